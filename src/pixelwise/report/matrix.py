"""The confusion matrix as the report shows it: where its cells and labels lie, and its largest confusions in words."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_LABEL = 24  # characters; the full name is in the tooltip and in the table of classes
MAX_NUMBERED = 40  # classes; beyond, the numbers would be smaller than anybody can read
SLANT = 0.78  # how much height and width a column label needs, of its length, when it leans by 50 degrees


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: its corner in user units, its share of the row in percent, and how strongly it is filled."""

    x: float
    y: float
    percent: float
    opacity: float
    is_right: bool
    row: int
    column: int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Geometry of the confusion matrix in user units (CSS pixels at natural size).

    Attributes:
        cells: the cells with at least half a percent of their row.
        labels: one for each class, shortened.
        empty_rows: classes without a pixel in the truth.
        cell: the side of a cell.
        left: the space for the labels of the rows.
        top: the space for the labels of the columns.
        width: of everything.
        height: of everything.
        font: of the numbers.
        label_font: of the labels.
    """

    cells: tuple[Cell, ...]
    labels: tuple[str, ...]
    empty_rows: tuple[int, ...]
    cell: float
    left: float
    top: float
    width: float
    height: float
    font: float
    label_font: float

    @property
    def is_numbered(self) -> bool:
        """Whether the cells are large enough for numbers."""
        return len(self.labels) <= MAX_NUMBERED


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Pixels of class `truth` that were labelled `prediction`; the shares are fractions in 0..1."""

    truth: int
    prediction: int
    pixels: int
    share_of_class: float
    share_of_errors: float


def draw_matrix(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Drawing:
    """Lay out a (K, K) confusion matrix whose rows are the truth.

    Example:
        >>> drawing = draw_matrix([[3, 1], [0, 0]], ["sky", "tree"])
        >>> [(cell.row, cell.column, cell.percent) for cell in drawing.cells], drawing.empty_rows
        ([(0, 0, 75.0), (0, 1, 25.0)], (1,))
    """
    counts = np.array(matrix, dtype=np.float64)
    k, totals = len(counts), counts.sum(axis=1)
    cell = float(np.clip(760 / k, 21 if k <= MAX_NUMBERED else 7, 58))
    label_font = min(12.5, max(7.0, cell * 0.5))
    labels = tuple(_shorten(name) for name in names)
    longest = max(_width(label) for label in labels) * label_font * 0.6
    left, top = longest + 34, longest * SLANT + 40
    cells = [
        _cell(row, column, float(100 * counts[row, column] / totals[row]), left, top, cell)
        for row, column in np.argwhere(counts > 0).tolist()
    ]
    return Drawing(
        cells=tuple(drawn for drawn in cells if drawn.percent >= 0.5),
        labels=labels,
        empty_rows=tuple(np.flatnonzero(totals == 0).tolist()),
        cell=cell,
        left=left,
        top=top,
        width=left + k * cell + _width(labels[-1]) * label_font * 0.6 * SLANT,
        height=top + k * cell + 4,
        font=min(13.0, cell * 0.4),
        label_font=label_font,
    )


def largest_confusions(matrix: Sequence[Sequence[int]], count: int = 8) -> list[Confusion]:
    """The pairs of classes with the most wrong pixels, largest first.

    Example:
        >>> [(pair.truth, pair.prediction, pair.share_of_errors) for pair in largest_confusions([[5, 3], [1, 5]])]
        [(0, 1, 0.75), (1, 0, 0.25)]
    """
    totals = [sum(row) for row in matrix]
    errors = sum(totals) - sum(matrix[index][index] for index in range(len(matrix)))
    pairs = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return [
        Confusion(truth=i, prediction=j, pixels=n, share_of_class=n / totals[i], share_of_errors=n / errors)
        for n, i, j in pairs[:count]
    ]


def _cell(row: int, column: int, percent: float, left: float, top: float, side: float) -> Cell:
    # Less than linear, so that a confusion of a few percent can be seen beside one of fifty.
    opacity = 0.03 + 0.97 * (percent / 100) ** 0.7 if row != column else 0.08 + 0.92 * percent / 100
    return Cell(
        x=left + column * side,
        y=top + row * side,
        percent=percent,
        opacity=opacity,
        is_right=row == column,
        row=row,
        column=column,
    )


def _shorten(name: str) -> str:
    if _width(name) <= MAX_LABEL:
        return name
    kept = ""
    for character in name:
        if _width(kept + character) > MAX_LABEL - 1:
            break
        kept += character
    return kept + "…"


def _width(text: str) -> int:
    """Width in columns; East Asian characters are twice as wide."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
