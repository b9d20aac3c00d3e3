"""NumPy's .npy files of any size, window by window. Files that hold Python objects are refused."""

import math
import tokenize
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.files import writing
from pixelwise.formats.axes import axes_of, axes_of_mask, axes_of_numpy
from pixelwise.formats.base import Opener, Result, Source, SourceInfo, check_finite, pixel_type, whole_numbers
from pixelwise.formats.local import Identity, readable, silence
from pixelwise.formats.ranges import Handles, opening

_STRIP_BYTES = 2**16
_BAND_BYTES = 16 * 2**20
_MAX_HEADER_BYTES = 10_000


def open_npy(
    location: str,
    opener: Opener | None = None,
    *,
    identity: Identity | None = None,
    axes: str | None = None,
    channels: int | None = None,
    labels: bool = False,
) -> Source:
    """Open an array (H, W), (H, W, C) or (planes, H, W, C); only its header is read.

    Other orders are read where they fit the number of `channels` that the network takes in one way only (`axes_of_numpy`),
    or as `axes` says ("cyx"). Of masks (`labels`) `axes` are those of the image, which count where the mask has as many
    (without channels); else three axes are (planes, H, W), unless the last one has length 1, or length 3 in 8 bits. An
    `opener` opens the file anew at each call, for reading, seekable; `identity` tells whether it changed.
    """
    with opening(location, opener, identity) as file:
        return _NpySource(location, file, axes, channels, labels)


class _NpySource(Source):
    def __init__(self, location: str, file: Handles, axes: str | None, channels: int | None, labels: bool) -> None:
        self._file, self._labels, self.identity = file, labels, file.identity
        self._shape, self._fortran, self._dtype, self._offset = _header(file.buffered)
        shape = self._shape
        end = self._offset + math.prod(shape) * self._dtype.itemsize
        if end > file.size:
            raise DataError(f"it says it has {end:,} bytes, but {file.size:,} are there; it is truncated.")
        is_color = shape[-1] == 3 and self._dtype == np.uint8
        axes = axes_of_mask(shape, axes) if labels else axes
        if axes is not None:
            self._axes = "".join(axes_of(shape, None, axes))
        elif labels and len(shape) == 3:
            self._axes = "yxc" if shape[2] == 1 or is_color else "zyx"
        else:
            self._axes = axes_of_numpy(shape, None if labels else channels)
        self._planes = [axis for axis, name in enumerate(self._axes) if name not in "yxc"]
        sides = dict(zip(self._axes, shape, strict=True))
        height, width, channels = sides["y"], sides["x"], sides.get("c", 1)
        strip = max(1, min(height, _STRIP_BYTES // (width * channels * self._dtype.itemsize)))
        self.info = SourceInfo(
            location=location, format="npy", height=height, width=width, channels=channels,
            planes=math.prod(shape[axis] for axis in self._planes), dtype=pixel_type(self._dtype, channels, labels),
            block_px=(height if self._fortran else strip, width),
        )  # fmt: skip

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        where = f"rows {top}..{top + height}, columns {left}..{left + width}"
        box = [(0, side) for side in self._shape]
        y, x = self._axes.index("y"), self._axes.index("x")
        box[y], box[x] = (top, top + height), (left, left + width)
        places = np.unravel_index(plane, [self._shape[axis] for axis in self._planes]) if self._planes else ()
        for axis, place in zip(self._planes, places, strict=True):
            box[axis] = (int(place), int(place) + 1)
        with readable(self.info.location, where):
            if self._fortran:
                array = self._file.window(self._offset, self._dtype, self._shape[::-1], box[::-1]).T
            else:
                array = self._file.window(self._offset, self._dtype, self._shape, box)
            order = [y, x, *(axis for axis, name in enumerate(self._axes) if name == "c"), *self._planes]
            array = array.transpose(order).reshape(height, width, -1)
            if not self._labels:
                check_finite(array, where)
            if array.dtype.kind == "b" or self._labels:
                array = whole_numbers(array)
            return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))

    def close(self) -> None:
        self._file.close()


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
    with writing(path) as part, part.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for plane in range(planes):
            for top in range(0, height, step):
                rows = result.rows(plane, top, min(top + step, height))
                file.write(np.ascontiguousarray(rows, dtype=dtype).data)
