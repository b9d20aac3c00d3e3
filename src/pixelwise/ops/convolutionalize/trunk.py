"""The trunk of a classifier with its last strides removed, so that scores lie closer together.

A step whose stride is removed is done at every cell, so that its map holds several interleaved maps, its phases: with a
spacing of n, phase (i, j) is made of the cells (y, x) with y = i and x = j modulo n. Each phase is what the network itself
would compute on the image shifted by a few pixels, so any step of the network may be done on each phase as it stands. A
dilated convolution is the same, quicker. Steps that look at single cells stay as they are.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from pixelwise.ops.convolutionalize.capture import Grid, NewNetwork, holds_tensors, share
from pixelwise.ops.convolutionalize.tracer import REFUSALS, is_by_cell, is_settled

Step = Callable[[Tensor], Tensor]
Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a step is done on an interleaved map."""

    spacing: int  # cells between neighbours of a phase
    axes: Pair = (2, 3)  # where the map has its rows and columns
    axes_out: Pair = (2, 3)  # where the result has them
    least: Pair = (1, 1)  # rows and columns that the step needs; smaller phases have no cells in the result
    stride: int = 1  # of the step; it is removed by doing the step at every cell
    own: Pair = (1, 1)  # rows and columns of a phase at the classifier's own image size
    rounds_up: bool = False  # it gives ceil(length / stride) cells for every length, as TensorFlow's "SAME" does

    def run(self, step: Step, x: Tensor) -> Tensor:
        """The result of `step`, which takes and gives single maps, for all phases of `x`, interleaved.

        Phase (i, j) of the result, whose spacing is `stride` times as large, comes of the cells from (i, j) on.
        """
        if self.spacing * self.stride == 1:
            return step(x)
        parts: dict[Pair, Tensor] = {}
        rows, columns = (self._alike(which, x.shape[axis]) for which, axis in enumerate(self.axes))
        for high, row_phases in rows.items():
            for wide, column_phases in columns.items():  # phases of one size go through as one batch
                at = [(row, column) for row in row_phases for column in column_phases]
                phases = [self._phase(x, first, (high, wide)) for first in at]
                parts |= zip(at, step(torch.cat(phases) if len(phases) > 1 else phases[0]).chunk(len(at)), strict=True)
        shape = list(parts[0, 0].shape)
        for which, axis in enumerate(self.axes_out):
            shape[axis] = sum(part.shape[axis] for first, part in parts.items() if first[1 - which] == 0)
        whole = parts[0, 0].new_empty(shape)
        for first, part in parts.items():
            _every(whole, first, self.spacing * self.stride, self.axes_out).copy_(part)
        for axis, axis_out in zip(self.axes, self.axes_out, strict=True) if self.stride > 1 else ():
            whole = whole.narrow(axis_out, 0, min(whole.shape[axis_out], x.shape[axis]))
        return whole

    def _alike(self, which: int, length: int) -> dict[int, list[int]]:
        """The phases along one axis by the cells that the step takes of them.

        A step that rounds up begins its windows where the length leaves the rest that it has at the own size: zeros are
        added for that.
        """
        found: dict[int, list[int]] = {}
        for first in range(min(self.spacing * self.stride, length)):
            cells = -(-(length - first) // self.spacing)
            cells += (self.own[which] - cells) % self.stride if self.rounds_up else 0
            if cells >= self.least[which]:
                found.setdefault(cells, []).append(first)
        return found

    def _phase(self, x: Tensor, first: Pair, size: Pair) -> Tensor:
        phase = _every(x, first, self.spacing, self.axes)
        for axis, length in zip(self.axes, size, strict=True):
            if missing := length - phase.shape[axis]:
                shape = [*phase.shape[:axis], missing, *phase.shape[axis + 1 :]]
                phase = torch.cat([phase, phase.new_zeros(shape)], dim=axis)
        return phase


def _every(x: Tensor, first: Pair, spacing: int, axes: Pair) -> Tensor:
    """Every n-th row and column, from the first ones on."""
    cut = [slice(None)] * x.ndim
    for axis, start in zip(axes, first, strict=True):
        cut[axis] = slice(start, None, spacing)
    return x[tuple(cut)]


class Here:
    """Stands in the arguments of a `FunctionStep` where the map goes."""


class FunctionStep(nn.Module):
    """A function or method of tensors as a module, its other arguments fixed; `args` and `kwargs` hold `Here` once."""

    def __init__(self, function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        args: Any = map_aggregate(self.args, lambda item: x if item is Here else item)
        kwargs: Any = map_aggregate(self.kwargs, lambda item: x if item is Here else item)
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)


def spread(module: nn.Module, how: Spread) -> nn.Module:
    """Let a module do its work on the phases of its input; its parameters keep their names."""
    module.spread_over = how  # type: ignore[assignment]
    module.forward = MethodType(_forward_spread, module)
    return module


def _forward_spread(self: Any, x: Tensor) -> Tensor:
    return self.spread_over.run(lambda phase: type(self).forward(self, phase), x)


def crop_alike(maps: Sequence[Tensor], axes: Pair = (2, 3)) -> list[Tensor]:
    """The first rows and columns of each map, as many as the smallest has: branches may differ in their last phases."""
    for axis in axes:
        length = min(item.shape[axis] for item in maps)
        maps = [item if item.shape[axis] == length else item.narrow(axis, 0, length) for item in maps]
    return list(maps)


class Trunk:
    """Puts the steps of a classifier's trunk into the new graph, one by one; `value` gives what stands for an input.

    `stride` is the largest number of pixels between the cells of a map (None leaves all strides), `spacing` by how much the
    stride of each map was reduced, `opaque` the paths of modules whose steps can only be changed as one, `stuck` such steps.
    """

    def __init__(self, new: NewNetwork, stride: int | None, value: Callable[[fx.Node], Any]) -> None:
        self.new, self.capture, self.stride, self.value = new, new.capture, stride, value
        self.spacing: dict[fx.Node, int] = {}
        self.opaque: set[str] = set()
        self.stuck: list[fx.Node] = []

    def convert(self, node: fx.Node, maps: list[fx.Node]) -> fx.Node:
        """The new step for `node`, whose inputs of the image are `maps`."""
        grid = self.capture.grid(node)
        grids = [found for item in maps if (found := self.capture.grid(item))]
        spacings = {self.spacing[item] for item in maps if self.capture.grid(item)} or {1}
        before = grids[0] if grids else Grid((2, 3), (1, 1), (1.0, 1.0))
        factor = grid.strides[0] / before.strides[0] if grid and grids else 1.0
        removed = self.stride is not None and grid is not None and factor > 1 and grid.strides[0] > self.stride
        self.spacing[node] = spacing = max(spacings)
        if removed:
            self.spacing[node] = round(spacing * factor)
        elif spacings == {1}:
            # Context of the whole image, as in squeeze and excitation, is left as it is before the first removed stride.
            self.spacing[node] = max([1, *(self.spacing[item] for item in maps)])
            if self.spacing[node] == 1:
                return self.new.graph.node_copy(node, self.value)
        if not maps or not holds_tensors(node):
            return self.new.graph.node_copy(node, self.value)
        done = None
        if grid is not None and len(spacings) == 1 and (factor == 1 or removed):
            done = self._spread(node, maps, before, grid, round(factor), spacing)
        if done is None:  # the module around the step is done as one, next time
            self.stuck.append(node)
            self.opaque.add(node.meta["path"])
            done = self.new.graph.node_copy(node, self.value)
        return done

    def _spread(
        self, node: fx.Node, maps: list[fx.Node], before: Grid, after: Grid, factor: int, spacing: int
    ) -> fx.Node | None:
        """The step on interleaved maps, or None if it cannot be done as one step."""
        module, value = self.capture.module(node), self.value
        same = all(found and found.size == after.size for item in maps if (found := self.capture.grid(item)))
        if is_by_cell(node, module) and factor == 1 and same:
            return self.new.graph.node_copy(node, self._cropped(maps, before))
        if len(maps) > 1:
            return None
        if _is_plain_conv(module):
            conv = self.new.own_module(node)
            conv.stride = (1, 1) if factor > 1 else conv.stride
            conv.padding = _times(conv.padding, spacing)
            conv.dilation = _times(conv.dilation, spacing)
            path = self.new.place(node, conv)
            return self.new.graph.call_module(path, fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value))
        if node.target in (F.conv2d, torch.conv2d):
            return self._functional_conv(node, factor, spacing)
        step = self._as_module(node, maps[0])
        if step is None or not isinstance(node.meta["own"], Tensor):
            return None
        if _is_plain_pool(module) and factor > 1:
            module, factor = share(module), 1  # type: ignore[arg-type]
            step.stride = module.stride = 1  # type: ignore[assignment]
        how = probe(module or step, maps[0].meta["own"], before, after.axes, factor, spacing)
        step = spread(step, how) if spacing > 1 or factor > 1 else step
        path = self.new.place(node, step)
        return self.new.graph.call_module(path, (value(maps[0]),))

    def _cropped(self, maps: list[fx.Node], grid: Grid) -> Callable[[fx.Node], Any]:
        """`value`, with maps of several branches cut to one size: the last phases may lack a cell in some of them."""
        several = [item for item in maps if self.capture.grid(item) and isinstance(item.meta["own"], Tensor)]
        if len(several) < 2:
            return self.value
        cropped = self.new.graph.call_function(crop_alike, ([self.value(item) for item in several], grid.axes))
        at = {
            item: self.new.graph.call_function(operator.getitem, (cropped, index)) for index, item in enumerate(several)
        }
        return lambda item: at[item] if item in at else self.value(item)

    def _functional_conv(self, node: fx.Node, factor: int, spacing: int) -> fx.Node | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        numbers = {"stride": 1, "padding": 0, "dilation": 1} | {key: given[key] for key in names[3:6] if key in given}
        if isinstance(numbers["padding"], str) or any(isinstance(item, fx.Node) for item in numbers.values()):
            return None
        stride = (1, 1) if factor > 1 else numbers["stride"]
        given |= {key: _times(numbers[key], spacing) for key in ("padding", "dilation")} | {"stride": stride}
        return self.new.graph.call_function(F.conv2d, (), fx.map_arg(given, self.value))

    def _as_module(self, node: fx.Node, source: fx.Node) -> Any:
        """The step as a module of one input, or None."""
        others = [item for item in node.all_input_nodes if item is not source]
        if not all(is_settled(item) for item in others):
            return None

        def fixed(item: Any) -> Any:
            if item is source:
                return Here
            return item.meta["own"] if isinstance(item, fx.Node) else item

        args, kwargs = map_aggregate(node.args, fixed), map_aggregate(node.kwargs, fixed)
        if node.op == "call_module":
            return self.new.own_module(node) if args == (Here,) and not kwargs else None
        return FunctionStep(node.target, args, kwargs)


def probe(step: nn.Module, given: Tensor, before: Grid, axes_out: tuple[int, int], stride: int, spacing: int) -> Spread:
    """How a step is to be spread, found by giving it maps of several sizes that have no content."""

    def cells(which: int, length: int) -> int:
        size = list(given.shape)
        size[before.axes[which]] = length
        try:
            with torch.no_grad(), torch.device("meta"):
                return int(step(given.new_empty(size)).shape[axes_out[which]])
        except REFUSALS:
            return 0

    least, rounds_up = [], True
    for which, own in enumerate(before.size):
        low, high = 0, 1 if cells(which, 1) else own  # it has no cell for `low`, and at least one for `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if cells(which, middle) else (middle, high)
        least.append(high)
        lengths = range(own, own + stride)
        rounds_up = rounds_up and stride > 1 and all(cells(which, item) == -(-item // stride) for item in lengths)
    return Spread(
        spacing=spacing,
        axes=before.axes,
        axes_out=axes_out,
        least=(least[0], least[1]),
        stride=stride,
        own=before.size,
        rounds_up=rounds_up,
    )


def _times(numbers: Any, factor: int) -> Any:
    """Padding or dilation, in cells that are `factor` times as many; "valid" stays."""
    if isinstance(numbers, str):
        return numbers
    return tuple(item * factor for item in ((numbers, numbers) if isinstance(numbers, int) else numbers))


def _is_plain_conv(module: nn.Module | None) -> bool:
    """A convolution with torch's own forward, padded by numbers of zeros."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return False
    own = type(module)._conv_forward is nn.Conv2d._conv_forward
    return own and module.padding_mode == "zeros" and module.padding != "same"


def _is_plain_pool(module: nn.Module | None) -> bool:
    """A maximum or average pooling with torch's own forward that rounds down."""
    pools = (nn.MaxPool2d, nn.AvgPool2d)
    own = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in pools)
    return own and not module.ceil_mode and not getattr(module, "return_indices", False)  # type: ignore[union-attr]
