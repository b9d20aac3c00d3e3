"""Windows of maps, and the memory in which their rows wait until nothing needs them any more.

Rows of a skip wait for many stripes. Were they to lie among the maps that come and go, what is freed between them would
be of no size that is asked for next, and the process would take two or three times what the maps do: `RowMemory` keeps them
apart, and `SpillFile` those that the memory cannot hold. Freed memory of one size is of no use for the next map, which is a
little larger, so malloc asks for more. It is fastest to let it, within a limit; beyond that `malloc_trim` frees all of it.
"""

import ctypes
import math
import mmap
import os
import sys
import tempfile
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixelwise.errors import PixelwiseError

_STATM = Path("/proc/self/statm")
_MARGIN = 0.05  # of the limit: how much is freed in vain before the next attempt
_STEPS = 8  # sizes between one power of two and the next
_LEAST_BYTES = 1 << 9
_MAPPED_BYTES = 1 << 26  # at once, at least; what is not used of it takes no memory
_OWN_MEMORY = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Span(NamedTuple):
    """The places start ... stop - 1 along one axis; empty where stop is not beyond start."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many places, 0 for an empty span."""
        return max(0, self.stop - self.start)

    def clip(self, length: int) -> "Span":
        """The part within an axis of `length` places; an empty part keeps to the nearer end."""
        start = min(max(self.start, 0), length)
        return Span(start, min(max(self.stop, start), length))

    def union(self, other: "Span") -> "Span":
        """The smallest span that holds both; an empty one adds nothing."""
        if self.length == 0 or other.length == 0:
            return other if self.length == 0 else self
        return Span(min(self.start, other.start), max(self.stop, other.stop))


class Window(NamedTuple):
    """A rectangle of a map: its rows and its columns."""

    rows: Span
    columns: Span

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows.length, self.columns.length

    def union(self, other: "Window") -> "Window":
        """The smallest window that holds both; an empty one adds nothing."""
        if 0 in self.size or 0 in other.size:
            return other if 0 in self.size else self
        return Window(self.rows.union(other.rows), self.columns.union(other.columns))


class RowMemory:
    """Memory from the system itself for rows that wait; what is no longer used serves rows of the same size, rounded."""

    def __init__(self) -> None:
        self._free: dict[int, list[tuple[mmap.mmap, int]]] = defaultdict(list)  # (mapping, offset), by size
        self._last, self._used = mmap.mmap(-1, 1, **_OWN_MEMORY), 1  # the last mapping, and how much of it is given

    def copy(self, rows: Tensor) -> Tensor:
        """A copy whose axes lie in memory in the same order, without gaps."""
        size = rounded(rows.nbytes)
        if not (free := self._free[size]):
            try:
                if self._used + size > len(self._last):
                    self._last, self._used = mmap.mmap(-1, max(size, _MAPPED_BYTES), **_OWN_MEMORY), 0
            except OSError as error:
                raise MemoryError(str(error)) from error
            free.append((self._last, self._used))
            self._used += size
        memory, offset = free.pop()
        place = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)
        weakref.finalize(place.untyped_storage(), free.append, (memory, offset))  # when no tensor lies there any more
        return _as_rows(place[: rows.nbytes], rows.shape, _order_of_axes(rows), rows.dtype).copy_(rows)


def rounded(size: int) -> int:
    """The next of the sizes that are kept apart: an eighth of a power of two, 512 bytes at least."""
    step = max(_LEAST_BYTES, 1 << max(0, math.ceil(math.log2(max(size, 1))) - 1) >> int(math.log2(_STEPS)))
    return -(-size // step) * step


def _order_of_axes(rows: Tensor) -> tuple[int, ...]:
    """The axes as they lie in memory, the one with the largest stride first."""
    return tuple(sorted(range(rows.ndim), key=rows.stride, reverse=True))


def _as_rows(data: Tensor, shape: Sequence[int], order: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Bytes as the tensor of this shape whose axes lie in them in this order."""
    return (
        data.view(dtype)
        .view([shape[axis] for axis in order])
        .permute([order.index(axis) for axis in range(len(order))])
    )


class Spilled(NamedTuple):
    """Where rows lie in the file, and what they are: `order` is that of their axes, largest stride first."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype


class SpillFile:
    """Puts tensors of the CPU into a nameless file in `folder` and gives them back; `size` is its length in bytes.

    The file goes when it is closed or the process ends. What the disk refuses is a PixelwiseError.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.size = folder, 0
        self._free: dict[int, list[int]] = defaultdict(list)  # offsets, by size
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as the spill file
        except OSError as error:
            raise PixelwiseError(f"{folder}: rows that wait cannot be stored there ({error.strerror}).") from error

    def __enter__(self) -> "SpillFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, rows: Tensor) -> Spilled:
        """Store a copy."""
        size, order = rounded(rows.nbytes), _order_of_axes(rows)
        if not self._free[size]:
            self._free[size].append(self.size)
            self.size += size
        offset = self._free[size].pop()
        self._write(offset, rows.permute(order))
        return Spilled(offset, rows.nbytes, tuple(rows.shape), order, rows.dtype)

    def take(self, item: Spilled) -> Tensor:
        """What was put, in memory of its own; its place is given to others."""
        rows = self._read(item)
        self.give_back(item)
        return rows

    def give_back(self, item: Spilled) -> None:
        """Forget it."""
        self._free[rounded(item.nbytes)].append(item.offset)

    def _write(self, offset: int, rows: Tensor) -> None:
        rest = rows.contiguous().flatten().view(torch.uint8).numpy().data
        try:
            self._file.seek(offset)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise PixelwiseError(
                f"{self._folder}: no room for rows of maps that wait on this disk ({error.strerror}). Free some space, or "
                "allow more memory."
            ) from error

    def _read(self, item: Spilled) -> Tensor:
        data = torch.empty(item.nbytes, dtype=torch.uint8)
        rest, got = data.numpy().data, 1
        try:
            self._file.seek(item.offset)
            while rest and got:
                got = self._file.readinto(rest)
                rest = rest[got:]
        except OSError as error:
            raise PixelwiseError(
                f"{self._folder}: rows that wait on this disk cannot be read ({error.strerror})."
            ) from error
        if rest:
            raise PixelwiseError(f"{self._folder}: the file of rows that wait on this disk has become shorter.")
        return _as_rows(data, item.shape, item.order, item.dtype)


class Block(NamedTuple):
    """Rows `first` ... `stop` - 1 of a map, with these columns; where they are spilled, `rows` has their shape only."""

    first: int
    stop: int
    rows: Tensor
    columns: Span
    is_apart: bool = False  # from the maps that come and go
    spilled: Spilled | None = None


@dataclass
class Kept:
    """The last rows of a map: some from `start` (inclusive) to `stop` (exclusive), in blocks as they were computed.

    `axes` are those of rows and columns, `columns` those that rows have when they come. Rows wait in `memory` (None: where
    they are) and, if for long, in the spill file (None: among the others).
    """

    axes: tuple[int, int]
    columns: Span
    start: int
    stop: int
    memory: RowMemory | None = None
    spill_file: SpillFile | None = None
    _blocks: deque[Block] = field(default_factory=deque)  # in order

    def append(self, rows: Tensor) -> None:
        """Take the next rows."""
        if count := rows.shape[self.axes[0]]:
            self._blocks.append(Block(self.stop, self.stop + count, rows, self.columns))
            self.stop += count

    def take(self, window: Window) -> Tensor:
        """The rows and columns of a window, without a copy where one block holds them all."""
        self.fetch(window.rows)
        found = [self._part(block, window) for block in self._blocks if _meets(block, window.rows)]
        if not found:
            raise RuntimeError("a step asks for rows of a map that were not computed")
        return found[0] if len(found) == 1 else torch.cat(found, dim=self.axes[0])

    def is_whole(self, window: Window) -> bool:
        """Whether `take` need not copy: one block holds all of the rows."""
        start, stop = window.rows
        return start >= stop or any(block.first <= start and stop <= block.stop for block in self._blocks)

    def nbytes(self) -> int:
        """Bytes of the rows that are kept in memory."""
        return sum(block.rows.nbytes for block in self._blocks if block.spilled is None)

    def drop_before(self, row: int) -> None:
        """Let go of the rows above `row`. Of a block that is mostly gone the rest is copied, so that its memory is free."""
        self.start = max(self.start, min(row, self.stop))
        while self._blocks:
            block = self._blocks[0]
            kept = block.stop - self.start
            if kept > 0 and (block.spilled is not None or 2 * kept > block.stop - block.first):
                return
            self._blocks.popleft()
            if kept > 0:
                self._blocks.appendleft(self._moved(block, block.columns))
                return
            if block.spilled is not None and self.spill_file is not None:
                self.spill_file.give_back(block.spilled)

    def narrow_before(self, row: int, columns: Span) -> None:
        """Of the blocks that end above `row`, keep these columns only: a skip needs fewer than what it branches off from."""
        for index in range(len(self._blocks) - 1, -1, -1):
            block = self._blocks[index]
            if block.stop > row:
                continue
            # Who still needs this block has its columns in both: it was narrowed to what all of those needed.
            left = Span(max(columns.start, block.columns.start), min(columns.stop, block.columns.stop))
            if left == block.columns or block.spilled is not None:
                return  # and so are those before it
            self._blocks[index] = self._moved(block, left)

    def settle(self) -> None:
        """Bring the blocks that wait into the memory for them."""
        for index in range(len(self._blocks) - 1, -1, -1):
            block = self._blocks[index]
            if self.memory is None or block.is_apart or block.spilled is not None:
                return  # and so are those before it
            self._blocks[index] = self._moved(block, block.columns)

    def spill(self, rows: Span) -> None:
        """Bring the blocks that lie within these rows into the spill file."""
        file = self.spill_file
        for index, block in enumerate(list(self._blocks)):
            if file and block.spilled is None and rows.start <= block.first and block.stop <= rows.stop:
                shape = torch.empty_like(block.rows, device="meta")
                self._blocks[index] = block._replace(rows=shape, spilled=file.put(block.rows))

    def fetch(self, rows: Span) -> None:
        """Bring the blocks that have some of these rows back from the spill file."""
        file = self.spill_file
        for index, block in enumerate(list(self._blocks)):
            if file and block.spilled and _meets(block, rows):
                back = file.take(block.spilled)
                back = back if self.memory is None else self.memory.copy(back)
                self._blocks[index] = block._replace(rows=back, is_apart=True, spilled=None)

    def _moved(self, block: Block, columns: Span) -> Block:
        """What is left of a block, by itself."""
        first = max(self.start, block.first)
        rows = self._part(block, Window(Span(first, block.stop), columns))
        rows = rows.clone() if self.memory is None else self.memory.copy(rows)
        return Block(first, block.stop, rows, columns, is_apart=True)

    def _part(self, block: Block, window: Window) -> Tensor:
        """What a block has of the rows of a window, with its columns."""
        low, high = max(window.rows.start, block.first), min(window.rows.stop, block.stop)
        rows, columns = block.rows, window.columns
        if (low, high) != (block.first, block.stop):
            rows = rows.narrow(self.axes[0], low - block.first, high - low)
        if columns != block.columns:
            rows = rows.narrow(self.axes[1], columns.start - block.columns.start, columns.length)
        return rows


def _meets(block: Block, rows: Span) -> bool:
    return block.first < rows.stop and rows.start < block.stop


def return_freed_memory() -> None:
    """Give back to the system what was freed but is kept by the C library for reuse; nothing happens where it cannot."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


class MemoryLimit:
    """Holds the growth of the process, from now on, to a number of bytes, as far as freed memory allows; on Linux only."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = resident_bytes() + limit_bytes if _malloc_trim() else 0
        self._margin = int(_MARGIN * limit_bytes)
        self._alarm = self._limit

    def hold(self) -> None:
        """Return what is free to the system if the process has grown beyond the limit."""
        if not self._limit or resident_bytes() <= self._alarm:
            return
        return_freed_memory()
        # What is in use cannot be returned, and trying takes time.
        self._alarm = max(self._limit, resident_bytes() + self._margin)


def resident_bytes() -> int:
    """Bytes of this process that lie in memory now; Linux only."""
    return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@cache
def _malloc_trim() -> Any:
    """The function of glibc; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
