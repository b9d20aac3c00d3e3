"""One huge image as pieces for many workers."""

from pixelwise.infer.tiling import Region

LEAST_PX, MOST_PX = 4 << 20, 64 << 20
"""Smaller pieces would repeat too much of their surroundings; of larger ones too much is lost with a worker."""

_LEAST_ROWS = 256
_ROUND = 64  # piece borders on multiples of this suit the strides of networks and the blocks of files


def pieces(height: int, width: int, planes: int, workers: int, piece_px: int | None = None) -> list[tuple[int, Region]]:
    """Ranges of rows of every plane, about three for each worker; of very wide images bands of columns too.

    Args:
        height: rows of a plane.
        width: columns.
        planes: of the stack.
        workers: that share the work.
        piece_px: pixels of a piece; None chooses.

    Returns:
        (plane, rectangle) pairs that cover every pixel once.

    Example:
        >>> [(plane, region.top, region.height) for plane, region in pieces(20_000, 30_000, 1, 4)][:2]
        [(0, 0, 1728), (0, 1728, 1728)]
    """
    share = piece_px or min(MOST_PX, max(LEAST_PX, height * width * planes // (3 * workers)))
    rows = min(height, _rounded(share / width) if piece_px else max(_LEAST_ROWS, _rounded(share / width)))
    bands = max(1, round(rows * width / (2 * share))) if rows * width > 2 * share else 1
    columns = _rounded(width / bands)
    return [
        (plane, Region(top, left, min(rows, height - top), min(columns, width - left)))
        for plane in range(planes)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]


def _rounded(length: float) -> int:
    return max(_ROUND, -(-int(length) // _ROUND) * _ROUND)
