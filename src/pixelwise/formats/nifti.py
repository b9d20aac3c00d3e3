"""NIfTI-1 and NIfTI-2 volumes through nibabel's headers, slice by slice along any voxel axis.

Voxels [i, j, k] lie with i fastest. Planes are cut along one axis; of the other two the faster one runs along the
columns and the slower one along the rows, so along axis 2 plane k is `volume[:, :, k].T`, as DICOM and viewers show it.

nibabel reads the header and decides type, order of bytes, slope and affine. The voxels are read here, with positional
reads: a memory map would end the whole process where another program shortens the file, and nibabel's own slicing makes
one read for each voxel of a sagittal plane. Of a compressed file the middle cannot be read, so it is decompressed once,
into a temporary file without a name (gone with the process, however that ends) of the size that the header tells.
"""

import hashlib
import math
import os
import threading
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.files import extra
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.intensity import Intensity, Scaling, by_type, check_intensity, percentile_scaling
from pixelwise.formats.local import Stamp, fingerprint, readable
from pixelwise.formats.nifti_header import (
    GZIP,
    check_size,
    decompressed,
    is_header,
    pair,
    read_header,
)

_READ_BYTES = 16 * 2**20
_SLAB_BYTES = 32 * 2**20
_SAMPLE_RUNS = 1024
_SAMPLE_VOXELS = 2**20


def open_nifti(
    location: str, *, axis: int = 2, intensity: Intensity | str = "auto", allow_no_affine: bool = False
) -> Source:
    """Open a volume of which the header is read.

    Args:
        location: .nii, .nii.gz, or either file of a .hdr and .img pair.
        axis: the voxel axis 0, 1 or 2 along which planes are cut. A fourth axis repeats them: plane = t * slices + slice.
        intensity: how the numbers become 0..1, after the file's slope and intercept.
        allow_no_affine: whether a volume that does not say where it lies in space is taken.

    Returns:
        uint8 as stored where 8-bit numbers need no change, else float32 in 0..1. Its metadata: `affine` (4, 4), `zooms`,
        `units`, `shape` and `axis` of the voxels, `header` (bytes) and the `intensity` in use.

    Raises:
        DataError: the file is missing, damaged, truncated, of complex numbers, or has no usable affine.
        UsageError: an option is wrong, or nibabel is not installed.

    Example:
        >>> import tempfile, nibabel
        >>> path = Path(tempfile.mkdtemp()) / "brain.nii.gz"
        >>> nibabel.Nifti1Image(np.zeros((5, 4, 3), dtype=np.uint8), np.eye(4)).to_filename(path)
        >>> with open_nifti(str(path)) as source:
        ...     source.info.planes, source.read(0, 0, 4, 5, plane=2).shape
        (3, (4, 5, 1))
    """
    if axis not in (0, 1, 2) or isinstance(axis, bool):
        raise UsageError(f"axis {axis!r} cannot be used: a volume is cut along its voxel axis 0, 1 or 2.")
    checked = check_intensity(intensity)
    nibabel = extra("nibabel", "medical", "NIfTI")
    return _NiftiSource(nibabel, location, axis, checked, allow_no_affine)


def is_nifti(head: bytes, name: str) -> bool:
    """Whether a file is NIfTI, by its first 4,096 bytes; of an .img its .hdr beside it decides.

    Example:
        >>> is_nifti((348).to_bytes(4, "little") + bytes(340) + b"n+1\\0", "a.nii")
        True
    """
    if head[:2] == GZIP:
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 1024)
        except zlib.error:
            return False
    if is_header(head):
        return True
    header, data = pair(Path(name))
    if Path(name) != data or header == data:
        return False
    try:
        with header.open("rb") as file:
            return header.is_file() and is_header(file.read(540))
    except (OSError, ValueError):
        return False


class _NiftiSource(Source):
    def __init__(self, nibabel: Any, location: str, axis: int, intensity: Intensity, allow_no_affine: bool) -> None:
        self._path = Path(location)
        self._intensity, self._axis = intensity, axis
        self._lock = threading.Lock()
        self._slabs: dict[int, NDArray[Any]] = {}
        self._voxels: BinaryIO | None = None
        self._offset = 0
        self._files = tuple(dict.fromkeys(pair(self._path)))
        self._stamps = tuple(Stamp.of(path) for path in self._files)
        with readable(location):
            self._layout, self._geometry = read_header(nibabel, self._files, axis, allow_no_affine)
            check_size(self._files[-1], self._layout)
        self._row_axis, self._column_axis = {0: (2, 1), 1: (2, 0), 2: (1, 0)}[axis]
        shape = self._layout.shape
        is_8_bit = self._layout.colors or self._layout.dtype == np.uint8
        self._stays = is_8_bit and (intensity == "type" or (intensity == "auto" and not self._layout.scaled))
        self.info = SourceInfo(
            location=location,
            format="nifti",
            height=shape[self._row_axis],
            width=shape[self._column_axis],
            channels=3 if self._layout.colors else 1,
            dtype="uint8" if self._stays else "float32",
            planes=shape[axis] * shape[3],
        )

    @property
    def metadata(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Geometry, and the range in use, for which a sample of the voxels may have to be read."""
        return MappingProxyType(self._geometry | {"intensity": self._used})

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window as (height, width, C): uint8, or float32 in 0..1."""
        time, index = divmod(plane, self._layout.shape[self._axis])
        ranges = [(0, 0), (0, 0), (0, 0)]
        ranges[self._axis] = (index, index + 1)
        ranges[self._row_axis], ranges[self._column_axis] = (top, top + height), (left, left + width)
        with readable(self.info.location):
            box = self._slab_box(ranges, time) if self._axis == 0 else self._box(ranges, time)
            values = box.squeeze(2 - self._axis)  # (height, width, C), for the slower of both axes comes first
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise DataError(
                    f"slice {index}{f' of time point {time}' if self._layout.shape[3] > 1 else ''} along axis "
                    f"{self._axis} holds {int((~np.isfinite(values)).sum()):,} voxels that are NaN or infinite (rows "
                    f"{top}..{top + height}, columns {left}..{left + width}). Replace them, for example with "
                    "numpy.nan_to_num."
                )
            return np.ascontiguousarray(self._scale(values))

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
            if self._voxels is not None:
                self._voxels.close()
            self._voxels, self._slabs = None, {}

    def _scale(self, values: NDArray[Any]) -> NDArray[Any]:
        if self._stays:
            return values
        if self._scaling is None:
            return by_type(values)
        return self._scaling.apply(self._meant(values))

    def _meant(self, values: NDArray[Any]) -> NDArray[np.float64]:
        with np.errstate(all="ignore"):
            return values.astype(np.float64) * self._layout.slope + self._layout.intercept

    @cached_property
    def _used(self) -> dict[str, Any]:
        if self._scaling is None:
            return {"function": "type"}
        return self._scaling.to_dict()

    @cached_property
    def _scaling(self) -> Scaling | None:
        """The map to 0..1; None where the type decides."""
        if self._stays or self._intensity == "type":
            return None
        if self._intensity != "auto":
            return Scaling(low=self._intensity[0], high=self._intensity[1])
        with readable(self.info.location):
            return percentile_scaling(self._meant(self._sample()))

    def _sample(self) -> NDArray[Any]:
        """At most about a million voxels: short runs, one at a random place of each of 1,024 parts; always the same."""
        count, size = math.prod(self._layout.shape), self._layout.dtype.itemsize
        if count <= _SAMPLE_VOXELS:
            return self._plain(self._bytes(0, count * size))
        length = _SAMPLE_VOXELS // _SAMPLE_RUNS
        places = np.random.default_rng(0).random(_SAMPLE_RUNS).tolist()
        starts = (int((part + place) * (count - length) / _SAMPLE_RUNS) for part, place in enumerate(places))
        return np.concatenate([self._plain(self._bytes(start * size, length * size)) for start in starts])

    def _slab_box(self, ranges: list[tuple[int, int]], time: int) -> NDArray[Any]:
        """A plane along axis 0 takes one voxel from every line of the file, so many planes are read at once and kept."""
        count, rows, columns, _ = self._layout.shape
        planes = _SLAB_BYTES // (rows * columns * self._layout.dtype.itemsize)
        if planes < 2:
            return self._box(ranges, time)
        index = ranges[0][0]
        key = time * count + index // planes
        with self._lock:
            slab = self._slabs.get(key)
        if slab is None:
            first = index // planes * planes
            slab = self._box([(first, min(first + planes, count)), (0, rows), (0, columns)], time)
            with self._lock:
                self._slabs = {**dict(list(self._slabs.items())[-1:]), key: slab}
        (j0, j1), (k0, k1) = ranges[1:]
        return slab[k0:k1, j0:j1, index % planes : index % planes + 1]

    def _box(self, ranges: list[tuple[int, int]], time: int) -> NDArray[Any]:
        """The voxels (K, J, I, C) of a box, from reads of whole lines, at most 16 MiB (or one line) at a time."""
        (i0, i1), (j0, j1), (k0, k1) = ranges
        columns, rows, slices, _ = self._layout.shape
        line = columns * self._layout.dtype.itemsize
        step = max(1, _READ_BYTES // line)
        box = np.empty((k1 - k0, j1 - j0, i1 - i0), dtype=self._layout.dtype)
        for k in range(k0, k1):
            start = (time * slices + k) * rows
            for j in range(j0, j1, step):
                count = min(step, j1 - j)
                raw = self._bytes((start + j) * line, count * line)
                lines = np.frombuffer(raw, self._layout.dtype).reshape(count, columns)
                box[k - k0, j - j0 : j - j0 + count] = lines[:, i0:i1]
        return self._plain(box)

    def _plain(self, stored: bytes | NDArray[Any]) -> NDArray[Any]:
        """(..., C) in the machine's order of bytes; C is 3 for colours, of which opacity is dropped, else 1."""
        array = np.frombuffer(stored, self._layout.dtype) if isinstance(stored, bytes) else stored
        if self._layout.colors:
            return array.view(np.uint8).reshape(*array.shape, -1)[..., :3]
        return array.astype(array.dtype.newbyteorder("="), copy=False)[..., None]

    def _bytes(self, start: int, count: int) -> bytes:
        file, offset = self._opened()
        parts = []
        while count > 0:
            part = os.pread(file.fileno(), count, offset + start)
            if not part:
                raise DataError("the file ends before its voxels do; it was shortened while it was read.")
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return b"".join(parts)

    def _opened(self) -> tuple[BinaryIO, int]:
        """The file that holds the voxels, and where they start in it."""
        with self._lock:
            if self._voxels is None:
                path = self._files[-1]
                file: BinaryIO = path.open("rb")
                packed = file.read(2) == GZIP
                if packed:
                    file.close()
                    file = decompressed(path, self._layout)
                self._voxels, self._offset = file, 0 if packed else self._layout.offset
            return self._voxels, self._offset
