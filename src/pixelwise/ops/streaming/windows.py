"""Intervals and windows of maps, and the rows of a map that are kept while they are still needed."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pixelwise.ops.streaming.allocator import Allocator
from pixelwise.ops.streaming.spill import Spilled, SpillFile


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


def whole(height: int, width: int) -> Window:
    """The window that is a whole map."""
    return Window(Span(0, height), Span(0, width))


class Block(NamedTuple):
    """Rows of a map, from `first` on, with these columns.

    `place` is theirs in the allocator, if they wait there; if they are the spill file, `rows` has their shape only.
    """

    first: int
    rows: Tensor
    columns: Span
    place: Tensor | None = None
    spilled: Spilled | None = None


@dataclass
class Kept:
    """The last rows of a map: some from `start` (inclusive) to `stop` (exclusive), in blocks as they were computed.

    `axes` are those of rows and columns, `columns` those that rows have when they come. Rows wait in the allocator's memory
    (None: where they are) and, if for long, in the spill file (None: among the others).
    """

    axes: tuple[int, int]
    columns: Span
    start: int
    stop: int
    allocator: Allocator | None = None
    spill_file: SpillFile | None = None

    def __post_init__(self) -> None:
        self._blocks: deque[Block] = deque()  # in order
        self._empty: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        """Take the next rows."""
        count = rows.shape[self.axes[0]]
        if count:
            if self.allocator is not None and self.allocator.holds(rows):
                rows = rows.clone()  # a view of rows that wait elsewhere, whose place will be given to others
            self._blocks.append(Block(self.stop, rows, self.columns))
            self.stop += count
        if self._empty is None:
            self._empty = rows.narrow(self.axes[0], 0, 0).clone()  # a view would keep the rows alive

    def take(self, window: Window) -> Tensor:
        """The rows and columns of a window, without a copy where one block holds them all."""
        (start, stop), columns = window
        self.fetch(window.rows)
        parts = []
        for first, block, wide, *_ in self._blocks:
            low, high = max(start, first), min(stop, first + block.shape[self.axes[0]])
            if low < high:
                if high - low != block.shape[self.axes[0]]:
                    block = block.narrow(self.axes[0], low - first, high - low)
                parts.append(_columns(block, self.axes[1], wide, columns))
        if not parts:
            if self._empty is None:
                raise RuntimeError("a step asks for rows of a map of which none was computed")
            parts = [_columns(self._empty, self.axes[1], self.columns, columns)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axes[0])

    def is_whole(self, window: Window) -> bool:
        """Whether `take` need not copy: one block holds all of the rows."""
        axis = self.axes[0]
        return not window.rows.length or any(
            block.first <= window.rows.start and window.rows.stop <= block.first + block.rows.shape[axis]
            for block in self._blocks
        )

    def nbytes(self) -> int:
        """Bytes of the rows that are kept in memory."""
        return sum(block.rows.nbytes for block in self._blocks if block.spilled is None)

    def drop_before(self, row: int) -> None:
        """Let go of the rows above `row`. Of a block that is mostly gone the rest is copied, so that its memory is free."""
        axis = self.axes[0]
        self.start = max(self.start, min(row, self.stop))
        while self._blocks:
            block = self._blocks[0]
            kept = block.first + block.rows.shape[axis] - self.start
            if kept > 0 and (block.spilled is not None or 2 * kept > block.rows.shape[axis]):
                return
            self._blocks.popleft()
            if kept > 0:
                rest = block.rows.narrow(axis, block.rows.shape[axis] - kept, kept)
                self._blocks.appendleft(self._moved(block, self.start, rest, block.columns))
                return
            self._let_go(block)

    def narrow_before(self, row: int, columns: Span) -> None:
        """Of the blocks that end above `row`, keep these columns only: a skip needs fewer than what it branches off from."""
        axis = self.axes[0]
        for index in range(len(self._blocks) - 1, -1, -1):
            block = self._blocks[index]
            if block.first + block.rows.shape[axis] > row:
                continue
            # Who still needs this block has its columns in both: it was narrowed to what all of those needed.
            left = Span(max(columns.start, block.columns.start), min(columns.stop, block.columns.stop))
            if left == block.columns or block.spilled is not None:
                return  # and so are those before it
            rows = _columns(block.rows, self.axes[1], block.columns, left)
            self._blocks[index] = self._moved(block, block.first, rows, left)

    def settle(self) -> None:
        """Bring the blocks that wait into the allocator."""
        for index in range(len(self._blocks) - 1, -1, -1):
            block = self._blocks[index]
            if self.allocator is None or block.place is not None or block.spilled is not None:
                return  # and so are those before it
            gone = max(0, self.start - block.first)
            rows = block.rows.narrow(self.axes[0], gone, block.rows.shape[self.axes[0]] - gone)
            rows, place = self.allocator.copy(rows)
            self._blocks[index] = Block(block.first + gone, rows, block.columns, place)

    def spill(self, rows: Span) -> None:
        """Bring the blocks that lie within these rows into the spill file."""
        if self.spill_file is None:
            return
        for index, block in enumerate(list(self._blocks)):
            stop = block.first + block.rows.shape[self.axes[0]]
            if block.spilled is None and rows.start <= block.first and stop <= rows.stop:
                item, shape = self.spill_file.put(block.rows), torch.empty_like(block.rows, device="meta")
                self._let_go(block)
                self._blocks[index] = Block(block.first, shape, block.columns, spilled=item)

    def fetch(self, rows: Span) -> None:
        """Bring the blocks that have some of these rows back from the spill file."""
        if self.spill_file is None:
            return
        for index, block in enumerate(list(self._blocks)):
            stop = block.first + block.rows.shape[self.axes[0]]
            if block.spilled is None or block.first >= rows.stop or stop <= rows.start:
                continue
            back, place = self.spill_file.take(block.spilled), None
            if self.allocator is not None:
                back, place = self.allocator.copy(back)
            self._blocks[index] = Block(block.first, back, block.columns, place)

    def _moved(self, block: Block, first: int, rows: Tensor, columns: Span) -> Block:
        """What is left of a block, by itself."""
        if block.place is None or self.allocator is None:
            return Block(first, rows.clone(), columns)
        rows, place = self.allocator.copy(rows)
        self._let_go(block)
        return Block(first, rows, columns, place)

    def _let_go(self, block: Block) -> None:
        if block.place is not None and self.allocator is not None:
            self.allocator.give_back(block.place)
        if block.spilled is not None and self.spill_file is not None:
            self.spill_file.give_back(block.spilled)


def _columns(rows: Tensor, axis: int, given: Span, wanted: Span) -> Tensor:
    return rows if given == wanted else rows.narrow(axis, wanted.start - given.start, wanted.length)
