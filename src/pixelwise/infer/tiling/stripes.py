"""Exact prediction in stripes: the image streams through the network's graph and nothing is computed twice.

Where a stripe of the whole width takes too much memory, the image is split into columns, each with what it needs of its
neighbours; only that is computed twice.
"""

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pixelwise.infer.tiling.base import Read, Region, Scores
from pixelwise.ops.streaming import WindowedNetwork
from pixelwise.ops.streaming.forecast import cost_of, item_sizes, peak_bytes, scratch_bytes
from pixelwise.ops.streaming.heap import HeapLimit
from pixelwise.ops.streaming.windows import Span, Window

BUDGET_BYTES = 2**30
_STRIPE_PX = 2**19  # pixels of a stripe that keep the cores busy; more only take memory
_LEAST_ROWS, _MOST_ROWS = 8, 512
_COLUMNS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128)
# malloc keeps what maps leave, and maps of changing sizes do not fit into the gaps: the process takes up to three times what
# its maps do, unless it is held to less (`HeapLimit`). Held to so many times, networks of several depths, widths and stripes
# run as fast as they can; held to the least, up to a third slower, but with wider columns, so that less is computed twice.
_CPU_FACTORS = (1.9, 1.35)
_GPU_FACTORS = (1.1,)
_SLACK = 0.4  # times the maps: what a single step may take beyond the limit before it is looked at
_CHEAP = 1.1  # a cost that is not worth to be slower for


class Stripes:
    """Scores an image, or any part of it, in stripes; see the module.

    Args:
        model: in eval mode; maps (1, C, H, W) to (1, K, H, W).
        height: H of the image.
        width: W of the image.
        in_channels: C.
        budget_bytes: what the maps may take.
        tile_px: width of the columns and most rows of a stripe, where the user chose.
        autocast: a context to run the network's operations in.
        compute_bytes: per number that convolutions give in that context.
        device: of the model.

    Attributes:
        way: "stripes of R rows", and in how many columns.
        stripe_px: R.
        cuts: where the columns begin and end.
        beside_bytes: what else may grow in this process meanwhile (pixels read ahead, results that wait), which is not taken
            from what the maps may hold.

    Raises:
        NotWindowed: the network has an operation that cannot be computed window by window.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 5, padding=2)).eval()
        >>> scorer = Stripes(model, 40, 30, in_channels=3, tile_px=16)
        >>> scorer.way, scorer.cuts, round(scorer.cost, 2)
        ('stripes of 16 rows in 2 columns', (0, 16, 30), 1.05)
        >>> image = torch.rand(3, 40, 30)
        >>> read = lambda top, left, height, width: image[:, top : top + height, left : left + width]
        >>> [part.region.width for part in scorer.score(read, Region(10, 4, 5, 20))]
        [12, 8]
    """

    def __init__(
        self,
        model: nn.Module,
        height: int,
        width: int,
        *,
        in_channels: int,
        budget_bytes: int = BUDGET_BYTES,
        tile_px: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        compute_bytes: int = 4,
        device: torch.device | None = None,
    ) -> None:
        self.network = WindowedNetwork(model, height, width, in_channels=in_channels, autocast=autocast)
        self.height, self.width = height, width
        self._sizes = item_sizes(self.network.graph, compute_bytes)
        self._is_cpu = device is None or device.type == "cpu"
        self.beside_bytes = 0
        self._heap: HeapLimit | None = None  # what the process is held to, from the first score on
        self._scratch = scratch_bytes(self.network.graph) if self._is_cpu else 0
        self._maps = lru_cache(maxsize=None)(self._maps_bytes)
        for factor in _CPU_FACTORS if self._is_cpu else _GPU_FACTORS:
            self._factor = factor
            columns, self.stripe_px = self._choose(budget_bytes, tile_px)
            self.cuts = _cuts(width, columns, tile_px)
            bands = [Window(Span(0, height), Span(*band)) for band in pairwise(self.cuts)]
            self.cost = cost_of(self.network.graph, bands) if len(bands) > 1 else 1.0
            if self.cost <= _CHEAP or tile_px is not None:
                break
        self.memory_bytes = self._forecast(self._widest(), self.stripe_px)
        self.way = f"stripes of {self.stripe_px} rows" + (f" in {len(bands)} columns" if len(bands) > 1 else "")

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """As `Scorer.score`: column by column, from top to bottom."""
        if self._heap is None and self._is_cpu:
            self._heap = HeapLimit(self._heap_bytes() + self.beside_bytes)
        for left, right in pairwise(self.cuts):
            left, right = max(left, region.left), min(right, region.right)
            if left >= right:
                continue
            place = {"top": region.top, "left": left, "height": region.height, "width": right - left}
            needed = self.network.windows(Window(Span(region.top, region.bottom), Span(left, right)))[0]
            with NextRows(read, needed.rows.stop) as ahead:
                for top, logits in self.network.stripes(ahead, **place, stripe_px=self.stripe_px, heap=self._heap):
                    yield Scores(Region(top, left, logits.shape[1], right - left), logits.float())

    def tile_bytes(self, tile_px: int) -> int:
        """What a tile of that size takes in the middle of the image."""
        tile = self._middle(tile_px)
        return self._bytes(tile, min(self.stripe_px, tile.rows.length))

    def tile_cost(self, tile_px: int) -> float:
        """Multiply-adds of the image in tiles of that size, each by itself, over those of one pass; from a middle one."""
        tile = self._middle(tile_px)
        share = tile.rows.length * tile.columns.length / (self.height * self.width)
        return cost_of(self.network.graph, [tile]) / share

    def _middle(self, tile_px: int) -> Window:
        height, width = min(tile_px, self.height), min(tile_px, self.width)
        top, left = (self.height - height) // 2, (self.width - width) // 2
        return Window(Span(top, top + height), Span(left, left + width))

    def _choose(self, budget_bytes: int, tile_px: int | None) -> tuple[int, int]:
        """Number of columns and rows of a stripe: as few columns, then as many rows, as the budget allows."""
        if tile_px is not None:
            return -(-self.width // tile_px), min(tile_px, self.height)

        def fits(columns: int) -> bool:
            wide = -(-self.width // columns)
            least = self._factor * 4 * self.network.num_classes * wide  # of logits alone, told at once
            return least < budget_bytes and self._forecast(wide, _LEAST_ROWS) <= budget_bytes

        possible = [columns for columns in _COLUMNS if columns == 1 or self.width // columns >= _LEAST_ROWS]
        columns = possible[min(bisect_left(possible, True, key=fits), len(possible) - 1)]
        wide, stripe = -(-self.width // columns), _LEAST_ROWS
        most = min(_MOST_ROWS, max(_LEAST_ROWS, _STRIPE_PX // wide), self.height)
        while 2 * stripe <= most and self._forecast(wide, 2 * stripe) <= budget_bytes:
            stripe *= 2
        return columns, min(stripe, self.height)

    def _widest(self) -> int:
        return max(right - left for left, right in pairwise(self.cuts))

    def _forecast(self, wide: int, rows: int) -> int:
        """What a column in the middle of the image takes in stripes of that many rows."""
        left = (self.width - wide) // 2
        return self._bytes(Window(Span(0, self.height), Span(left, left + wide)), rows)

    def _bytes(self, window: Window, rows: int) -> int:
        return int(self._factor * self._maps(window, rows)) + self._scratch

    def _maps_bytes(self, window: Window, rows: int) -> int:
        maps = peak_bytes(self.network.graph, window, rows, self._sizes)
        return (
            maps + 3 * 4 * self.network.num_classes * rows * window.columns.length
        )  # logits, and what is made of them

    def _heap_bytes(self) -> int:
        """What the process is held to, so that it stays within what was stated."""
        return int((self.memory_bytes - self._scratch) * (1 - _SLACK / self._factor)) + self._scratch


def _cuts(width: int, columns: int, tile_px: int | None) -> tuple[int, ...]:
    """Where columns begin and end: of `tile_px`, or of equal widths."""
    step = -(-width // columns) if tile_px is None else tile_px
    return (*range(0, width, step), width)


class NextRows:
    """Reads windows of an image from top to bottom, always the next one in a thread of its own.

    Args:
        read: as in `base`; called from one other thread.
        bottom: the row below the last that will be asked for.

    Example:
        >>> image = torch.arange(12.0).view(1, 6, 2)
        >>> read = lambda top, left, height, width: image[:, top : top + height, left : left + width]
        >>> with NextRows(read, bottom=6) as ahead:
        ...     first, second = ahead(0, 0, 2, 2), ahead(2, 0, 2, 2)
        >>> second.tolist()
        [[[4.0, 5.0], [6.0, 7.0]]]
    """

    def __init__(self, read: Read, bottom: int) -> None:
        self._read, self._bottom = read, bottom
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-rows")
        self._next: tuple[tuple[int, int, int, int], Future[Tensor]] | None = None

    def __call__(self, top: int, left: int, height: int, width: int) -> Tensor:
        """(C, height, width), in the order of memory that convolutions run fastest in."""
        found = self._found(top, left, height, width)
        after = min(height, self._bottom - top - height)
        if after > 0:
            then = (top + height, left, after, width)
            self._next = (then, self._pool.submit(self._fetch, *then))
        return found

    def _found(self, top: int, left: int, height: int, width: int) -> Tensor:
        """The window, as far as possible from what was fetched, which may have other rows than were expected."""
        waiting, self._next = self._next, None
        if waiting is None:
            return self._fetch(top, left, height, width)
        place, fetched = waiting[0], waiting[1].result()
        if (place[0], place[1], place[3]) != (top, left, width):
            return self._fetch(top, left, height, width)
        missing = height - place[2]
        if missing <= 0:
            return fetched[:, :height]
        return torch.cat([fetched, self._fetch(top + place[2], left, missing, width)], dim=1)

    def _fetch(self, top: int, left: int, height: int, width: int) -> Tensor:
        with torch.inference_mode():
            window = self._read(top, left, height, width)
            return window.float()[None].contiguous(memory_format=torch.channels_last)[0]

    def __enter__(self) -> "NextRows":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._next = None
