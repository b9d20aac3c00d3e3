"""A whole image, or a whole mask, of any format that can be opened."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.base import Palette, Source, SourceInfo
from pixelwise.formats.image import ImageSource
from pixelwise.formats.local import printable
from pixelwise.formats.opening import open_source
from pixelwise.formats.registry import is_picture

MAX_DECODED_BYTES = 4 * 2**30
"""Larger images are not read as a whole."""


def read_image(path: str | Path) -> NDArray[Any]:
    """Read an image as it is meant to be seen, (H, W, C) in the file's number type; the array may be read-only.

    EXIF orientation is applied, palettes become RGB, opacity is dropped, 1-bit becomes 0 and 255. Bit depth stays.

    Raises:
        DataError: the file is missing, empty, damaged, too large, no image, a volume, or holds NaN or infinity.
    """
    with _opened(path) as source:
        return _whole(source)


def read_mask(path: str | Path) -> NDArray[Any]:
    """Read a mask as it is stored: the numbers of an index or palette file, or its RGB colours.

    EXIF orientation is applied as to images; 1-bit becomes 0 and 255; opacity is dropped.

    Returns:
        integers (H, W), or uint8 (H, W, 3); the array may be read-only.

    Raises:
        DataError: as `read_image`, or the file holds neither whole numbers nor 8-bit colours.
    """
    with _opened(path, labels=True) as source:
        array = _whole(source)
        return array[:, :, 0] if array.shape[2] == 1 else array


def palette(path: str | Path) -> Palette | None:
    """The colours of a palette file by index, or None for a file without a palette."""
    with _opened(path, labels=True) as source:
        return source.metadata.get("palette")


def image_info(path: str | Path) -> SourceInfo:
    """What a file says about its image, as `read_image` reads it."""
    with _opened(path) as source:
        return source.info


def _opened(path: str | Path, labels: bool = False) -> Source:
    name = str(path)
    if is_picture(_first_bytes(name)):  # as `open_source` would find out, but at once: training reads thousands of them
        return ImageSource(name, labels, now=True)
    return open_source(name, labels=labels or None)


def _first_bytes(name: str) -> bytes:
    """Of a file; none of a folder, a pipe or what is not there."""
    try:
        handle = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            return os.read(handle, 12)
        finally:
            os.close(handle)
    except (OSError, ValueError):
        return b""


def _whole(source: Source) -> NDArray[Any]:
    info = source.info
    if info.planes > 1:
        raise DataError(f"{printable(info.location)}: it holds {info.planes:,} planes; a single image is needed.")
    size = info.height * info.width * info.channels * np.dtype(info.dtype).itemsize
    if size > MAX_DECODED_BYTES:
        raise DataError(
            f"{printable(info.location)}: it takes {size / 2**30:,.1f} GiB when decoded; at most "
            f"{MAX_DECODED_BYTES >> 30} GiB are read at once. Cut it into parts."
        )
    return source.read(0, 0, info.height, info.width)
