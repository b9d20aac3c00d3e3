"""Labels as PNG of any size, written row by row: indices with the palette of the classes, and the mark as a text chunk.

The chunks are those of the PNG specification (W3C, third edition, sections 5 and 11).
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pixelwise.errors import UsageError
from pixelwise.files import atomic_path, cannot_write
from pixelwise.formats.base import LABELS, Result
from pixelwise.formats.writers import MARK

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_INDEXED, _GREY = 3, 0  # colour types
_BAND_BYTES = 4 * 2**20
_CHUNK_BYTES = 2**20
_MAX_SIDE = 2**31 - 1


def write_png_labels(path: Path, result: Result) -> None:
    """Write labels as an indexed PNG (uint8), or as 16-bit grey without colours (uint16); a band of rows is in memory.

    Raises:
        UsageError: the result is a map of floats, or has several planes; the message names formats that can hold it.
        PixelwiseError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.formats import SourceInfo
        >>> from pixelwise.formats.writers import read_mark
        >>> spec = LabelSpec(names=("a", "b"), colors=((0, 0, 0), (9, 8, 7)), values=((0,), (1,)))
        >>> source = SourceInfo(location="a.jpg", format="jpeg", height=2, width=3, channels=3, dtype="uint8")
        >>> labels = np.eye(2, 3, dtype=np.uint8)
        >>> path = Path(tempfile.mkdtemp()) / "a.png"
        >>> write_png_labels(path, Result(kind="labels", spec=spec, source=source, dtype=labels.dtype,
        ...                               rows=lambda plane, top, bottom: labels[top:bottom], mark={"model": "abc"}))
        >>> Image.open(path).convert("RGB").getpixel((1, 1)), read_mark(path)
        ((9, 8, 7), {'model': 'abc'})
    """
    _refuse(path, result)
    try:
        with atomic_path(path) as part, part.open("wb") as file:
            _write(file, result)
    except OSError as error:
        raise cannot_write(path, error) from error


def _refuse(path: Path, result: Result) -> None:
    source = result.source
    if result.kind != LABELS or result.dtype.kind != "u" or result.dtype.itemsize > 2:
        raise UsageError(
            f"{path}: a map of {result.kind} ({result.dtype}) cannot be a PNG, which holds whole numbers up to 65,535. "
            "Write it as TIFF, GeoTIFF, Zarr or .npy."
        )
    if source.planes > 1:
        raise UsageError(
            f"{path}: {source.location} has {source.planes:,} planes, and a PNG holds one. Write a format that holds them "
            "all: TIFF, OME-TIFF, NIfTI, Zarr, OME-Zarr or .npy."
        )
    if max(source.height, source.width) > _MAX_SIDE:
        raise UsageError(f"{path}: a PNG has at most {_MAX_SIDE:,} rows and columns. Write it as TIFF.")


def _write(file: BinaryIO, result: Result) -> None:
    height, width, bits = result.source.height, result.source.width, result.dtype.itemsize * 8
    color = _INDEXED if bits == 8 else _GREY
    file.write(_SIGNATURE)
    file.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)))
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
