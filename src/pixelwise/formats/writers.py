"""Predictions as files and pictures: indexed PNG labels with the class palette, overlays, arrays.

Everything is written atomically. PNGs carry a mark (a text chunk) that says which network made them from which input,
so a later run knows what is finished without any file beside them.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixelwise.errors import UsageError
from pixelwise.files import atomic_path, cannot_write
from pixelwise.formats.base import Classes

MARK = "pixelwise"  # keyword of the text chunk
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_MARK_BYTES = 1 << 16


def label_image(labels: NDArray[np.uint8], spec: Classes) -> Image.Image:
    """Labels (H, W) as a palette image: its indices are the class ids, its colours those of the classes.

    Example:
        >>> from pixelwise.data.labels import LabelSpec
        >>> spec = LabelSpec(names=("a",), colors=((200, 0, 0),), values=((0,),))
        >>> label_image(np.zeros((2, 3), dtype=np.uint8), spec).convert("RGB").getpixel((0, 0))
        (200, 0, 0)
    """
    picture = Image.fromarray(labels)
    picture.putpalette(spec.palette_bytes())
    return picture


def write_png(path: str | Path, picture: Image.Image, mark: Mapping[str, Any] | None = None) -> None:
    """Write a PNG atomically, with `mark` (JSON-able values) as its text chunk.

    Raises:
        UsageError: the name does not end in .png.
        PixelwiseError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.png"
        >>> write_png(path, Image.new("L", (4, 3)), {"model": "abc"})
        >>> read_mark(path)
        {'model': 'abc'}
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: labels and pictures are written as PNG; give a name that ends in .png.")
    text = PngInfo()
    if mark is not None:
        text.add_text(MARK, json.dumps(dict(mark), sort_keys=True))
    level = 6 if picture.mode == "P" else 1  # photographs hardly shrink further, but would take far longer
    try:
        with atomic_path(path) as part:
            picture.save(part, format="PNG", pnginfo=text, compress_level=level)
    except OSError as error:
        raise cannot_write(path, error) from error


def read_mark(path: str | Path) -> dict[str, Any] | None:
    """The mark of a PNG that `write_png` wrote; None for every other file, however damaged.

    Only the chunks before the pixels are read, so asking costs nothing and no picture is too large to ask.

    Example:
        >>> read_mark("no/such.png") is None
        True
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(8) != _PNG_SIGNATURE:
                return None
            while len(header := file.read(8)) == 8:
                length, kind = struct.unpack(">I4s", header)
                if kind == b"IDAT" or length > _MAX_MARK_BYTES:
                    return None
                keyword, _, text = file.read(length + 4)[:-4].partition(b"\0")
                if kind == b"tEXt" and keyword == MARK.encode():
                    mark = json.loads(text)
                    return mark if isinstance(mark, dict) else None
    except (OSError, ValueError, RecursionError):
        return None
    return None
