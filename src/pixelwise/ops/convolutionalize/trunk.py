"""The trunk of a classifier with its last strides removed, so that scores lie closer together.

A step whose stride is removed is done at every cell; what follows is done on every n-th cell (`windows`):
convolutions by dilation, poolings and all else on interleaved maps. Steps that look at single cells stay as they are.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from pixelwise.ops.convolutionalize.capture import Grid, NewNetwork, holds_tensors, share
from pixelwise.ops.convolutionalize.steps import is_by_cell, is_plain_conv, is_plain_pool
from pixelwise.ops.convolutionalize.tracer import REFUSALS, is_settled
from pixelwise.ops.convolutionalize.windows import FunctionStep, Here, Spread, crop_alike, spread


class Trunk:
    """Puts the steps of a classifier's trunk into the new graph, one by one.

    `stride` is the largest number of pixels between the cells of a map (None leaves all strides), `spacing` by how much the
    stride of each map was reduced, `opaque` the paths of modules whose steps can only be changed as one, `stuck` such steps.
    """

    def __init__(self, new: NewNetwork, stride: int | None) -> None:
        self.new, self.capture, self.stride = new, new.capture, stride
        self.spacing: dict[fx.Node, int] = {}
        self.opaque: set[str] = set()
        self.stuck: list[fx.Node] = []

    def convert(self, node: fx.Node, maps: list[fx.Node], value: Callable[[fx.Node], Any]) -> fx.Node:
        """The new step for `node`, whose inputs of the image are `maps`; `value` gives what stands for an input."""
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
                return self.new.graph.node_copy(node, value)
        if not maps or not holds_tensors(node):
            return self.new.graph.node_copy(node, value)
        done = None
        if grid is not None and len(spacings) == 1 and (factor == 1 or removed):
            done = self._spread(node, maps, value, (before, grid), round(factor), spacing)
        if done is None:  # the module around the step is done as one, next time
            self.stuck.append(node)
            self.opaque.add(node.meta["path"])
            done = self.new.graph.node_copy(node, value)
        return done

    def _spread(
        self,
        node: fx.Node,
        maps: list[fx.Node],
        value: Callable[[fx.Node], Any],
        grids: tuple[Grid, Grid],
        factor: int,
        spacing: int,
    ) -> fx.Node | None:
        """The step on interleaved maps, or None if it cannot be done as one step."""
        module, (before, after) = self.capture.module(node), grids
        same = all(found and found.size == after.size for item in maps if (found := self.capture.grid(item)))
        if is_by_cell(node, module) and factor == 1 and same:
            return self.new.graph.node_copy(node, self._cropped(node, maps, value, before))
        if len(maps) > 1:
            return None
        if is_plain_conv(module):
            conv = self.new.own_module(node)
            conv.stride = (1, 1) if factor > 1 else conv.stride
            conv.padding = _times(conv.padding, spacing)
            conv.dilation = _times(conv.dilation, spacing)
            path = self.new.place(node, conv)
            return self.new.graph.call_module(path, fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value))
        if node.target in (F.conv2d, torch.conv2d):
            return self._functional_conv(node, value, factor, spacing)
        step = self._as_module(node, maps[0])
        if step is None or not isinstance(node.meta["own"], Tensor):
            return None
        if is_plain_pool(module) and factor > 1:
            module, factor = share(module), 1  # type: ignore[arg-type]
            step.stride = module.stride = 1  # type: ignore[assignment]
        how = probe(module or step, maps[0].meta["own"], before, after.axes, factor, spacing)
        step = spread(step, how) if spacing > 1 or factor > 1 else step
        path = self.new.place(node, step)
        return self.new.graph.call_module(path, (value(maps[0]),))

    def _cropped(
        self, node: fx.Node, maps: list[fx.Node], value: Callable[[fx.Node], Any], grid: Grid
    ) -> Callable[[fx.Node], Any]:
        """`value`, with maps of several branches cut to one size: the last phases may lack a cell in some of them."""
        several = [item for item in maps if self.capture.grid(item) and isinstance(item.meta["own"], Tensor)]
        if len(several) < 2:
            return value
        cropped = self.new.graph.call_function(crop_alike, ([value(item) for item in several], grid.axes))
        at = {
            item: self.new.graph.call_function(operator.getitem, (cropped, index)) for index, item in enumerate(several)
        }
        return lambda item: at[item] if item in at else value(item)

    def _functional_conv(
        self, node: fx.Node, value: Callable[[fx.Node], Any], factor: int, spacing: int
    ) -> fx.Node | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        numbers = {"stride": 1, "padding": 0, "dilation": 1} | {key: given[key] for key in names[3:6] if key in given}
        if isinstance(numbers["padding"], str) or any(isinstance(item, fx.Node) for item in numbers.values()):
            return None
        stride = (1, 1) if factor > 1 else numbers["stride"]
        given |= {key: _times(numbers[key], spacing) for key in ("padding", "dilation")} | {"stride": stride}
        return self.new.graph.call_function(F.conv2d, (), fx.map_arg(given, value))

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
