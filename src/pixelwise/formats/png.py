"""PNG files: pictures through Pillow, and labels of any size row by row, with the palette of the classes.

Both carry the provenance record as a text chunk. The chunks are those of the PNG specification (W3C, third edition,
sections 5 and 11).
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixelwise.errors import UsageError
from pixelwise.files import atomic_path, cannot_write
from pixelwise.formats.base import LABELS, Classes, Result

MARK = "pixelwise"  # keyword of the text chunk
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_INDEXED, _GREY = 3, 0  # colour types
_BAND_BYTES, _CHUNK_BYTES = 4 << 20, 1 << 20
_MAX_SIDE = 2**31 - 1


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
    try:
        with atomic_path(path) as part:
            picture.save(part, format="PNG", pnginfo=text, compress_level=level)
    except OSError as error:
        raise cannot_write(path, error) from error


def chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Kind and bytes of each chunk of a PNG, the file at its content; none of another file."""
    file.seek(0)
    if file.read(8) != SIGNATURE:
        return
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        after = file.tell() + length + 4
        yield kind, length
        file.seek(after)


def write_png_labels(path: Path, result: Result) -> None:
    """Write labels as an indexed PNG (uint8), or as 16-bit grey without colours (uint16); a band of rows is in memory."""
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
    try:
        with atomic_path(path) as part, part.open("wb") as file:
            _write_labels(file, result)
    except OSError as error:
        raise cannot_write(path, error) from error


def _write_labels(file: IO[bytes], result: Result) -> None:
    height, width, bits = result.source.height, result.source.width, result.dtype.itemsize * 8
    color = _INDEXED if bits == 8 else _GREY
    file.write(SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)))
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
