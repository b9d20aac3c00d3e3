"""Strips and tiles that are images of their own (JPEG, JPEG 2000, PNG, WebP, JPEG XL, JPEG XR): small ones only.

Such a block has a header with a size of its own, which may be far larger than the tags of the TIFF say; it is refused
before a decoder takes memory for it.
"""

from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.errors import DataError

_WEBP = 50001
IMAGE_CODECS = (22610, 33003, 33004, 33005, 34712, 34933, 34934, _WEBP, 50002, 52546)
"""TIFF's numbers of these compressions, without the kinds of JPEG that share tables between their tiles."""

_JPEG_2000 = b"\xff\x4f\xff\x51"  # start of codestream, size
_MORE_PX = 64  # encoders pad to their own blocks


def check_jpeg(data: bytes, size: tuple[int, ...]) -> None:
    """Refuse a JPEG that says it is far larger than its strip or tile.

    Args:
        data: the block.
        size: rows and columns of a strip or tile.

    Raises:
        DataError: it is.
    """
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            _compare(_number(data, position + 5, 2), _number(data, position + 7, 2), size)
            return
        position += 1 if marker == 0xFF else 2 + _number(data, position + 2, 2)


def decode_image(data: bytes, compression: int, shapes: list[tuple[int, ...]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Decode a block that is an image of one of these shapes.

    Args:
        data: the block.
        compression: one of `IMAGE_CODECS`.
        shapes: (rows, columns, samples) that it may have: of a whole block, or of one cut off at the image's border.
        dtype: of its numbers, as the tags say.

    Raises:
        DataError: it has another shape.
        ValueError, RuntimeError, KeyError: it cannot be decoded.
    """
    start = data.find(_JPEG_2000)
    if start >= 0:
        right, bottom, left, top = (_number(data, start + at, 4) for at in (8, 12, 16, 20))
        _compare(bottom - top, right - left, shapes[0][:2])
    decompress = tifffile.TIFF.DECOMPRESSORS[compression]
    options = {"hasalpha": True} if compression == _WEBP and shapes[0][2] == 4 else {}
    if options:
        decompress = imagecodecs.webp_decode
    for shape in shapes:
        block = np.empty(shape, dtype)  # decoders refuse an image that does not fit before they decode it
        try:
            decompress(data, out=block, **options)
        except ValueError as error:
            if "invalid out" not in str(error):
                raise
        else:
            return block
    raise DataError(f"a block of it is no image of {shapes[0][1]} x {shapes[0][0]} pixels, as its tags say.")


def _compare(height: int, width: int, size: tuple[int, ...]) -> None:
    if height > size[0] + _MORE_PX or width > size[1] + _MORE_PX:
        raise DataError(f"a block of it is an image of {width} x {height}, but its tags say {size[1]} x {size[0]}.")


def _number(data: bytes, start: int, count: int) -> int:
    return int.from_bytes(data[start : start + count], "big")
