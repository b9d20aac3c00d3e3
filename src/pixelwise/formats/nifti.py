"""NIfTI-1 and NIfTI-2 through nibabel's headers: volumes are read along any voxel axis, labels and maps are written.

Voxels [i, j, k] lie with i fastest. Planes are cut along one axis; of the other two the faster one runs along the
columns and the slower one along the rows, so along axis 2 plane k is `volume[:, :, k].T`, as DICOM and viewers show it.

Of a compressed file the middle cannot be read, so it is decompressed once, into a temporary file without a name.
Results keep every field of the source's header that says where the voxels lie, bit by bit.
"""

import gzip
import json
import math
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.extras import extra
from pixelwise.files import writing
from pixelwise.formats.base import LABELS, Result, Source, SourceInfo, check_finite, whole_numbers
from pixelwise.formats.intensity import Intensity, Scaling, by_type, check_intensity, percentile_scaling
from pixelwise.formats.local import Identity, Stamp, readable
from pixelwise.formats.nifti_header import (
    GZIP,
    geometry,
    is_packed,
    pair,
    read_header,
    shape_and_type,
    version,
    voxel_offset,
)  # fmt: skip
from pixelwise.formats.ranges import read_box

_SLAB_BYTES = 32 * 2**20
_SAMPLE_RUNS = 1024
_SAMPLE_VOXELS = 2**20
_INTENT_LABEL, _INTENT_ESTIMATE = 1002, 1001
_COMMENT = 6  # code of a header extension that is plain text
_SFORM_SCANNER = 1
_BAND_BYTES = 8 * 2**20
_MAX_NIFTI1 = 32_767
_COLORS = 3


def open_nifti(
    location: str,
    *,
    axis: int = 2,
    intensity: Intensity | str = "auto",
    allow_no_affine: bool = False,
    nan_is_nodata: bool = False,
    channels: int | None = None,
    labels: bool = False,
) -> "_NiftiSource":
    """Open a volume (.nii, .nii.gz, or either file of a .hdr and .img pair) of which the header is read.

    Planes are cut along a voxel axis 0, 1 or 2; a fourth axis repeats them: plane = t * slices + slice. Slope and intercept
    of the file are applied, then `intensity`; masks (`labels`) are whole numbers. A volume that does not say where it lies
    in space is refused, unless `allow_no_affine`. A fourth axis as long as the `channels` that the network takes
    (modalities) is the channels, each with a range of its own. NaN is refused, or, with `nan_is_nodata`, no data.

    Pixels are uint8 as stored where 8-bit numbers need no change, else float32 in 0..1. Metadata: `affine` (4, 4), `zooms`,
    `units`, `shape` and `axis` of the voxels, `header` (bytes) and the `intensity` in use.
    """
    if axis not in (0, 1, 2) or isinstance(axis, bool):
        raise UsageError(f"axis {axis!r} cannot be used: a volume is cut along its voxel axis 0, 1 or 2.")
    checked = check_intensity(intensity)
    nibabel = extra("nibabel", "medical", "NIfTI")
    channels = None if labels else channels
    return _NiftiSource(nibabel, location, axis, checked, allow_no_affine, nan_is_nodata, channels, labels)


def is_nifti(head: bytes, name: str) -> bool:
    """Whether a file is NIfTI, by its first 4,096 bytes; of an .img its .hdr beside it decides."""
    if head[:2] == GZIP:
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 1024)
        except zlib.error:
            return False
    header, data = pair(Path(name))
    if version(head) or Path(name) != data or header == data:
        return bool(version(head))
    try:
        with header.open("rb") as file:
            return header.is_file() and bool(version(file.read(540)))
    except (OSError, ValueError):
        return False


class _NiftiSource(Source):
    def __init__(
        self,
        nibabel: Any,
        location: str,
        axis: int,
        intensity: Intensity,
        allow_no_affine: bool,
        nan_is_nodata: bool,
        channels: int | None,
        labels: bool,
    ) -> None:
        self._intensity, self._axis, self._labels = intensity, axis, labels
        files = pair(Path(location))
        stamps = {path: Stamp.of(path) for path in files}
        self._path, self.identity = files[1], Identity.of_stamps(stamps)
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        with readable(location), np.errstate(all="ignore"):
            header = read_header(nibabel, files[0])
            self._shape, self._dtype = shape, dtype = shape_and_type(header)
            self._offset = voxel_offset(header, stamps, self._path, math.prod(shape) * dtype.itemsize)
            self._modalities = shape[3] if channels == shape[3] and not dtype.names else 1
            self._slab = lru_cache(maxsize=2 * self._modalities)(self._read_slab)  # of each, what is read at once
            if self._modalities > 1:  # results have three axes
                header.set_data_shape(shape[:3])
            times = shape[3] // self._modalities
            self._geometry = geometry(header, axis, (*shape[:3], times), allow_no_affine)
            if self._modalities == _COLORS:  # which a grey image is repeated for as well
                text = f"its {_COLORS} volumes are read as the channels of one, because the network takes as many"
                self._geometry["warnings"] = (text,)
            slope, intercept = (None, None) if dtype.names else header.get_slope_inter()
            self._slope, self._intercept = float(1 if slope is None else slope), float(intercept or 0)
        scaled = (self._slope, self._intercept) != (1.0, 0.0)
        is_8_bit = dtype.names is not None or dtype == np.uint8
        self._stays = is_8_bit and (intensity == "type" or (intensity == "auto" and not scaled))
        self._rescaled = labels and scaled
        name = "uint8" if self._stays else "float32"
        if labels:
            name = "int64" if scaled or dtype.kind == "f" else "uint8" if dtype.names else dtype.newbyteorder("=").name
        self._row_axis, self._column_axis = {0: (2, 1), 1: (2, 0), 2: (1, 0)}[axis]
        self.info = SourceInfo(
            location=location, format="nifti", height=shape[self._row_axis], width=shape[self._column_axis],
            channels=_COLORS if dtype.names else self._modalities, dtype=name, planes=shape[axis] * times,
        )  # fmt: skip
        self._nan_is_nodata = nan_is_nodata and not labels and dtype.kind == "f"
        self._scaling = lru_cache(maxsize=None)(self._find_scaling)

    @property
    def metadata(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Geometry, and the range in use, for which a sample of the voxels may have to be read."""
        if self._labels:
            return MappingProxyType(self._geometry)
        volumes = range(self._modalities) if self._modalities > 1 else [None]
        kinds = [self._scaling(volume) for volume in volumes]
        used = [{"function": "type"} if kind is None else kind.to_dict() for kind in kinds]
        each = used[0] if len(used) == 1 else {"function": "range of each channel", "channels": used}
        return MappingProxyType(self._geometry | {"intensity": each})

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window as (height, width, C): uint8, or float32 in 0..1, or whole numbers."""
        where = f"rows {top}..{top + height}, columns {left}..{left + width}"
        window = (top, top + height), (left, left + width)
        with readable(self.info.location):
            if self._modalities == 1:
                return self._pixels(*window, plane, None, where)
            slices = self._shape[self._axis]
            channels = [self._pixels(*window, k * slices + plane, k, where) for k in range(self._modalities)]
            return np.concatenate(channels, axis=2)

    def _pixels(
        self, rows: tuple[int, int], columns: tuple[int, int], plane: int, volume: int | None, where: str
    ) -> NDArray[Any]:
        """A window of a plane of all volumes; `volume` is the one whose range counts, None if that of all does."""
        time, index = divmod(plane, self._shape[self._axis])
        values = self._plain(self._stored(rows, columns, index, time))
        missing = ~np.isfinite(values) if self._nan_is_nodata else None
        if missing is None:
            moment = f" of time point {time}" if self._shape[3] > 1 else ""
            if not self._labels:
                advice = "take them for missing data: nan_is_nodata (--nan-is-nodata)"
                check_finite(values, f"slice {index}{moment} along axis {self._axis} ({where})", advice)
        else:
            values = np.where(missing, 0, values)
        if self._labels:
            values = whole_numbers(self._meant(values) if self._rescaled else values)
        elif not self._stays:
            scaling = self._scaling(volume)
            values = by_type(values) if scaling is None else scaling.apply(self._meant(values))
        if missing is not None:
            values[missing] = 0
        return np.ascontiguousarray(values)

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where all channels are finite; None if that is not asked for."""
        if not self._nan_is_nodata:
            return None
        slices, there = self._shape[self._axis], np.ones((height, width), dtype=bool)
        with readable(self.info.location):
            for volume in range(self._modalities):
                time, index = divmod(volume * slices + plane, slices)
                stored = self._stored((top, top + height), (left, left + width), index, time)
                there &= np.isfinite(self._plain(stored)).all(axis=2)
        return there

    def close(self) -> None:
        """Let go of the file and of the temporary one."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None
            self._slab.cache_clear()

    def _meant(self, values: NDArray[Any]) -> NDArray[np.float64]:
        if (self._slope, self._intercept) == (1.0, 0.0):
            return values.astype(np.float64)
        with np.errstate(all="ignore"):
            return values.astype(np.float64) * self._slope + self._intercept

    def _plain(self, stored: NDArray[Any]) -> NDArray[Any]:
        """(..., C) in the machine's order of bytes; C is 3 for colours, of which opacity is dropped, else 1."""
        if self._dtype.names:
            stored = np.ascontiguousarray(stored)
            return stored.view(np.uint8).reshape(*stored.shape, -1)[..., :3]
        return (stored if stored.dtype.isnative else stored.astype(stored.dtype.newbyteorder("=")))[..., None]

    def _stored(self, rows: tuple[int, int], columns: tuple[int, int], index: int, time: int) -> NDArray[Any]:
        """The voxels (height, width) of a window."""
        # a plane along axis 0 takes one voxel from every line of the file, so many planes are read at once and kept
        thick = _SLAB_BYTES // (self._modalities * self._shape[1] * self._shape[2] * self._dtype.itemsize)
        if self._axis == 0 and thick > 1:
            return self._slab(index // thick, thick, time)[slice(*rows), slice(*columns), index % thick]
        box = [(index, index + 1)] * 3
        box[self._row_axis], box[self._column_axis] = rows, columns
        return self._box(time, *box).squeeze(2 - self._axis)

    def _read_slab(self, number: int, thick: int, time: int) -> NDArray[Any]:
        i, j, k, _ = self._shape
        return self._box(time, (number * thick, min((number + 1) * thick, i)), (0, j), (0, k))

    def _box(self, time: int, *box: tuple[int, int]) -> NDArray[Any]:
        """The voxels (K, J, I) of a box."""
        return self._read(self._shape[::-1], ((time, time + 1), *box[::-1]))[0]

    def _read(self, shape: tuple[int, ...], box: tuple[tuple[int, int], ...]) -> NDArray[Any]:
        with self._lock:
            if self._file is None:
                self._file = _voxel_file(self._path, self._offset + math.prod(self._shape) * self._dtype.itemsize)
            return read_box(self._file, self._offset, self._dtype, shape, box)

    def _find_scaling(self, volume: int | None) -> Scaling | None:
        """The map to 0..1 of one volume, or of all; None where the type decides."""
        if self._stays or self._intensity == "type":
            return None
        if self._intensity != "auto":
            return Scaling(low=self._intensity[0], high=self._intensity[1])
        with readable(self.info.location):
            return percentile_scaling(self._meant(self._plain(self._sample(volume))))

    def _sample(self, volume: int | None) -> NDArray[Any]:
        """At most about a million voxels: short runs, one at a random place of each of 1,024 parts; always the same."""
        whole = math.prod(self._shape)
        count = whole if volume is None else whole // self._shape[3]
        first = 0 if volume is None else volume * count
        if count <= _SAMPLE_VOXELS:
            return self._read((whole,), ((first, first + count),))
        length = _SAMPLE_VOXELS // _SAMPLE_RUNS
        places = np.random.default_rng(0).random(_SAMPLE_RUNS).tolist()
        starts = [first + int((part + place) * (count - length) / _SAMPLE_RUNS) for part, place in enumerate(places)]
        return np.concatenate([self._read((whole,), ((start, start + length),)) for start in starts])


def _voxel_file(path: Path, nbytes: int) -> BinaryIO:
    """The file, opened; of a compressed one its first bytes in a temporary file without a name."""
    if not is_packed(path):
        return path.open("rb", buffering=0)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise DataError(
            f"decompressed it takes {nbytes / 2**30:.1f} GiB in the folder for temporary files ({folder}), which has "
            f"{free / 2**30:.1f} GiB free. Set TMPDIR to a larger disk."
        )
    target = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115  (the source closes it)
    try:
        with gzip.open(path) as stream:
            while nbytes > 0:
                if not (content := stream.read(min(nbytes, 2**20))):
                    raise DataError(f"it ends {nbytes:,} bytes before its voxels do. It is truncated.")
                target.write(content)
                nbytes -= len(content)
            stream.read(1)  # at the end of the stream its checksum is compared
    except BaseException:
        target.close()
        raise
    return target


def write_nifti(path: Path, result: Result) -> None:
    """Write labels (intent label, smallest integer type) or a map (float32) as .nii or .nii.gz.

    Names and colours of the classes and the mark are JSON in a header extension of plain text.
    """
    header = _new_header(extra("nibabel", "medical", "NIfTI"), result)
    with writing(path) as part, part.open("wb") as file, ExitStack() as stack:
        stream: Any = file
        if path.name.endswith(".gz"):  # neither name nor time is stored, so that equal labels give equal files
            stream = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0))
        header.write_to(stream)
        stream.write(bytes(int(header["vox_offset"]) - stream.tell()))
        for voxels in _in_file_order(result):
            stream.write(voxels.tobytes())


def _new_header(nibabel: Any, result: Result) -> Any:
    known = result.metadata
    stored = known.get("header")
    big = max(known["shape"]) > _MAX_NIFTI1 if stored is None else len(stored) == 540
    header = (nibabel.Nifti2Header if big else nibabel.Nifti1Header)(stored, endianness="<", check=False)
    if stored is None:  # of a DICOM series
        header.set_data_shape(known["shape"])
        header.set_zooms(known["zooms"])
        header.set_xyzt_units("mm", "sec" if len(known["shape"]) > 3 else "unknown")
        header.set_sform(known["affine"], code=_SFORM_SCANNER)
        header.set_qform(known["affine"], code=_SFORM_SCANNER, strip_shears=True)
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
    names, colors = result.spec.names, result.spec.colors
    classes = [{"label": k, "name": names[k], "color": list(colors[k])} for k in range(len(names))]
    content: dict[str, Any] = {"kind": result.kind, "classes": classes, "pixelwise": dict(result.mark)}
    content |= {"intensity": known["intensity"]} if "intensity" in known else {}
    content |= {} if result.nodata is None else {"nodata": result.nodata}
    text = json.dumps(content, sort_keys=True).encode()
    header.extensions.append(nibabel.nifti1.Nifti1Extension(_COMMENT, text))
    header["vox_offset"] = header.single_vox_offset + header.extensions.get_sizeondisk()
    return header


def _in_file_order(result: Result) -> Iterator[NDArray[Any]]:
    """All voxels, i fastest, in boxes (slices, rows, columns) of at most 8 MiB, or one line."""
    axis, shape = result.metadata["axis"], (*result.metadata["shape"], 1, 1)[:4]
    i, j, k, t = shape
    line = i * result.dtype.itemsize
    slices, lines = max(1, _BAND_BYTES // (line * j)), max(1, _BAND_BYTES // line) if line * j > _BAND_BYTES else j
    for time in range(t):
        for first in range(0, k, slices):
            for top in range(0, j, lines):
                ks, js = (first, min(first + slices, k)), (top, min(top + lines, j))
                planes = (range(i), range(*js), range(*ks))[axis]
                rows = [result.rows(time * shape[axis] + plane, *(js if axis == 2 else ks)) for plane in planes]
                box = np.stack(rows, axis=2 - axis, dtype=result.dtype, casting="unsafe")
                yield box[:, slice(*js)] if axis == 0 else box
