"""NIfTI-1 and NIfTI-2 through nibabel: volumes are read slice by slice along any voxel axis, labels and maps are written.

Voxels [i, j, k] lie with i fastest. Planes are cut along one axis; of the other two the faster one runs along the
columns and the slower one along the rows, so along axis 2 plane k is `volume[:, :, k].T`, as DICOM and viewers show it.

Of a compressed file the middle cannot be read, so it is decompressed once, into a temporary file without a name.
Results keep every field of the source's header that says where the voxels lie, bit by bit.
"""

import gzip
import hashlib
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import atomic_path, cannot_write, extra
from pixelwise.formats import nifti_header
from pixelwise.formats.base import LABELS, Result, Source, SourceInfo
from pixelwise.formats.intensity import Intensity, Scaling, by_type, check_intensity, percentile_scaling
from pixelwise.formats.local import Stamp, fingerprint, readable
from pixelwise.formats.raster import whole_numbers

_SLAB_BYTES = 32 * 2**20
_SAMPLE_RUNS = 1024
_SAMPLE_VOXELS = 2**20
_INTENT_LABEL, _INTENT_ESTIMATE = 1002, 1001
_COMMENT = 6  # code of a header extension that is plain text
_BAND_BYTES = 8 * 2**20
_MAX_NIFTI1 = 32_767
_MAX_TEXT_BYTES = 2**20


def open_nifti(
    location: str,
    *,
    axis: int = 2,
    intensity: Intensity | str = "auto",
    allow_no_affine: bool = False,
    labels: bool = False,
) -> Source:
    """Open a volume of which the header is read.

    Args:
        location: .nii, .nii.gz, or either file of a .hdr and .img pair.
        axis: the voxel axis 0, 1 or 2 along which planes are cut. A fourth axis repeats them: plane = t * slices + slice.
        intensity: how the numbers become 0..1, after the file's slope and intercept.
        allow_no_affine: whether a volume that does not say where it lies in space is taken.
        labels: whether it is read as a mask: whole numbers, after slope and intercept.

    Returns:
        uint8 as stored where 8-bit numbers need no change, else float32 in 0..1. Its metadata: `affine` (4, 4), `zooms`,
        `units`, `shape` and `axis` of the voxels, `header` (bytes) and the `intensity` in use.

    Raises:
        DataError: the file is missing, damaged, truncated, of complex numbers, or has no usable affine.
        UsageError: an option is wrong, or nibabel is not installed.
    """
    if axis not in (0, 1, 2) or isinstance(axis, bool):
        raise UsageError(f"axis {axis!r} cannot be used: a volume is cut along its voxel axis 0, 1 or 2.")
    checked = check_intensity(intensity)
    nibabel = extra("nibabel", "medical", "NIfTI")
    return _NiftiSource(nibabel, location, axis, checked, allow_no_affine, labels)


def is_nifti(head: bytes, name: str) -> bool:
    """Whether a file is NIfTI, by its first 4,096 bytes; of an .img its .hdr beside it decides."""
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 1024)
        except zlib.error:
            return False
    if nifti_header.version(head):
        return True
    header, data = nifti_header.pair(Path(name))
    if Path(name) != data or header == data:
        return False
    try:
        with header.open("rb") as file:
            return header.is_file() and bool(nifti_header.version(file.read(540)))
    except (OSError, ValueError):
        return False


class _NiftiSource(Source):
    def __init__(
        self, nibabel: Any, location: str, axis: int, intensity: Intensity, allow_no_affine: bool, labels: bool
    ) -> None:
        self._nibabel, self._intensity, self._axis, self._labels = nibabel, intensity, axis, labels
        self._files = tuple(dict.fromkeys(nifti_header.pair(Path(location))))
        self._stamps = tuple(Stamp.of(path) for path in self._files)
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._slab = lru_cache(maxsize=2)(self._read_slab)
        with readable(location), nifti_header.format_errors(nibabel):
            header = nifti_header.read_header(nibabel, self._files[0])
            self._shape, self._dtype = shape, dtype = nifti_header.shape_and_type(header)
            self._geometry = nifti_header.geometry(header, axis, shape, allow_no_affine)
            self._offset, self._end = nifti_header.voxel_range(header, self._files, math.prod(shape) * dtype.itemsize)
            slope, intercept = (None, None) if dtype.names else header.get_slope_inter()
            self._slope, self._intercept = float(1 if slope is None else slope), float(intercept or 0)
        scaled = (self._slope, self._intercept) != (1.0, 0.0)
        is_8_bit = dtype.names is not None or dtype == np.uint8
        self._stays = is_8_bit and (intensity == "type" or (intensity == "auto" and not scaled))
        self._rescaled = labels and scaled
        name = "uint8" if self._stays else "float32"
        if labels:
            name = "int64" if scaled or dtype.kind == "f" else "uint8" if dtype.names else dtype.newbyteorder("=").name
        row_axis, column_axis = {0: (2, 1), 1: (2, 0), 2: (1, 0)}[axis]
        self.info = SourceInfo(
            location=location,
            format="nifti",
            height=shape[row_axis],
            width=shape[column_axis],
            channels=3 if dtype.names else 1,
            dtype=name,
            planes=shape[axis] * shape[3],
        )

    @property
    def metadata(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Geometry, and the range in use, for which a sample of the voxels may have to be read."""
        if self._labels:
            return MappingProxyType(self._geometry)
        used = {"function": "type"} if self._scaling is None else self._scaling.to_dict()
        return MappingProxyType(self._geometry | {"intensity": used})

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window as (height, width, C): uint8, or float32 in 0..1, or whole numbers."""
        time, index = divmod(plane, self._shape[self._axis])
        with readable(self.info.location):
            values = self._plain(self._stored(slice(top, top + height), slice(left, left + width), index, time))
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise DataError(
                    f"slice {index}{f' of time point {time}' if self._shape[3] > 1 else ''} along axis "
                    f"{self._axis} holds {int((~np.isfinite(values)).sum()):,} voxels that are NaN or infinite (rows "
                    f"{top}..{top + height}, columns {left}..{left + width}). Replace them, for example with "
                    "numpy.nan_to_num."
                )
            if self._labels:
                values = whole_numbers(self._meant(values) if self._rescaled else values)
            elif not self._stays:
                scaling = self._scaling
                values = by_type(values) if scaling is None else scaling.apply(self._meant(values))
            return np.ascontiguousarray(values)

    def fingerprint(self) -> str:
        """Of the file, or of both files of a pair."""
        found = [fingerprint(path) for path in self._files]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise `DataError` if a file has changed."""
        for path, stamp in zip(self._files, self._stamps, strict=True):
            stamp.check(path)

    def close(self) -> None:
        """Let go of the file and of the temporary one."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None
            self._slab.cache_clear()

    def _meant(self, values: NDArray[Any]) -> NDArray[np.float64]:
        with np.errstate(all="ignore"):
            return values.astype(np.float64) * self._slope + self._intercept

    def _plain(self, stored: NDArray[Any]) -> NDArray[Any]:
        """(..., C) in the machine's order of bytes; C is 3 for colours, of which opacity is dropped, else 1."""
        if self._dtype.names:
            stored = np.ascontiguousarray(stored)
            return stored.view(np.uint8).reshape(*stored.shape, -1)[..., :3]
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)[..., None]

    def _stored(self, rows: slice, columns: slice, index: int, time: int) -> NDArray[Any]:
        """The voxels (height, width) of a window."""
        if self._axis > 0:
            j, k = (rows, index) if self._axis == 2 else (index, rows)
            return self._voxels(j, k, time)[columns].T
        # a plane along axis 0 takes one voxel from every line of the file, so many planes are read at once and kept
        thick = _SLAB_BYTES // (self._shape[1] * self._shape[2] * self._dtype.itemsize)
        if thick < 2:
            return self._read_lines(slice(index, index + 1), columns, rows, time)[:, :, 0]
        return self._slab(index // thick, thick, time)[rows, columns, index % thick]

    def _read_slab(self, number: int, thick: int, time: int) -> NDArray[Any]:
        return self._read_lines(
            slice(number * thick, (number + 1) * thick), slice(None), slice(0, self._shape[2]), time
        )

    def _read_lines(self, i: slice, j: slice, k: slice, time: int) -> NDArray[Any]:
        """The voxels (K, J, I) of a box, from whole lines of one slice after the other."""
        return np.stack([self._voxels(j, index, time)[i].T for index in range(k.start, k.stop)])

    def _voxels(self, j: slice | int, k: slice | int, time: int) -> NDArray[Any]:
        """Whole lines, because few long reads are faster than many short ones."""
        proxy = self._opened()[1]
        try:
            return cast(NDArray[Any], proxy[:, j, k, time])
        except ValueError as error:
            raise DataError("the file ends before its voxels do; it was shortened while it was read.") from error

    @cached_property
    def _scaling(self) -> Scaling | None:
        """The map to 0..1; None where the type decides."""
        if self._stays or self._intensity == "type":
            return None
        if self._intensity != "auto":
            return Scaling(low=self._intensity[0], high=self._intensity[1])
        with readable(self.info.location):
            return percentile_scaling(self._meant(self._plain(self._sample())))

    def _sample(self) -> NDArray[Any]:
        """At most about a million voxels: short runs, one at a random place of each of 1,024 parts; always the same."""
        count, size, file = math.prod(self._shape), self._dtype.itemsize, self._opened()[0]
        length, starts = count, [0]
        if count > _SAMPLE_VOXELS:
            length = _SAMPLE_VOXELS // _SAMPLE_RUNS
            places = np.random.default_rng(0).random(_SAMPLE_RUNS).tolist()
            starts = [int((part + place) * (count - length) / _SAMPLE_RUNS) for part, place in enumerate(places)]
        runs = (os.pread(file.fileno(), length * size, self._offset + start * size) for start in starts)
        return np.concatenate([np.frombuffer(run, self._dtype) for run in runs])

    def _opened(self) -> tuple[BinaryIO, Any]:
        """The file that holds the voxels as they are, and nibabel's view of them without slope and intercept."""
        with self._lock:
            if self._file is None:
                self._file = nifti_header.voxel_file(self._files[-1], self._end)
                spec = (self._shape, self._dtype, self._offset, 1.0, 0.0)
                self._proxy = self._nibabel.arrayproxy.ArrayProxy(self._file, spec, mmap=False)
            return self._file, self._proxy


def write_nifti(path: Path, result: Result) -> None:
    """Write labels (intent label, smallest integer type) or a map (float32) as .nii or .nii.gz.

    Names and colours of the classes and the mark are JSON in a header extension of plain text.

    Raises:
        UsageError: the name ends in something else, or the source knows no space: it is neither NIfTI nor DICOM.
        PixelwiseError: the file cannot be written, or the slices of a DICOM series lie at uneven distances.
    """
    path = Path(path)
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise UsageError(f"{path}: NIfTI is written to a name that ends in .nii or .nii.gz.")
    nibabel = extra("nibabel", "medical", "NIfTI")
    header = _header(nibabel, path, result)
    try:
        with atomic_path(path) as part, part.open("wb") as file, ExitStack() as stack:
            stream: Any = file
            if name.endswith(".gz"):  # neither name nor time is stored, so that equal labels give equal files
                stream = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0))
            header.write_to(stream)
            stream.write(bytes(int(header["vox_offset"]) - stream.tell()))
            for voxels in _in_file_order(result):
                stream.write(voxels.tobytes())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_nifti_mark(path: str | Path) -> dict[str, Any] | None:
    """The mark of a file that `write_nifti` wrote; None for every other file, however damaged.

    Only the header and the extension that comes first are read.
    """
    try:
        with Path(path).open("rb") as file, nifti_header.unpacked(file) as stream:
            size = int.from_bytes(stream.read(4), "little")
            if size not in (348, 540):
                return None
            stream.read(size - 4)
            first, length, code = struct.unpack("<4sii", stream.read(12))
            if first[:1] != b"\1" or code != _COMMENT or not 8 < length <= _MAX_TEXT_BYTES:
                return None
            mark = json.loads(stream.read(length - 8).rstrip(b"\0")).get("pixelwise")
    except (OSError, EOFError, ValueError, AttributeError, RecursionError, struct.error, zlib.error):
        return None
    return mark if isinstance(mark, dict) else None


def _header(nibabel: Any, path: Path, result: Result) -> Any:
    known = result.metadata
    if "affine" not in known or "shape" not in known:
        raise UsageError(
            f"{path}: {result.source.location} ({result.source.format}) does not say where its pixels lie in space, which "
            "NIfTI needs. NIfTI is written of NIfTI and DICOM; choose another format."
        )
    if not known.get("even", True):
        raise PixelwiseError(
            f"{path}: the slices of {result.source.location} lie at uneven distances, which NIfTI cannot say. Complete the "
            "series, or write DICOM-SEG, which keeps the place of every slice."
        )
    stored = known.get("header")
    big = max(known["shape"]) > _MAX_NIFTI1 if stored is None else len(stored) == 540
    kind = nibabel.Nifti2Header if big else nibabel.Nifti1Header
    header = nifti_header.fresh_header(kind, known) if stored is None else kind(stored, endianness="<", check=False)
    header["magic"] = header.single_magic
    header.set_data_dtype(result.dtype)
    header.set_slope_inter(1, 0)
    is_labels = result.kind == LABELS
    header.set_intent(_INTENT_LABEL if is_labels else _INTENT_ESTIMATE, name=result.kind[:15], allow_unknown=True)
    header["cal_min"], header["cal_max"] = 0, result.spec.num_classes - 1 if is_labels else 0
    header["descrip"] = f"pixelwise {result.kind}".encode()
    for field in ("aux_file", "db_name"):  # these belong to the source, and may name somebody
        if field in header.keys():  # noqa: SIM118  (a header is no dict)
            header[field] = b""
    text = json.dumps(_description(result), sort_keys=True).encode()
    header.extensions.append(nibabel.nifti1.Nifti1Extension(_COMMENT, text))
    header["vox_offset"] = header.single_vox_offset + header.extensions.get_sizeondisk()
    return header


def _description(result: Result) -> dict[str, Any]:
    names, colors = result.spec.names, result.spec.colors
    classes = [{"label": k, "name": names[k], "color": list(colors[k])} for k in range(len(names))]
    content = {"kind": result.kind, "classes": classes, "pixelwise": dict(result.mark)}
    if "intensity" in result.metadata:
        content["intensity"] = result.metadata["intensity"]
    return content if result.nodata is None else content | {"nodata": result.nodata}


def _in_file_order(result: Result) -> Iterator[NDArray[Any]]:
    """All voxels, i fastest, in pieces (slices, rows, columns) of at most 8 MiB, or one line."""
    i, j, k, t = (*result.metadata["shape"], 1, 1)[:4]
    line, slab = i * result.dtype.itemsize, i * j * result.dtype.itemsize
    slabs, lines = max(1, _BAND_BYTES // slab), max(1, _BAND_BYTES // line)
    for time in range(t):
        for first in range(0, k, slabs):
            for top in range(0, j, lines if slab > _BAND_BYTES else j):
                box = ((first, min(first + slabs, k)), (top, min(top + lines, j)))
                yield _box(result, time, i, *box)


def _box(result: Result, time: int, columns: int, ks: tuple[int, int], js: tuple[int, int]) -> NDArray[Any]:
    """Voxels (K, J, I) of some slices and rows, gathered from the planes that hold them."""
    axis, shape = result.metadata["axis"], (*result.metadata["shape"], 1, 1)
    planes = (range(columns), range(*js), range(*ks))[axis]
    rows = [result.rows(time * shape[axis] + plane, *(js if axis == 2 else ks)) for plane in planes]
    box = np.stack(rows, axis=2 - axis, dtype=result.dtype, casting="unsafe")
    return box[:, slice(*js)] if axis == 0 else box
