"""Max pooling as Caffe does it: the size of the result is rounded up."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

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
        # torch's ceil mode asks whether the size divides, which a graph for all sizes cannot. One step less a cell of
        # -inf makes rounding down what rounding up was; no window lies in it alone, as none is shorter than the step.
        padded = F.pad(x, (0, self.step - 1, 0, self.step - 1), value=float("-inf"))
        return F.max_pool2d(padded, self.kernel, self.step)
