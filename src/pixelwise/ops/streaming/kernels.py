"""Rules of convolutions, their transposes, and pooling: windows of the output from slightly larger windows of the input.

At the border of the whole map the window is padded as the operation pads; elsewhere the neighbours are really there.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelwise.ops.streaming.axes import Rule, Sliding, Spreading
from pixelwise.ops.streaming.graph import Call
from pixelwise.ops.streaming.pointwise import Chunk
from pixelwise.ops.streaming.windows import Span, Window

Pair = tuple[int, int]


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

    def cut(self, y: Tensor, out: Window, given: list[Span]) -> Tensor:
        """The window `out` of a result that has the places `given`; zeros where it has none."""
        for axis, (wanted, all_) in zip((2, 3), zip(out, given, strict=True), strict=True):
            inside = Span(max(wanted.start, all_.start), min(wanted.stop, all_.stop))
            y = y.narrow(axis, inside.start - all_.start, inside.length) if inside != all_ else y
            before, after = inside.start - wanted.start, wanted.stop - inside.stop
            if before or after:
                y = F.pad(y, (0, 0, before, after) if axis == 2 else (before, after))
        return y


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

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        (above, below), (left, right) = self.pads(out)
        x, padding = tensors[0], (above, left)  # which the operation adds itself if it is the same on both sides
        if above != below or left != right:
            x, padding = self.padded(x, out), (0, 0)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


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
        y = self.cut(
            F.conv_transpose2d(x, self.weight, bias, self.stride, 0, 0, self.groups, self.dilation), out, given
        )
        return y + self.bias[:, None, None].to(y.dtype) if beyond and self.bias is not None else y


class Pooling(Slides):
    """What maximum and average pooling share."""

    def __init__(self, call: Call, dilation: Pair = (1, 1)) -> None:
        kernel = pair(call.argument(1, "kernel_size"))
        stride = pair(call.argument(2, "stride", []) or kernel)
        super().__init__(call, kernel, stride, pair(call.argument(3, "padding", 0)), dilation)


class MaxPooling(Pooling):
    """max_pool2d, with ceil_mode, and with the places of the maxima (as in the whole map)."""

    fill = float("-inf")

    def __init__(self, call: Call) -> None:
        super().__init__(call, pair(call.argument(4, "dilation", 1)))
        self.with_places = len(call.shapes) > 1

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Any:
        x = self.padded(tensors[0], out)
        if not self.with_places:
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
        places = call.source_rules[1]
        pooling = places.whole if isinstance(places, Chunk) else None
        if not isinstance(pooling, MaxPooling):
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
        return self.cut(y, out, given)


class AveragePooling(Pooling):
    """avg_pool2d: sums of windows, divided by how many places of each count."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        with_padding, self.divisor = call.argument(5, "count_include_pad", True), call.argument(6, "divisor_override")
        self.counts = [
            _counts(length, axis, with_padding)
            for length, axis in zip(call.shapes[0][2:], (self.rows, self.columns), strict=True)
        ]

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x = self.padded(tensors[0], out)
        rows, columns = (
            counts[span.start : span.stop].to(x.device) for counts, span in zip(self.counts, out, strict=True)
        )
        if self.divisor or (bool((rows == self.kernel[0]).all()) and bool((columns == self.kernel[1]).all())):
            return F.avg_pool2d(x, self.kernel, self.stride, divisor_override=self.divisor or math.prod(self.kernel))
        sums = F.avg_pool2d(x, self.kernel, self.stride, divisor_override=1)
        return sums / (rows[:, None] * columns).to(sums.dtype)


def _counts(outputs: int, axis: Sliding, with_padding: bool) -> Tensor:
    """For each window along an axis, how many places count."""
    start = torch.arange(outputs) * axis.stride - axis.before
    stop = (start + axis.kernel).clamp(max=axis.length + (axis.before if with_padding else 0))
    return stop - (start if with_padding else start.clamp(min=0))
