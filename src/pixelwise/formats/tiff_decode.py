"""TIFF through tifffile: any number of channels, 1 to 64 bit, integer or float, bands first or last.

tifffile gives raw samples, so what the tags say about them (palette, WhiteIsZero, orientation, opacity) is read here.
"""

import logging
import math
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile

from pixelwise.errors import DataError
from pixelwise.formats.raster import MAX_DECODED_BYTES, Palette, Raster

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_ORIENTATION_TAG = 274
_WHITE_IS_ZERO, _PALETTE = 0, 3
_GRAY_OR_RGB = (_WHITE_IS_ZERO, 1, 2, _PALETTE, 32803)  # and 32803, colour filter array, which is one raw channel
_YCBCR = 6
_JPEG = (6, 7)  # decoding these turns YCbCr into RGB
_ALPHA = (1, 2)
_DIALECTS = (
    "avs", "bif", "eer", "fluoview", "lsm", "mdgel", "micromanager", "mmstack", "ndpi", "ndtiff", "nih", "ome", "philips",
    "qpi", "scanimage", "scn", "sis", "stk", "svs",
)  # fmt: skip

_MAX_PAGES = 10_000
_BOMB_BYTES = 64 * 2**20  # below this, no claim is too bold
_BOMB_RATIO = 4096  # deflate reaches 1032 at most, empty tiles with zstd about 2000

_quiet = threading.local()

PLAIN: dict[str, Any] = {f"is_{name}": False for name in _DIALECTS if name in tifffile.TIFF.FILE_FLAGS}
"""Flags for `tifffile.TiffFile`: dialects of microscopes are not followed, for their descriptions may name other files."""


@dataclass(frozen=True, kw_only=True)
class TiffHeader:
    """The shape and meaning of a file's first image: `channels` as stored, `has_alpha` if the last one is opacity."""

    height: int
    width: int
    channels: int
    dtype: np.dtype
    orientation: int
    palette: Palette | None
    has_alpha: bool
    inverted: bool


def tiff_header(path: Path) -> TiffHeader:
    """Read the tags only. Raises `DataError` or one of `DECODE_ERRORS`."""
    with _opened(path) as series:
        return _header(series)[0]


def decode_tiff(path: Path) -> Raster:
    """Decode the first image. Raises `DataError` or one of `DECODE_ERRORS`."""
    with _opened(path) as series:
        header, order = _header(series)
        array = np.asarray(series.asarray(maxworkers=1))
    if array.shape != series.shape:
        raise DataError(f"its pixels have the shape {array.shape}, but its tags say {tuple(series.shape)}.")
    array = np.transpose(array, order).reshape(header.height, header.width, header.channels)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return Raster(
        array=array,
        format="TIFF",
        orientation=header.orientation,
        palette=header.palette,
        has_alpha=header.has_alpha,
        inverted=header.inverted,
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The first image, or stack of equal pages, of a file.

    The dialects of microscopes are not followed; their pages are read as those of any TIFF.
    """
    with path.open("rb") as file:
        pages = count_pages(file)
    with quiet(), tifffile.TiffFile(path, **PLAIN) as tiff:
        first = tiff.pages.first
        series = first if pages == 1 and not tiff.is_shaped and not tiff.is_imagej else tiff.series[0]
        _check_size(series, first, path.stat().st_size)
        yield series


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what tifffile logs in this thread about the file at hand, for the error tells it all."""
    before = getattr(_quiet, "active", False)
    _quiet.active = True
    try:
        yield
    finally:
        _quiet.active = before


class _OwnMessages(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_quiet, "active", False)


logging.getLogger("tifffile").addFilter(_OwnMessages())


def _header(series: Any) -> tuple[TiffHeader, tuple[int, ...]]:
    """What the tags say, and the order of axes that makes (…, rows, columns, channels) of the stored samples."""
    order, (height, width, channels) = _arrange(series.axes, series.shape)
    page = getattr(series, "keyframe", series)
    return page_header(page, np.dtype(series.dtype), height, width, channels), order


def page_header(page: Any, dtype: np.dtype, height: int, width: int, channels: int) -> TiffHeader:
    """What the tags of a page say about the meaning of its numbers, for an image of this size.

    Raises:
        DataError: its colours are neither grey, RGB nor a palette.
    """
    photometric = int(page.photometric)
    if photometric not in _GRAY_OR_RGB and not (photometric == _YCBCR and int(page.compression) in _JPEG):
        name = tifffile.PHOTOMETRIC(photometric).name
        raise DataError(f"its colours are stored as {name}. Convert it to RGB or grey.")
    extra = [int(sample) for sample in page.extrasamples]
    return TiffHeader(
        height=height,
        width=width,
        channels=channels,
        dtype=dtype,
        orientation=_orientation(page),
        palette=_palette(page.colormap) if photometric == _PALETTE and channels == 1 else None,
        has_alpha=channels in (2, 4) and len(extra) == 1 and extra[0] in _ALPHA,
        inverted=photometric == _WHITE_IS_ZERO,
    )


def _arrange(axes: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """The order of axes that ends in rows, columns, channels, and their lengths.

    tifffile names what the file names (S samples, C channels, Z, T, I pages). An axis that nothing names (Q) is the
    channels where it is the shortest of the three, first or last: arrays are written either way without saying so.
    """
    rows, columns = axes.index("Y"), axes.index("X")
    rest = [axis for axis in range(len(axes)) if axis not in (rows, columns) and shape[axis] != 1]
    if len(rest) > 1:
        sizes = " x ".join(f"{axes[axis]} {shape[axis]}" for axis in range(len(axes)))
        raise DataError(f"it holds a stack of more than three dimensions ({sizes}). Save each image as its own file.")
    if not rest:
        order: tuple[int, ...] = (rows, columns)
    elif axes[rest[0]] == "Q" and rest[0] < rows < columns and shape[columns] < shape[rest[0]]:
        order = (rest[0], rows, columns)
    else:
        order = (rows, columns, rest[0])
    lengths = [int(shape[axis]) for axis in order] + [1]
    unit = tuple(axis for axis in range(len(axes)) if axis not in order)
    return unit + order, (lengths[0], lengths[1], lengths[2])


def count_pages(file: BinaryIO) -> int:
    """How many pages are chained to each other; damaged chains may run in circles, which tifffile follows for long."""
    start = file.read(8)
    order = "<" if start[:2] == b"II" else ">"
    is_big = 43 in start[2:4]
    count, entry, link = ("Q", 20, "Q") if is_big else ("H", 12, "I")
    file.seek(8 if is_big else 4)
    seen: set[int] = set()
    while (offset := _read_number(file, order + link)) not in seen and len(seen) <= _MAX_PAGES:
        if offset == 0:
            return len(seen)
        seen.add(offset)
        file.seek(offset)
        file.seek(_read_number(file, order + count) * entry, os.SEEK_CUR)
    raise DataError(f"its pages form a circle, or are more than {_MAX_PAGES:,}.")


def _read_number(file: BinaryIO, form: str) -> int:
    size = struct.calcsize(form)
    return int(struct.unpack(form, file.read(size))[0])


def _check_size(series: Any, page: Any, file_bytes: int) -> None:
    """Refuse an image that is empty, huge, far larger than its file can hold, or of which parts are missing."""
    if 0 in series.shape or not series.shape:
        raise DataError(f"its size is {' x '.join(map(str, series.shape)) or 'missing'}.")
    itemsize = np.dtype(series.dtype).itemsize
    wanted = max(math.prod(series.shape), page.tilewidth * page.tilelength * page.tiledepth) * itemsize
    if wanted > MAX_DECODED_BYTES:
        raise DataError(
            f"it says it takes {wanted / 2**30:,.1f} GiB when decoded; at most {MAX_DECODED_BYTES >> 30} GiB are read. "
            "Cut it into parts."
        )
    if wanted > max(_BOMB_BYTES, _BOMB_RATIO * file_bytes):
        raise DataError(f"it says it takes {wanted:,} bytes when decoded, which {file_bytes:,} bytes cannot hold.")
    if len(page.dataoffsets) < math.prod(page.chunked):
        raise DataError(f"of its {math.prod(page.chunked):,} blocks only {len(page.dataoffsets):,} are there.")
    ends = (offset + size for offset, size in zip(page.dataoffsets, page.databytecounts, strict=False) if size)
    if max(ends, default=0) > file_bytes:
        raise DataError("its pixels reach beyond the end of the file; it is truncated.")


def _orientation(page: Any) -> int:
    tag = page.tags.get(_ORIENTATION_TAG)
    return int(tag.value) if tag is not None and isinstance(tag.value, int) else 1


def _palette(colormap: np.ndarray) -> Palette:
    """TIFF keeps a palette as uint16 (3, 2^bits)."""
    return tuple((int(red), int(green), int(blue)) for red, green, blue in (colormap >> 8).T)
