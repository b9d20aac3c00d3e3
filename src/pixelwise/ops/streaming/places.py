"""Rules of operations that compute each place of a map from one place of other maps: the same, or another."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from pixelwise.ops.streaming.graph import Axis, Call, Rule
from pixelwise.ops.streaming.memory import Span, Window

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


def _out_of_place(op: Any) -> Any:
    """The form that makes a new map, since what in-place forms change may be kept for others; None if there is none."""
    if not op._schema.is_mutable:
        return op
    name, _, overload = str(op).removeprefix("aten.").partition(".")
    return getattr(getattr(aten, name[:-1], None), overload, None)


def is_placewise(op: Any) -> bool:
    """Whether an operation looks at one place only, with any number of maps and constants as arguments."""
    op = _out_of_place(op)
    return op in UNTAGGED or torch.Tag.pointwise in getattr(op, "tags", ())


class Placewise(Rule):
    """The same operation on windows; constants that have rows or columns of their own are cut likewise."""

    def __init__(self, call: Call, axes: tuple[int, int] | None = None, *, gives_new: bool = False) -> None:
        self.call, self.count, self.gives_new = call, len(call.inputs), gives_new
        aligned = {(item.axes[0] - len(item.shape), item.axes[1] - len(item.shape)) for item in call.inputs}
        sizes = {(item.height, item.width) for item in call.inputs}
        if len(aligned) != 1 or len(sizes) != 1:
            raise call.refusal("its maps have different sizes")
        (self._back,), (self._size,) = aligned, sizes
        self.axes = axes or (len(call.shape) + self._back[0], len(call.shape) + self._back[1])
        if (call.shape[self.axes[0]], call.shape[self.axes[1]]) != self._size:
            raise call.refusal(f"it makes {call.shape} of a map of {self._size[0]} x {self._size[1]}")
        self._op = _out_of_place(call.op)
        self.in_place = _CHEAP.get(self._op) if self.count == 1 else None
        # The constants of others (norms, prelu) go by channel.
        constants = self.constants() if torch.Tag.pointwise in self._op.tags else []
        self.cuts = any(self._is_along(item, which) for item in constants for which in (0, 1))

    def constants(self) -> list[Tensor]:
        return [item for item in pytree.tree_leaves((self.call.args, self.call.kwargs)) if isinstance(item, Tensor)]

    def _is_along(self, item: Tensor, which: int) -> bool:
        """Whether a constant has the rows (0) or columns (1) of the map."""
        axis, length = self._back[which], self._size[which]
        return item.ndim >= -axis and item.shape[axis] == length and length > 1

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Any:
        args, kwargs = self.call.fill(tensors)
        if owned and self.in_place is not None:
            return self.in_place(*args, **kwargs)
        if self.cuts:
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


class Joined(Placewise):
    """cat along the channels."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        dim = call.argument(1, "dim", 0) % len(call.shape)
        if dim in self.axes:
            raise call.refusal("it puts maps beside each other")
        self.cuts = bool(self.constants())  # they are as large as the maps
        self.joins = dim == 1 and len(call.shape) == 4 and self.axes == (2, 3) and not self.cuts


class DroppedByPlace(Placewise):
    """Dropout whose mask is a function of the place in the whole map (ops/dropout)."""

    def __init__(self, call: Call) -> None:
        call.require_nchw()
        super().__init__(call, gives_new=True)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        (_, p, seed, sample, layer, top, left, channelwise), _ = self.call.fill(tensors)
        place = (top + out.rows.start, left + out.columns.start)
        return self.call.op(tensors[0], p, seed, sample, layer, *place, channelwise)


class Reshaped(Rule):
    """view, reshape, squeeze, unsqueeze: other axes change, those of rows and columns stay the last two."""

    def __init__(self, call: Call) -> None:
        before, after = call.inputs[0], call.shape
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


def at_rest(call: Call) -> Rule:
    """Dropout in evaluation, which gives what it takes."""
    if call.argument(2, "train"):
        raise call.refusal("its random numbers would depend on the windows")
    return Placewise(call, call.inputs[0].axes)


def normalised(call: Call) -> Rule:
    """Batch norm by the averages of the training."""
    if call.argument(5, "training"):
        raise call.refusal("it takes mean and variance of the whole image")
    return Placewise(call, gives_new=True)


def along_channels(call: Call) -> Rule:
    """softmax, sums, means, norms and the like over channels; chunk and split along them."""
    before, ndim = call.inputs[0], len(call.inputs[0].shape)
    place, default = (1, None) if call.index is None else (2, 0)
    dims = [dim % ndim for dim in pytree.tree_leaves(call.argument(place, "dim", default)) if dim is not None]
    dims = dims or list(range(ndim))
    if set(dims) & set(before.axes):
        raise call.refusal("it goes over all rows or columns")
    if len(call.shape) == ndim:
        return Placewise(call, before.axes)
    above, left = (axis - sum(dim < axis for dim in dims) for axis in before.axes)
    return Placewise(call, (above, left))


def norm_of_channels(call: Call) -> Rule:
    """Layer norm over the last axes, none of them rows or columns."""
    first = call.inputs[0]
    if max(first.axes) >= len(first.shape) - len(call.argument(1, "normalized_shape")):
        raise call.refusal("it normalises over rows or columns")
    return Placewise(call)


def linear_of_channels(call: Call) -> Rule:
    """A linear layer over the last axis, which is not rows or columns."""
    first = call.inputs[0]
    if max(first.axes) >= len(first.shape) - 1 or len(call.inputs) != 1:
        raise call.refusal("it goes over all columns")
    rule = Placewise(call, first.axes)
    rule.macs = math.prod(call.argument(1, "weight").shape)
    return rule


def pooled_channels(call: Call) -> Rule:
    """Average pooling in three dimensions whose windows are one row and one column (local response norm)."""
    last = (len(call.inputs[0].shape) - 2, len(call.inputs[0].shape) - 1)
    kernel, stride = call.argument(1, "kernel_size"), call.argument(2, "stride", []) or [1, 1, 1]
    padding = call.argument(3, "padding", 0)
    padding = [padding] * 3 if isinstance(padding, int) else list(padding) * (3 if len(padding) == 1 else 1)
    if call.inputs[0].axes != last or [*kernel[1:], *stride[1:], *padding[1:]] != [1, 1, 1, 1, 0, 0]:
        raise call.refusal("it pools over rows or columns")
    return Placewise(call)


class Lookup(Axis):
    """Any place for any place: `places[o]` of the input for o of the output."""

    def __init__(self, places: Tensor) -> None:
        self.places = places.cpu().numpy()

    def need(self, out: Span) -> Span:
        asked = self.places[out.start : out.stop]
        return Span(int(asked.min()), int(asked.max()) + 1)

    def select(self, x: Tensor, axis: int, out: Span) -> Tensor:
        """The places `out` of what `need` gives; where they are a plain run, nothing is copied."""
        places = self.places[out.start : out.stop] - self.need(out).start
        if np.array_equal(places, np.arange(x.shape[axis])):
            return x
        return x.index_select(axis, torch.from_numpy(places).to(x.device))


class Lookups(Rule):
    """Rows and columns from other places, by a table for each of these axes: slices, repetition, nearest places."""

    def __init__(self, call: Call, tables: dict[int, Tensor]) -> None:
        self.axes = call.inputs[0].axes
        self.rows, self.columns = (Lookup(tables[axis]) if axis in tables else Axis() for axis in self.axes)

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        x = tensors[0]
        for axis, side, span in zip(self.axes, (self.rows, self.columns), out, strict=True):
            x = side.select(x, axis, span) if isinstance(side, Lookup) else x
        return x


class Flip(Lookups):
    """flip."""

    def __init__(self, call: Call) -> None:
        shape = call.inputs[0].shape
        self.dims = [dim % len(shape) for dim in call.argument(1, "dims")]
        super().__init__(call, {dim: torch.arange(shape[dim]).flip(0) for dim in self.dims})

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return tensors[0].flip(self.dims)


class PixelShuffle(Rule):
    """pixel_shuffle: channels become rows and columns."""

    def __init__(self, call: Call) -> None:
        call.require_nchw()
        self.factor = call.argument(1, "upscale_factor")
        self.rows, self.columns = (Lookup(torch.arange(length) // self.factor) for length in call.shape[2:])

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Tensor:
        return cut(F.pixel_shuffle(tensors[0], self.factor), out, enlarged(windows[0], (self.factor, self.factor)))


def cut(y: Tensor, out: Window, given: Sequence[Span]) -> Tensor:
    """The window `out` of a result (N, C, H, W) that has the places `given`; zeros where it has none."""
    for axis, (wanted, all_) in enumerate(zip(out, given, strict=True), 2):
        inside = Span(max(wanted.start, all_.start), min(wanted.stop, all_.stop))
        y = y.narrow(axis, inside.start - all_.start, inside.length) if inside != all_ else y
        before, after = inside.start - wanted.start, wanted.stop - inside.stop
        if before or after:
            y = F.pad(y, (0, 0, before, after) if axis == 2 else (before, after))
    return y


def enlarged(window: Window, factors: Sequence[int]) -> list[Span]:
    """The places of a result that has `factors` times the rows and columns of the input's window."""
    return [Span(span.start * factor, span.stop * factor) for span, factor in zip(window, factors, strict=True)]


def slicing(call: Call) -> Rule:
    """slice and narrow."""
    first = call.inputs[0]
    dim = call.argument(1, "dim", 0) % len(first.shape)
    if dim not in first.axes:
        return Placewise(call, first.axes)
    length, start = first.shape[dim], call.argument(2, "start", 0) or 0
    start = min(max(start + length if start < 0 else start, 0), length)
    step = call.argument(4, "step", 1) if "slice" in str(call.op) else 1
    return Lookups(call, {dim: start + step * torch.arange(call.shape[dim])})


def index_selecting(call: Call) -> Rule:
    """index_select, by a table that does not depend on the image."""
    first = call.inputs[0]
    dim, places = call.argument(1, "dim") % len(first.shape), call.argument(2, "index")
    if not isinstance(places, Tensor):
        raise call.refusal("its places depend on the image")
    return Lookups(call, {dim: places}) if dim in first.axes else Placewise(call, first.axes)


def nearest(call: Call) -> Rule:
    """upsample_nearest2d, which takes the nearest place rounded down."""
    tables = {}
    for axis, (length, target, scale) in enumerate(scaled_sizes(call, place=2, factors=(1, 2)), 2):
        step = torch.tensor(1 / scale if scale else length / target, dtype=torch.float32)
        tables[axis] = (torch.arange(target, dtype=torch.float32) * step).floor().long().clamp(max=length - 1)
    return Lookups(call, tables)


def scaled_sizes(call: Call, place: int, factors: tuple[int, ...]) -> list[tuple[int, int, float | None]]:
    """Rows and columns: length, target, and the scale that the network's code gave to torch at `place`, if it gave any.

    Where lengths fit one of `factors`, torch takes that instead of the scale that it was given, on some devices.
    """
    scales: Any = (call.argument(place, "scales_h"), call.argument(place + 1, "scales_w"))
    if str(call.op).endswith(".vec"):
        scales = [float(scale) for scale in call.argument(place, "scale_factors") or ()] or (None, None)
    sizes = list(zip(call.require_nchw().shape[2:], call.shape[2:], scales, strict=True))
    for length, target, scale in sizes:
        if scale is not None and any(target == factor * length and scale != factor for factor in factors):
            raise call.refusal(f"its scale of {scale} makes {target} of {length}, which is not the same on all devices")
    return sizes
