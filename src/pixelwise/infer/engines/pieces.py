"""One huge image as pieces for many workers."""

import math
from dataclasses import dataclass

from pixelwise.infer.tiling import Region

LEAST_PX, MOST_PX = 4 << 20, 64 << 20
"""Smaller pieces would repeat too much of their surroundings; of larger ones too much is lost with a worker."""

_LEAST_ROWS = 256
_STRIP_ROWS = 2048  # of pieces of files whose blocks are whole rows: each piece decodes the rows of its neighbours too
_ROUND = 64  # piece borders on multiples of this suit the strides of networks and the blocks of files


@dataclass(frozen=True)
class Piece:
    """A rectangle of one plane, or of several that follow each other.

    Attributes:
        plane: the first.
        planes: how many.
        region: the rectangle.
    """

    plane: int
    planes: int
    region: Region

    @property
    def px(self) -> int:
        """Pixels of all its planes."""
        return self.planes * self.region.height * self.region.width

    @property
    def near(self) -> tuple[int, Region] | None:
        """Its plane and rectangle, by which its parts are known; None if it has several planes."""
        return (self.plane, self.region) if self.planes == 1 else None


def pieces(
    height: int,
    width: int,
    planes: int,
    workers: int,
    piece_px: int | None = None,
    block_px: tuple[int, int] = (_ROUND, _ROUND),
) -> list[Piece]:
    """Rectangles of every plane, about three for each worker, as square as the file allows; of small planes several.

    A network needs the surroundings of a piece as well, which neighbours compute again; squares have the least of them.

    Args:
        height: rows of a plane.
        width: columns.
        planes: of the stack.
        workers: that share the work.
        piece_px: pixels of a piece; None chooses.
        block_px: rows and columns that the file stores together.

    Returns:
        pieces that cover every pixel once.

    Example:
        >>> found = pieces(20_000, 30_000, 1, 4)
        >>> len(found), found[0].region
        (12, Region(top=0, left=0, height=6720, width=7552))
        >>> [(piece.plane, piece.planes) for piece in pieces(512, 512, 40, 4)]
        [(0, 16), (16, 16), (32, 8)]
    """
    share = piece_px or min(MOST_PX, max(LEAST_PX, height * width * planes // (3 * workers)))
    rows = math.sqrt(share)
    if block_px[1] >= width:
        rows = max(share / width, _STRIP_ROWS)
    down = max(1, round(height / max(rows, min(_LEAST_ROWS, share / width))))
    rows = min(height, _rounded(height / down))
    columns = min(width, _rounded(width / max(1, round(rows * width / share))))
    together = max(1, share // (height * width)) if (rows, columns) == (height, width) else 1
    return [
        Piece(
            plane, min(together, planes - plane), Region(top, left, min(rows, height - top), min(columns, width - left))
        )
        for plane in range(0, planes, together)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]


def _rounded(length: float) -> int:
    return max(_ROUND, math.ceil(length / _ROUND) * _ROUND)
