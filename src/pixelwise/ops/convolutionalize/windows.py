"""What a fully convolutional classifier computes with: steps on interleaved maps, pooling over windows, cells as a batch.

Where a stride was removed, a map holds several interleaved maps, its phases: with a spacing of n, phase (i, j) is made of
the cells (y, x) with y = i and x = j modulo n. Each phase is what the network itself would compute on the image shifted by
a few pixels, so any step of the network may be done on each phase as it stands. A dilated convolution is the same, quicker.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from pixelwise.errors import UsageError

Step = Callable[[Tensor], Tensor]
Axes = tuple[int, int]
Parts = dict[tuple[int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a step is done on an interleaved map."""

    spacing: int  # cells between neighbours of a phase
    axes: Axes = (2, 3)  # where the map has its rows and columns
    axes_out: Axes = (2, 3)  # where the result has them
    least: tuple[int, int] = (1, 1)  # rows and columns that the step needs; smaller phases have no cells in the result
    stride: int = 1  # of the step; it is removed by doing the step at every cell
    own: tuple[int, int] = (1, 1)  # rows and columns of a phase at the classifier's own image size
    rounds_up: bool = False  # it gives ceil(length / stride) cells for every length, as TensorFlow's "SAME" does

    def run(self, step: Step, x: Tensor) -> Tensor:
        """The result of `step`, which takes and gives single maps, for all phases of `x`, interleaved as they were."""
        if self.stride > 1:
            return self._per_phase(lambda phase: self._at_every_cell(step, phase), x)
        return self._per_phase(step, x)

    def _per_phase(self, step: Step, x: Tensor) -> Tensor:
        if self.spacing == 1:
            return step(x)
        parts: Parts = {}
        sizes = (x.shape[self.axes[0]], x.shape[self.axes[1]])
        for rows, columns in _alike(sizes, self.spacing, self.least):  # phases of one size go through as one batch
            at = [(row, column) for row in rows for column in columns]
            phases = [self._every(x, row, column, self.spacing, self.axes) for row, column in at]
            parts |= zip(at, step(torch.cat(phases)).chunk(len(at)), strict=True)
        return self._interleave(parts, self.spacing)

    def _at_every_cell(self, step: Step, x: Tensor) -> Tensor:
        """The step on the map and on the map shifted by 1 ... stride - 1 cells, interleaved."""
        parts: Parts = {}
        for row in range(self.stride):
            for column in range(self.stride):
                shifted = self._shift(self._shift(x, 0, row), 1, column)
                if all(shifted.shape[axis] >= least for axis, least in zip(self.axes, self.least, strict=True)):
                    parts[row, column] = step(shifted)
        whole = self._interleave(parts, self.stride)
        for axis, axis_out in zip(self.axes, self.axes_out, strict=True):
            whole = whole.narrow(axis_out, 0, min(whole.shape[axis_out], x.shape[axis]))
        return whole

    def _shift(self, x: Tensor, which: int, by: int) -> Tensor:
        """Without its first cells.

        A step that rounds up begins its windows where the length leaves the rest that it has at the own size: zeros are
        added for that, and what is computed from zeros alone is cut off afterwards.
        """
        axis = self.axes[which]
        shifted = x.narrow(axis, by, max(x.shape[axis] - by, 0))
        missing = (self.own[which] - shifted.shape[axis]) % self.stride if self.rounds_up else 0
        if not missing:
            return shifted
        shape = list(shifted.shape)
        shape[axis] = missing
        return torch.cat([shifted, shifted.new_zeros(shape)], dim=axis)

    @staticmethod
    def _every(x: Tensor, row: int, column: int, spacing: int, axes: Axes) -> Tensor:
        cut = [slice(None)] * x.ndim
        cut[axes[0]], cut[axes[1]] = slice(row, None, spacing), slice(column, None, spacing)
        return x[tuple(cut)]

    def _interleave(self, parts: Parts, spacing: int) -> Tensor:
        shape = list(parts[0, 0].shape)
        shape[self.axes_out[0]] = sum(part.shape[self.axes_out[0]] for (_, x), part in parts.items() if x == 0)
        shape[self.axes_out[1]] = sum(part.shape[self.axes_out[1]] for (y, _), part in parts.items() if y == 0)
        whole = parts[0, 0].new_empty(shape)
        for (row, column), part in parts.items():
            self._every(whole, row, column, spacing, self.axes_out).copy_(part)
        return whole


def _alike(sizes: tuple[int, int], spacing: int, least: tuple[int, int]) -> Iterator[tuple[range, range]]:
    """The phases by size: the first ones are a cell longer where the spacing does not divide the length."""
    groups = []
    for length, wanted in zip(sizes, least, strict=True):
        shorter, longer = divmod(length, spacing)
        both = ((range(longer), shorter + 1), (range(longer, spacing), shorter))
        groups.append([phases for phases, cells in both if phases and cells >= max(wanted, 1)])
    for rows in groups[0]:
        for columns in groups[1]:
            yield rows, columns


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


def crop_alike(maps: Sequence[Tensor], axes: Axes = (2, 3)) -> list[Tensor]:
    """The first rows and columns of each map, as many as the smallest has: branches may differ in their last phases."""
    for axis in axes:
        length = min(item.shape[axis] for item in maps)
        maps = [item if item.shape[axis] == length else item.narrow(axis, 0, length) for item in maps]
    return list(maps)


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


def require_size(image: Tensor, least: Sequence[int]) -> Tensor:
    """The image (N, C, H, W), if it has the channels of `least` = (C, H, W) and is not smaller; else a UsageError."""
    channels, height, width = least
    if image.ndim != 4 or image.shape[1] != channels:
        raise UsageError(f"the image must have shape (N, {channels}, H, W), not {tuple(image.shape)}.")
    if image.shape[2] < height or image.shape[3] < width:
        raise UsageError(
            f"the image of {image.shape[2]} x {image.shape[3]} px (height x width) is smaller than the classifier's window "
            f"of {height} x {width} px. Pad or enlarge it."
        )
    return image


def whole_windows(scores: Tensor, image: Tensor, window: Sequence[int], stride: int) -> Tensor:
    """The scores (N, K, h, w) of windows within the image: padding and rounding let a network have a few cells more."""
    rows, columns = ((length - own) // stride + 1 for length, own in zip(image.shape[2:], window, strict=True))
    return scores[:, :, :rows, :columns]
