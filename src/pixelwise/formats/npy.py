"""NumPy's .npy files of any size, window by window. Files that hold Python objects are refused."""

import itertools
import math
import tokenize
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.files import atomic_path, cannot_write
from pixelwise.formats.base import Result, Source, SourceInfo, whole_numbers
from pixelwise.formats.local import Identity, readable, silence

_STRIP_BYTES = 2**16
_BAND_BYTES = 16 * 2**20
_GAP_BYTES = 2**14  # reading so much takes as long as another read
_MAX_HEADER_BYTES = 10_000


def open_npy(
    location: str,
    opener: Callable[[], BinaryIO] | None = None,
    *,
    identity: Identity | None = None,
    labels: bool = False,
) -> Source:
    """Open an array (H, W), (H, W, C) or (planes, H, W, C); only its header is read.

    Of masks (`labels`) three axes are (planes, H, W), unless the last one has length 1, or length 3 in 8 bits. An `opener`
    opens the file anew at each call, for reading, seekable; `identity` tells whether it changed.
    """
    if opener is None:
        identity = Identity.local(location)
    elif identity is None:
        raise UsageError(f"{location}: a file that is opened by a function needs an identity as well.")
    with readable(location):
        return _NpySource(location, opener or (lambda: Path(location).open("rb", buffering=0)), identity, labels)


class _NpySource(Source):
    def __init__(self, location: str, opener: Callable[[], BinaryIO], identity: Identity, labels: bool) -> None:
        self._opener, self._identity, self._labels = opener, identity, labels
        with opener() as file:
            shape, self._fortran, self._dtype, self._offset = _header(file)
            size, end = file.seek(0, 2), self._offset + math.prod(shape) * self._dtype.itemsize
        if end > size:
            raise DataError(f"it says it has {end:,} bytes, but {size:,} are there; it is truncated.")
        is_color = shape[-1] == 3 and self._dtype == np.uint8
        if len(shape) == 2 or (labels and len(shape) == 3 and shape[2] != 1 and not is_color):
            shape = (*shape, 1)
        planes, height, width, channels = self._shape = (1, *shape)[-4:]
        if labels and channels != 1 and not is_color:
            raise DataError(f"it has {channels} channels of {self._dtype}; a mask has one, or 8-bit RGB.")
        strip = max(1, min(height, _STRIP_BYTES // (width * channels * self._dtype.itemsize)))
        stored = "uint8" if self._dtype.kind == "b" else self._dtype.newbyteorder("=").name
        dtype = "int64" if labels and self._dtype.kind == "f" else stored
        self.info = SourceInfo(
            location=location, format="npy", height=height, width=width, channels=channels, dtype=dtype, planes=planes,
            block_px=(height if self._fortran else strip, width),
        )  # fmt: skip
        self._idle: list[BinaryIO] = []

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        where = f"rows {top}..{top + height}, columns {left}..{left + width}"
        box = ((plane, plane + 1), (top, top + height), (left, left + width), (0, self._shape[3]))
        with readable(self.info.location, where):
            with self._file() as file:
                if self._fortran:
                    array = read_box(file, self._offset, self._dtype, self._shape[::-1], box[::-1])[..., 0].T
                else:
                    array = read_box(file, self._offset, self._dtype, self._shape, box)[0]
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = int((~np.isfinite(array)).sum())
                raise DataError(f"{bad:,} numbers in {where} are NaN or infinite. Replace them.")
            if array.dtype.kind == "b" or self._labels:
                array = whole_numbers(array)
            return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))

    def fingerprint(self) -> str:
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        self._identity.check()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        """A handle that no other thread has."""
        try:
            file = self._idle.pop()
        except IndexError:
            file = self._opener()
        try:
            yield file
        finally:
            self._idle.append(file)


def read_box(
    file: BinaryIO, offset: int, dtype: np.dtype[Any], shape: Sequence[int], box: Sequence[tuple[int, int]]
) -> NDArray[Any]:
    """A box (start and stop along each axis) of an array that lies in a file in C order, from `offset` on.

    Short gaps are read along, because few long reads are faster than many short ones.
    """
    lengths = [stop - start for start, stop in box]
    step, wanted = math.prod(shape[1:]) * dtype.itemsize, math.prod(lengths[1:]) * dtype.itemsize
    level, outer = 0, []  # along the axes before `level` neighbours are read one by one
    while step - wanted > _GAP_BYTES:
        outer.append(range(box[level][0] * step, box[level][1] * step, step))
        level += 1
        step, wanted = step // shape[level], wanted // lengths[level]
    (start, stop), crop = box[level], (slice(None), *(slice(*ends) for ends in box[level + 1 :]))
    count = max(1, _BAND_BYTES // step)
    if lengths[level] <= count or step == wanted:
        count = lengths[level]
        if math.prod(lengths[:level]) == 1:
            first = offset + sum(steps[0] for steps in outer) + start * step
            lines = _read_into(np.empty((count, *shape[level + 1 :]), dtype), file, first)
            return lines[(*[None] * level, *crop)]
    found = np.empty(lengths, dtype)
    lines = np.empty((count, *shape[level + 1 :]), dtype)
    for target, places in zip(found.reshape(-1, *lengths[level:]), itertools.product(*outer), strict=True):
        for first in range(start, stop, count):
            read = lines[: stop - first]
            target[first - start : first - start + count] = _read_into(read, file, offset + sum(places) + first * step)[
                crop
            ]
    return found


def _read_into(target: NDArray[Any], file: BinaryIO, position: int) -> NDArray[Any]:
    file.seek(position)
    view = target.view(np.uint8).reshape(-1).data
    while view:
        if not (size := file.readinto(view)):  # type: ignore[attr-defined]
            raise DataError("the file ends before its numbers do; it was shortened while it was read.")
        view = view[size:]
    return target


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether columns come first, number type, and where the numbers start."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"it is of version {version[0]}.{version[1]} of the format, which is for tables, not images.")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        with silence():  # headers of Python 2 make numpy warn
            shape, fortran, dtype = read(file, max_header_size=_MAX_HEADER_BYTES)
    except tokenize.TokenError as error:  # from numpy's second try, for Python 2
        raise DataError("its header is damaged.") from error
    if dtype.hasobject:
        raise DataError("it holds Python objects, which are not read, for they could run programs. Save numbers.")
    if dtype.kind not in "buif":
        raise DataError(f"its numbers are of type {dtype}; whole numbers and floats can be used.")
    if len(shape) not in (2, 3, 4):
        raise DataError(f"its shape is {shape}; (H, W), (H, W, C) and (planes, H, W, C) can be read.")
    if min(shape) < 1:
        raise DataError(f"its shape is {shape}; it has no pixels.")
    return shape, fortran, dtype, file.tell()


def write_npy(path: Path, result: Result) -> None:
    """Write an array (H, W) or (planes, H, W), a band of rows at a time; `numpy.load(path, mmap_mode="r")` reads it."""
    planes, height, width = result.source.planes, result.source.height, result.source.width
    _write(path, result, (height, width) if planes == 1 else (planes, height, width), np.dtype(result.dtype))


def write_probabilities(path: Path, result: Result) -> None:
    """Write the probabilities of all classes as .npy, float32 (K, H, W), or (planes, K, H, W) of several planes.

    The planes of the result are the classes of the first plane of the image, then those of the next.
    """
    info, classes = result.source, result.spec.num_classes
    shape: tuple[int, ...] = (classes, info.height, info.width)
    _write(path, result, shape if info.planes <= classes else (info.planes // classes, *shape), np.dtype("<f4"))


def _write(path: Path, result: Result, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    planes, height = result.source.planes, result.source.height
    step = max(1, _BAND_BYTES // (result.source.width * dtype.itemsize))
    header = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    try:
        with atomic_path(path) as part, part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for plane in range(planes):
                for top in range(0, height, step):
                    rows = result.rows(plane, top, min(top + step, height))
                    file.write(np.ascontiguousarray(rows, dtype=dtype).data)
    except OSError as error:
        raise cannot_write(path, error) from error
