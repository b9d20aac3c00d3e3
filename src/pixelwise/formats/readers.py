"""Images and masks from files: PNG, JPEG, WebP, BMP, GIF and PNM through Pillow, TIFF through tifffile.

Whatever is wrong with a file ends in one `DataError` that names it; nothing else is raised and nothing is printed. What
a file is, its content decides, not its name.
"""

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image

from pixelwise.errors import DataError
from pixelwise.formats.base import Source
from pixelwise.formats.raster import DECODE_ERRORS, ImageInfo, Palette, Raster, in_words, orient, printable
from pixelwise.formats.registry import open_source
from pixelwise.formats.tiff import MAGIC as TIFF_MAGIC

__all__ = ["IMAGE_SUFFIXES", "ImageInfo", "image_info", "palette", "read_image", "read_mask"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm")

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")  # no others: Pillow would hand some to outside programs
_ORIENTATION_TAG = 0x0112
_MODES = {  # Pillow's mode: channels of the image as read, number type
    "1": (1, "uint8"), "L": (1, "uint8"), "LA": (1, "uint8"), "P": (3, "uint8"), "PA": (3, "uint8"),
    "RGB": (3, "uint8"), "RGBA": (3, "uint8"), "RGBX": (3, "uint8"), "CMYK": (3, "uint8"), "YCbCr": (3, "uint8"),
    "I": (1, "int32"), "I;16": (1, "uint16"), "I;16B": (1, "uint16"), "I;16L": (1, "uint16"), "F": (1, "float32"),
}  # fmt: skip
_TO_RGB = ("CMYK", "YCbCr", "RGBX")
_WIDE_COLOR = ("RGB;16B", "RGBA;16B", "LA;16B")  # Pillow keeps the upper half of these only

# `warnings.catch_warnings` swaps state of the whole process, so only one thread may be inside it. Only headers are read
# there; decoding runs beside it in any number of threads.
_header_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a worker must not be forked while another thread holds the lock
    os.register_at_fork(
        before=_header_lock.acquire, after_in_parent=_header_lock.release, after_in_child=_header_lock.release
    )


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as it is meant to be seen.

    EXIF orientation is applied, palettes become RGB, opacity is dropped, 1-bit becomes 0 and 255. Bit depth stays. A
    TIFF may have any number of channels, first or last; of files with several images the first is read.

    Args:
        path: PNG, JPEG, WebP, BMP, GIF, PNM or TIFF.

    Returns:
        (H, W, C), the file's number type.

    Raises:
        DataError: the file is missing, empty, damaged, too large, no image, or holds NaN or infinity.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "grey.png"
        >>> Image.new("L", (4, 3), 7).save(path)
        >>> read_image(path).shape
        (3, 4, 1)
    """
    path = Path(path)
    with _readable(path):
        if _is_tiff(path):
            return _read_tiff(path)
        raster = _decode(path)
        array = meant(raster)
        if array.dtype.kind not in "uif":
            raise DataError(f"its numbers are of type {array.dtype}; whole numbers and floats can be used.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise DataError(f"{bad:,} of its {array.size:,} numbers are NaN or infinite. Replace them.")
        return np.ascontiguousarray(orient(array, raster.orientation))


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask as it is stored: the numbers of an index or palette file, or its RGB colours.

    EXIF orientation is applied as to images; 1-bit becomes 0 and 255; opacity is dropped.

    Returns:
        integers (H, W), or uint8 (H, W, 3).

    Raises:
        DataError: as `read_image`, or the file holds neither whole numbers nor 8-bit colours.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mask.png"
        >>> Image.new("L", (2, 1), 5).save(path)
        >>> read_mask(path).tolist()
        [[5, 5]]
    """
    return read_mask_file(path)[0]


def read_mask_file(path: str | Path) -> tuple[np.ndarray, Raster]:
    """What `read_mask` gives, with the decoded file, which knows its palette and format."""
    path = Path(path)
    with _readable(path):
        if _is_tiff(path):
            return _read_tiff_mask(path)
        raster = _decode(path)
        array = _whole_numbers(_without_alpha(raster))
        channels = array.shape[2]
        if channels == 1:
            array = array[:, :, 0]
        elif channels != 3 or array.dtype != np.uint8:
            raise DataError(
                f"it has {channels} channels of {array.dtype}; a mask has one channel of whole numbers, or 8-bit RGB."
            )
        return np.ascontiguousarray(orient(array, raster.orientation)), raster


def palette(path: str | Path) -> Palette | None:
    """The colours of a palette file by index, or None for a file without a palette.

    Raises:
        DataError: as `read_image`, as far as the header shows it.
    """
    path = Path(path)
    with _readable(path):
        if _is_tiff(path):
            with open_source(path, format="tiff") as source:
                found: Palette | None = source.metadata.get("palette")
            return found
        with _opened(path) as image:
            return _colors(image)


def image_info(path: str | Path) -> ImageInfo:
    """Size, channels and number type that `read_image` would give, mostly without decoding the pixels.

    Raises:
        DataError: as `read_image`, as far as the header shows it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.png"
        >>> Image.new("RGB", (4, 3)).save(path)
        >>> image_info(path)
        ImageInfo(width=4, height=3, channels=3, dtype='uint8', format='PNG')
    """
    path = Path(path)
    with _readable(path):
        return _tiff_info(path) if _is_tiff(path) else _pillow_info(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn everything that can be wrong with a file into a `DataError` that names it."""
    name = printable(path)
    try:
        _check_file(path)
        yield
    except DataError as error:
        if str(error).startswith(f"{name}: "):
            raise
        raise DataError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: refused, for it is too large: {error} Cut it into parts, or store it as TIFF."
        ) from error
    except Image.UnidentifiedImageError as error:
        names = ", ".join((*_FORMATS, "TIFF"))
        raise DataError(
            f"{name}: this is no image that can be read ({names}), or its first bytes are damaged."
        ) from error
    except MemoryError as error:
        raise DataError(f"{name}: there is not enough memory to decode it. Cut it into parts.") from error
    except DECODE_ERRORS as error:
        raise DataError(f"{name}: the file is damaged or truncated ({in_words(error)}).") from error


def _check_file(path: Path) -> None:
    """Refuse what must not even be opened: a pipe would wait forever."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DataError("there is no such file.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"the file cannot be opened ({getattr(error, 'strerror', None) or error}).") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError("this is a folder." if stat.S_ISDIR(status.st_mode) else "this is not a regular file.")
    if status.st_size == 0:
        raise DataError("the file is empty (0 bytes).")


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in TIFF_MAGIC


def _decode(path: Path) -> Raster:
    raster = _decode_pillow(path)
    if raster.array.size == 0:
        raise DataError("it has no pixels.")
    return raster


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image of which only the header was read."""
    with path.open("rb") as file:
        with silence():
            image = Image.open(file, formats=_FORMATS)
        with image:
            yield image


@contextmanager
def silence() -> Iterator[None]:
    """Keep warnings of libraries away from the terminal; only one thread at a time is inside, so be quick."""
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode_pillow(path: Path) -> Raster:
    with _opened(path) as image:
        if image.mode not in _MODES:
            raise DataError(f"its colours are stored as {image.mode}. Convert it to RGB or grey.")
        wide = _is_wide_color(image)
        image.load()
        with silence():
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        array = imagecodecs.png_decode(path.read_bytes()) if wide else _pixels(image)
        return Raster(
            array=array,
            format=image.format or "",
            orientation=orientation if isinstance(orientation, int) else 1,
            palette=_colors(image),
            has_alpha=image.mode in ("LA", "RGBA", "PA"),
        )


def _pixels(image: Image.Image) -> np.ndarray:
    array = np.array(image.convert("RGB") if image.mode in _TO_RGB else image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return array.astype(np.uint16)  # older versions of Pillow widen 16 bits so
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _is_wide_color(image: Image.Image) -> bool:
    tile = getattr(image, "tile", None)
    if image.format != "PNG" or not tile:
        return False
    return (tile[0][3] if isinstance(tile[0][3], str) else tile[0][3][0]) in _WIDE_COLOR


def _colors(image: Image.Image) -> Palette | None:
    flat = image.getpalette("RGB") if image.mode in ("P", "PA") else None
    if flat is None:
        return None
    return tuple((flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat) - 2, 3))


def meant(raster: Raster) -> np.ndarray:
    """The pixels (H, W, C) as they are meant to be seen: palette looked up, opacity dropped, black as 0."""
    array = _without_alpha(raster)
    if array.dtype == bool:
        array = _whole_numbers(array)
    if raster.inverted and array.dtype.kind == "u":
        array = np.iinfo(array.dtype).max - array
    if raster.palette is not None:
        colors = np.zeros((max(256, len(raster.palette), int(array.max()) + 1), 3), dtype=np.uint8)
        colors[: len(raster.palette)] = raster.palette
        array = colors[array[:, :, 0]]
    return array


def _without_alpha(raster: Raster) -> np.ndarray:
    array = raster.array if raster.array.ndim == 3 else raster.array[:, :, None]
    return array[:, :, :-1] if raster.has_alpha else array


def _whole_numbers(array: np.ndarray) -> np.ndarray:
    """Masks are integers; 1 bit counts as black and white, and floats pass if they are whole numbers."""
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "ui":
        return array
    if array.dtype.kind == "f" and np.isfinite(array).all() and np.abs(array).max() < 2**31:
        whole = array.astype(np.int64)
        if (whole == array).all():
            return whole
    raise DataError(f"it holds numbers of type {array.dtype} that are not whole; a mask has whole numbers.")


def _tiff_info(path: Path) -> ImageInfo:
    with open_source(path, format="tiff") as source:
        info = _one_plane(source).info
    return ImageInfo(width=info.width, height=info.height, channels=info.channels, dtype=info.dtype, format="TIFF")


def _read_tiff(path: Path) -> np.ndarray:
    with open_source(path, format="tiff") as source:
        info = _one_plane(source).info
        return source.read(0, 0, info.height, info.width)


def _read_tiff_mask(path: Path) -> tuple[np.ndarray, Raster]:
    with open_source(path, format="tiff", labels=True) as source:
        info = _one_plane(source).info
        array = source.read(0, 0, info.height, info.width)
        array = array[:, :, 0] if info.channels == 1 else array
        return array, Raster(array=array, format="TIFF", palette=source.metadata.get("palette"))


def _one_plane(source: Source) -> Source:
    if source.info.planes > 1:
        raise DataError(f"it holds {source.info.planes:,} planes; a single image is needed.")
    return source


def _pillow_info(path: Path) -> ImageInfo:
    with _opened(path) as image:
        if image.mode not in _MODES:
            raise DataError(f"its colours are stored as {image.mode}. Convert it to RGB or grey.")
        channels, dtype = _MODES[image.mode]
        if _is_wide_color(image):
            channels, dtype = (1 if image.mode == "LA" else 3), "uint16"
        elif image.mode == "I" and image.format in ("PNG", "PPM"):
            dtype = "uint16"
        width, height, name = image.width, image.height, image.format or ""
        with silence():
            turned = image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    return ImageInfo(
        width=height if turned else width,
        height=width if turned else height,
        channels=channels,
        dtype=dtype,
        format=name,
    )
