"""A whole image, or a whole mask, of any format that can be opened."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.image import ImageSource, is_image, meant, silence, whole_numbers
from pixelwise.formats.local import Identity, readable
from pixelwise.formats.raster import MAX_DECODED_BYTES, Palette, Raster, orient, printable
from pixelwise.formats.registry import FORMATS, open_source
from pixelwise.formats.tiff_decode import MAGIC as _TIFF_MAGIC
from pixelwise.formats.tiff_decode import decode_tiff

__all__ = ["IMAGE_SUFFIXES", "image_info", "meant", "palette", "read_image", "read_mask", "read_mask_file", "silence"]

IMAGE_SUFFIXES = (*FORMATS["image"].suffixes, ".tif", ".tiff")


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
    return read_mask_file(path)[0]


def read_mask_file(path: str | Path) -> tuple[NDArray[Any], Raster]:
    """What `read_mask` gives, with what the file says besides: its format and palette."""
    with _opened(path, labels=True) as source:
        array = _whole(source)
        array = array[:, :, 0] if array.shape[2] == 1 else array
        return array, Raster(array=array, format=source.info.format.upper(), palette=source.metadata.get("palette"))


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
    head = _first_bytes(name)
    if is_image(head, name):  # as `open_source` would find out, but at once: training reads thousands of them
        return ImageSource(name, labels, now=True)
    return _WholeTiff(name, labels) if head[:4] in _TIFF_MAGIC else open_source(name, labels=labels or None)


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


# From here on: TIFF as a whole, until `open_tiff` reads masks and stacks of channels as `decode_tiff` does.


class _WholeTiff(Source):
    def __init__(self, name: str, labels: bool) -> None:
        self._identity = Identity.local(name)
        with readable(name):
            raster = decode_tiff(Path(name))
            if labels:
                array = raster.array[:, :, :-1] if raster.has_alpha else raster.array
                array = whole_numbers(array)
                if array.shape[2] != 1 and (array.shape[2] != 3 or array.dtype != np.uint8):
                    raise DataError(
                        f"it has {array.shape[2]} channels of {array.dtype}; a mask has one channel of whole numbers, or "
                        "8-bit RGB."
                    )
            else:
                array = meant(raster)
                if array.dtype.kind not in "uif":
                    raise DataError(f"its numbers are of type {array.dtype}; whole numbers and floats can be used.")
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    bad = int((~np.isfinite(array)).sum())
                    raise DataError(f"{bad:,} of its {array.size:,} numbers are NaN or infinite. Replace them.")
            self._pixels = np.ascontiguousarray(orient(array, raster.orientation))
        self.metadata = {} if raster.palette is None else {"palette": raster.palette}
        height, width, channels = self._pixels.shape
        self.info = SourceInfo(
            location=name, format="tiff", height=height, width=width, channels=channels, dtype=self._pixels.dtype.name
        )

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        return self._pixels[top : top + height, left : left + width]

    def fingerprint(self) -> str:
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        self._identity.check()
