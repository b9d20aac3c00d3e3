"""Rules of operations that compute each place of a map from the same place of other maps, whatever the channels do."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pixelwise.ops.streaming.graph import Call
from pixelwise.ops.streaming.windows import Window

# Names of torch's operations that look at one place only, with any number of maps and constants as arguments.
PLACEWISE = frozenset(
    f"aten.{name}"
    for name in (
        "abs.default", "add.Scalar", "add.Tensor", "alias.default", "celu.default", "clamp.default",
        "clamp_max.default", "clamp_min.default", "clone.default", "contiguous.default", "cos.default",
        "detach.default", "detach_.default", "div.Scalar", "div.Tensor", "elu.default", "eq.Scalar", "erf.default",
        "exp.default", "floor.default", "gelu.default", "hardsigmoid.default", "hardswish.default", "hardtanh.default",
        "leaky_relu.default", "lift_fresh_copy.default", "log.default", "log1p.default",
        "log_sigmoid.default", "logical_not.default",
        "maximum.default", "minimum.default", "mish.default", "mul.Scalar", "mul.Tensor", "neg.default",
        "pow.Tensor_Scalar", "pow.Tensor_Tensor", "prelu.default", "reciprocal.default", "relu.default", "relu6.default",
        "rsqrt.default", "rsub.Scalar", "selu.default", "sigmoid.default", "silu.default",
        "sin.default", "softplus.default", "sqrt.default",
        "sub.Scalar", "sub.Tensor", "tanh.default", "to.dtype", "_to_copy.default", "where.self", "xlogy.Tensor",
    )
)  # fmt: skip
# Their in-place forms change what they are given, which may be kept for others: the form that makes a new map runs.
IN_PLACE = frozenset(
    ("add_.Tensor", "add_.Scalar", "sub_.Tensor", "mul_.Tensor", "mul_.Scalar", "div_.Tensor", "relu_.default",
     "relu6_.default", "hardtanh_.default", "hardswish_.default", "hardsigmoid_.default", "silu_.default", "mish_.default",
     "leaky_relu_.default", "elu_.default", "celu_.default", "selu_.default", "sigmoid_.default", "clamp_.default",
     "tanh_.default", "clamp_min_.default", "clamp_max_.default", "exp_.default", "gelu_.default")
)  # fmt: skip
# Of these, a constant may have rows and columns as the maps have; the constants of others (norms, prelu) go by channel.
BROADCASTING = ("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "pow", "where", "xlogy")
# In evaluation these give what they take.
IDENTITY = frozenset(
    f"aten.{name}"
    for name in ("dropout.default", "feature_dropout.default", "alpha_dropout.default", "dropout_.default")
)
# Run in place on a map that nothing else will look at.
_CHEAP = {
    "aten.relu.default": torch.ops.aten.relu_.default,
    "aten.relu_.default": torch.ops.aten.relu_.default,
    "aten.hardtanh.default": torch.ops.aten.hardtanh_.default,
    "aten.hardtanh_.default": torch.ops.aten.hardtanh_.default,
    "aten.silu.default": torch.ops.aten.silu_.default,
    "aten.silu_.default": torch.ops.aten.silu_.default,
    "aten.hardswish.default": torch.ops.aten.hardswish_.default,
    "aten.hardswish_.default": torch.ops.aten.hardswish_.default,
    "aten.leaky_relu.default": torch.ops.aten.leaky_relu_.default,
    "aten.leaky_relu_.default": torch.ops.aten.leaky_relu_.default,
}


class Placewise:
    """The same operation on windows; constants that have rows or columns of their own are cut likewise."""

    def __init__(self, call: Call, axes: tuple[int, int] | None = None) -> None:
        self.call = call
        ndim = len(call.shapes[0])
        aligned = {(item.axes[0] - len(item.shape), item.axes[1] - len(item.shape)) for item in call.inputs}
        sizes = {(item.height, item.width) for item in call.inputs}
        if len(aligned) != 1 or len(sizes) != 1:
            raise call.refusal("its maps have different sizes")
        back = aligned.pop()
        self.axes = axes or (ndim + back[0], ndim + back[1])
        size = sizes.pop()
        given = call.shapes[0]
        if (given[self.axes[0]], given[self.axes[1]]) != size:
            raise call.refusal(f"it makes {given} of a map of {size[0]} x {size[1]}")
        self._op, self._large = _out_of_place(call.op), self._large_constants(back, size)
        self.in_place = _CHEAP.get(str(call.op)) if len(call.inputs) == 1 else None

    def _large_constants(self, back: tuple[int, int], size: tuple[int, int]) -> bool:
        """Whether a constant has rows or columns; then they are those of the map."""
        self._back = back
        if str(self.call.op).removeprefix("aten.").partition(".")[0].rstrip("_") not in BROADCASTING:
            return False
        constants = [
            item for item in pytree.tree_leaves((self.call.args, self.call.kwargs)) if isinstance(item, Tensor)
        ]
        return any(
            item.ndim >= -axis and item.shape[axis] == length and length > 1
            for item in constants
            for axis, length in zip(back, size, strict=True)
        )

    def need(self, out: Window) -> list[Window]:
        return [out] * len(self.call.inputs)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Any:
        args, kwargs = self.call.fill(tensors)
        if owned and self.in_place is not None:
            return self.in_place(*args, **kwargs)
        if self._large:
            args, kwargs = self._cut(args, kwargs, out, tensors)
        return self._op(*args, **kwargs)

    def _cut(self, args: Any, kwargs: Any, out: Window, tensors: list[Tensor]) -> tuple[Any, Any]:
        given = {id(item) for item in tensors}
        size = (self.call.inputs[0].height, self.call.inputs[0].width)

        def cut(item: Tensor) -> Tensor:
            if id(item) in given:
                return item
            for axis, length, span in zip(self._back, size, out, strict=True):
                if item.ndim >= -axis and item.shape[axis] == length and length > 1:
                    item = item.narrow(axis, span.start, span.length)
            return item

        return pytree.tree_map_only(Tensor, cut, (args, kwargs))


def _out_of_place(op: Any) -> Any:
    name, _, overload = str(op).removeprefix("aten.").partition(".")
    return getattr(getattr(torch.ops.aten, name[:-1]), overload) if name.endswith("_") else op


class Normalised(Placewise):
    """Batch norm by the averages of the training."""

    gives_new = True

    def __init__(self, call: Call) -> None:
        if call.argument(5, "training"):
            raise call.refusal("it takes mean and variance of the whole image")
        super().__init__(call)


class Identity:
    """Gives what it takes: dropout in evaluation."""

    def __init__(self, call: Call) -> None:
        if call.argument(2, "train"):
            raise call.refusal("its random numbers would depend on the windows")
        self.axes = call.inputs[0].axes

    def need(self, out: Window) -> list[Window]:
        return [out]

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return tensors[0]


class DroppedByPlace(Placewise):
    """Dropout whose mask is a function of the place in the whole map (ops/spatial_dropout)."""

    gives_new = True

    def __init__(self, call: Call) -> None:
        if len(call.inputs[0].shape) != 4 or call.inputs[0].axes != (2, 3):
            raise call.refusal("its map is not (N, C, H, W)")
        super().__init__(call)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        (_, p, seed, sample, layer, top, left, channelwise), _ = self.call.fill(tensors)
        place = (top + out.rows.start, left + out.columns.start)
        return self.call.op(tensors[0], p, seed, sample, layer, *place, channelwise)


class Chunk:
    """One of the results of an operation that gives several, which computes it."""

    def __init__(self, call: Call) -> None:
        self.axes, self.index = call.inputs[0].axes, int(call.args[1])
        self.whole = call.source_rules[0]

    def need(self, out: Window) -> list[Window]:
        return [out]


class Reshaped:
    """view, reshape, squeeze, unsqueeze: other axes change, those of rows and columns stay the last two."""

    def __init__(self, call: Call) -> None:
        before, after = call.inputs[0], call.shapes[0]
        ndim = len(before.shape)
        if before.axes != (ndim - 2, ndim - 1) or len(after) < 3 or after[-2:] != before.shape[-2:]:
            raise call.refusal(f"it makes {after} of {before.shape}")
        self.axes, self._front = (len(after) - 2, len(after) - 1), after[:-2]

    def need(self, out: Window) -> list[Window]:
        return [out]

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return tensors[0].reshape(*self._front, *out.size)


class Permuted:
    """permute and transpose: the axes of rows and columns go along."""

    def __init__(self, call: Call) -> None:
        before = call.inputs[0]
        order = list(range(len(before.shape)))
        if str(call.op) == "aten.permute.default":
            order = [axis % len(order) for axis in call.argument(1, "dims")]
        else:
            first, second = (call.argument(index, name) % len(order) for index, name in ((1, "dim0"), (2, "dim1")))
            order[first], order[second] = order[second], order[first]
        self._order = order
        self.axes = (order.index(before.axes[0]), order.index(before.axes[1]))
        # Where rows become columns of an image-like map, they are called by what they are now.
        self._swapped = self.axes[0] > self.axes[1]
        if self._swapped:
            self.axes = (self.axes[1], self.axes[0])

    def need(self, out: Window) -> list[Window]:
        return [Window(out.columns, out.rows) if self._swapped else out]

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return tensors[0].permute(self._order)


class Joined(Placewise):
    """cat along the channels."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        dim = call.argument(1, "dim", 0) % len(call.shapes[0])
        if dim in self.axes:
            raise call.refusal("it puts maps beside each other")
        constants = any(isinstance(item, Tensor) for item in pytree.tree_leaves(call.args))
        self._large = constants  # they are as large as the maps
        self.joins = dim == 1 and len(call.shapes[0]) == 4 and self.axes == (2, 3) and not constants


def _along_channels(call: Call, dims: Any) -> None:
    """Refuse an operation that goes along rows or columns."""
    first = call.inputs[0]
    given = range(len(first.shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    if any(dim % len(first.shape) in first.axes for dim in given):
        raise call.refusal("it goes over all rows or columns")


class AlongChannels(Placewise):
    """softmax, sums, means, norms and the like over channels."""

    def __init__(self, call: Call) -> None:
        _along_channels(call, call.argument(1, "dim"))
        before = call.inputs[0]
        if len(call.shapes[0]) == len(before.shape):
            super().__init__(call, before.axes)
            return
        dims = [item % len(before.shape) for item in pytree.tree_leaves(call.argument(1, "dim"))]
        axes = [axis - sum(dim < axis for dim in dims) for axis in before.axes]
        self._squeezed(call, (axes[0], axes[1]))

    def _squeezed(self, call: Call, axes: tuple[int, int]) -> None:
        self.call, self.axes, self._op, self._large, self.in_place = call, axes, call.op, False, None


class Chunked(AlongChannels):
    """chunk and split along the channels: several maps."""

    def __init__(self, call: Call) -> None:
        _along_channels(call, call.argument(2, "dim", 0))
        self._squeezed(call, call.inputs[0].axes)


class NormOfChannels(Placewise):
    """layer norm over the last axes, none of them rows or columns."""

    def __init__(self, call: Call) -> None:
        first = call.inputs[0]
        if max(first.axes) >= len(first.shape) - len(call.argument(1, "normalized_shape")):
            raise call.refusal("it normalises over rows or columns")
        super().__init__(call)


class LinearOfChannels(Placewise):
    """A linear layer over the last axis, which is not rows or columns."""

    def __init__(self, call: Call) -> None:
        first = call.inputs[0]
        if max(first.axes) >= len(first.shape) - 1 or len(call.inputs) != 1:
            raise call.refusal("it goes over all columns")
        super().__init__(call, first.axes)
        self.macs = math.prod(call.argument(1, "weight").shape)


class PooledChannels(Placewise):
    """Average pooling in three dimensions whose windows are one row and one column (local response norm)."""

    def __init__(self, call: Call) -> None:
        first = call.inputs[0]
        last = (len(first.shape) - 2, len(first.shape) - 1)
        kernel, stride = call.argument(1, "kernel_size"), call.argument(2, "stride", []) or [1, 1, 1]
        padding = call.argument(3, "padding", 0)
        padding = [padding] * 3 if isinstance(padding, int) else list(padding) * (3 if len(padding) == 1 else 1)
        if first.axes != last or list(kernel)[1:] != [1, 1] or list(stride)[1:] != [1, 1] or padding[1:] != [0, 0]:
            raise call.refusal("it pools over rows or columns")
        super().__init__(call)
