"""Rectangles of an image: which are missing, small ones joined to large ones, large images cut into blocks."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import PixelwiseError
from pixelwise.infer.network import Region

FLUSH_BYTES = 16 << 20
FLUSH_S = 30.0
"""What a killed run may lose, in bytes of results and in seconds."""

MOST_BYTES = 4 * FLUSH_BYTES  # one that grows, one as it is joined, two that wait to be written

Arrays = Mapping[str, NDArray[Any]]
Add = Callable[[Region, Arrays], None]
"""Takes what was found in a window, (height, width) of each kind."""

LEAST_PX, MOST_PX = 4 << 20, 64 << 20
"""Smaller blocks would repeat too much of their surroundings; of larger ones too much is lost with a worker."""

_LEAST_ROWS = 256
_STRIP_ROWS = 2048  # of blocks of files that are stored in rows: each block decodes the rows of its neighbours too
_ROUND = 64  # block borders on multiples of this suit the strides of networks and the blocks of files


class Block(NamedTuple):
    """A rectangle of one plane, or of several that follow each other."""

    plane: int
    planes: int
    region: Region


def blocks_of(
    height: int,
    width: int,
    planes: int,
    workers: int,
    block_px: int | None = None,
    stored_px: tuple[int, int] = (_ROUND, _ROUND),
) -> list[Block]:
    """Rectangles that cover every plane once, about three for each worker; of small planes several together.

    Neighbours compute what surrounds a block again; squares have the least of it, so blocks are as square as the file,
    which stores `stored_px` rows and columns together, allows. `block_px` pixels each, if that is given.
    """
    share = block_px or min(MOST_PX, max(LEAST_PX, height * width * planes // (3 * workers)))
    rows = math.sqrt(share)
    if stored_px[1] >= width:
        rows = max(share / width, _STRIP_ROWS)
    down = max(1, round(height / max(rows, min(_LEAST_ROWS, share / width))))
    rows = min(height, _rounded(height / down))
    columns = min(width, _rounded(width / max(1, round(rows * width / share))))
    together = max(1, share // (height * width)) if (rows, columns) == (height, width) else 1
    return [
        Block(
            plane, min(together, planes - plane), Region(top, left, min(rows, height - top), min(columns, width - left))
        )
        for plane in range(0, planes, together)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]


def _rounded(length: float) -> int:
    return max(_ROUND, math.ceil(length / _ROUND) * _ROUND)


class Joiner:
    """Joins windows side by side to bands and bands below each other to larger ones; at most two wait to be written."""

    def __init__(self, write: Add) -> None:
        self._write = write
        self._band: list[tuple[Region, Arrays]] = []  # side by side
        self._stack: list[tuple[Region, Arrays]] = []  # below each other
        self._bytes, self._since = 0, time.monotonic()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixelwise-write")
        self._waiting: deque[Future[None]] = deque()

    def add(self, region: Region, arrays: Arrays) -> None:
        """Take a window."""
        if self._band and not _beside(self._band[-1][0], region):
            self._close_band()
        self._band.append((region, arrays))
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes >= FLUSH_BYTES or time.monotonic() - self._since >= FLUSH_S:
            self._flush()

    def close(self, *, quietly: bool = False) -> None:
        """Write the rest."""
        try:
            self._flush()
            while self._waiting:
                self._waiting.popleft().result()
        except PixelwiseError:
            if not quietly:
                raise
        finally:
            self._pool.shutdown()

    def _flush(self) -> None:
        self._close_band()
        self._close_stack()
        self._bytes, self._since = 0, time.monotonic()

    def _close_band(self) -> None:
        if not self._band:
            return
        band = _joined(self._band, axis=1)
        self._band = []
        if self._stack and not _below(self._stack[-1][0], band[0]):
            self._close_stack()
        self._stack.append(band)

    def _close_stack(self) -> None:
        if not self._stack:
            return
        region, arrays = _joined(self._stack, axis=0)
        self._stack = []
        while len(self._waiting) >= 2:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, region, arrays))


def uncovered(target: Region, done: Iterable[Region]) -> list[Region]:
    """What is left of `target` without `done`, as rectangles that do not overlap, from top to bottom."""
    near = sorted(
        (region for region in done if region.top < target.bottom and region.bottom > target.top),
        key=lambda region: region.top,
    )
    edges = {target.top, target.bottom}
    edges |= {edge for region in near for edge in (region.top, region.bottom) if target.top < edge < target.bottom}
    active: list[Region] = []
    waiting = iter([*near, None])
    coming = next(waiting)
    left: list[Region] = []
    open_gaps: tuple[tuple[int, int], ...] = ()
    start = target.top
    for top, _ in pairwise(sorted(edges)):
        while coming is not None and coming.top <= top:
            active.append(coming)
            coming = next(waiting)
        active = [region for region in active if region.bottom > top]
        gaps = _gaps(target, active)
        if gaps != open_gaps:
            left += [Region(start, first, top - start, last - first) for first, last in open_gaps]
            open_gaps, start = gaps, top
    left += [Region(start, first, target.bottom - start, last - first) for first, last in open_gaps]
    return left


def _gaps(target: Region, active: Iterable[Region]) -> tuple[tuple[int, int], ...]:
    """The columns of `target` that no active region covers, as (first, behind the last)."""
    gaps, at = [], target.left
    for region in sorted(active, key=lambda region: region.left):
        if region.left > at:
            gaps.append((at, min(region.left, target.right)))
        at = max(at, region.right)
        if at >= target.right:
            break
    if at < target.right:
        gaps.append((at, target.right))
    return tuple(gaps)


def _beside(first: Region, second: Region) -> bool:
    return (first.top, first.height, first.right) == (second.top, second.height, second.left)


def _below(first: Region, second: Region) -> bool:
    return (first.left, first.width, first.bottom) == (second.left, second.width, second.top)


def _joined(windows: list[tuple[Region, Arrays]], axis: int) -> tuple[Region, Arrays]:
    """Neighbours as one; axis 0 joins downwards, 1 to the right."""
    if len(windows) == 1:
        return windows[0]
    first, last = windows[0][0], windows[-1][0]
    region = Region(first.top, first.left, last.bottom - first.top, last.right - first.left)
    return region, {kind: np.concatenate([found[kind] for _, found in windows], axis=axis) for kind in windows[0][1]}


def touches(plane: int, region: Region, near: tuple[int, Region] | None) -> bool:
    return near is None or (plane == near[0] and uncovered(region, [near[1]]) != [region])
