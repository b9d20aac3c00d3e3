"""Rules of convolutions, their transposes, pooling, padding and interpolation: windows from slightly larger windows.

At the border of the whole map the window is padded as the operation pads; elsewhere the neighbours are really there.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelwise.ops.packed import PackedConvolution
from pixelwise.ops.quantization import PackedInt8Convolution
from pixelwise.ops.streaming.graph import Axis, Call, Rule
from pixelwise.ops.streaming.memory import Span, Window
from pixelwise.ops.streaming.places import Lookups, Placewise, cut, enlarged, scaled_sizes

Pair = tuple[int, int]
MODES = {
    "aten.constant_pad_nd.default": "constant",
    "aten.replication_pad2d.default": "replicate",
    "aten.reflection_pad2d.default": "reflect",
}


@dataclass(frozen=True)
class Sliding(Axis):
    """Windows of `kernel` places, `dilation` apart, that move by `stride`; `before` places of padding come first."""

    length: int
    kernel: int
    stride: int = 1
    before: int = 0
    dilation: int = 1

    def given(self, inside: Span) -> Span:
        """The places, with those of the padding, that these windows cover."""
        start = inside.start * self.stride - self.before
        return Span(start, (inside.stop - 1) * self.stride - self.before + (self.kernel - 1) * self.dilation + 1)

    def need(self, out: Span) -> Span:
        return self.given(out).clip(self.length)

    def padding(self, out: Span) -> Pair:
        """How many places of padding come before and behind what is needed."""
        padded, inside = self.given(out), self.need(out)
        if inside.length == 0:
            return padded.length, 0
        return inside.start - padded.start, padded.stop - inside.stop


class Spreading(Sliding):
    """The transpose: a place of the input goes to `kernel` places of the output, `stride` further for the next."""

    def need(self, out: Span) -> Span:
        first = -(-(out.start + self.before - (self.kernel - 1) * self.dilation) // self.stride)
        return Span(first, (out.stop - 1 + self.before) // self.stride + 1).clip(self.length)

    def padding(self, out: Span) -> Pair:
        return 0, 0  # the result is cut instead


def pair(value: Any) -> Pair:
    """(height, width) of an argument that may be one number for both."""
    value = (value,) if isinstance(value, int) else value
    return value[0], value[-1]


class Slides(Rule):
    """What kernels share: two `Sliding` axes and the padding of border windows."""

    rows: Sliding
    columns: Sliding
    fill = 0.0  # what stands outside the map
    kind = Sliding

    def __init__(self, call: Call, kernel: Pair, stride: Pair, before: Pair, dilation: Pair = (1, 1)) -> None:
        self.kernel, self.stride, self.dilation = kernel, stride, dilation
        geometry = zip(call.require_nchw().shape[2:], kernel, stride, before, dilation, strict=True)
        self.rows, self.columns = (self.kind(*numbers) for numbers in geometry)

    def pads(self, out: Window) -> tuple[Pair, Pair]:
        """(above, below), (left, right): how much padding the window needs."""
        return self.rows.padding(out.rows), self.columns.padding(out.columns)

    def padded(self, x: Tensor, out: Window) -> Tensor:
        """The window with its padding."""
        (above, below), (left, right) = self.pads(out)
        return F.pad(x, (left, right, above, below), value=self.fill) if above or below or left or right else x


class Convolution(Slides):
    """conv2d."""

    gives_new, dilation_at = True, 5

    def __init__(self, call: Call) -> None:
        self.weight, self.bias = call.argument(1, "weight"), call.argument(2, "bias")
        if not isinstance(self.weight, Tensor) or len(call.inputs) != 1:
            raise call.refusal("its weights depend on the image")
        kernel, dilation = pair(self.weight.shape[2:]), pair(call.argument(self.dilation_at, "dilation", 1))
        padding = call.argument(4, "padding", 0)
        if padding == "same":  # the smaller half goes first
            padding = [side * (size - 1) // 2 for side, size in zip(dilation, kernel, strict=True)]
        before = (0, 0) if padding == "valid" else pair(padding)
        super().__init__(call, kernel, pair(call.argument(3, "stride", 1)), before, dilation)
        self.groups, self.macs = call.argument(6, "groups", 1), math.prod(self.weight.shape)
        self.packed: PackedConvolution | PackedInt8Convolution | None = None
        if self.weight.dtype == torch.bfloat16:  # of a folded network, which runs without autocast
            self.packed = PackedConvolution.of(self.weight, self.bias, self.stride, self.dilation, self.groups, None)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        (above, below), (left, right) = self.pads(out)
        x, padding = tensors[0], (above, left)  # which the operation adds itself if it is the same on both sides
        if above != below or left != right:
            x, padding = self.padded(x, out), (0, 0)
        if self.packed is not None and PackedConvolution.is_possible(x):
            return self.packed(x, padding)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class Int8Convolution(Convolution):
    """pixelwise::int8_convolution."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        more = call.args[7:]
        self.packed = PackedInt8Convolution(self.weight, self.bias, self.stride, self.dilation, self.groups, *more)
        self.fill = more[2]  # the level that is 0


class TransposedConvolution(Convolution):
    """conv_transpose2d."""

    kind, dilation_at = Spreading, 7

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.macs, self.macs_of_input = 0, self.macs

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x = tensors[0]
        if 0 in x.shape:
            y = x.new_zeros(x.shape[0], self.weight.shape[1] * self.groups, *out.size)
            return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)
        given = [axis.given(span) for axis, span in zip((self.rows, self.columns), windows[0], strict=True)]
        # Beyond what the input reaches (torch's output_padding) there is nothing but the bias.
        beyond = any(span.start < all_.start or span.stop > all_.stop for span, all_ in zip(out, given, strict=True))
        bias = None if beyond else self.bias
        y = F.conv_transpose2d(x, self.weight, bias, self.stride, 0, 0, self.groups, self.dilation)
        y = cut(y, out, given)
        return y + self.bias[:, None, None].to(y.dtype) if beyond and self.bias is not None else y


class Pooling(Slides):
    """What maximum and average pooling share."""

    def __init__(self, call: Call, dilation: Pair = (1, 1)) -> None:
        kernel = pair(call.argument(1, "kernel_size"))
        stride = pair(call.argument(2, "stride", []) or kernel)
        super().__init__(call, kernel, stride, pair(call.argument(3, "padding", 0)), dilation)


class MaxPooling(Pooling):
    """max_pool2d, with ceil_mode, and with the places of the maxima in the whole map, where `gives_places`."""

    fill = float("-inf")

    def __init__(self, call: Call) -> None:
        super().__init__(call, pair(call.argument(4, "dilation", 1)))
        self.index = call.index
        self.gives_places = call.index == 1

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Any:
        x = self.padded(tensors[0], out)
        if self.index is None:
            return F.max_pool2d(x, self.kernel, self.stride, 0, self.dilation)
        maxima, places = F.max_pool2d(x, self.kernel, self.stride, 0, self.dilation, return_indices=True)
        row, column = places // x.shape[3], places % x.shape[3]
        (above, _), (left, _) = self.pads(out)
        first_row, first_column = windows[0].rows.start - above, windows[0].columns.start - left
        return maxima, (row + first_row) * self.columns.length + column + first_column


class MaxUnpooling(Slides):
    """max_unpool2d of maxima whose windows did not overlap: a value lands in the window that its place belongs to."""

    kind, count = Spreading, 2

    def __init__(self, call: Call) -> None:
        pooling = call.source_rules[1]
        if not isinstance(pooling, MaxPooling) or not pooling.gives_places:
            raise call.refusal("its places do not come straight from a pooling")
        self.size = pair(call.argument(2, "output_size"))
        if pooling.stride != pooling.kernel or pooling.dilation != (1, 1) or pooling.columns.length != self.size[1]:
            raise call.refusal("its places come from pooling with windows that overlap, or from a map of another size")
        super().__init__(call, pooling.kernel, pooling.stride, (pooling.rows.before, pooling.columns.before))

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        values, places = tensors
        if 0 in values.shape:  # beyond the windows
            return values.new_zeros(*values.shape[:2], *out.size)
        sides = zip((self.rows, self.columns), windows[0], self.size, strict=True)
        given = [axis.given(span).clip(length) for axis, span, length in sides]
        height, width = given[0].length, given[1].length
        local = (places // self.size[1] - given[0].start) * width + places % self.size[1] - given[1].start
        y = torch.ops.aten.max_unpool2d(values.contiguous(), local.contiguous(), [height, width])
        return cut(y, out, given)


class AveragePooling(Pooling):
    """avg_pool2d: sums of windows, divided by how many places of each count."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        with_padding, self.divisor = call.argument(5, "count_include_pad", True), call.argument(6, "divisor_override")
        self.counts = []  # for each window along an axis, how many places count
        for outputs, axis in zip(call.shape[2:], (self.rows, self.columns), strict=True):
            start = torch.arange(outputs) * axis.stride - axis.before
            stop = (start + axis.kernel).clamp(max=axis.length + (axis.before if with_padding else 0))
            self.counts.append(stop - (start if with_padding else start.clamp(min=0)))

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x = self.padded(tensors[0], out)
        rows, columns = (
            counts[span.start : span.stop].to(x.device) for counts, span in zip(self.counts, out, strict=True)
        )
        if self.divisor or (bool((rows == self.kernel[0]).all()) and bool((columns == self.kernel[1]).all())):
            return F.avg_pool2d(x, self.kernel, self.stride, divisor_override=self.divisor or math.prod(self.kernel))
        sums = F.avg_pool2d(x, self.kernel, self.stride, divisor_override=1)
        return sums / (rows[:, None] * columns).to(sums.dtype)


class ConstantPadding(Rule):
    """pad with a constant: windows of one place. Padding may be negative, which cuts."""

    rows: Sliding
    columns: Sliding

    def __init__(self, call: Call, amounts: list[Pair], value: float) -> None:
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
    """pad and its kin."""
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
        tables[axis] = places.clamp(0, end) if mode == "replicate" else end - (end - places.abs()).abs()
    return Lookups(call, tables)


class Interpolation(Axis):
    """Linear between two places, as torch computes it (in float32, so that far from the start the same rounding comes out).

    `align_corners` lets the ends fall together (else the areas of the outermost places do). `scale` is output over input,
    where the caller of torch gave it; else it follows from the lengths.
    """

    def __init__(self, length: int, target: int, scale: float | None, align_corners: bool) -> None:
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
        align = bool(call.argument(2, "align_corners", False))
        sizes = scaled_sizes(call, place=3, factors=() if align else (1,))
        unchanged = not align and all(target == length and scale in (None, 1.0) for length, target, scale in sizes)
        self.sides = (
            [] if unchanged else [Interpolation(*size[:2], None if align else size[2], align) for size in sizes]
        )
        if self.sides:
            self.rows, self.columns = self.sides

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x = tensors[0]
        factors = [side.factor for side in self.sides]
        if self.sides and all(factors):
            size = (x.shape[2] * factors[0], x.shape[3] * factors[1])
            y = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            return cut(y, out, enlarged(windows[0], factors))
        for axis, side in enumerate(self.sides):
            x = side.run(x, axis + 2, out[axis], windows[0][axis])
        return x
