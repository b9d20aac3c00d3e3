"""Rules of convolutions, their transposes, and pooling: windows of the output from slightly larger windows of the input.

At the border of the whole map the window is padded as the operation pads; elsewhere the neighbours are really there.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelwise.ops.streaming.axes import Sliding, Spreading
from pixelwise.ops.streaming.graph import Call, Map
from pixelwise.ops.streaming.pointwise import Chunk
from pixelwise.ops.streaming.windows import Span, Window

Side = TypeVar("Side", Sliding, Spreading)


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of an argument that may be one number for both."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _last_two(call: Call) -> None:
    for item in call.inputs:
        if item.axes != (2, 3) or len(item.shape) != 4:
            raise call.refusal("its map is not (N, C, H, W)")


def _axes(kind: type[Side], given: Map, *geometry: Sequence[int]) -> tuple[Side, Side]:
    """The rows and columns of a map, for a kernel, a stride, a padding and perhaps a dilation of (height, width)."""
    rows, columns = zip(*geometry, strict=True)
    return kind(given.height, *rows), kind(given.width, *columns)


class Slides:
    """What convolution and pooling share: two `Sliding` axes and the padding of border windows."""

    axes = (2, 3)
    rows: Sliding
    columns: Sliding
    fill = 0.0  # what stands outside the map

    def need(self, out: Window) -> list[Window]:
        return [Window(self.rows.need(out.rows), self.columns.need(out.columns))]

    def pads(self, out: Window) -> tuple[tuple[int, int], tuple[int, int]]:
        """(above, below), (left, right): how much padding the window needs."""
        return self.rows.padding(out.rows), self.columns.padding(out.columns)

    def padded(self, x: Tensor, out: Window) -> tuple[Tensor, tuple[int, int]]:
        """The window with the padding that is not the same on both sides, and the rest, which the operation adds itself."""
        (above, below), (left, right) = self.pads(out)
        if above == below and left == right:
            return x, (above, left)
        return F.pad(x, (left, right, above, below), value=self.fill), (0, 0)


class Convolution(Slides):
    """conv2d."""

    gives_new = True

    def __init__(self, call: Call) -> None:
        _last_two(call)
        self.weight, self.bias = call.argument(1, "weight"), call.argument(2, "bias")
        if not isinstance(self.weight, Tensor) or len(call.inputs) != 1:
            raise call.refusal("its weights depend on the image")
        self.stride, self.dilation = pair(call.argument(3, "stride", 1)), pair(call.argument(5, "dilation", 1))
        self.groups = call.argument(6, "groups", 1)
        kernel = (self.weight.shape[2], self.weight.shape[3])
        padding = call.argument(4, "padding", 0)
        if padding == "same":  # the smaller half goes first
            before = tuple(side * (size - 1) // 2 for side, size in zip(self.dilation, kernel, strict=True))
        else:
            before = (0, 0) if padding == "valid" else pair(padding)
        self.rows, self.columns = _axes(Sliding, call.inputs[0], kernel, self.stride, before, self.dilation)
        self.macs = math.prod(self.weight.shape)  # for each place of the output

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x, padding = self.padded(tensors[0], out)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class TransposedConvolution:
    """conv_transpose2d."""

    axes = (2, 3)
    gives_new = True

    def __init__(self, call: Call) -> None:
        _last_two(call)
        self.weight, self.bias = call.argument(1, "weight"), call.argument(2, "bias")
        if not isinstance(self.weight, Tensor) or len(call.inputs) != 1:
            raise call.refusal("its weights depend on the image")
        self.stride, padding = pair(call.argument(3, "stride", 1)), pair(call.argument(4, "padding", 0))
        self.groups, self.dilation = call.argument(6, "groups", 1), pair(call.argument(7, "dilation", 1))
        kernel = self.weight.shape[2:]
        self.rows, self.columns = _axes(Spreading, call.inputs[0], kernel, self.stride, padding, self.dilation)
        self.channels = self.weight.shape[1] * self.groups
        self.macs_of_input = math.prod(self.weight.shape)  # for each place of the input

    def need(self, out: Window) -> list[Window]:
        return [Window(self.rows.need(out.rows), self.columns.need(out.columns))]

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x = tensors[0]
        if 0 in x.shape:
            y = x.new_zeros(x.shape[0], self.channels, *out.size)
            return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)
        given = [axis.given(span) for axis, span in zip((self.rows, self.columns), windows[0], strict=True)]
        # Beyond what the input reaches (torch's output_padding) there is nothing but the bias.
        beyond = any(span.start < all_.start or span.stop > all_.stop for span, all_ in zip(out, given, strict=True))
        bias = None if beyond else self.bias
        y = F.conv_transpose2d(x, self.weight, bias, self.stride, 0, 0, self.groups, self.dilation)
        for axis, (span, all_) in zip((2, 3), zip(out, given, strict=True), strict=True):
            y = _fit(y, axis, span, all_)
        return y + self.bias[:, None, None].to(y.dtype) if beyond and self.bias is not None else y


def _fit(y: Tensor, axis: int, wanted: Span, given: Span) -> Tensor:
    """The places `wanted` of a tensor that has the places `given`; zeros where it has none."""
    inside = Span(max(wanted.start, given.start), min(wanted.stop, given.stop))
    y = y.narrow(axis, inside.start - given.start, inside.length) if inside != given else y
    before, after = inside.start - wanted.start, wanted.stop - inside.stop
    if before or after:
        y = F.pad(y, (0, 0, before, after) if axis == 2 else (before, after))
    return y


class MaxPooling(Slides):
    """max_pool2d, with ceil_mode, and with the places of the maxima (as in the whole map)."""

    fill = float("-inf")

    def __init__(self, call: Call) -> None:
        _last_two(call)
        kernel, padding = pair(call.argument(1, "kernel_size")), pair(call.argument(3, "padding", 0))
        self.kernel, self.dilation = kernel, pair(call.argument(4, "dilation", 1))
        self.stride = pair(call.argument(2, "stride", []) or kernel)
        self.width = call.inputs[0].width
        self.rows, self.columns = _axes(Sliding, call.inputs[0], kernel, self.stride, padding, self.dilation)
        self.with_places = len(call.shapes) > 1

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Any:
        x = tensors[0]
        (above, below), (left, right) = self.pads(out)
        if above or below or left or right:
            x = F.pad(x, (left, right, above, below), value=self.fill)
        if not self.with_places:
            return F.max_pool2d(x, self.kernel, self.stride, 0, self.dilation)
        maxima, places = F.max_pool2d(x, self.kernel, self.stride, 0, self.dilation, return_indices=True)
        width = x.shape[3]
        row, column = places // width, places % width
        first_row, first_column = windows[0].rows.start - above, windows[0].columns.start - left
        return maxima, (row + first_row) * self.width + column + first_column


class MaxUnpooling:
    """max_unpool2d of maxima whose windows did not overlap: a value lands in the window that its place belongs to."""

    axes = (2, 3)

    def __init__(self, call: Call) -> None:
        _last_two(call)
        places = call.source_rules[1]
        pooling = places.whole if isinstance(places, Chunk) else None
        if not isinstance(pooling, MaxPooling):
            raise call.refusal("its places do not come straight from a pooling")
        size = tuple(call.argument(2, "output_size"))
        self.size = (size[0], size[1])
        if pooling.stride != pooling.kernel or pooling.dilation != (1, 1) or pooling.width != size[1]:
            raise call.refusal("its places come from pooling with windows that overlap, or from a map of another size")
        before = (pooling.rows.before, pooling.columns.before)
        self.rows, self.columns = _axes(Spreading, call.inputs[1], pooling.kernel, pooling.stride, before)

    def need(self, out: Window) -> list[Window]:
        return [Window(self.rows.need(out.rows), self.columns.need(out.columns))] * 2

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        values, places = tensors
        if 0 in values.shape:  # beyond the windows
            return values.new_zeros(*values.shape[:2], *out.size)
        given = [
            axis.given(span).clip(length)
            for axis, span, length in zip((self.rows, self.columns), windows[0], self.size, strict=True)
        ]
        height, width = given[0].length, given[1].length
        local = (places // self.size[1] - given[0].start) * width + places % self.size[1] - given[1].start
        y = torch.ops.aten.max_unpool2d(values.contiguous(), local.contiguous(), [height, width])
        for axis, (span, all_) in zip((2, 3), zip(out, given, strict=True), strict=True):
            y = _fit(y, axis, span, all_)
        return y


class AveragePooling(Slides):
    """avg_pool2d: sums of windows, divided by how many places of each count."""

    def __init__(self, call: Call) -> None:
        _last_two(call)
        kernel, padding = pair(call.argument(1, "kernel_size")), pair(call.argument(3, "padding", 0))
        self.kernel, self.stride = kernel, pair(call.argument(2, "stride", []) or kernel)
        self.rows, self.columns = _axes(Sliding, call.inputs[0], kernel, self.stride, padding)
        with_padding, self.divisor = call.argument(5, "count_include_pad", True), call.argument(6, "divisor_override")
        self.counts = [
            _counts(call.shapes[0][2 + axis], sliding, with_padding, padding[axis])
            for axis, sliding in enumerate((self.rows, self.columns))
        ]

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        (above, below), (left, right) = self.pads(out)
        x = F.pad(tensors[0], (left, right, above, below)) if above or below or left or right else tensors[0]
        rows, columns = (
            counts[span.start : span.stop].to(x.device) for counts, span in zip(self.counts, out, strict=True)
        )
        area = math.prod(self.kernel)
        if self.divisor or (bool((rows == self.kernel[0]).all()) and bool((columns == self.kernel[1]).all())):
            return F.avg_pool2d(x, self.kernel, self.stride, divisor_override=self.divisor or area)
        sums = F.avg_pool2d(x, self.kernel, self.stride, divisor_override=1)
        return sums / (rows[:, None] * columns).to(sums.dtype)


def _counts(outputs: int, axis: Sliding, with_padding: bool, padding: int) -> Tensor:
    """For each window along an axis, how many places count."""
    start = torch.arange(outputs) * axis.stride - axis.before
    stop = (start + axis.kernel).clamp(max=axis.length + (padding if with_padding else 0))
    return stop - (start if with_padding else start.clamp(min=0))
