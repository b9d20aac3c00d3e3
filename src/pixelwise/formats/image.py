"""PNG, JPEG, WebP, BMP, GIF and PNM through Pillow, decoded whole when the first window is asked for; PNG is written.

Pillow's own limit on pixels holds (179 million): larger files are refused before any memory is taken. Labels of any size
are written row by row, with the palette of the classes; the provenance record is a text chunk. Chunks are those of the PNG
specification (W3C, third edition, sections 5 and 11).
"""

import json
import os
import struct
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import (
    Image,
    WebPImagePlugin,  # noqa: F401  (or Pillow imports all of its formats to find this one)
)
from PIL.PngImagePlugin import PngImageFile, PngInfo

from pixelwise.errors import DataError, UsageError
from pixelwise.files import writing
from pixelwise.formats.base import (
    Classes,
    Palette,
    Result,
    Source,
    SourceInfo,
    check_finite,
    check_opacity,
    orient,
    whole_numbers,
)
from pixelwise.formats.local import Identity, readable, silence

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")  # no others: Pillow would hand some to outside programs
_ORIENTATION_TAG = 0x0112
_MODES = {  # Pillow's mode: channels of the image as read, number type
    "1": (1, "uint8"), "L": (1, "uint8"), "LA": (1, "uint8"), "P": (3, "uint8"), "PA": (3, "uint8"),
    "RGB": (3, "uint8"), "RGBA": (3, "uint8"), "RGBX": (3, "uint8"), "CMYK": (3, "uint8"), "YCbCr": (3, "uint8"),
    "I": (1, "int32"), "I;16": (1, "uint16"), "I;16B": (1, "uint16"), "I;16L": (1, "uint16"), "F": (1, "float32"),
}  # fmt: skip
_WITH_OPACITY = ("LA", "RGBA", "PA")
_LEFT_OUT = "its opacity (alpha) is left out, and pixels that it hides count like all others"
_TO_RGB = ("CMYK", "YCbCr", "RGBX")
_WIDE_COLOR = ("RGB;16B", "RGBA;16B", "LA;16B")  # Pillow keeps the upper half of these only

MARK = "pixelwise"  # keyword of the text chunk
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_INDEXED, _GREY = 3, 0  # colour types
_BAND_BYTES, _CHUNK_BYTES = 4 << 20, 1 << 20
_MAX_SIDE = 2**31 - 1


class ImageSource(Source):
    """An image of which only the header is read at first, unless all of it is wanted `now`.

    EXIF orientation is applied, opacity is dropped, 1-bit becomes 0 and 255, palettes become RGB. Bit depth stays. Masks
    (`labels`) are the indices of palettes, whole numbers of any depth, or 8-bit RGB. Once decoded it is kept while it is
    open, in `cache_bytes` of memory.
    """

    def __init__(self, location: str, *, labels: bool = False, now: bool = False) -> None:
        self.identity = Identity.local(location)
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
        known: dict[str, Any] = {} if colors is None else {"palette": colors}
        if (frames := _frames(image)) > 1:
            text = f"it holds {frames:,} frames, of which only the first is read; save the others as files of their own"
            known["warnings"] = (text,)
        known |= {"orientation": self._orientation} if self._orientation in range(2, 9) else {}
        self.metadata: Mapping[str, Any] = MappingProxyType(known)
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
                if image.mode in _WITH_OPACITY and not self._labels and np.asarray(image.getchannel("A")).min() < 255:
                    self.metadata = MappingProxyType({**self.metadata, "opacity": _LEFT_OUT})
                pixels = _pixels(image, info, self._is_wide, self._labels)
            if self._orientation != 1:
                pixels = orient(pixels, self._orientation)
            self.identity.check()  # while it was decoded
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
    if image.mode in _WITH_OPACITY:
        array, opacity = array[:, :, :-1], array[:, :, -1]
        if labels:
            check_opacity(array, opacity)
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype.kind == "f":
        array = whole_numbers(array) if labels else array
        check_finite(array, f"{array.size:,} pixels")
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
            now = _chunk_kinds(image.fp)[-2:] != [b"IDAT", b"IEND"]
            image.fp.seek(place)
        if now:
            image.load()
    with silence():
        found = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    return found if isinstance(found, int) else 1


def _frames(image: Image.Image) -> int:
    """How many pictures an animation has; further ones in a JPEG are previews and gain maps of cameras."""
    return 1 if image.format not in ("GIF", "PNG", "WEBP") else int(getattr(image, "n_frames", 1))


def _chunk_kinds(file: IO[bytes]) -> list[bytes]:
    """The kinds of the chunks of a PNG, in order."""
    kinds, place = [], len(_SIGNATURE)
    while file.seek(place) and len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        kinds.append(kind)
        place += 12 + length
    return kinds


def _colors(image: Image.Image) -> Palette | None:
    flat = image.getpalette("RGB") if image.mode in ("P", "PA") else None
    return None if flat is None else tuple(map(tuple, np.reshape(flat, (-1, 3)).tolist()))


def label_image(labels: NDArray[np.uint8], spec: Classes) -> Image.Image:
    """Labels (H, W) as a palette image: its indices are the class ids, its colours those of the classes."""
    picture = Image.fromarray(labels)
    picture.putpalette(spec.palette_bytes())
    return picture


def write_png(path: str | Path, picture: Image.Image, mark: Mapping[str, Any] | None = None) -> None:
    """Write a PNG atomically, with `mark` (JSON-able values) as its text chunk."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: labels and pictures are written as PNG; give a name that ends in .png.")
    text = PngInfo()
    if mark is not None:
        text.add_text(MARK, json.dumps(dict(mark), sort_keys=True))
    level = 6 if picture.mode == "P" else 1  # photographs hardly shrink further, but would take far longer
    with writing(path) as part:
        picture.save(part, format="PNG", pnginfo=text, compress_level=level)


def write_png_labels(path: Path, result: Result) -> None:
    """Write labels as an indexed PNG (uint8), or as 16-bit grey without colours (uint16); a band of rows is in memory."""
    source = result.source
    if max(source.height, source.width) > _MAX_SIDE:
        raise UsageError(f"{path}: a PNG has at most {_MAX_SIDE:,} rows and columns. Write it as TIFF.")
    bits = result.dtype.itemsize * 8
    color = _INDEXED if bits == 8 else _GREY
    with writing(path) as part, part.open("wb") as file:
        header = struct.pack(">IIBBBBB", source.width, source.height, bits, color, 0, 0, 0)
        file.write(_SIGNATURE + _chunk(b"IHDR", header))
        if color == _INDEXED:
            file.write(_chunk(b"PLTE", result.spec.palette_bytes()))
        if result.mark:
            text = json.dumps(dict(result.mark), sort_keys=True).encode("ascii")
            file.write(_chunk(b"tEXt", MARK.encode("ascii") + b"\0" + text))
        for content in _compressed(result):
            file.write(_chunk(b"IDAT", content))
        file.write(_chunk(b"IEND", b""))


def _compressed(result: Result) -> Iterator[bytes]:
    """The rows, each behind the number of its filter (0, none), as parts of one zlib stream."""
    height, width = result.source.height, result.source.width
    dtype = result.dtype.newbyteorder(">")
    step = max(1, _BAND_BYTES // (width * dtype.itemsize))
    stream, waiting = zlib.compressobj(6), b""
    for top in range(0, height, step):
        rows = np.ascontiguousarray(result.rows(0, top, min(top + step, height)), dtype=dtype)
        lines = np.zeros((len(rows), 1 + width * dtype.itemsize), dtype=np.uint8)
        lines[:, 1:] = rows.view(np.uint8).reshape(len(rows), -1)
        waiting += stream.compress(lines.data)
        if len(waiting) >= _CHUNK_BYTES:
            yield waiting
            waiting = b""
    yield waiting + stream.flush()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
