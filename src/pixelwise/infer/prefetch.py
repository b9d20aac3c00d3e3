"""What is needed next is read and decoded by threads while the network works on what came before."""

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixelwise.formats.base import Source, SourceInfo
from pixelwise.infer.tiling import Read, Region

Item = TypeVar("Item")
Found = TypeVar("Found")

CACHE_BYTES = 64 << 20  # decoded pixels that are kept; what one window and the next need is kept beyond it
_CHUNK_BYTES = 2 << 20
_LARGEST_BLOCK_BYTES = 32 << 20  # of larger blocks the source itself must know how to give a part


def prefetch(
    function: Callable[[Item], Found], items: Iterable[Item]
) -> Generator[tuple[Item, "Future[Found]"], None, None]:
    """Apply `function` to each item in a background thread, which is always one item ahead of whoever iterates."""
    pending: deque[tuple[Item, Future[Found]]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="pixelwise-read")
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) == 2:
                yield pending.popleft()
        if pending:
            yield pending.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def read_batch(read: Read, windows: Iterable[Region]) -> Tensor:
    """Windows of one size, (N, C, height, width) float32 in the order of memory that networks run fastest in."""
    found = [read(*window).float() for window in windows]
    stacked = found[0][None] if len(found) == 1 else torch.stack(found)
    return stacked.contiguous(memory_format=torch.channels_last)


def chunk_px(info: SourceInfo) -> tuple[int, int]:
    """Rows and columns that are read at once: whole blocks of the file, about 2 MiB of them."""
    pixel = _pixel_bytes(info)
    sizes = zip(info.block_px, (info.height, info.width), strict=True)
    rows, columns = (max(1, min(block, size)) for block, size in sizes)
    if rows * columns * pixel > _LARGEST_BLOCK_BYTES:
        rows, columns = min(256, rows), min(256, columns)
    columns *= max(1, min(_CHUNK_BYTES // (rows * columns * pixel), math.ceil(info.width / columns)))
    if columns >= info.width:
        columns = info.width
        rows *= max(1, _CHUNK_BYTES // (rows * columns * pixel))
    return min(rows, info.height), columns


def kept_bytes(info: SourceInfo, window_rows: int = 256) -> int:
    """What a `WindowReader` keeps at most, for windows of the whole width."""
    rows, _ = chunk_px(info)
    row_bytes = info.width * _pixel_bytes(info)
    touched = 1 + math.ceil(2 * window_rows / rows)
    return min(max(CACHE_BYTES, touched * rows * row_bytes), info.height * row_bytes)


class WindowReader:
    """Reads windows of one plane; those that seem to come next are read by other threads in the meantime.

    Windows come in rows or columns at equal distances mostly, so the step from the one before to the present one is
    taken once more. A wrong guess costs time, never correctness. No block is decoded twice in a row.
    Windows of an image in memory are given as they are.
    """

    def __init__(self, source: Source, plane: int = 0) -> None:
        self.source, self.plane = source, plane
        self._in_memory = getattr(source, "pixels_in_memory", False)
        self._whole = Region(0, 0, source.info.height, source.info.width)
        self._chunk_px = rows, columns = chunk_px(source.info)
        self._room = CACHE_BYTES // (rows * columns * _pixel_bytes(source.info))
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pixelwise-window")
        self._chunks: OrderedDict[Region, Future[NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()
        self._last: Region | None = None

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[Any]:
        """The window (height, width, C), as `Source.read` gives it."""
        if self._in_memory:
            return self.source.read(top, left, height, width, self.plane)
        window = Region(top, left, height, width)
        with self._lock:
            needed = {chunk: self._future(chunk) for chunk in self._touched(window)}
            ahead = self._touched(self._next(window))
            for chunk in ahead:
                self._future(chunk)
            self._forget({*needed, *ahead})
            self._last = window
        result = np.empty((height, width, self.source.info.channels), dtype=self.source.info.dtype)
        for chunk, future in needed.items():
            both = chunk.overlap(window)
            result[both.within(window)] = future.result()[both.within(chunk)]
        return result

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(cancel_futures=True)
        self._chunks.clear()

    def _future(self, chunk: Region) -> "Future[NDArray[Any]]":
        if chunk not in self._chunks:
            self._chunks[chunk] = self._pool.submit(self.source.read, *chunk, self.plane)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk]

    def _touched(self, window: Region) -> list[Region]:
        """What is read at once of the image, as far as it lies under a window."""
        rows, columns = self._chunk_px
        tops = range(window.top // rows * rows, window.bottom, rows)
        lefts = range(window.left // columns * columns, window.right, columns)
        return [Region(top, left, rows, columns).overlap(self._whole) for top in tops for left in lefts]

    def _next(self, window: Region) -> Region:
        """The window that will be asked for next, by the step from the last to this one; an empty one if none is."""
        last = self._last or Region(window.top - window.height, window.left, 0, 0)
        down, left = window.top - last.top, 2 * window.left - last.left
        if window[:2] == last[:2]:
            return Region(0, 0, 0, 0)
        if down == 0 and left >= self._whole.width:  # the end of a row of tiles
            down, left = window.height, 0
        return Region(max(0, window.top + down), max(0, left), window.height, window.width).overlap(self._whole)

    def _forget(self, needed: set[Region]) -> None:
        for chunk in list(self._chunks):
            if len(self._chunks) <= self._room:
                return
            if chunk not in needed:
                del self._chunks[chunk]  # never cancelled: another thread may wait for it


class NextRows:
    """Reads windows of an image from top to row `bottom`, always the next one in a thread of its own."""

    def __init__(self, read: Read, bottom: int) -> None:
        self._read, self._bottom = read, bottom
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-rows")
        self._next: tuple[Region, Future[Tensor]] | None = None

    def __call__(self, top: int, left: int, height: int, width: int) -> Tensor:
        """(C, height, width), in the order of memory that convolutions run fastest in."""
        found = self._found(Region(top, left, height, width))
        after = min(height, self._bottom - top - height)
        if after > 0:
            then = Region(top + height, left, after, width)
            self._next = then, self._pool.submit(self._fetch, then)
        return found

    def _found(self, window: Region) -> Tensor:
        """The window, as far as possible from what was fetched, which may have other rows than were expected."""
        waiting, self._next = self._next, None
        if waiting is None:
            return self._fetch(window)
        place, fetched = waiting[0], waiting[1].result()
        if place._replace(height=window.height) != window:
            return self._fetch(window)
        missing = window.height - place.height
        if missing <= 0:
            return fetched[:, : window.height]
        rest = window._replace(top=place.bottom, height=missing)
        return torch.cat([fetched, self._fetch(rest)], dim=1)

    def _fetch(self, window: Region) -> Tensor:
        with torch.inference_mode():
            return read_batch(self._read, [window])[0]

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._next = None


def _pixel_bytes(info: SourceInfo) -> int:
    return info.channels * np.dtype(info.dtype).itemsize
