"""Exact prediction in stripes: the image streams through the network's graph and nothing is computed twice.

Where a stripe of the whole width takes too much memory, the image is split into columns, each with what it needs of its
neighbours; only that is computed twice. Where that is much, rows that wait for long lie in a file, and columns are wider.
"""

import contextlib
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixelwise.infer.prefetch import NextRows
from pixelwise.infer.tiling import BUDGET_BYTES, Read, Region, Scorer, Scores
from pixelwise.ops.streaming import WindowedNetwork
from pixelwise.ops.streaming.forecast import Peaks, cost_of, item_sizes, peaks, scratch_bytes
from pixelwise.ops.streaming.memory import MemoryLimit, Span, SpillFile, Window

_STRIPE_PX = 2**19  # pixels of a stripe that keep the cores busy; more only take memory
_LEAST_ROWS, _MOST_ROWS = 8, 512
_COLUMNS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128)
# malloc keeps what maps leave, and maps of changing sizes do not fit into the gaps: the process takes up to three times what
# its maps do, unless it is held to less (`MemoryLimit`). Held to so many times, networks of several depths, widths and
# stripes run as fast as they can; held to the least, up to a third slower, but with wider columns, so that less is
# computed twice.
# The disk comes last: rows that wait for long leave the memory to wider columns.
_CPU_WAYS = ((1.9, False), (1.35, False), (1.35, True))
_GPU_WAYS = ((1.1, False),)
_SLACK = 0.4  # times the maps: what a single step may take beyond the limit before it is looked at
_HARDLY_MORE = 1.25  # times the memory
_CHEAP = 1.1  # a cost that is not worth to be slower for


@dataclass(frozen=True)
class _Plan:
    """How an image streams."""

    factor: float  # memory of the process over that of the maps
    has_spill_file: bool  # whether rows that wait for long lie on the disk
    cuts: tuple[int, ...] = ()  # where the columns begin and end
    stripe_px: int = 0
    cost: float = 1.0

    @property
    def widest(self) -> int:
        return max(right - left for left, right in pairwise(self.cuts))


class Stripes(Scorer):
    """Scores an image, or any part of it, in stripes; see the module.

    Args:
        model: in eval mode; maps (1, C, H, W) to (1, K, H, W).
        budget_bytes: what the maps may take.
        tile_px: width of the columns and most rows of a stripe, where the user chose.
        autocast: a context to run the network's operations in.
        compute_bytes: per number that convolutions give in that context.
        scratch: an existing folder, on whose disk rows may wait where memory is short (on CPUs); None: nowhere.

    Raises:
        NotWindowed: the network has an operation that cannot be computed window by window.
    """

    is_kept = True

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
        scratch: Path | None = None,
    ) -> None:
        self.network = WindowedNetwork(model, height, width, in_channels=in_channels, autocast=autocast)
        self.height, self.width = height, width
        self._sizes = item_sizes(self.network.graph, compute_bytes)
        self._is_cpu = device is None or device.type == "cpu"
        self._heap: MemoryLimit | None = None  # what the process is held to, from the first score on
        self._reordered = scratch_bytes(self.network.graph) if self._is_cpu else 0
        self._maps = lru_cache(maxsize=None)(self._maps_peaks)
        self.scratch = scratch
        self._plan = self._choose(budget_bytes, tile_px)
        self.cuts, self.stripe_px, self.cost = self._plan.cuts, self._plan.stripe_px, self._plan.cost
        needed = self._forecast(self._plan, self._plan.widest, self.stripe_px)
        self.memory_bytes, self.disk_bytes = needed
        columns = len(self.cuts) - 1
        self.way = f"stripes of {self.stripe_px} rows" + (f" in {columns} columns" if columns > 1 else "")

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """As `Scorer.score`: column by column, from top to bottom."""
        if self._heap is None and self._is_cpu:  # the process is held to what was stated
            maps = int((self.memory_bytes - self._reordered) * (1 - _SLACK / self._plan.factor))
            self._heap = MemoryLimit(maps + self._reordered + self.beside_bytes)
        for left, right in pairwise(self.cuts):
            left, right = max(left, region.left), min(right, region.right)
            if left < right:
                yield from self._column(read, Region(region.top, left, region.height, right - left))

    def _column(self, read: Read, part: Region) -> Iterator[Scores]:
        needed = self.network.graph.windows(Window(Span(part.top, part.bottom), Span(part.left, part.right)))[0]
        place = {"top": part.top, "left": part.left, "height": part.height, "width": part.width}
        # A file for each column, for its rows are of other sizes than those of the next.
        on_disk = SpillFile(self.scratch) if self.scratch and self._plan.has_spill_file else contextlib.nullcontext()
        with contextlib.closing(NextRows(read, needed.rows.stop)) as ahead, on_disk as spill_file:
            parts = self.network.stripes(
                ahead, **place, stripe_px=self.stripe_px, memory_limit=self._heap, spill_file=spill_file
            )
            for top, logits in parts:
                yield Scores(Region(top, part.left, logits.shape[1], part.width), logits.float())

    def tile_bytes(self, tile_px: int) -> int:
        """What a tile of that size takes in the middle of the image."""
        tile = self._middle(tile_px)
        return self._bytes(self._plan, tile, min(self.stripe_px, tile.rows.length)).memory

    def tile_cost(self, tile_px: int) -> float:
        """Multiply-adds of the image in tiles of that size, each by itself, over those of one pass; from a middle one."""
        tile = self._middle(tile_px)
        share = tile.rows.length * tile.columns.length / (self.height * self.width)
        return cost_of(self.network.graph, [tile]) / share

    def _middle(self, tile_px: int) -> Window:
        height, width = min(tile_px, self.height), min(tile_px, self.width)
        top, left = (self.height - height) // 2, (self.width - width) // 2
        return Window(Span(top, top + height), Span(left, left + width))

    def _choose(self, budget_bytes: int, tile_px: int | None) -> _Plan:
        """The first way that fits and computes hardly anything twice; else the cheapest that fits; else the least."""
        found: list[tuple[int, float, _Plan]] = []  # bytes too much, cost
        rows = min(_LEAST_ROWS if tile_px is None else tile_px, self.height)
        # Half of the disk is left to the results, and to others.
        room = shutil.disk_usage(self.scratch).free // 2 if self.scratch else 0
        for factor, has_spill_file in _CPU_WAYS if self._is_cpu else _GPU_WAYS:
            if has_spill_file and self.scratch is None:
                break
            plan = self._in_columns(_Plan(factor, has_spill_file), budget_bytes, tile_px)
            needed = self._forecast(plan, plan.widest, rows)
            if has_spill_file and needed.disk > room:
                continue
            found.append((max(0, needed.memory - budget_bytes), plan.cost, plan))
            if needed.memory <= budget_bytes and (plan.cost <= _CHEAP or tile_px is not None):
                break
        _, _, best = min(found, key=lambda item: item[:2])
        rows = self._rows_of(best, budget_bytes) if tile_px is None else tile_px
        return replace(best, stripe_px=min(rows, self.height))

    def _in_columns(self, plan: _Plan, budget_bytes: int, tile_px: int | None) -> _Plan:
        """In columns of `tile_px`, or in as many of equal widths as the budget asks for."""
        step = tile_px or -(-self.width // self._columns(plan, budget_bytes))
        cuts = (*range(0, self.width, step), self.width)
        bands = [Window(Span(0, self.height), Span(*band)) for band in pairwise(cuts)]
        return replace(plan, cuts=cuts, cost=cost_of(self.network.graph, bands) if len(bands) > 1 else 1.0)

    def _columns(self, plan: _Plan, budget_bytes: int) -> int:
        """As few columns as the budget allows.

        Bytes grow nearly linearly with the width of a column, and a forecast of a deep network takes seconds.
        """
        possible = [columns for columns in _COLUMNS if columns == 1 or self.width // columns >= _LEAST_ROWS]
        widths = [-(-self.width // columns) for columns in possible]
        low, high, place = -1, len(possible), 0  # too few columns, enough, and where to look next
        known: dict[int, int] = {}  # bytes, by place
        while high - low > 1:
            known[place] = self._forecast(plan, widths[place], _LEAST_ROWS).memory
            low, high = (low, place) if known[place] <= budget_bytes else (place, high)
            line = [(0, 0), *((widths[place], size) for place, size in known.items())][-2:]
            fitting = _width_for(budget_bytes, *line)
            place = next((place for place, wide in enumerate(widths) if wide <= fitting), len(widths) - 1)
            place = min(max(place, low + 1), high - 1)
        if high == len(possible):  # nothing fits: narrow columns are mostly surroundings, and hardly take less
            return self._columns(plan, int(_HARDLY_MORE * min(known.values())))
        return possible[high]

    def _rows_of(self, plan: _Plan, budget_bytes: int) -> int:
        """As many rows of a stripe as the budget allows and are of use."""
        most = min(_MOST_ROWS, max(_LEAST_ROWS, _STRIPE_PX // plan.widest), self.height)
        possible = [_LEAST_ROWS << power for power in range(16) if _LEAST_ROWS << power <= max(most, _LEAST_ROWS)]

        def is_more(rows: int) -> bool:
            return self._forecast(plan, plan.widest, rows).memory > budget_bytes

        return possible[max(0, bisect_left(possible, True, key=is_more) - 1)]

    def _forecast(self, plan: _Plan, wide: int, rows: int) -> Peaks:
        """What a column in the middle of the image takes in stripes of that many rows."""
        left = (self.width - wide) // 2
        return self._bytes(plan, Window(Span(0, self.height), Span(left, left + wide)), rows)

    def _bytes(self, plan: _Plan, window: Window, rows: int) -> Peaks:
        maps = self._maps(window, rows, plan.has_spill_file)
        return Peaks(int(plan.factor * maps.memory) + self._reordered, maps.disk)

    def _maps_peaks(self, window: Window, rows: int, has_spill_file: bool) -> Peaks:
        maps = peaks(self.network.graph, window, rows, self._sizes, has_spill_file=has_spill_file)
        logits = 4 * self.network.num_classes * rows * window.columns.length
        return maps._replace(memory=maps.memory + 3 * logits)  # they, and what is made of them


def _width_for(budget: int, one: tuple[int, int], other: tuple[int, int]) -> float:
    """The width that takes so many bytes, on the line through two widths with their bytes."""
    (wide, more), (narrow, less) = max(one, other), min(one, other)
    if more <= less:
        return narrow / 2
    return narrow + (budget - less) * (wide - narrow) / (more - less)
