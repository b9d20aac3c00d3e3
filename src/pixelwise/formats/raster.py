"""What the decoders of files give to the readers, and which errors of theirs mean "this file is bad"."""

import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.errors import DataError

Palette = tuple[tuple[int, int, int], ...]

MAX_DECODED_BYTES = 4 * 2**30
"""Files that say they are larger than this when decoded are refused before any memory is taken."""

DECODE_ERRORS = (
    OSError,  # missing, unreadable, truncated; Pillow's UnidentifiedImageError
    tifffile.TiffFileError,  # no ValueError in older versions
    ValueError,  # numpy shapes, text that is no text
    TypeError,  # tags of another type than the format says
    LookupError,  # tables in the file that point outside it, unknown codecs
    AttributeError,  # tags that should be there
    ArithmeticError,  # division by a size of zero, overflow
    AssertionError,  # tifffile's own checks
    RuntimeError,  # imagecodecs' errors, NotImplementedError, RecursionError
    SyntaxError,  # Pillow's broken PNG; ParseError of XML descriptions in TIFF
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow, tifffile and imagecodecs raise on damaged input; anything else is a bug and passes through."""

_OF_PROGRAMS = (
    TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, NotImplementedError, RecursionError,
)  # fmt: skip
"""Errors whose words are about a decoder's code, not about the file."""


def in_words(error: BaseException) -> str:
    """Why a file could not be decoded, for somebody who does not know the decoder: one line of at most 200 letters.

    Example:
        >>> in_words(ValueError("no  tile")), in_words(struct.error("unpack requires a buffer of 2 bytes"))
        ('no tile', 'it ends too early, or what its headers say makes no sense')
        >>> in_words(AttributeError("'NoneType' object has no attribute 'shape'"))
        'what its headers say makes no sense'
    """
    text = " ".join(str(error).split())[:200]
    if isinstance(error, struct.error):
        return "it ends too early, or what its headers say makes no sense"
    if isinstance(error, EOFError) and not text:
        return "it ends too early"
    if isinstance(error, _OF_PROGRAMS) or not text or "<class " in text or " object at 0x" in text or "ast." in text:
        return "what its headers say makes no sense"
    return text


@dataclass(frozen=True, kw_only=True)
class Raster:
    """One decoded file, as stored: neither turned nor reduced to what an image or a mask needs.

    Attributes:
        array: (H, W) or (H, W, C), any numeric type or bool, native byte order.
        format: what the content is, for example "PNG".
        orientation: EXIF orientation, 1..8.
        palette: the colours that the indices in `array` stand for, or None.
        has_alpha: whether the last channel is opacity.
        inverted: whether the largest number is black (TIFF's WhiteIsZero).
    """

    array: np.ndarray
    format: str
    orientation: int = 1
    palette: Palette | None = None
    has_alpha: bool = False
    inverted: bool = False


def printable(path: str | Path) -> str:
    """A path as text that any terminal and JSON take, also where the bytes of its name are no text."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image (H, W[, C]) as EXIF orientation 1..8 says; other numbers turn nothing (EXIF 2.3, tag 0x0112).

    Example:
        >>> orient(np.array([[1, 2, 3]]), 6).tolist()
        [[1], [2], [3]]
    """
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def whole_numbers(array: NDArray[Any]) -> NDArray[Any]:
    """Masks are integers; 1 bit counts as black and white, and floats pass if they are whole numbers.

    Raises:
        DataError: they are not.
    """
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "ui":
        return array
    if array.dtype.kind == "f" and np.isfinite(array).all() and np.abs(array).max() < 2**31:
        whole = array.astype(np.int64)
        if (whole == array).all():
            return whole
    raise DataError(f"it holds numbers of type {array.dtype} that are not whole; a mask has whole numbers.")


# `warnings.catch_warnings` swaps state of the whole process, so only one thread may be inside it. Only headers are read
# there; decoding runs beside it in any number of threads.
_header_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a worker must not be forked while another thread holds the lock
    os.register_at_fork(
        before=_header_lock.acquire, after_in_parent=_header_lock.release, after_in_child=_header_lock.release
    )


@contextmanager
def silence() -> Iterator[None]:
    """Keep warnings of libraries away from the terminal; only one thread at a time is inside, so be quick."""
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
