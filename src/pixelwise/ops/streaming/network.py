"""A network that computes any window of its logits from the windows of all maps before it, each row of them once.

Rows are asked for from the last map backwards ("these logits need those rows of that map, which need ...") and computed
forwards. A map keeps the rows that rows still to come will need, and no others: skips wait in it until the decoder has come
as far. So the image streams through in stripes, nothing is computed twice, and the result is that of one pass.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pixelwise.ops.streaming import kernels, places
from pixelwise.ops.streaming.graph import Call, Graph, Rule
from pixelwise.ops.streaming.memory import Kept, MemoryLimit, RowMemory, Span, SpillFile, Window

ReadWindow = Callable[[int, int, int, int], Tensor]
"""(top, left, height, width) -> that part of the image, (C, height, width), on the network's device."""

LEAST_STEP_PX = 32  # rows of the image that are taken at once, at least
_SOON_PX = 64  # rows that are needed before so many rows of the image have come do not go to the disk
_NARROW = 0.9  # of the columns; what saves less is not worth a copy

_MAKERS: dict[Callable[[Call], Rule], str] = {
    places.at_rest: "dropout.default feature_dropout.default alpha_dropout.default dropout_.default",
    places.along_channels: "softmax.int _softmax.default log_softmax.int _log_softmax.default sum.dim_IntList mean.dim "
    "amax.default logsumexp.default chunk.default split.Tensor split_with_sizes.default",
    places.Reshaped: "view.default reshape.default squeeze.dim squeeze.dims unsqueeze.default",
    places.Permuted: "permute.default transpose.int",
    places.normalised: "batch_norm.default",
    places.Joined: "cat.default",
    places.norm_of_channels: "layer_norm.default",
    places.linear_of_channels: "linear.default",
    places.pooled_channels: "avg_pool3d.default",
    places.slicing: "slice.Tensor narrow.default",
    places.index_selecting: "index_select.default",
    places.Flip: "flip.default",
    places.nearest: "upsample_nearest2d.vec upsample_nearest2d.default",
    places.PixelShuffle: "pixel_shuffle.default",
    kernels.Convolution: "conv2d.default conv2d.padding",
    kernels.TransposedConvolution: "conv_transpose2d.input",
    kernels.MaxPooling: "max_pool2d.default max_pool2d_with_indices.default",
    kernels.MaxUnpooling: "max_unpool2d.default",
    kernels.AveragePooling: "avg_pool2d.default",
    kernels.padding: "pad.default constant_pad_nd.default replication_pad2d.default reflection_pad2d.default",
    kernels.BilinearResampling: "upsample_bilinear2d.vec upsample_bilinear2d.default",
}
RULES = {f"aten.{name}": maker for maker, names in _MAKERS.items() for name in names.split()}
RULES["pixelwise.spatial_dropout.default"] = places.DroppedByPlace
RULES["pixelwise.int8_convolution.default"] = kernels.Int8Convolution


def rule_of(call: Call) -> Rule:
    """The rule of an operation; NotWindowed if it has none, or its own does not suit it."""
    if maker := RULES.get(str(call.op)):
        return maker(call)
    if call.index is None and places.is_placewise(call.op):
        return places.Placewise(call)
    raise call.refusal("it is not known here, or needs the whole image at once")


class WindowedNetwork:
    """A network, made ready to compute the logits of images of one size window by window.

    The model is in eval mode and shares its weights; `autocast` gives the context to run in. `num_classes` is K. An
    operation that is not known, or needs the whole image at once, is NotWindowed.
    """

    def __init__(
        self,
        model: nn.Module,
        height: int,
        width: int,
        *,
        in_channels: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.graph = Graph(model, (1, in_channels, height, width), rule_of)
        self.autocast = autocast
        self.num_classes = self.graph.maps[self.graph.last].shape[1]

    @torch.inference_mode()
    def stripes(
        self,
        read: ReadWindow,
        *,
        top: int,
        left: int,
        height: int,
        width: int,
        stripe_px: int,
        memory_limit: MemoryLimit | None = None,
        spill_file: SpillFile | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The logits of a window, `stripe_px` rows after the other: (first row, (K, rows, width)).

        The process is held to `memory_limit`, if given, as far as the maps allow; rows that wait for long lie in
        `spill_file`, if given (on CPUs).
        """
        region = Window(Span(top, top + height), Span(left, left + width))
        memory = RowMemory() if self.graph.device.type == "cpu" else None
        stream = Stream(self.graph, region, memory, memory_limit, spill_file)
        for first in range(top, top + height, stripe_px):
            with self.autocast():
                logits = stream.advance(min(first + stripe_px, top + height), read, max(stripe_px, LEAST_STEP_PX))
            yield first, logits[0]


class Stream:
    """One way down a region of the logits; `kept` are, of each map, the rows that are still needed."""

    def __init__(
        self,
        graph: Graph,
        region: Window,
        memory: RowMemory | None = None,
        memory_limit: MemoryLimit | None = None,
        spill_file: SpillFile | None = None,
    ) -> None:
        self.graph, self.region, self.memory_limit = graph, region, memory_limit
        self.needed = graph.windows(region)
        self.kept = [
            Kept(item.axes, window.columns, window.rows.start, window.rows.start, memory, spill_file)
            for item, window in zip(graph.maps, self.needed, strict=True)
        ]
        self.waits: list[dict[int, Window | None]] = [
            {user: self._needs(source, user) for user in users} for source, users in enumerate(graph.users)
        ]

    def advance(self, row: int, read: ReadWindow, step_px: int) -> Tensor:
        """The logits down to `row` (exclusive), from where the last call ended, (1, K, rows, width)."""
        last = self.kept[self.graph.last]
        first = last.stop
        for step, stop in self.schedule(row, step_px):
            self._compute(step, stop, read)
            if self.memory_limit is not None:
                self.memory_limit.hold()
        logits = last.take(Window(Span(first, row), self.region.columns))
        last.drop_before(row)
        return logits

    def schedule(self, row: int, step_px: int) -> Iterator[tuple[int, int]]:
        """(map, down to which row it is to be computed next), until there are logits down to `row`.

        `step_px` rows of the image are taken at a time, and what they allow is computed before the next are: the first rows
        of the logits need many of the image, whose maps would be large all at once.
        """
        targets = self._targets(row)
        image = 0
        while True:
            targets_now = [*targets]
            targets_now[image] = min(targets[image], self.kept[image].stop + step_px)
            is_last = targets_now[image] == targets[image]
            for step, stop in enumerate(targets_now):
                if stop > self.kept[step].stop:
                    stop = stop if is_last else self._reachable(step, stop)
                    if stop > self.kept[step].stop:
                        yield step, stop
            self.set_aside()
            if is_last:
                return

    def _reachable(self, step: int, stop: int) -> int:
        """How far a map can be computed, at most to `stop`, from the rows that are there."""
        call, rule, kept = self.graph.calls[step], self.graph.rules[step], self.kept[step]
        if call is None:
            return stop
        columns = self.needed[step].columns

        def is_there(row: int) -> bool:
            windows = rule.need(Window(Span(kept.stop, row), columns))
            return all(
                not window.rows.length or window.rows.stop <= self.kept[base].stop
                for source, window in zip(call.sources, windows, strict=True)
                for base in self.graph.bases[source]
            )

        if is_there(stop):
            return stop
        return kept.stop + bisect_left(range(kept.stop + 1, stop + 1), True, key=lambda row: not is_there(row))

    def _targets(self, row: int) -> list[int]:
        """Down to which row each map has to be computed for the logits down to `row`."""
        graph, kept = self.graph, self.kept
        targets = [item.stop for item in kept]
        targets[graph.last] = row
        for step in range(graph.last, 0, -1):
            alike = graph.together.get(step, [step])
            for item in alike:
                targets[item] = max(targets[item] for item in alike)
            call = graph.calls[step]
            if call is None or targets[step] <= kept[step].stop:
                continue
            new = Window(Span(kept[step].stop, targets[step]), self.needed[step].columns)
            for source, window in zip(call.sources, graph.rules[step].need(new), strict=True):
                for base in graph.bases[source] if 0 not in window.size else ():
                    targets[base] = max(targets[base], window.rows.stop)
        return targets

    def _compute(self, step: int, stop: int, read: ReadWindow) -> None:
        """The next rows of a map."""
        graph, kept = self.graph, self.kept[step]
        call, rule = graph.calls[step], graph.rules[step]
        new = Window(Span(kept.stop, stop), self.needed[step].columns)
        if call is None:
            (top, _), (left, _) = new
            kept.append(read(top, left, *new.size)[None])
            return
        windows = rule.need(new)
        tensors = [self._take(source, window) for source, window in zip(call.sources, windows, strict=True)]
        result = rule.run(new, tensors, windows, self._is_owned(call, tensors))
        del tensors
        for item in graph.together.get(step, [step]):
            index = graph.calls[item].index  # type: ignore[union-attr]
            self.kept[item].append(result if index is None else result[index])
            for source in graph.sources(item):
                self.release(source, item)

    def _take(self, source: int, window: Window) -> Tensor:
        bases = self.graph.bases[source]
        if 0 in window.size:  # only padding is seen
            maps = [self.graph.maps[base].empty(window.size, self.graph.device) for base in bases]
        else:
            maps = [self.kept[base].take(window) for base in bases]
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)

    def _is_owned(self, call: Call, tensors: list[Tensor]) -> bool:
        """Whether the only input is of no use to anything else, so that it may be overwritten."""
        graph, sources = self.graph, call.sources
        if len(sources) != 1 or graph.bases[sources[0]] != sources or len(graph.users[sources[0]]) != 1:
            return False
        return graph.rules[sources[0]].gives_new and tensors[0]._base is None

    def release(self, source: int, user: int) -> None:
        """Let go of the rows of a map that nothing to come needs, now that `user` has come further."""
        waits = self.waits[source]
        waits[user] = self._needs(source, user)
        rows = [need.rows.start for need in waits.values() if need is not None]
        self.kept[source].drop_before(min(rows, default=self.needed[source].rows.stop))

    def set_aside(self) -> None:
        """Where rows wait for a skip only, drop the columns that it does not need; what is left may go to the spill file."""
        for source, kept in enumerate(self.kept[: self.graph.last]):
            if kept.start < kept.stop:
                self._set_aside(source, kept)
            kept.settle()

    def _set_aside(self, source: int, kept: Kept) -> None:
        needs = sorted(need for need in self.waits[source].values() if need is not None)
        soon = 1 + _SOON_PX * self.graph.maps[source].height // self.graph.shape[2]
        if not needs or needs[-1].rows.start <= needs[0].rows.start + soon:
            return
        columns = Span(0, 0)
        best = (0, 0, columns)  # numbers that are saved, above which row, with which columns
        for skip, later in pairwise(needs):
            columns, row = columns.union(skip.columns), later.rows.start
            best = max(best, ((row - kept.start) * (kept.columns.length - columns.length), row, columns))
        saved, row, columns = best
        if saved > 0 and columns.length < _NARROW * kept.columns.length:
            kept.narrow_before(row, columns)
        for skip, later in pairwise(needs):
            if later.rows.start > skip.rows.start + soon:
                kept.spill(Span(skip.rows.start + soon, later.rows.start))

    def _needs(self, source: int, user: int) -> Window | None:
        """What an operation still needs of a map; None if nothing."""
        rest = Window(Span(self.kept[user].stop, self.needed[user].rows.stop), self.needed[user].columns)
        call = self.graph.calls[user]
        if rest.rows.length == 0 or call is None:
            return None
        found = None
        for item, window in zip(call.sources, self.graph.rules[user].need(rest), strict=True):
            if source in self.graph.bases[item] and 0 not in window.size:
                found = window if found is None else found.union(window)
        return found
