"""What a way of streaming costs, told beforehand: multiply-adds over those of one pass, and the most memory at any time.

Nothing is computed: the stream is walked with tensors that have shapes only.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pixelwise.ops.streaming.graph import Graph, whole
from pixelwise.ops.streaming.kernels import Convolution, MaxPooling, Slides
from pixelwise.ops.streaming.memory import Span, Spilled, SpillFile, Window
from pixelwise.ops.streaming.network import LEAST_STEP_PX, Stream

_TYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.int64}  # by bytes per number
STEADY = 6  # stripes without a new peak, once rows have been let go of everywhere, tell that none will come


def multiply_adds(graph: Graph, windows: Sequence[Window]) -> int:
    """Multiplications (each with its addition) to compute these windows of the graph's maps."""
    total = 0
    for rule, window in zip(graph.rules[1:], windows[1:], strict=True):
        total += rule.macs * math.prod(window.size)
        total += rule.macs_of_input and rule.macs_of_input * math.prod(rule.need(window)[0].size)
    return total


def cost_of(graph: Graph, regions: Sequence[Window]) -> float:
    """The multiply-adds for these windows of the logits, each by itself, over those of one pass over the whole image.

    A network without convolutions costs nothing either way: 1.
    """
    _, _, height, width = graph.shape
    once = multiply_adds(graph, graph.windows(whole(height, width)))
    return sum(multiply_adds(graph, graph.windows(region)) for region in regions) / once if once else 1.0


def item_sizes(graph: Graph, compute_bytes: int) -> list[int]:
    """Bytes per number of each map, where convolutions and linear layers give numbers of `compute_bytes`."""
    sizes: list[int] = []
    for call, rule in zip(graph.calls, graph.rules, strict=True):
        if call is None:
            sizes.append(4)
        elif rule.macs or rule.macs_of_input:
            sizes.append(compute_bytes)
        elif isinstance(rule, MaxPooling) and rule.gives_places:
            sizes.append(8)
        else:
            floats = [sizes[source] for source in call.sources if sizes[source] <= 4]
            sizes.append(max(floats, default=4))
    return sizes


def scratch_bytes(graph: Graph) -> int:
    """What the largest convolution takes beside its maps: CPUs bring its weights into another order for each call."""
    return max((rule.weight.nbytes for rule in graph.rules if isinstance(rule, Convolution)), default=0)


class Peaks(NamedTuple):
    """The most bytes at any time."""

    memory: int
    disk: int = 0


class _EmptyFile(SpillFile):
    """Counts what would be stored, of tensors without content."""

    def __init__(self) -> None:
        self.size, self._free = 0, defaultdict(list)

    def _write(self, offset: int, rows: Tensor) -> None:
        pass

    def _read(self, item: Spilled) -> Tensor:
        return torch.empty(item.shape, dtype=item.dtype, device="meta")


class Forecast(Stream):
    """A stream that keeps account of the bytes and computes nothing."""

    def __init__(self, graph: Graph, region: Window, sizes: Sequence[int], *, has_spill_file: bool = False) -> None:
        self.spill_file = _EmptyFile() if has_spill_file else None
        super().__init__(graph, region, spill_file=self.spill_file)
        self.sizes, self.peak, self.held = sizes, 0, [0] * len(graph.calls)

    def walk(self, row: int, step_px: int) -> None:
        """As `advance`."""
        for step, stop in self.schedule(row, step_px):
            self._count(step, stop)
        last = self.graph.last
        self.kept[last].drop_before(row)
        self._weigh(last)

    def set_aside(self) -> None:
        """As that of a stream."""
        super().set_aside()
        for step in range(self.graph.last):
            self._weigh(step)

    def _count(self, step: int, stop: int) -> None:
        call, rule, kept = self.graph.calls[step], self.graph.rules[step], self.kept[step]
        new = Window(Span(kept.stop, stop), self.needed[step].columns)
        copied = 0
        for source, window in zip(call.sources, rule.need(new), strict=True) if call else ():
            pads = rule.pads(new) if isinstance(rule, Slides) else ()
            is_uneven = any(before != after for before, after in pads)
            bases = self.graph.bases[source]
            for base in bases:
                self.kept[base].fetch(window.rows)
                self._weigh(base)
                copies = is_uneven + (len(bases) > 1) + (not self.kept[base].is_whole(window))
                copied += copies * self._rows(base, window).nbytes if copies else 0
        alike = self.graph.together.get(step, [step])
        for item in alike:
            self.kept[item].append(self._rows(item, new))
            self._weigh(item)
        self.peak = max(self.peak, sum(self.held) + copied)
        for item in alike:
            for source in self.graph.sources(item):
                self.release(source, item)
                self._weigh(source)

    @property
    def peaks(self) -> Peaks:
        """Up to now."""
        return Peaks(self.peak, self.spill_file.size if self.spill_file is not None else 0)

    def _rows(self, step: int, new: Window) -> Tensor:
        return self.graph.maps[step].empty(new.size, "meta", _TYPES[self.sizes[step]])

    def _weigh(self, step: int) -> None:
        self.held[step] = self.kept[step].nbytes()

    def is_flowing(self) -> bool:
        """Whether every map has let go of its first rows, so that no more than now waits anywhere."""
        return all(
            kept.start > needed.rows.start or not needed.rows.length
            for step, (kept, needed) in enumerate(zip(self.kept, self.needed, strict=True))
            if not self.graph.is_joined(step)
        )


def peaks(graph: Graph, region: Window, stripe_px: int, sizes: Sequence[int], *, has_spill_file: bool = False) -> Peaks:
    """The most bytes that the maps take at any time while `region` streams through in stripes of `stripe_px` rows.

    That is while the first rows flow, or at the end, where the last stripe is followed at once by what waited for rows
    below the image. With a spill file, rows that wait for long lie on the disk.
    """
    most, last = _walk(graph, region, stripe_px, sizes, has_spill_file)
    start = region.rows.start + (region.rows.length - 1) // stripe_px * stripe_px - stripe_px
    if start <= last:
        return most
    bottom, _ = _walk(graph, Window(Span(start, region.rows.stop), region.columns), stripe_px, sizes, has_spill_file)
    return Peaks(max(most.memory, bottom.memory), max(most.disk, bottom.disk))


def _walk(
    graph: Graph, region: Window, stripe_px: int, sizes: Sequence[int], has_spill_file: bool
) -> tuple[Peaks, int]:
    """The peaks of a region, and down to which row they were looked for: until they repeat."""
    forecast, steady = Forecast(graph, region, sizes, has_spill_file=has_spill_file), 0
    for first in range(region.rows.start, region.rows.stop, stripe_px):
        before = forecast.peaks
        forecast.walk(min(first + stripe_px, region.rows.stop), max(stripe_px, LEAST_STEP_PX))
        steady = steady + 1 if forecast.peaks == before and forecast.is_flowing() else 0
        if steady == STEADY:
            return forecast.peaks, first + stripe_px
    return forecast.peaks, region.rows.stop
