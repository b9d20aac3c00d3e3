"""The head of a classifier, from its last map to its scores, redone for every window of the map.

What a head does to the one window of the classifier's own image size is followed on numbered values, so that any way to
flatten, permute or slice it comes out right. A step over the whole window that is a mean or a maximum of each channel
becomes a pooling of windows at stride 1; a linear layer becomes a convolution; any other step on vectors is done as it
stands, with the cells of the map as its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pixelwise.errors import UsageError
from pixelwise.ops.convolutionalize.capture import OWN_BATCH, Capture, Grid, NewNetwork
from pixelwise.ops.convolutionalize.tracer import (
    REFUSALS,
    is_adaptive_average,
    is_elementwise,
    is_linear,
    is_rearranging,
    run_node,
)
from pixelwise.ops.convolutionalize.trunk import Spread

Size = tuple[int, int]
Run = Callable[[Tensor], Any]
REDUCTIONS = ("mean", "sum", "amax", torch.mean, torch.sum, torch.amax)  # these may come one axis at a time


@dataclass(frozen=True)
class Windows:
    """What a value (N, ...) of the classifier's head is in the new graph.

    `numbers` tells, for each value of two images at the classifier's own size, which one of the window (C, h, w) it is;
    those of the second image go on where those of the first end.
    """

    map: fx.Node  # the step that gives a map (N, C, H', W')
    channels: int  # C
    numbers: Tensor
    window: Size = (1, 1)  # h, w in cells; (1, 1) where a cell of the map is all there is
    dilation: int = 1  # cells of the map between neighbours in a window
    bins: Size | None = None  # a, b where the window is to be averaged to (C, a, b) first, which `numbers` then number
    begun: tuple[Run, ...] = ()  # steps that have reduced the window by one axis: `x.mean(3).mean(2)`

    @property
    def is_cell(self) -> bool:
        return self.window == (1, 1) and self.bins is None and not self.begun

    @property
    def in_order(self) -> bool:
        return torch.equal(self.numbers.flatten(), torch.arange(OWN_BATCH * self.count))

    @property
    def count(self) -> int:
        rows, columns = self.bins or self.window
        return self.channels * rows * columns


def numbered(channels: int, size: Size = (1, 1)) -> Tensor:
    """(2, C, h, w) with every value another number."""
    return torch.arange(OWN_BATCH * channels * size[0] * size[1]).reshape(OWN_BATCH, channels, *size)


def window_of(map_: fx.Node, value: Tensor, grid: Grid, dilation: int, graph: fx.Graph) -> Windows:
    """The last map of the trunk; one with its channels last is turned round."""
    others = [axis for axis in range(1, value.ndim) if axis not in grid.axes]
    order = [0, *others, *grid.axes]
    if order != list(range(value.ndim)):
        map_ = graph.call_method("permute", (map_, *order))
    channels = value.shape[others[0]]
    numbers = numbered(channels, grid.size).permute([order.index(axis) for axis in range(value.ndim)])
    return Windows(map_, channels, numbers, grid.size, dilation)


class Head:
    """Turns the steps of a classifier's head, one by one; `value` tells what stands for an input from outside of it.

    `per_cell` leaves poolings out, so that each cell gets scores.
    """

    def __init__(self, new: NewNetwork, per_cell: bool, value: Callable[[fx.Node], Any]) -> None:
        self.new, self.capture, self.graph, self.per_cell, self.value = new, new.capture, new.graph, per_cell, value

    def convert(self, node: fx.Node, given: dict[fx.Node, Windows]) -> Windows:
        """The next step, whose inputs of the head are `given`."""
        module = self.capture.module(node)
        if len(given) == 1:
            source, windows = next(iter(given.items()))
            done = self._one_step(node, module, partial(try_step, self.capture, node, source), windows)
            if done:
                return done
        if given and all(windows.is_cell for windows in given.values()):
            return self._by_cells(node, given)
        raise self._refusal(node, given)

    def _one_step(self, node: fx.Node, module: nn.Module | None, run: Run, windows: Windows) -> Windows | None:
        """A step on one value of the head, if it is of a kind that is done on maps."""
        if not windows.is_cell and (pooled := self._pooled(node, run, windows)):
            return pooled
        if windows.begun:
            return None
        if is_rearranging(node, module) and (moved := self._rearranged(run, windows)):
            return moved
        if is_linear(module):
            return self._convolved(node, windows)
        keeps = isinstance(module, nn.Identity | nn.Dropout) or windows.bins is None
        if is_elementwise(node, module) and keeps and len(node.all_input_nodes) == 1:
            return replace(windows, map=self.graph.node_copy(node, lambda item: windows.map))
        return None

    def scores(self, node: fx.Node, windows: Windows) -> fx.Node:
        """The map of scores, at the end of the head."""
        if not windows.is_cell:
            raise self._refusal(node, {node: windows})
        if windows.in_order:
            return windows.map
        cells = self.graph.call_function(cells_of, self._cells_of(windows))
        return self.graph.call_function(map_of, (cells, windows.map))

    def _rearranged(self, run: Run, windows: Windows) -> Windows | None:
        numbers = run(windows.numbers)
        if not isinstance(numbers, Tensor) or numbers.ndim < 2 or numbers.shape[0] != OWN_BATCH:
            return None
        if not torch.equal(numbers[1], numbers[0] + windows.count):  # it mixes the images of a batch
            return None
        return replace(windows, numbers=numbers)

    def _pooled(self, node: fx.Node, run: Run, windows: Windows) -> Windows | None:
        """For a step that takes the mean, sum or maximum of each channel of the window, whatever it is called."""
        if windows.bins is not None or self.capture.has_state(node):
            return None
        begun = (*windows.begun, run)
        kind, numbers = recognise_pooling(lambda values: reduce(lambda x, step: step(x), begun, values), windows)
        if kind is None and node.target in REDUCTIONS:
            return replace(windows, begun=begun)
        if kind is None:
            return None if windows.begun else self._binned(node, windows)
        if not self.per_cell:
            path = self.new.place(node, WindowPool(kind, windows.window, windows.dilation))
            pooled = self.graph.call_module(path, (windows.map,))
        else:  # the scores of the classifier are then the mean of the cells' scores, where the head is linear
            scale = windows.window[0] * windows.window[1] if kind == "sum" else 1
            pooled = self.graph.call_method("mul", (windows.map, scale)) if scale > 1 else windows.map
        return Windows(pooled, windows.channels, numbers)

    def _binned(self, node: fx.Node, windows: Windows) -> Windows | None:
        """Adaptive averaging to a few cells: what follows must be linear."""
        averages = is_adaptive_average(node, self.capture.module(node))
        if not averages or not windows.in_order or windows.numbers.ndim != 4:
            return None
        bins = tuple(node.meta["own"].shape[2:])
        return replace(windows, numbers=numbered(windows.channels, bins), bins=bins)

    def _convolved(self, node: fx.Node, windows: Windows) -> Windows | None:
        """A linear layer over a whole window (or a cell) as a convolution with the same numbers."""
        order = windows.numbers[0]
        whole = order.ndim == 1 and torch.equal(order.sort().values, torch.arange(windows.count))
        if not whole or (self.per_cell and not windows.is_cell):
            return None
        linear: Any = self.capture.classifier.get_submodule(str(node.target))
        weight = linear.weight.detach()
        if not windows.in_order:
            weight = weight[:, order.argsort().to(weight.device)]
        size = windows.bins or windows.window
        kernel = nn.Parameter(weight.reshape(-1, windows.channels, *size), requires_grad=linear.weight.requires_grad)
        conv: nn.Module
        if windows.bins is not None:
            conv = PooledConv2d(kernel, linear.bias, windows.window, windows.dilation)
        else:
            with torch.device("meta"):  # no memory for weights that are replaced at once
                conv = nn.Conv2d(windows.channels, linear.out_features, size, dilation=windows.dilation, bias=False)
            conv.weight, conv.bias = kernel, linear.bias
        path = self.new.place(node, conv.train(linear.training))
        scores = self.graph.call_module(path, (windows.map,))
        return Windows(scores, linear.out_features, numbered(linear.out_features)[..., 0, 0])

    def _by_cells(self, node: fx.Node, given: dict[fx.Node, Windows]) -> Windows:
        """Any step on vectors, done as it stands with every cell of the map as a vector."""
        after = node.meta["own"]
        if not isinstance(after, Tensor) or after.ndim < 2 or after.shape[0] != OWN_BATCH:
            raise self._refusal(node, given)
        cells = {item: self.graph.call_function(cells_of, self._cells_of(windows)) for item, windows in given.items()}
        step = self.graph.node_copy(node, lambda item: cells[item] if item in cells else self.value(item))
        like = next(iter(given.values())).map
        channels = after[0].numel()
        result = self.graph.call_function(map_of, (step, like))
        return Windows(result, channels, numbered(channels).reshape(after.shape))

    def _cells_of(self, windows: Windows) -> tuple[Any, ...]:
        shape = tuple(windows.numbers.shape[1:])
        order = () if windows.in_order else (windows.numbers[0].flatten().tolist(),)
        return (windows.map, shape, *order)

    def _refusal(self, node: fx.Node, given: dict[fx.Node, Windows]) -> UsageError:
        if self.per_cell and is_linear(self.capture.module(node)):
            size = next(iter(given.values())).window
            why = f"it takes the whole {size[0]} x {size[1]} map, so that a cell has no scores of its own; use head='window'"
            return self.capture.refusal(node, why)
        size = next((windows.window for windows in given.values() if not windows.is_cell), (1, 1))
        step = "it" if node.op == "call_module" else f"its step {getattr(node.target, '__name__', str(node.target))!r}"
        why = f"{step} works on all cells of the {size[0]} x {size[1]} map at once, and is no pooling"
        why = f"{step} cannot be done for each cell of a map" if size == (1, 1) else why
        return self.capture.size_refusal(node, why)


def recognise_pooling(run: Run, windows: Windows) -> tuple[str | None, Tensor]:
    """(mean, sum, max or None, which channel each value of the result is): what a step does to numbers tells what it is."""
    cells = windows.window[0] * windows.window[1]
    random = torch.rand(OWN_BATCH * windows.channels, cells, generator=torch.Generator().manual_seed(0))
    random = random.double() - 0.5
    result = run(random.flatten()[windows.numbers])
    channels = run((windows.numbers // cells).double())
    if isinstance(result, Tensor) and isinstance(channels, Tensor) and result.shape == channels.shape:
        for kind, pooled in (("mean", random.mean(1)), ("max", random.amax(1)), ("sum", random.sum(1))):
            numbers = (channels / cells if kind == "sum" else channels).round().long()
            known = int(numbers.min()) >= 0 and int(numbers.max()) < len(pooled)
            if known and numbers.shape[0] == OWN_BATCH and torch.allclose(result, pooled[numbers]):
                return kind, numbers
    return None, windows.numbers


def try_step(capture: Capture, node: fx.Node, source: fx.Node, given: Tensor) -> Any:
    """What a step gives at the own size for `given` in place of its input `source`; None if it refuses."""
    try:
        return run_node(node, capture.twin, lambda item: given if item is source else item.meta["own"])
    except REFUSALS:
        return None


def starts_head(capture: Capture, node: fx.Node, source: fx.Node, before: Grid) -> bool:
    """Whether a step averages all cells of the map at the own size, by a fixed window that would move over a larger one."""
    value, after = source.meta["own"], node.meta["own"]
    is_one_cell = isinstance(after, Tensor) and after.ndim == 4 and after.shape[2:] == (1, 1) and before.size != (1, 1)
    if not is_one_cell or value.ndim != 4 or before.axes != (2, 3) or capture.has_state(node):
        return False
    windows = Windows(source, value.shape[1], numbered(value.shape[1], before.size), before.size)
    return recognise_pooling(partial(try_step, capture, node, source), windows)[0] == "mean"


class WindowPool(nn.Module):
    """The mean or the maximum over every window of a map, at stride 1; the cells of a window are `dilation` apart."""

    def __init__(self, kind: str, window: tuple[int, int], dilation: int = 1) -> None:
        super().__init__()
        self.kind, self.window, self.dilation = kind, window, dilation

    def forward(self, x: Tensor) -> Tensor:
        return Spread(spacing=self.dilation, least=self.window).run(self._pool, x)  # (N, C, h, w)

    def _pool(self, x: Tensor) -> Tensor:
        if self.kind == "max":
            return F.max_pool2d(x, self.window, stride=1)
        return F.avg_pool2d(x, self.window, stride=1, divisor_override=1 if self.kind == "sum" else None)

    def extra_repr(self) -> str:
        return f"{self.kind}, window={self.window}, dilation={self.dilation}"


class PooledConv2d(nn.Module):
    """A convolution over windows that are averaged to fewer cells first, as a linear layer after adaptive pooling is.

    The weight (O, C, a, b) is for a x b averages of a window, whose cells are `dilation` apart.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, window: tuple[int, int], dilation: int = 1
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.dilation = weight, bias, dilation
        self.rows: Tensor
        self.columns: Tensor
        for name, bins, length in zip(("rows", "columns"), weight.shape[2:], window, strict=True):
            shares = F.adaptive_avg_pool1d(torch.eye(length)[:, None], bins)[:, 0].T  # (bins, length)
            self.register_buffer(name, shares.to(weight.device, weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("ocab,ah,bw->ochw", self.weight, self.rows, self.columns)
        return F.conv2d(x, kernel, self.bias, dilation=self.dilation)  # (N, O, h, w)


def cells_of(x: Tensor, shape: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """The cells of a map (N, C, h, w) as a batch (N * h * w, *shape), their channels in the given order."""
    cells = x.permute(0, 2, 3, 1).flatten(0, 2)  # (N * h * w, C)
    cells = cells if order is None else cells[:, torch.as_tensor(order, device=x.device)]
    return cells.reshape(-1, *shape)


def map_of(cells: Tensor, like: Tensor) -> Tensor:
    """A batch of cells (N * h * w, ...) as a map (N, C', h, w), for the map (N, C, h, w) that `cells_of` took apart."""
    return cells.reshape(like.shape[0], like.shape[2], like.shape[3], -1).permute(0, 3, 1, 2)
