"""Windows of a source, read ahead: while one is computed the next is decoded, and no block is decoded twice in a row."""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pixelwise.formats import Source, SourceInfo

CACHE_BYTES = 64 << 20
_CHUNK_BYTES = 2 << 20
_LARGEST_BLOCK_BYTES = 32 << 20  # of larger blocks the source itself must know how to give a part

Window = tuple[int, int, int, int]  # top, left, height, width
Chunk = tuple[int, int]  # its place in the grid: row, column


def chunk_px(info: SourceInfo) -> tuple[int, int]:
    """Rows and columns that are read at once: whole blocks of the file, about 2 MiB of them.

    Example:
        >>> chunk_px(SourceInfo(location="a.tif", format="tiff", height=9000, width=9000, channels=3, dtype="uint8"))
        (256, 2560)
    """
    pixel = info.channels * np.dtype(info.dtype).itemsize
    rows, columns = (max(1, min(block, size)) for block, size in zip(info.block_px, _size(info), strict=True))
    if rows * columns * pixel > _LARGEST_BLOCK_BYTES:
        rows, columns = min(256, rows), min(256, columns)
    columns *= max(1, min(_CHUNK_BYTES // (rows * columns * pixel), math.ceil(info.width / columns)))
    if columns >= info.width:
        columns = info.width
        rows *= max(1, _CHUNK_BYTES // (rows * columns * pixel))
    return min(rows, info.height), columns


def kept_bytes(info: SourceInfo, window_rows: int = 256) -> int:
    """What a reader of this image keeps at most, for windows of the whole width.

    Args:
        info: of the image.
        window_rows: of the highest window; the next one is read ahead as well.

    Example:
        >>> info = SourceInfo(location="a.tif", format="tiff", height=30_000, width=30_000, channels=3, dtype="uint8")
        >>> kept_bytes(info) >> 20, kept_bytes(info, window_rows=512) >> 20
        (65, 109)
    """
    rows, _ = chunk_px(info)
    row_bytes = info.width * info.channels * np.dtype(info.dtype).itemsize
    touched = 1 + math.ceil(2 * window_rows / rows)
    return min(max(CACHE_BYTES, touched * rows * row_bytes), info.height * row_bytes)


class AheadReader:
    """Reads windows of one plane; those that seem to come next are read by other threads in the meantime.

    Windows come in rows or columns at equal distances mostly, so the step from the one before to the present one is
    taken once more. A wrong guess costs time, never correctness.

    Args:
        source: the image.
        plane: of a stack.
        cache_bytes: decoded pixels that are kept; what one window and the next need is kept beyond it.
        threads: that read.

    Example:
        >>> from pixelwise.formats import SourceInfo
        >>> class Ramp(Source):
        ...     info = SourceInfo(location="ramp", format="npy", height=600, width=2, channels=1, dtype="uint16")
        ...     def read(self, top, left, height, width, plane=0):
        ...         return np.arange(top, top + height, dtype=np.uint16).repeat(width).reshape(height, width, 1)
        ...     def fingerprint(self):
        ...         return "0"
        ...     def check_unchanged(self):
        ...         pass
        >>> with AheadReader(Ramp()) as reader:
        ...     reader.read(255, 0, 2, 2)[:, :, 0].tolist()
        [[255, 255], [256, 256]]
    """

    def __init__(self, source: Source, plane: int = 0, *, cache_bytes: int = CACHE_BYTES, threads: int = 2) -> None:
        self.source, self.plane, self.cache_bytes = source, plane, cache_bytes
        self._rows, self._columns = chunk_px(source.info)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pixelwise-window")
        self._chunks: OrderedDict[Chunk, Future[NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()
        self._last: Window | None = None

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[Any]:
        """The window (height, width, C), as `Source.read` gives it.

        Raises:
            DataError: as `Source.read`.
        """
        window = (top, left, height, width)
        with self._lock:
            needed = {chunk: self._future(chunk) for chunk in self._touched(window)}
            coming = self._next(window)
            ahead = list(self._touched(coming)) if coming else []
            for chunk in ahead:
                self._future(chunk)
            self._forget({*needed, *ahead})
            self._last = window
        info = self.source.info
        result = np.empty((height, width, info.channels), dtype=info.dtype)
        for (row, column), future in needed.items():
            part, y, x = future.result(), row * self._rows, column * self._columns
            first, last = max(top, y), min(top + height, y + part.shape[0])
            start, stop = max(left, x), min(left + width, x + part.shape[1])
            result[first - top : last - top, start - left : stop - left] = part[
                first - y : last - y, start - x : stop - x
            ]
        return result

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(cancel_futures=True)
        self._chunks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _future(self, chunk: Chunk) -> "Future[NDArray[Any]]":
        if chunk not in self._chunks:
            self._chunks[chunk] = self._pool.submit(self._load, chunk)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk]

    def _load(self, chunk: Chunk) -> NDArray[Any]:
        info = self.source.info
        top, left = chunk[0] * self._rows, chunk[1] * self._columns
        height, width = min(self._rows, info.height - top), min(self._columns, info.width - left)
        return self.source.read(top, left, height, width, self.plane)

    def _touched(self, window: Window) -> Iterator[Chunk]:
        top, left, height, width = window
        rows = range(top // self._rows, (top + height - 1) // self._rows + 1)
        return product(rows, range(left // self._columns, (left + width - 1) // self._columns + 1))

    def _next(self, window: Window) -> Window | None:
        """The window that will be asked for next, by the step from the last to this one."""
        top, left, height, width = window
        if self._last is None:
            down, right = height, 0
        else:
            down, right = top - self._last[0], left - self._last[1]
        if (down, right) == (0, 0):
            return None
        if down == 0 and left + right >= self.source.info.width:  # the end of a row of tiles
            down, left, right = height, 0, 0
        y, x = max(0, top + down), max(0, left + right)
        rows, columns = _size(self.source.info)
        if y >= rows or x >= columns:
            return None
        return y, x, min(height, rows - y), min(width, columns - x)

    def _forget(self, needed: set[Chunk]) -> None:
        pixel = self.source.info.channels * np.dtype(self.source.info.dtype).itemsize
        room = self.cache_bytes // (self._rows * self._columns * pixel)
        for chunk in list(self._chunks):
            if len(self._chunks) <= room:
                return
            if chunk not in needed:
                del self._chunks[chunk]  # never cancelled: another thread may wait for it


def _size(info: SourceInfo) -> tuple[int, int]:
    return info.height, info.width
