"""Windows of the pages of a TIFF: only the strips or tiles that a window touches are read and decoded."""

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.blocks import BlockCache, Bytes, StoredArray
from pixelwise.formats.tiff_codecs import IMAGE_CODECS, check_jpeg, decode_image
from pixelwise.formats.tiff_decode import quiet

MAX_BLOCK_BYTES = 2**30
"""Strips and tiles that are larger than this when decoded are refused; they can only be decoded as a whole."""

_JPEG = (6, 7, 34892, 33007)
_BOMB_BYTES, _BOMB_RATIO = 64 * 2**20, 4096  # deflate reaches 1032
_MIN_CACHE, _MAX_CACHE = 32 * 2**20, 256 * 2**20
_WHOLE_BYTES = 8  # bits of numbers that are stored as they are used, in steps of

Part = tuple[int, int]
"""Start and stop."""


class PageReader:
    """Reads windows of equal pages of one file, from any number of threads.

    Args:
        file: the bytes.
        keyframe: tifffile's page that all pages are like.
        page_at: gives the page of a number; called under a lock.

    Attributes:
        block: rows and columns that are stored together.
        cache_bytes: the most that decoded blocks take.

    Raises:
        DataError: its strips or tiles are too large.
    """

    def __init__(self, file: Bytes, keyframe: Any, page_at: Callable[[int], Any]) -> None:
        self._file, self._key, self._page_at = file, keyframe, page_at
        self._lock = threading.Lock()
        self._tables: dict[int, tuple[NDArray[Any], NDArray[Any], Any]] = {}
        self.dtype = np.dtype(keyframe.dtype)
        self._samples = int(keyframe.samplesperpixel) if keyframe.planarconfig == 1 else 1
        _, self._depth, self._height, self._width, _ = keyframe.shaped
        if keyframe.is_tiled:
            self._lengths = (int(keyframe.tiledepth), int(keyframe.tilelength), int(keyframe.tilewidth))
        else:
            self._lengths = (1, max(1, min(int(keyframe.rowsperstrip), self._height)), self._width)
        whole = (self._depth, self._height, self._width)
        self._grid = tuple(-(-size // length) for size, length in zip(whole, self._lengths, strict=True))
        self.block = (min(self._lengths[1], self._height), min(self._lengths[2], self._width))
        self._row_bytes = self._bytes_of_rows()
        block_bytes = math.prod(self._lengths) * self._samples * self.dtype.itemsize
        if not self._row_bytes and block_bytes > MAX_BLOCK_BYTES:
            raise DataError(_too_large(keyframe.is_tiled, block_bytes))
        row = block_bytes * self._grid[2]
        self.cache_bytes = 0 if self._row_bytes else max(block_bytes, min(max(2 * row, _MIN_CACHE), _MAX_CACHE))
        self._cache = BlockCache(self.cache_bytes)
        with quiet():
            self._decode: Any = None if self._row_bytes else keyframe.decode
            self._jpeg = {"jpegheader": keyframe.jpegheader} if int(keyframe.compression) in _JPEG else None

    def read(self, page: int, depth: int, rows: Part, columns: Part, samples: Part) -> NDArray[Any]:
        """The window as (rows, columns, samples), as stored.

        Raises:
            DataError: or what is in `DECODE_ERRORS`: a block of it is damaged or missing.
        """
        result = np.empty((rows[1] - rows[0], columns[1] - columns[0], samples[1] - samples[0]), self.dtype)
        separate = self._samples == 1 and self._key.planarconfig != 1
        for sample in range(*samples) if separate else [0]:
            target = result[:, :, sample - samples[0] : sample - samples[0] + 1] if separate else result
            inner = (0, 1) if separate else samples
            steps = [
                range(part[0] // n, -(-part[1] // n))
                for part, n in zip((rows, columns), self._lengths[1:], strict=True)
            ]
            for row, column in itertools.product(*steps):
                self._paste(target, page, (sample, depth, row, column), (rows, columns, inner))
        return result

    def close(self) -> None:
        """Let go of the decoded blocks."""
        self._cache = BlockCache(0)

    def _paste(
        self, target: NDArray[Any], page: int, place: tuple[int, int, int, int], window: tuple[Part, Part, Part]
    ) -> None:
        """Copy what one strip or tile has of the window."""
        sample, depth, row, column = place
        layers, length, width = self._lengths
        top, left = row * length, column * width
        height = min(length, self._height - top)
        rows = max(window[0][0] - top, 0), min(window[0][1] - top, height)
        columns = max(window[1][0] - left, 0), min(window[1][1] - left, width, self._width - left)
        index = ((sample * self._grid[0] + depth // layers) * self._grid[1] + row) * self._grid[2] + column
        part = target[
            top + rows[0] - window[0][0] : top + rows[1] - window[0][0],
            left + columns[0] - window[1][0] : left + columns[1] - window[1][0],
        ]
        if self._row_bytes:
            part[...] = self._stored_rows(page, index, height, rows, columns, window[2])
            return
        block = self._cache.get((page, index), lambda: self._decoded(page, index))
        if not block.size:
            part[...] = self._key.nodata
            return
        found = block[depth % layers, slice(*rows), slice(*columns), slice(*window[2])]
        if found.shape != part.shape:
            raise DataError(f"a block of it has the shape {block.shape}, which is less than its tags say.")
        part[...] = found

    def _table(self, page: int) -> tuple[NDArray[Any], NDArray[Any], Any]:
        """Offsets and lengths of the blocks of a page, and the JPEG tables that they share."""
        with self._lock, quiet():
            if page not in self._tables:
                found = self._page_at(page)
                if found is None:
                    raise DataError(f"its page {page + 1} is missing, or lies in another file.")
                offsets = np.asarray(found.dataoffsets, dtype=np.uint64)
                counts = np.asarray(found.databytecounts, dtype=np.uint64)
                wanted = math.prod(self._grid) * (1 if self._samples > 1 else int(self._key.shaped[0]))
                if min(len(offsets), len(counts)) < wanted:
                    raise DataError(f"of its {wanted:,} blocks only {min(len(offsets), len(counts)):,} are there.")
                if len(self._tables) > 64:
                    self._tables.clear()
                self._tables[page] = offsets, counts, found.jpegtables if self._jpeg else None
            return self._tables[page]

    def check(self, page: int) -> None:
        """Raise `DataError` if blocks of the page should lie behind the end of the file."""
        offsets, counts, _ = self._table(page)
        there = counts[: len(offsets)] > 0
        ends = offsets[: len(there)][there] + counts[: len(there)][there]
        if ends.size and int(ends.max()) > self._file.size:
            raise DataError("its pixels reach beyond the end of the file; it is truncated.")

    def _decoded(self, page: int, index: int) -> NDArray[Any]:
        """One block (depth, rows, columns, samples); of size 0 if the file leaves it out."""
        offsets, counts, tables = self._table(page)
        size = int(counts[index])
        if not size or not int(offsets[index]):
            return np.empty(0, self.dtype)
        claimed = math.prod(self._lengths) * self._samples * self.dtype.itemsize
        if claimed > max(_BOMB_BYTES, _BOMB_RATIO * size):
            raise DataError(f"a block of it takes {claimed:,} bytes when decoded, which {size:,} bytes cannot hold.")
        data = self._file.read(int(offsets[index]), size)
        if int(self._key.compression) in IMAGE_CODECS:
            return self._decoded_image(data, index)
        if self._jpeg is not None:
            check_jpeg(data, self._lengths[1:])
        arguments = {} if self._jpeg is None else {**self._jpeg, "jpegtables": tables}
        with quiet():
            block = np.asarray(self._decode(data, index, **arguments)[0])
        if block.ndim != 4:
            raise DataError(f"a block of it has {block.ndim} dimensions when decoded.")
        return block

    def _decoded_image(self, data: bytes, index: int) -> NDArray[Any]:
        if self._lengths[0] != 1:
            raise DataError(f"its tiles are {self._lengths[0]} planes deep, which its compression does not know.")
        row, column = index // self._grid[2] % self._grid[1], index % self._grid[2]
        height = min(self._lengths[1], self._height - row * self._lengths[1])
        width = min(self._lengths[2], self._width - column * self._lengths[2])
        shapes: list[tuple[int, ...]] = [(*self._lengths[1:], self._samples), (height, width, self._samples)]
        return decode_image(data, int(self._key.compression), shapes, self.dtype.newbyteorder("="))[None]

    def _bytes_of_rows(self) -> int:
        """How many bytes a row of a strip takes, if its rows can be read one by one; otherwise 0."""
        page = self._key
        plain = int(page.compression) == 1 and page.predictor == 1 and page.fillorder == 1 and not page.is_tiled
        bits = page.bitspersample
        if not plain or page.is_subsampled or page.sampleformat == 5 or not isinstance(bits, int):
            return 0
        if bits % _WHOLE_BYTES and self.dtype.kind not in "bui":
            return 0
        if bits in (8, 16, 32, 64) and self.dtype.itemsize * 8 == bits:
            return self._width * self._samples * self.dtype.itemsize
        return -(-self._width * self._samples * bits // 8) if self.dtype.kind in "bui" else 0

    def _stored_rows(
        self, page: int, index: int, height: int, rows: Part, columns: Part, samples: Part
    ) -> NDArray[Any] | Any:
        offsets, counts, _ = self._table(page)
        offset, size = int(offsets[index]), int(counts[index])
        if not size or not offset:
            return self._key.nodata
        if size < height * self._row_bytes:
            raise EOFError(f"a strip has {size:,} bytes, but its rows take {height * self._row_bytes:,}")
        order = self.dtype.newbyteorder(self._key.parent.byteorder)
        if self._row_bytes == self._width * self._samples * self.dtype.itemsize and self.dtype.kind != "b":
            stored = StoredArray(self._file, offset, (height, self._width, self._samples), order)
            return stored.read([rows, columns, samples])
        data = self._file.read(offset + rows[0] * self._row_bytes, (rows[1] - rows[0]) * self._row_bytes)
        runs = self._width * self._samples
        unpacked = imagecodecs.packints_decode(data, order, self._key.bitspersample, runlen=runs)
        pixels = np.asarray(unpacked).reshape(rows[1] - rows[0], self._width, self._samples)
        return pixels[:, slice(*columns), slice(*samples)]


def _too_large(tiled: bool, size: int) -> str:
    kind = "tiles" if tiled else "strips"
    return (
        f"it is stored in compressed {kind} of {size / 2**30:,.1f} GiB, which can only be decoded as a whole; at most "
        f"{MAX_BLOCK_BYTES / 2**30:g} GiB are taken. Save it in tiles (tiffcp -8 -t -w 512 -l 512 in.tif out.tif)."
    )
