"""Max pooling without its stride: the pooling of a window, for the windows of all pixels at once.

A network that pools with stride s sees, in a window, every s-th cell of each later map. For all windows in one pass, pool at
every cell instead and let what follows take cells s apart, which is a dilation: the a trous form of shift-and-stitch
(OverFeat, arXiv:1312.6229; Giusti et al., arXiv:1302.1700, keep the same numbers as max-pooling fragments).
"""

import torch
from torch import Tensor


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
