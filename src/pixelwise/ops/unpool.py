"""Max pooling that remembers where each maximum stood, and the unpooling that puts it back (SegNet, arXiv:1511.00561)."""

import torch.nn.functional as F
from torch import Tensor, nn


class MaxPoolKeepingIndices(nn.Module):
    """`nn.MaxPool2d` that keeps the places of its last maxima, for an encoder whose code returns features only.

    Args:
        pool: the pooling to stand in for; its windows must not overlap (kernel = stride), else a maximum has two places.
        channels: of the maps it pools.

    Example:
        >>> import torch
        >>> pool = MaxPoolKeepingIndices(nn.MaxPool2d(2), channels=1)
        >>> maxima = pool(torch.tensor([[[[1., 9.], [3., 4.]]]]))
        >>> pool.unpool(maxima)
        tensor([[[[0., 9.],
                  [0., 0.]]]])
    """

    def __init__(self, pool: nn.MaxPool2d, *, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.kernel, self.ceil_mode = _pair(pool.kernel_size), pool.ceil_mode
        self._last: tuple[Tensor, tuple[int, ...]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        maxima, indices = F.max_pool2d(x, self.kernel, ceil_mode=self.ceil_mode, return_indices=True)
        self._last = (indices, tuple(x.shape[-2:]))
        return maxima

    def unpool(self, x: Tensor) -> Tensor:
        """Put each value of `x`, shaped as the last pooled map, where the maximum stood; zeros elsewhere."""
        if self._last is None:
            raise RuntimeError("unpool follows a forward pass: each one remembers its places for one unpooling.")
        (indices, size), self._last = self._last, None
        return F.max_unpool2d(x, indices, self.kernel, output_size=size)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
