"""Rules of operations that move or interpolate places: padding, slices, index tables, flips, up- and downsampling."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelwise.ops.streaming.axes import Axis, Interpolation, Lookup, Nearest, Reverse, Same, Shift, Sliding
from pixelwise.ops.streaming.graph import Call
from pixelwise.ops.streaming.pointwise import Placewise
from pixelwise.ops.streaming.windows import Span, Window


class Moves:
    """What they share: one rule per axis."""

    def __init__(self, call: Call, **others: Axis) -> None:
        self.axes = call.inputs[0].axes
        self.rows: Axis = others.get("rows", Same())
        self.columns: Axis = others.get("columns", Same())

    def need(self, out: Window) -> list[Window]:
        return [Window(self.rows.need(out.rows), self.columns.need(out.columns))]


class _PadAxis(Sliding):
    """Padding by a constant: windows of one place. Padding may be negative, which cuts."""


class PaddingByRepetition(Moves):
    """pad with mode "replicate" or "reflect"."""

    def __init__(self, call: Call, amounts: list[tuple[int, int]], mode: str) -> None:
        first = call.inputs[0]
        self.tables = []
        for length, (before, after) in zip((first.height, first.width), amounts, strict=True):
            places = torch.arange(-before, length + after)
            if mode == "replicate":
                places = places.clamp(0, length - 1)
            else:
                places = places.abs()
                places = torch.where(places >= length, 2 * (length - 1) - places, places)
            self.tables.append(Lookup(places))
        super().__init__(call, rows=self.tables[0], columns=self.tables[1])

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return _look_up(tensors[0], self.axes, self.tables, out)


def _look_up(x: Tensor, axes: tuple[int, int], tables: list[Any], out: Window) -> Tensor:
    """Places by table; where the table is a plain run of places, nothing is copied."""
    for axis, table, span in zip(axes, tables, out, strict=True):
        if isinstance(table, Lookup):
            places = table.relative(span, x.device)
            if len(places) != x.shape[axis] or not torch.equal(places, torch.arange(len(places), device=x.device)):
                x = x.index_select(axis, places)
    return x


class ConstantPadding(Moves):
    """pad with a constant."""

    def __init__(self, call: Call, amounts: list[tuple[int, int]], value: float) -> None:
        first = call.inputs[0]
        self.row_axis, self.column_axis = (
            _PadAxis(length, kernel=1, before=before)
            for length, (before, _) in zip((first.height, first.width), amounts, strict=True)
        )
        self.value = value
        super().__init__(call, rows=self.row_axis, columns=self.column_axis)
        self._ndim = len(first.shape)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        pads = [0] * (2 * self._ndim)
        for axis, rule, span in zip(self.axes, (self.row_axis, self.column_axis), out, strict=True):
            place = 2 * (self._ndim - 1 - axis)
            pads[place : place + 2] = rule.padding(span)
        return F.pad(tensors[0], pads, value=self.value) if any(pads) else tensors[0]


def padding(call: Call) -> Any:
    """The rule of aten.pad and its kin."""
    name = str(call.op)
    amounts, first = list(call.argument(1, "pad") or call.argument(1, "padding")), call.inputs[0]
    mode = call.argument(2, "mode", "constant") if name == "aten.pad.default" else _MODES[name]
    value = call.argument(3, "value") if name == "aten.pad.default" else call.argument(2, "value", 0)
    ndim = len(first.shape)
    by_axis = {ndim - 1 - index: (amounts[2 * index], amounts[2 * index + 1]) for index in range(len(amounts) // 2)}
    along = [by_axis.pop(axis, (0, 0)) for axis in first.axes]
    if any(amount != (0, 0) for amount in by_axis.values()):
        if any(amount != (0, 0) for amount in along):
            raise call.refusal("it pads channels together with rows or columns")
        return Placewise(call, first.axes)
    if mode == "constant":
        return ConstantPadding(call, along, 0.0 if value is None else value)
    if mode not in ("replicate", "reflect"):
        raise call.refusal(f"padding of mode {mode} brings rows from the other end of the image")
    return PaddingByRepetition(call, along, mode)


_MODES = {
    "aten.constant_pad_nd.default": "constant",
    "aten.replication_pad2d.default": "replicate",
    "aten.reflection_pad2d.default": "reflect",
}


class Slice(Moves):
    """slice and narrow along rows or columns."""

    def __init__(self, call: Call, axis: int, start: int, step: int) -> None:
        shift = Shift(start, step)
        is_row = axis == call.inputs[0].axes[0]
        super().__init__(call, **{"rows" if is_row else "columns": shift})
        self.axis, self.step, self._number = axis, step, 0 if is_row else 1

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        if self.step == 1:
            return tensors[0]
        places = torch.arange(out[self._number].length, device=tensors[0].device) * self.step
        return tensors[0].index_select(self.axis, places)


def slicing(call: Call) -> Any:
    """The rule of aten.slice and aten.narrow."""
    first = call.inputs[0]
    dim = call.argument(1, "dim", 0) % len(first.shape)
    start = call.argument(2, "start", 0) or 0
    if dim not in first.axes:
        return Placewise(call, first.axes)
    length = first.shape[dim]
    start = min(max(start + length if start < 0 else start, 0), length)
    step = call.argument(4, "step", 1) if "slice" in str(call.op) else 1
    return Slice(call, dim, start, step)


class IndexSelect(Moves):
    """index_select along rows or columns by a table that does not depend on the image."""

    def __init__(self, call: Call, axis: int, places: Tensor) -> None:
        table = Lookup(places)
        is_row = axis == call.inputs[0].axes[0]
        super().__init__(call, **{"rows" if is_row else "columns": table})
        self.tables = [table, None] if is_row else [None, table]

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return _look_up(tensors[0], self.axes, self.tables, out)


def index_selecting(call: Call) -> Any:
    """The rule of aten.index_select."""
    first = call.inputs[0]
    dim, places = call.argument(1, "dim") % len(first.shape), call.argument(2, "index")
    if not isinstance(places, Tensor):
        raise call.refusal("its places depend on the image")
    return IndexSelect(call, dim, places) if dim in first.axes else Placewise(call, first.axes)


class Flip(Moves):
    """flip."""

    def __init__(self, call: Call) -> None:
        first = call.inputs[0]
        self.dims = [dim % len(first.shape) for dim in call.argument(1, "dims")]
        rows, columns = (
            Reverse(first.shape[axis]) if axis in self.dims else Same() for axis in first.axes
        )  # fmt: skip
        super().__init__(call, rows=rows, columns=columns)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return tensors[0].flip(self.dims)


class BilinearResampling(Moves):
    """upsample_bilinear2d to any size, larger or smaller."""

    def __init__(self, call: Call) -> None:
        first = call.inputs[0]
        if first.axes != (2, 3) or len(first.shape) != 4:
            raise call.refusal("its map is not (N, C, H, W)")
        align = bool(call.argument(2, "align_corners", False))
        scales = (None, None) if align else _scales(call, 3)
        sizes = list(zip((first.height, first.width), call.shapes[0][2:], scales, strict=True))
        _refuse_shortcuts(call, sizes, factors=(1,))
        self.sides = [Interpolation(length, target, align, scale) for length, target, scale in sizes]
        self.unchanged = not align and call.shapes[0][2:] == first.shape[2:] and set(scales) <= {None, 1.0}
        super().__init__(
            call, rows=Same() if self.unchanged else self.sides[0], columns=Same() if self.unchanged else self.sides[1]
        )

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x = tensors[0]
        if self.unchanged:
            return x
        factors = [side.factor for side in self.sides]
        if all(factors):
            size = (x.shape[2] * factors[0], x.shape[3] * factors[1])
            y = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            for axis, factor, span, window in zip((2, 3), factors, out, windows[0], strict=True):
                y = y.narrow(axis, span.start - window.start * factor, span.length)
            return y
        for axis, side, span, window in zip((2, 3), self.sides, out, windows[0], strict=True):
            x = _interpolate(x, axis, side, span, window)
        return x


def _interpolate(x: Tensor, axis: int, side: Interpolation, out: Span, window: Span) -> Tensor:
    low, high = (table[out.start : out.stop] - window.start for table in (side.low, side.high))
    share = side.share[out.start : out.stop].to(x.device)
    share = share[:, None] if axis == 2 else share
    lower, higher = (x.index_select(axis, places.to(x.device)) for places in (low, high))
    return (lower * (1 - share) + higher * share).to(x.dtype)


class NearestResampling(Moves):
    """upsample_nearest2d."""

    def __init__(self, call: Call) -> None:
        first = call.inputs[0]
        if first.axes != (2, 3):
            raise call.refusal("its map is not (N, C, H, W)")
        sizes = list(zip((first.height, first.width), call.shapes[0][2:], _scales(call, 2), strict=True))
        _refuse_shortcuts(call, sizes, factors=(1, 2))
        self.tables = [Nearest(*size) for size in sizes]
        super().__init__(call, rows=self.tables[0], columns=self.tables[1])

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return _look_up(tensors[0], self.axes, self.tables, out)


def _refuse_shortcuts(call: Call, sizes: Sequence[tuple[int, int, float | None]], factors: tuple[int, ...]) -> None:
    """Where lengths fit one of these factors, torch takes that instead of the scale that it was given, on some devices."""
    for length, target, scale in sizes:
        if scale is not None and any(target == factor * length and scale != factor for factor in factors):
            raise call.refusal(f"its scale of {scale} makes {target} of {length}, which is not the same on all devices")


def _scales(call: Call, place: int) -> tuple[float | None, float | None]:
    """The scale factors that the network's code gave to torch, if it gave any."""
    given = call.argument(place, "scale_factors")
    if str(call.op).endswith(".vec"):
        return (None, None) if not given else (float(given[0]), float(given[1]))
    return (call.argument(place, "scales_h"), call.argument(place + 1, "scales_w"))


class PixelShuffle(Moves):
    """pixel_shuffle: channels become rows and columns."""

    def __init__(self, call: Call) -> None:
        first = call.inputs[0]
        if first.axes != (2, 3) or len(first.shape) != 4:
            raise call.refusal("its map is not (N, C, H, W)")
        self.factor = call.argument(1, "upscale_factor")
        sides = [_Blocks(self.factor) for _ in first.axes]
        super().__init__(call, rows=sides[0], columns=sides[1])

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        y = F.pixel_shuffle(tensors[0], self.factor)
        for axis, span, window in zip((2, 3), out, windows[0], strict=True):
            y = y.narrow(axis, span.start - window.start * self.factor, span.length)
        return y


class _Blocks:
    """Each place becomes `factor` places."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def need(self, out: Span) -> Span:
        return Span(out.start // self.factor, -(-out.stop // self.factor))
