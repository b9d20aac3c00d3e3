"""Rules of operations that move or interpolate places: padding, slices, index tables, flips, up- and downsampling."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelwise.ops.streaming.axes import Lookup, Rule, Same, Sliding
from pixelwise.ops.streaming.graph import Call
from pixelwise.ops.streaming.pointwise import Placewise
from pixelwise.ops.streaming.windows import Span, Window

MODES = {
    "aten.constant_pad_nd.default": "constant",
    "aten.replication_pad2d.default": "replicate",
    "aten.reflection_pad2d.default": "reflect",
}


class Lookups(Rule):
    """Rows and columns from other places, by a table for each of these axes: slices, repetition, nearest places."""

    def __init__(self, call: Call, tables: dict[int, Tensor]) -> None:
        self.axes = call.inputs[0].axes
        self.rows, self.columns = (Lookup(tables[axis]) if axis in tables else Same() for axis in self.axes)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x = tensors[0]
        for axis, side, span in zip(self.axes, (self.rows, self.columns), out, strict=True):
            x = side.select(x, axis, span) if isinstance(side, Lookup) else x
        return x


class ConstantPadding(Rule):
    """pad with a constant: windows of one place. Padding may be negative, which cuts."""

    rows: Sliding
    columns: Sliding

    def __init__(self, call: Call, amounts: list[tuple[int, int]], value: float) -> None:
        first = call.inputs[0]
        self.axes, self.value, self._ndim = first.axes, value, len(first.shape)
        sides = zip((first.height, first.width), amounts, strict=True)
        self.rows, self.columns = (Sliding(length, kernel=1, before=before) for length, (before, _) in sides)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        pads = [0] * (2 * self._ndim)
        for axis, rule, span in zip(self.axes, (self.rows, self.columns), out, strict=True):
            place = 2 * (self._ndim - 1 - axis)
            pads[place : place + 2] = rule.padding(span)
        return F.pad(tensors[0], pads, value=self.value) if any(pads) else tensors[0]


def padding(call: Call) -> Rule:
    """The rule of aten.pad and its kin."""
    name, first = str(call.op), call.inputs[0]
    amounts = list(call.argument(1, "pad") or call.argument(1, "padding"))
    mode = call.argument(2, "mode", "constant") if name == "aten.pad.default" else MODES[name]
    value = call.argument(3, "value") if name == "aten.pad.default" else call.argument(2, "value", 0)
    last = len(first.shape) - 1
    by_axis = {last - index: (amounts[2 * index], amounts[2 * index + 1]) for index in range(len(amounts) // 2)}
    along = [by_axis.pop(axis, (0, 0)) for axis in first.axes]
    if any(amount != (0, 0) for amount in by_axis.values()):
        if any(amount != (0, 0) for amount in along):
            raise call.refusal("it pads channels together with rows or columns")
        return Placewise(call, first.axes)
    if mode == "constant":
        return ConstantPadding(call, along, 0.0 if value is None else value)
    if mode not in ("replicate", "reflect"):
        raise call.refusal(f"padding of mode {mode} brings rows from the other end of the image")
    tables = {}
    for axis, (before, after) in zip(first.axes, along, strict=True):
        end = first.shape[axis] - 1
        places = torch.arange(-before, end + 1 + after)
        mirrored = end - (end - places.abs()).abs()
        tables[axis] = places.clamp(0, end) if mode == "replicate" else mirrored
    return Lookups(call, tables)


def slicing(call: Call) -> Rule:
    """The rule of aten.slice and aten.narrow."""
    first = call.inputs[0]
    dim = call.argument(1, "dim", 0) % len(first.shape)
    if dim not in first.axes:
        return Placewise(call, first.axes)
    length, start = first.shape[dim], call.argument(2, "start", 0) or 0
    start = min(max(start + length if start < 0 else start, 0), length)
    step = call.argument(4, "step", 1) if "slice" in str(call.op) else 1
    return Lookups(call, {dim: start + step * torch.arange(call.shapes[0][dim])})


def index_selecting(call: Call) -> Rule:
    """The rule of aten.index_select, by a table that does not depend on the image."""
    first = call.inputs[0]
    dim, places = call.argument(1, "dim") % len(first.shape), call.argument(2, "index")
    if not isinstance(places, Tensor):
        raise call.refusal("its places depend on the image")
    return Lookups(call, {dim: places}) if dim in first.axes else Placewise(call, first.axes)


class Flip(Lookups):
    """flip."""

    def __init__(self, call: Call) -> None:
        shape = call.inputs[0].shape
        self.dims = [dim % len(shape) for dim in call.argument(1, "dims")]
        super().__init__(call, {dim: torch.arange(shape[dim]).flip(0) for dim in self.dims})

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return tensors[0].flip(self.dims)


class Interpolation:
    """Linear between two places, as torch computes it (in float32, so that far from the start the same rounding comes out).

    `align_corners` lets the ends fall together (else the areas of the outermost places do). `scale` is output over input,
    where the caller of torch gave it; else it follows from the lengths.
    """

    def __init__(self, length: int, target: int, align_corners: bool, scale: float | None) -> None:
        places = torch.arange(target, dtype=torch.float32)
        if align_corners:
            step = (length - 1) / (target - 1) if target > 1 else 0.0
            source = places * torch.tensor(step, dtype=torch.float32)
        else:
            step = 1 / scale if scale else length / target
            source = (torch.tensor(step, dtype=torch.float32) * (places + 0.5) - 0.5).clamp(min=0)
        self.low = source.floor().long().clamp(max=length - 1)
        self.high = (self.low + 1).clamp(max=length - 1)
        self.share = (source - self.low).clamp(0, 1)  # of the higher place
        factor = target // length
        self.factor = factor if target == factor * length and not align_corners and scale in (None, factor) else 0
        self.length = length

    def need(self, out: Span) -> Span:
        if out.length == 0:
            return Span(0, 0)
        if self.factor:  # a place more on each side: torch's own kernel treats the ends of what it is given as borders
            return Span(out.start // self.factor - 1, -(-out.stop // self.factor) + 1).clip(self.length)
        return Span(int(self.low[out.start]), int(self.high[out.stop - 1]) + 1)

    def run(self, x: Tensor, axis: int, out: Span, window: Span) -> Tensor:
        """The places `out` from the window that they need."""
        low, high = (table[out.start : out.stop] - window.start for table in (self.low, self.high))
        share = self.share[out.start : out.stop].to(x.device)
        share = share[:, None] if axis == 2 else share
        lower, higher = (x.index_select(axis, places.to(x.device)) for places in (low, high))
        return (lower * (1 - share) + higher * share).to(x.dtype)


class BilinearResampling(Rule):
    """upsample_bilinear2d to any size, larger or smaller."""

    def __init__(self, call: Call) -> None:
        first, target = call.require_nchw(), call.shapes[0][2:]
        align = bool(call.argument(2, "align_corners", False))
        scales = (None, None) if align else _scales(call, 3)
        sizes = list(zip(first.shape[2:], target, scales, strict=True))
        _refuse_shortcuts(call, sizes, factors=(1,))
        self.unchanged = not align and target == first.shape[2:] and set(scales) <= {None, 1.0}
        self.sides = [] if self.unchanged else [Interpolation(*size[:2], align, size[2]) for size in sizes]
        if self.sides:
            self.rows, self.columns = self.sides

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x = tensors[0]
        factors = [side.factor for side in self.sides]
        if self.sides and all(factors):
            size = (x.shape[2] * factors[0], x.shape[3] * factors[1])
            return _narrow(F.interpolate(x, size=size, mode="bilinear", align_corners=False), out, windows[0], factors)
        for axis, side in enumerate(self.sides):
            x = side.run(x, axis + 2, out[axis], windows[0][axis])
        return x


def _narrow(y: Tensor, out: Window, window: Window, factors: Sequence[int]) -> Tensor:
    """The window `out` of a result that has `factors` times the rows and columns of the input's window."""
    for axis, factor, span, given in zip((2, 3), factors, out, window, strict=True):
        y = y.narrow(axis, span.start - given.start * factor, span.length)
    return y


def nearest(call: Call) -> Rule:
    """The rule of upsample_nearest2d, which takes the nearest place rounded down."""
    first = call.require_nchw()
    sizes = list(zip(first.shape[2:], call.shapes[0][2:], _scales(call, 2), strict=True))
    _refuse_shortcuts(call, sizes, factors=(1, 2))
    tables = {}
    for axis, (length, target, scale) in enumerate(sizes, 2):
        step = torch.tensor(1 / scale if scale else length / target, dtype=torch.float32)
        tables[axis] = (torch.arange(target, dtype=torch.float32) * step).floor().long().clamp(max=length - 1)
    return Lookups(call, tables)


def _refuse_shortcuts(call: Call, sizes: Sequence[tuple[int, int, float | None]], factors: tuple[int, ...]) -> None:
    """Where lengths fit one of these factors, torch takes that instead of the scale that it was given, on some devices."""
    for length, target, scale in sizes:
        if scale is not None and any(target == factor * length and scale != factor for factor in factors):
            raise call.refusal(f"its scale of {scale} makes {target} of {length}, which is not the same on all devices")


def _scales(call: Call, place: int) -> tuple[float | None, float | None]:
    """The scale factors that the network's code gave to torch, if it gave any."""
    given: Any = call.argument(place, "scale_factors")
    if str(call.op).endswith(".vec"):
        return (None, None) if not given else (float(given[0]), float(given[1]))
    return (call.argument(place, "scales_h"), call.argument(place + 1, "scales_w"))


class PixelShuffle(Rule):
    """pixel_shuffle: channels become rows and columns."""

    def __init__(self, call: Call) -> None:
        call.require_nchw()
        self.factor = call.argument(1, "upscale_factor")
        self.rows, self.columns = (Lookup(torch.arange(length) // self.factor) for length in call.shapes[0][2:])

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return _narrow(F.pixel_shuffle(tensors[0], self.factor), out, windows[0], (self.factor, self.factor))
