"""Max pooling that remembers where each maximum stood, and the unpooling that puts it back (SegNet, arXiv:1511.00561)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.ops.resize import has_known_size


def max_pool_keeping_indices(x: Tensor, kernel: int | tuple[int, int] = 2) -> tuple[Tensor, Tensor]:
    """The maximum of each window and its place; windows do not overlap, and those cut by the border count (ceil mode).

    (N, C, H, W) becomes maxima (N, C, ceil(H / kernel), ceil(W / kernel)) and indices of that shape (int64), row * W +
    column in `x`. Of equal values in a window, the first in reading order is taken.
    """
    kernel = _pair(kernel)
    if has_known_size(x):
        return F.max_pool2d(x, kernel, ceil_mode=True, return_indices=True)
    # torch's ceil mode asks whether the size divides, which a graph for all sizes cannot. Cells of -inf are never taken.
    height, width = x.shape[-2:]
    rows, columns = ((length + step - 1) // step * step for length, step in zip((height, width), kernel, strict=True))
    padded = F.pad(x, (0, columns - width, 0, rows - height), value=float("-inf"))
    maxima, indices = F.max_pool2d(padded, kernel, return_indices=True)
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
        self._last: tuple[Tensor, tuple[int, ...]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.ceil_mode:
            maxima, indices = max_pool_keeping_indices(x, self.kernel)
        else:
            maxima, indices = F.max_pool2d(x, self.kernel, return_indices=True)
        self._last = (indices, tuple(x.shape[-2:]))
        return maxima

    def unpool(self, x: Tensor) -> Tensor:
        """Put each value of `x`, shaped as the last pooled map, where the maximum stood; zeros elsewhere."""
        if self._last is None:
            raise RuntimeError("unpool follows a forward pass: each one remembers its places for one unpooling.")
        (indices, size), self._last = self._last, None
        return max_unpool(x, indices, size)  # type: ignore[arg-type]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
