"""Intervals and windows of maps, and the rows of a map that are kept while they are still needed."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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


@dataclass
class Kept:
    """The last rows of a map: some from `start` on, in pieces as they were computed.

    Attributes:
        axes: which axes of the tensors are rows and columns.
        columns: the columns that all pieces have.
        start: the first row that is kept.
        stop: the row below the last.
    """

    axes: tuple[int, int]
    columns: Span
    start: int
    stop: int

    def __post_init__(self) -> None:
        self._pieces: deque[tuple[int, Tensor]] = deque()  # (first row, rows), in order
        self._empty: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        """Take the next rows."""
        count = rows.shape[self.axes[0]]
        if count:
            self._pieces.append((self.stop, rows))
            self.stop += count
        if self._empty is None:
            self._empty = rows.narrow(self.axes[0], 0, 0).clone()  # a view would keep the rows alive

    def take(self, window: Window) -> Tensor:
        """The rows and columns of a window, without a copy where one piece holds them all."""
        (start, stop), columns = window
        parts = []
        for first, piece in self._pieces:
            low, high = max(start, first), min(stop, first + piece.shape[self.axes[0]])
            if low < high:
                whole_piece = high - low == piece.shape[self.axes[0]]
                parts.append(piece if whole_piece else piece.narrow(self.axes[0], low - first, high - low))
        if not parts:
            if self._empty is None:
                raise RuntimeError("a step asks for rows of a map of which none was computed")
            parts = [self._empty]
        if columns != self.columns:
            parts = [part.narrow(self.axes[1], columns.start - self.columns.start, columns.length) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axes[0])

    def is_whole(self, window: Window) -> bool:
        """Whether `take` need not copy: one piece holds all of the rows."""
        axis = self.axes[0]
        return not window.rows.length or any(
            first <= window.rows.start and window.rows.stop <= first + piece.shape[axis]
            for first, piece in self._pieces
        )

    def numbers(self) -> int:
        """How many numbers are kept."""
        return sum(piece.numel() for _, piece in self._pieces)

    def drop_before(self, row: int) -> None:
        """Let go of the rows above `row`. Of a piece that is mostly gone the rest is copied, so that its memory is free."""
        axis = self.axes[0]
        self.start = max(self.start, min(row, self.stop))
        while self._pieces:
            first, piece = self._pieces[0]
            kept = first + piece.shape[axis] - self.start
            if kept > 0 and 2 * kept > piece.shape[axis]:
                return
            self._pieces.popleft()
            if kept > 0:
                rest = piece.narrow(axis, piece.shape[axis] - kept, kept)
                self._pieces.appendleft((self.start, rest.clone()))
                return
