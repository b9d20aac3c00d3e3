"""Rules of operations that compute each place of a map from the same place of other maps, whatever the channels do."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pixelwise.ops.streaming.axes import Rule
from pixelwise.ops.streaming.graph import Call
from pixelwise.ops.streaming.windows import Window

aten = torch.ops.aten
# These look at one place only too, but torch does not tag them so.
UNTAGGED = tuple(
    getattr(getattr(aten, name), overload)
    for name, overload in (
        ("alias", "default"), ("contiguous", "default"), ("detach", "default"), ("hardswish", "default"),
        ("lift_fresh_copy", "default"), ("log_sigmoid", "default"), ("prelu", "default"), ("to", "dtype"),
        ("_to_copy", "default"),
    )
)  # fmt: skip
# Run in place on a map that nothing else will look at.
_CHEAP = {getattr(aten, name).default: getattr(aten, f"{name}_").default
          for name in ("relu", "hardtanh", "silu", "hardswish", "leaky_relu")}  # fmt: skip


def out_of_place(op: Any) -> Any:
    """The form that makes a new map, since what in-place forms change may be kept for others; None if there is none."""
    if not op._schema.is_mutable:
        return op
    name, _, overload = str(op).removeprefix("aten.").partition(".")
    return getattr(getattr(aten, name[:-1], None), overload, None)


def is_placewise(op: Any) -> bool:
    """Whether an operation looks at one place only, with any number of maps and constants as arguments."""
    op = out_of_place(op)
    return op in UNTAGGED or torch.Tag.pointwise in getattr(op, "tags", ())


class Placewise(Rule):
    """The same operation on windows; constants that have rows or columns of their own are cut likewise."""

    def __init__(self, call: Call, axes: tuple[int, int] | None = None) -> None:
        self.call, self.count, given = call, len(call.inputs), call.shapes[0]
        aligned = {(item.axes[0] - len(item.shape), item.axes[1] - len(item.shape)) for item in call.inputs}
        sizes = {(item.height, item.width) for item in call.inputs}
        if len(aligned) != 1 or len(sizes) != 1:
            raise call.refusal("its maps have different sizes")
        (self._back,), (self._size,) = aligned, sizes
        self.axes = axes or (len(given) + self._back[0], len(given) + self._back[1])
        if (given[self.axes[0]], given[self.axes[1]]) != self._size:
            raise call.refusal(f"it makes {given} of a map of {self._size[0]} x {self._size[1]}")
        self._op = out_of_place(call.op)
        self.in_place = _CHEAP.get(self._op) if self.count == 1 else None
        # The constants of others (norms, prelu) go by channel.
        constants = self._constants() if torch.Tag.pointwise in self._op.tags else []
        self._large = any(self._is_along(item, which) for item in constants for which in (0, 1))

    def _constants(self) -> list[Tensor]:
        return [item for item in pytree.tree_leaves((self.call.args, self.call.kwargs)) if isinstance(item, Tensor)]

    def _is_along(self, item: Tensor, which: int) -> bool:
        """Whether a constant has the rows (0) or columns (1) of the map."""
        axis, length = self._back[which], self._size[which]
        return item.ndim >= -axis and item.shape[axis] == length and length > 1

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Any:
        args, kwargs = self.call.fill(tensors)
        if owned and self.in_place is not None:
            return self.in_place(*args, **kwargs)
        if self._large:
            args, kwargs = self._cut(args, kwargs, out, tensors)
        return self._op(*args, **kwargs)

    def _cut(self, args: Any, kwargs: Any, out: Window, tensors: list[Tensor]) -> tuple[Any, Any]:
        given = {id(item) for item in tensors}

        def cut(item: Tensor) -> Tensor:
            for which, span in enumerate(out):
                if id(item) not in given and self._is_along(item, which):
                    item = item.narrow(self._back[which], span.start, span.length)
            return item

        return pytree.tree_map_only(Tensor, cut, (args, kwargs))


class Normalised(Placewise):
    """Batch norm by the averages of the training."""

    gives_new = True

    def __init__(self, call: Call) -> None:
        if call.argument(5, "training"):
            raise call.refusal("it takes mean and variance of the whole image")
        super().__init__(call)


class Identity(Rule):
    """Gives what it takes: dropout in evaluation."""

    def __init__(self, call: Call) -> None:
        if call.argument(2, "train"):
            raise call.refusal("its random numbers would depend on the windows")
        self.axes = call.inputs[0].axes

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return tensors[0]


class DroppedByPlace(Placewise):
    """Dropout whose mask is a function of the place in the whole map (ops/spatial_dropout)."""

    gives_new = True

    def __init__(self, call: Call) -> None:
        call.require_nchw()
        super().__init__(call)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        (_, p, seed, sample, layer, top, left, channelwise), _ = self.call.fill(tensors)
        place = (top + out.rows.start, left + out.columns.start)
        return self.call.op(tensors[0], p, seed, sample, layer, *place, channelwise)


class Chunk(Rule):
    """One of the results of an operation that gives several, which computes it."""

    def __init__(self, call: Call) -> None:
        self.axes, self.index = call.inputs[0].axes, int(call.args[1])
        self.whole = call.source_rules[0]


class Reshaped(Rule):
    """view, reshape, squeeze, unsqueeze: other axes change, those of rows and columns stay the last two."""

    def __init__(self, call: Call) -> None:
        before, after = call.inputs[0], call.shapes[0]
        ndim = len(before.shape)
        if before.axes != (ndim - 2, ndim - 1) or len(after) < 3 or after[-2:] != before.shape[-2:]:
            raise call.refusal(f"it makes {after} of {before.shape}")
        self.axes, self._front = (len(after) - 2, len(after) - 1), after[:-2]

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return tensors[0].reshape(*self._front, *out.size)


class Permuted(Rule):
    """permute and transpose: the axes of rows and columns go along."""

    def __init__(self, call: Call) -> None:
        before = call.inputs[0]
        order = list(range(len(before.shape)))
        if str(call.op) == "aten.permute.default":
            order = [axis % len(order) for axis in call.argument(1, "dims")]
        else:
            first, second = (call.argument(index, name) % len(order) for index, name in ((1, "dim0"), (2, "dim1")))
            order[first], order[second] = order[second], order[first]
        self._order, axes = order, (order.index(before.axes[0]), order.index(before.axes[1]))
        # Where rows become columns of an image-like map, they are called by what they are now.
        self._swapped = axes[0] > axes[1]
        self.axes = (min(axes), max(axes))

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
        self._large = bool(self._constants())  # they are as large as the maps
        self.joins = dim == 1 and len(call.shapes[0]) == 4 and self.axes == (2, 3) and not self._large


class AlongChannels(Placewise):
    """softmax, sums, means, norms and the like over channels."""

    def __init__(self, call: Call, place: int = 1) -> None:
        before, dims = call.inputs[0], pytree.tree_leaves(call.argument(place, "dim", None if place == 1 else 0))
        ndim = len(before.shape)
        dims = [dim % ndim for dim in dims if dim is not None] or list(range(ndim))
        if set(dims) & set(before.axes):
            raise call.refusal("it goes over all rows or columns")
        if len(call.shapes[0]) == ndim:
            super().__init__(call, before.axes)
            return
        above, left = (axis - sum(dim < axis for dim in dims) for axis in before.axes)
        self.call, self.axes, self._op, self._large, self.in_place = call, (above, left), call.op, False, None


class Chunked(AlongChannels):
    """chunk and split along the channels: several maps."""

    def __init__(self, call: Call) -> None:
        super().__init__(call, place=2)


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
        last = (len(call.inputs[0].shape) - 2, len(call.inputs[0].shape) - 1)
        kernel, stride = call.argument(1, "kernel_size"), call.argument(2, "stride", []) or [1, 1, 1]
        padding = call.argument(3, "padding", 0)
        padding = [padding] * 3 if isinstance(padding, int) else list(padding) * (3 if len(padding) == 1 else 1)
        if call.inputs[0].axes != last or [*kernel[1:], *stride[1:], *padding[1:]] != [1, 1, 1, 1, 0, 0]:
            raise call.refusal("it pools over rows or columns")
        super().__init__(call)
