"""Intervals and windows of maps, and the rows of a map that are kept while they are still needed."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pixelwise.ops.streaming.pool import Pool
from pixelwise.ops.streaming.shelf import Shelf, Shelved


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


class Piece(NamedTuple):
    """Rows of a map, from `first` on, with these columns.

    `place` is theirs in the pool, if they wait there; if they are on the shelf, `rows` has their shape only.
    """

    first: int
    rows: Tensor
    columns: Span
    place: Tensor | None = None
    shelved: Shelved | None = None


@dataclass
class Kept:
    """The last rows of a map: some from `start` on, in pieces as they were computed.

    Attributes:
        axes: which axes of the tensors are rows and columns.
        columns: the columns that rows have when they come; `narrow_before` leaves fewer.
        start: the first row that is kept.
        stop: the row below the last.
        pool: where rows wait that are not needed at once; None leaves them where they are.
        shelf: where rows wait for long; None leaves them among the others.
    """

    axes: tuple[int, int]
    columns: Span
    start: int
    stop: int
    pool: Pool | None = None
    shelf: Shelf | None = None

    def __post_init__(self) -> None:
        self._pieces: deque[Piece] = deque()  # in order
        self._empty: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        """Take the next rows."""
        count = rows.shape[self.axes[0]]
        if count:
            if self.pool is not None and self.pool.holds(rows):
                rows = rows.clone()  # a view of rows that wait elsewhere, whose place will be given to others
            self._pieces.append(Piece(self.stop, rows, self.columns))
            self.stop += count
        if self._empty is None:
            self._empty = rows.narrow(self.axes[0], 0, 0).clone()  # a view would keep the rows alive

    def take(self, window: Window) -> Tensor:
        """The rows and columns of a window, without a copy where one piece holds them all."""
        (start, stop), columns = window
        self.fetch(window.rows)
        parts = []
        for first, piece, wide, *_ in self._pieces:
            low, high = max(start, first), min(stop, first + piece.shape[self.axes[0]])
            if low < high:
                if high - low != piece.shape[self.axes[0]]:
                    piece = piece.narrow(self.axes[0], low - first, high - low)
                parts.append(_columns(piece, self.axes[1], wide, columns))
        if not parts:
            if self._empty is None:
                raise RuntimeError("a step asks for rows of a map of which none was computed")
            parts = [_columns(self._empty, self.axes[1], self.columns, columns)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axes[0])

    def is_whole(self, window: Window) -> bool:
        """Whether `take` need not copy: one piece holds all of the rows."""
        axis = self.axes[0]
        return not window.rows.length or any(
            piece.first <= window.rows.start and window.rows.stop <= piece.first + piece.rows.shape[axis]
            for piece in self._pieces
        )

    def nbytes(self) -> int:
        """Bytes of the rows that are kept in memory."""
        return sum(piece.rows.nbytes for piece in self._pieces if piece.shelved is None)

    def drop_before(self, row: int) -> None:
        """Let go of the rows above `row`. Of a piece that is mostly gone the rest is copied, so that its memory is free."""
        axis = self.axes[0]
        self.start = max(self.start, min(row, self.stop))
        while self._pieces:
            piece = self._pieces[0]
            kept = piece.first + piece.rows.shape[axis] - self.start
            if kept > 0 and (piece.shelved is not None or 2 * kept > piece.rows.shape[axis]):
                return
            self._pieces.popleft()
            if kept > 0:
                rest = piece.rows.narrow(axis, piece.rows.shape[axis] - kept, kept)
                self._pieces.appendleft(self._moved(piece, self.start, rest, piece.columns))
                return
            self._let_go(piece)

    def narrow_before(self, row: int, columns: Span) -> None:
        """Of the pieces that end above `row`, keep these columns only: a skip needs fewer than what it branches off from."""
        axis = self.axes[0]
        for index in range(len(self._pieces) - 1, -1, -1):
            piece = self._pieces[index]
            if piece.first + piece.rows.shape[axis] > row:
                continue
            # Who still needs this piece has its columns in both: it was narrowed to what all of those needed.
            left = Span(max(columns.start, piece.columns.start), min(columns.stop, piece.columns.stop))
            if left == piece.columns or piece.shelved is not None:
                return  # and so are those before it
            rows = _columns(piece.rows, self.axes[1], piece.columns, left)
            self._pieces[index] = self._moved(piece, piece.first, rows, left)

    def settle(self) -> None:
        """Bring the pieces that wait into the pool."""
        for index in range(len(self._pieces) - 1, -1, -1):
            piece = self._pieces[index]
            if self.pool is None or piece.place is not None or piece.shelved is not None:
                return  # and so are those before it
            gone = max(0, self.start - piece.first)
            rows = piece.rows.narrow(self.axes[0], gone, piece.rows.shape[self.axes[0]] - gone)
            rows, place = self.pool.copy(rows)
            self._pieces[index] = Piece(piece.first + gone, rows, piece.columns, place)

    def shelve(self, rows: Span) -> None:
        """Bring the pieces that lie within these rows onto the shelf."""
        if self.shelf is None:
            return
        for index, piece in enumerate(list(self._pieces)):
            stop = piece.first + piece.rows.shape[self.axes[0]]
            if piece.shelved is None and rows.start <= piece.first and stop <= rows.stop:
                item, shape = self.shelf.put(piece.rows), torch.empty_like(piece.rows, device="meta")
                self._let_go(piece)
                self._pieces[index] = Piece(piece.first, shape, piece.columns, shelved=item)

    def fetch(self, rows: Span) -> None:
        """Bring the pieces that have some of these rows back from the shelf."""
        if self.shelf is None:
            return
        for index, piece in enumerate(list(self._pieces)):
            stop = piece.first + piece.rows.shape[self.axes[0]]
            if piece.shelved is None or piece.first >= rows.stop or stop <= rows.start:
                continue
            back, place = self.shelf.take(piece.shelved), None
            if self.pool is not None:
                back, place = self.pool.copy(back)
            self._pieces[index] = Piece(piece.first, back, piece.columns, place)

    def _moved(self, piece: Piece, first: int, rows: Tensor, columns: Span) -> Piece:
        """What is left of a piece, by itself."""
        if piece.place is None or self.pool is None:
            return Piece(first, rows.clone(), columns)
        rows, place = self.pool.copy(rows)
        self._let_go(piece)
        return Piece(first, rows, columns, place)

    def _let_go(self, piece: Piece) -> None:
        if piece.place is not None and self.pool is not None:
            self.pool.give_back(piece.place)
        if piece.shelved is not None and self.shelf is not None:
            self.shelf.give_back(piece.shelved)


def _columns(rows: Tensor, axis: int, given: Span, wanted: Span) -> Tensor:
    return rows if given == wanted else rows.narrow(axis, wanted.start - given.start, wanted.length)
