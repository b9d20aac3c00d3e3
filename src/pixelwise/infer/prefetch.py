"""Images are opened, and what is needed next is read and decoded by threads while the network works on what came before."""

import hashlib
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixelwise.data import samples
from pixelwise.errors import UsageError
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.network import Read, Region

Item = TypeVar("Item")
Found = TypeVar("Found")

ONE_PASS_PX = 1 << 20
"""Images of no more pixels are labelled in one pass, and kept in memory."""

CACHE_BYTES = 64 << 20
_CHUNK_BYTES = 2 << 20
_LARGEST_BLOCK_BYTES = 32 << 20  # of larger blocks the source itself must know how to give a part

Chunk = tuple[int, int]  # its place in the grid: row, column


class ArraySource(Source):
    """An image in memory; of a small file that was read as a whole, with what else the file knows (it may change now).

    Args:
        pixels: (H, W, C).
        origin: the open file that they are from, which is closed with this.
        name: for errors, where there is no file.
        valid: where there is data, (H, W); None is everywhere.
    """

    pixels_in_memory = True

    def __init__(
        self,
        pixels: NDArray[Any],
        origin: Source | None = None,
        *,
        name: str = "the image",
        valid: NDArray[np.bool_] | None = None,
    ) -> None:
        height, width, channels = pixels.shape
        self.pixels, self.origin, self._valid = pixels, origin, valid
        self.info = origin.info if origin else SourceInfo(
            location=name, format="array", height=height, width=width, channels=channels, dtype=pixels.dtype.name
        )  # fmt: skip
        self.metadata = origin.metadata if origin else {}

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        return self.pixels[top : top + height, left : left + width]

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        return None if self._valid is None else self._valid[top : top + height, left : left + width]

    def fingerprint(self) -> str:
        return self.origin.fingerprint() if self.origin else hashlib.sha256(self.pixels.tobytes()).hexdigest()

    def check_unchanged(self) -> None:
        if self.origin:
            self.origin.check_unchanged()

    def close(self) -> None:
        if self.origin:
            self.origin.close()


def open_image(location: str | Path, card: ModelCard, reading: Mapping[str, Any] | None = None) -> Source:
    """Open an image as those of the training were read, as far as its format has these options; `reading` overrides."""
    try:
        return samples.open_image(location, {**card.reading, **(reading or {})}, len(card.mean))
    except UsageError:
        if not card.reading:
            raise
        return samples.open_image(location, reading, card.in_channels)


class OnePlane(Source):
    """A single plane of an open volume, which is not closed with this."""

    def __init__(self, source: Source, plane: int) -> None:
        self._source, self._plane = source, plane
        self.info, self.metadata = replace(source.info, planes=1), source.metadata

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        return self._source.read(top, left, height, width, self._plane)

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        return self._source.valid(top, left, height, width, self._plane)

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}-{self._plane}"

    def check_unchanged(self) -> None:
        self._source.check_unchanged()


def in_memory(source: Source) -> Source:
    """The same image, read as a whole if it is small, so that this thread decodes it."""
    info = source.info
    if info.planes > 1 or info.height * info.width > ONE_PASS_PX:
        return source
    whole = (0, 0, info.height, info.width)
    return ArraySource(source.read(*whole), source, valid=source.valid(*whole))


def prefetch(
    function: Callable[[Item], Found],
    items: Iterable[Item],
    *,
    threads: int = 1,
    discard: Callable[[Found], None] | None = None,
) -> Generator[tuple[Item, "Future[Found]"], None, None]:
    """Apply `function` to each item in background threads, each always one item ahead of whoever iterates."""
    pending: deque[tuple[Item, Future[Found]]] = deque()
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pixelwise-read")
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) == threads + 1:
                yield pending.popleft()
        while pending:  # not all at once: who has iterated to the end should not keep what was read
            yield pending.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
        for _, future in pending:
            if discard is not None and not future.cancelled() and future.exception() is None:
                discard(future.result())


def read_batch(read: Read, windows: Iterable[Region]) -> Tensor:
    """Windows of one size, (N, C, height, width) float32 in the order of memory that networks run fastest in."""
    found = [read(window.top, window.left, window.height, window.width).float() for window in windows]
    stacked = found[0][None] if len(found) == 1 else torch.stack(found)
    return stacked.contiguous(memory_format=torch.channels_last)


def chunk_px(info: SourceInfo) -> tuple[int, int]:
    """Rows and columns that are read at once: whole blocks of the file, about 2 MiB of them."""
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
    """What a `WindowReader` keeps at most, for windows of the whole width."""
    rows, _ = chunk_px(info)
    row_bytes = info.width * info.channels * np.dtype(info.dtype).itemsize
    touched = 1 + math.ceil(2 * window_rows / rows)
    return min(max(CACHE_BYTES, touched * rows * row_bytes), info.height * row_bytes)


class WindowReader:
    """Reads windows of one plane; those that seem to come next are read by other threads in the meantime.

    Windows come in rows or columns at equal distances mostly, so the step from the one before to the present one is
    taken once more. A wrong guess costs time, never correctness. No block is decoded twice in a row.

    Args:
        source: the image; of one in memory windows are given as they are.
        plane: of a stack.
        cache_bytes: decoded pixels that are kept; what one window and the next need is kept beyond it.
        threads: that read.
    """

    def __init__(self, source: Source, plane: int = 0, *, cache_bytes: int = CACHE_BYTES, threads: int = 2) -> None:
        self.source, self.plane, self.cache_bytes = source, plane, cache_bytes
        self._in_memory = getattr(source, "pixels_in_memory", False)
        self._rows, self._columns = chunk_px(source.info)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pixelwise-window")
        self._chunks: OrderedDict[Chunk, Future[NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()
        self._last: Region | None = None

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[Any]:
        """The window (height, width, C), as `Source.read` gives it."""
        if self._in_memory:
            return self.source.read(top, left, height, width, self.plane)
        window = Region(top, left, height, width)
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

    def __exit__(self, *error: object) -> None:
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

    def _touched(self, window: Region) -> Iterator[Chunk]:
        rows = range(window.top // self._rows, (window.bottom - 1) // self._rows + 1)
        return product(rows, range(window.left // self._columns, (window.right - 1) // self._columns + 1))

    def _next(self, window: Region) -> Region | None:
        """The window that will be asked for next, by the step from the last to this one."""
        left = window.left
        if self._last is None:
            down, right = window.height, 0
        else:
            down, right = window.top - self._last.top, left - self._last.left
        if (down, right) == (0, 0):
            return None
        if down == 0 and left + right >= self.source.info.width:  # the end of a row of tiles
            down, left, right = window.height, 0, 0
        y, x = max(0, window.top + down), max(0, left + right)
        rows, columns = _size(self.source.info)
        if y >= rows or x >= columns:
            return None
        return Region(y, x, min(window.height, rows - y), min(window.width, columns - x))

    def _forget(self, needed: set[Chunk]) -> None:
        pixel = self.source.info.channels * np.dtype(self.source.info.dtype).itemsize
        room = self.cache_bytes // (self._rows * self._columns * pixel)
        for chunk in list(self._chunks):
            if len(self._chunks) <= room:
                return
            if chunk not in needed:
                del self._chunks[chunk]  # never cancelled: another thread may wait for it


class NextRows:
    """Reads windows of an image from top to bottom, always the next one in a thread of its own.

    Args:
        read: called from one other thread.
        bottom: the row below the last that will be asked for.
    """

    def __init__(self, read: Read, bottom: int) -> None:
        self._read, self._bottom = read, bottom
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-rows")
        self._next: tuple[Region, Future[Tensor]] | None = None

    def __call__(self, top: int, left: int, height: int, width: int) -> Tensor:
        """(C, height, width), in the order of memory that convolutions run fastest in."""
        found = self._found(top, left, height, width)
        after = min(height, self._bottom - top - height)
        if after > 0:
            then = Region(top + height, left, after, width)
            self._next = (then, self._pool.submit(self._fetch, then))
        return found

    def _found(self, top: int, left: int, height: int, width: int) -> Tensor:
        """The window, as far as possible from what was fetched, which may have other rows than were expected."""
        waiting, self._next = self._next, None
        if waiting is None:
            return self._fetch(Region(top, left, height, width))
        place, fetched = waiting[0], waiting[1].result()
        if (place.top, place.left, place.width) != (top, left, width):
            return self._fetch(Region(top, left, height, width))
        missing = height - place.height
        if missing <= 0:
            return fetched[:, :height]
        return torch.cat([fetched, self._fetch(Region(top + place.height, left, missing, width))], dim=1)

    def _fetch(self, window: Region) -> Tensor:
        with torch.inference_mode():
            return read_batch(self._read, [window])[0]

    def __enter__(self) -> "NextRows":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._next = None


def _size(info: SourceInfo) -> tuple[int, int]:
    return info.height, info.width
