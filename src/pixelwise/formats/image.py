"""PNG, JPEG, WebP, BMP, GIF and PNM through Pillow, decoded whole, in this process, when the first window is asked for.

Pillow's own limit on pixels holds (179 million): larger files are refused before any memory is taken.
"""

import os
import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from pixelwise.errors import DataError
from pixelwise.formats.base import Palette, Source, SourceInfo, orient, whole_numbers
from pixelwise.formats.local import Identity, readable, silence
from pixelwise.formats.png import chunks

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")  # no others: Pillow would hand some to outside programs
_ORIENTATION_TAG = 0x0112
_MODES = {  # Pillow's mode: channels of the image as read, number type
    "1": (1, "uint8"), "L": (1, "uint8"), "LA": (1, "uint8"), "P": (3, "uint8"), "PA": (3, "uint8"),
    "RGB": (3, "uint8"), "RGBA": (3, "uint8"), "RGBX": (3, "uint8"), "CMYK": (3, "uint8"), "YCbCr": (3, "uint8"),
    "I": (1, "int32"), "I;16": (1, "uint16"), "I;16B": (1, "uint16"), "I;16L": (1, "uint16"), "F": (1, "float32"),
}  # fmt: skip
_TO_RGB = ("CMYK", "YCbCr", "RGBX")
_WIDE_COLOR = ("RGB;16B", "RGBA;16B", "LA;16B")  # Pillow keeps the upper half of these only


def open_image(location: str, *, labels: bool = False) -> "ImageSource":
    """Open an image; only its header is read.

    EXIF orientation is applied, opacity is dropped, 1-bit becomes 0 and 255, palettes become RGB. Bit depth stays. Masks
    (`labels`) are the indices of palettes, whole numbers of any depth, or 8-bit RGB.
    """
    return ImageSource(location, labels)


class ImageSource(Source):
    """An image that is kept decoded while it is open (`cache_bytes`); `now` if it is read at once, so decoding may begin."""

    def __init__(self, location: str, labels: bool = False, now: bool = False) -> None:
        self._identity = Identity.local(location)
        self._labels = labels
        self._lock = threading.Lock()
        self._pixels: NDArray[Any] | None = None
        self._file = ExitStack()
        weakref.finalize(self, self._file.close)  # for those who forget to close it
        with readable(location):
            self._image: Image.Image | None = self._opened(location)
            image = self._image
            self._is_wide = _is_wide_color(image)
            channels, dtype = _kind(image, self._is_wide, labels)
            self._orientation = _orientation(image, now)
            colors = _colors(image) if labels else None  # which decodes the image
        height, width = image.height, image.width
        if self._orientation in (5, 6, 7, 8):
            height, width = width, height
        self.metadata: Mapping[str, Any] = MappingProxyType({} if colors is None else {"palette": colors})
        self.info = SourceInfo(
            location=location,
            format=(image.format or "").lower(),
            height=height,
            width=width,
            channels=channels,
            dtype=dtype,
            block_px=(height, width),
        )
        self.cache_bytes = height * width * channels * np.dtype(dtype).itemsize

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window, (height, width, C); a view that cannot be written to."""
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decoded()
            return self._pixels[top : top + height, left : left + width]

    def fingerprint(self) -> str:
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        self._identity.check()

    def close(self) -> None:
        """Let go of the file and its pixels; a later `read` decodes it again."""
        with self._lock:
            self._pixels = self._image = None
            self._file.close()

    def _opened(self, location: str) -> Image.Image:
        """The image, of which only the header was read; given a path, Pillow would map the file into memory."""
        try:
            file = self._file.enter_context(open(location, "rb"))  # noqa: SIM115, PTH123
            with silence():
                image = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise DataError(f"refused, for it is too large: {error} Cut it into parts, or store it as TIFF.") from error
        except Image.UnidentifiedImageError as error:
            raise DataError(
                f"this is no image that can be read ({', '.join(_FORMATS)}), or its first bytes are damaged."
            ) from error
        self._file.callback(image.close)
        return image

    def _decoded(self) -> NDArray[Any]:
        info = self.info
        with readable(info.location):
            image, self._image = self._image or self._opened(info.location), None
            with self._file:
                pixels = orient(_pixels(image, info, self._is_wide, self._labels), self._orientation)
            self._identity.check()  # while it was decoded
            if pixels.shape != (info.height, info.width, info.channels):
                raise DataError(
                    f"its pixels have the shape {pixels.shape}, but its header says another. It is damaged."
                )
        pixels = np.ascontiguousarray(pixels)
        pixels.flags.writeable = False
        return pixels


def _kind(image: Image.Image, is_wide: bool, labels: bool) -> tuple[int, str]:
    """Channels and number type of the pixels as they are read."""
    if image.mode not in _MODES:
        raise DataError(f"its colours are stored as {image.mode}. Convert it to RGB or grey.")
    channels, dtype = _MODES[image.mode]
    if is_wide:
        channels, dtype = (1 if image.mode == "LA" else 3), "uint16"
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # older versions of Pillow widen 16 bits so
        dtype = "uint16"
    if labels and image.mode in ("P", "PA"):
        channels = 1
    if labels and dtype == "float32":
        dtype = "int64"
    if labels and (channels, dtype) == (3, "uint16"):
        raise DataError("it has 3 channels of uint16; a mask has one channel of whole numbers, or 8-bit RGB.")
    return channels, dtype


def _pixels(image: Image.Image, info: SourceInfo, is_wide: bool, labels: bool) -> NDArray[Any]:
    """The pixels (H, W, C), not yet turned."""
    if is_wide:
        array = imagecodecs.png_decode(Path(info.location).read_bytes())
    else:
        array = np.asarray(image.convert("RGB") if image.mode in _TO_RGB else image)
    array = array if array.ndim == 3 else array[:, :, None]
    if image.mode in ("LA", "RGBA", "PA"):
        array = array[:, :, :-1]
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype.kind == "f":
        array = whole_numbers(array) if labels else array
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise DataError(f"{bad:,} of its {array.size:,} numbers are NaN or infinite. Replace them.")
    colors = _colors(image)
    if colors is not None and not labels:
        return _look_up(array, colors)
    return array.astype(info.dtype, copy=False)


def _look_up(array: NDArray[Any], palette: Palette) -> NDArray[np.uint8]:
    """The colours (H, W, 3) of indices (H, W, 1); black where the palette names none."""
    colors = np.zeros((max(256, len(palette), int(array.max()) + 1), 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    return colors[array[:, :, 0]]


def _is_wide_color(image: Image.Image) -> bool:
    tile = getattr(image, "tile", None)
    if image.format != "PNG" or not tile:
        return False
    return (tile[0][3] if isinstance(tile[0][3], str) else tile[0][3][0]) in _WIDE_COLOR


def _orientation(image: Image.Image, now: bool) -> int:
    """EXIF orientation 1..8. Only where text follows the pixels of a PNG, these are decoded to get at it."""
    if isinstance(image, PngImageFile) and image.fp is not None:
        if not now:
            place = image.fp.seek(0, os.SEEK_CUR)
            now = [kind for kind, _ in chunks(image.fp)][-2:] != [b"IDAT", b"IEND"]
            image.fp.seek(place)
        if now:
            image.load()
    with silence():
        found = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    return found if isinstance(found, int) else 1


def _colors(image: Image.Image) -> Palette | None:
    flat = image.getpalette("RGB") if image.mode in ("P", "PA") else None
    if flat is None:
        return None
    return tuple((flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat) - 2, 3))
