"""Max pooling that rounds up, that remembers where each maximum stood, or has no stride; and unpooling.

Caffe's poolings, and so those of the FCN papers and of SegNet (arXiv:1511.00561), round the size of the result up; torch's
ceil mode asks whether the size divides, which a graph for all sizes cannot.

A network that pools with stride s sees, in a window, every s-th cell of each later map. For all windows in one pass, pool at
every cell instead and let what follows take cells s apart, which is a dilation: the a trous form of shift-and-stitch
(OverFeat, arXiv:1312.6229; Giusti et al., arXiv:1302.1700, keep the same numbers as max-pooling fragments).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pixelwise.ops.resize import has_known_size


class CeilMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` with `ceil_mode`, which can also be exported for all sizes at once; `stride` is at most `kernel`.

    A side of n cells gives ceil((n - kernel) / stride) + 1; windows that reach over the border take what they hold.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__(kernel, stride, ceil_mode=True)
        self.kernel, self.step = kernel, stride

    def forward(self, x: Tensor) -> Any:
        """(N, C, H, W) with H, W >= kernel -> (N, C, ceil((H - kernel) / stride) + 1, likewise)."""
        if has_known_size(x):
            return super().forward(x)
        # One step less a cell of -inf makes rounding down what rounding up was; no window lies in it alone, as none is
        # shorter than the step.
        padded = F.pad(x, (0, self.step - 1, 0, self.step - 1), value=float("-inf"))
        return F.max_pool2d(padded, self.kernel, self.step)


def max_pool_dense(x: Tensor, kernel: int, dilation: int = 1) -> Tensor:
    """Max pooling of stride 1 over kernel x kernel cells, `dilation` apart: (N, C, H - (kernel - 1) * dilation, likewise).

    Equal to `torch.nn.functional.max_pool2d`; several times faster on a CPU, where that runs cell by cell.
    """
    for axis in (-2, -1):  # the maximum over a square is one over rows, then one over columns
        count = x.shape[axis] - (kernel - 1) * dilation
        shifted = [x.narrow(axis, shift * dilation, count) for shift in range(kernel)]
        x = shifted[0]
        for other in shifted[1:]:
            x = torch.maximum(x, other)
    return x


def max_pool_keeping_indices(x: Tensor, kernel: int | tuple[int, int] = 2) -> tuple[Tensor, Tensor]:
    """The maximum of each window and its place; windows do not overlap, and those cut by the border count (ceil mode).

    (N, C, H, W) becomes maxima (N, C, ceil(H / kernel), ceil(W / kernel)) and indices of that shape (int64), row * W +
    column in `x`. Of equal values in a window, the first in reading order is taken.
    """
    sides = _pair(kernel)
    if has_known_size(x):
        return F.max_pool2d(x, sides, ceil_mode=True, return_indices=True)
    height, width = x.shape[-2:]  # cells of -inf are never taken
    rows, columns = ((length + step - 1) // step * step for length, step in zip((height, width), sides, strict=True))
    padded = F.pad(x, (0, columns - width, 0, rows - height), value=float("-inf"))
    maxima, indices = F.max_pool2d(padded, sides, return_indices=True)
    return maxima, indices - indices // columns * (columns - width)


def max_unpool(values: Tensor, indices: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Put each value (N, C, h, w) where the maximum of its window stood, zeros elsewhere: (N, C, *size).

    `indices` come from `max_pool_keeping_indices`, `size` is that of the map that was pooled; gradients take the same way.
    """
    # The operator behind F.max_unpool2d, which compares sizes in Python and so cannot be exported for all of them.
    return torch.ops.aten.max_unpool2d(values, indices, size)


class MaxPoolKeepingIndices(nn.Module):
    """`nn.MaxPool2d` that keeps the places of its last maxima, for an encoder whose code returns features only.

    The windows of `pool` must not overlap (kernel = stride), else a maximum has two places; `channels` are of its maps.
    """

    def __init__(self, pool: nn.MaxPool2d, *, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.kernel, self.ceil_mode = _pair(pool.kernel_size), pool.ceil_mode
        self._last: tuple[Tensor, torch.Size] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.ceil_mode:
            maxima, indices = max_pool_keeping_indices(x, self.kernel)
        else:
            maxima, indices = F.max_pool2d(x, self.kernel, return_indices=True)
        self._last = (indices, x.shape[-2:])
        return maxima

    def unpool(self, x: Tensor) -> Tensor:
        """Put each value of `x`, shaped as the last pooled map, where the maximum stood; zeros elsewhere."""
        if self._last is None:
            raise RuntimeError("unpool follows a forward pass: each one remembers its places for one unpooling.")
        (indices, size), self._last = self._last, None
        return max_unpool(x, indices, size)
