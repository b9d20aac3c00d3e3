"""Bilinear upsampling as the FCN papers do it: a transposed convolution without padding, then a crop at a fixed offset."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.ops.resize import bilinear_kernel


class FixedBilinear(nn.Module):
    """A transposed convolution whose bilinear kernel never changes (FCN, arXiv:1411.4038, section 3.3).

    It gives what a full (K, K, k, k) kernel with bilinear filters on its diagonal gives, from the k numbers of one row:
    no channel mixes with another, and the filter is the product of a row and a column. They are no part of the state.

    Args:
        channels: K of the maps.
        kernel: k, the side of the filter.
        stride: the factor of enlargement.

    Example:
        >>> FixedBilinear(1, kernel=4, stride=2)(torch.ones(1, 1, 3, 3))[0, 0, 3]
        tensor([0.2500, 0.7500, 1.0000, 1.0000, 1.0000, 1.0000, 0.7500, 0.2500])
    """

    row: Tensor

    def __init__(self, channels: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        # The filter is row x row, so its diagonal is the row squared.
        row = bilinear_kernel(kernel).diagonal().sqrt().repeat(channels, 1, 1, 1)
        self.register_buffer("row", row, persistent=False)  # (K, 1, 1, k)

    def forward(self, x: Tensor) -> Tensor:
        """(N, K, h, w) -> (N, K, (h - 1) * stride + kernel, (w - 1) * stride + kernel)."""
        x = F.conv_transpose2d(x, self.row, stride=(1, self.stride), groups=self.channels)
        return F.conv_transpose2d(x, self.row.transpose(2, 3), stride=(self.stride, 1), groups=self.channels)


def bilinear_upsampling(channels: int, *, kernel: int, stride: int, learnt: bool) -> nn.Module:
    """An enlargement of (N, K, h, w) by `stride` that is bilinear, or starts so and may learn to mix the channels.

    Args:
        channels: K of the maps.
        kernel: the side of the filter in pixels of the result.
        stride: the factor of enlargement.
        learnt: whether the filters are parameters: K * K * kernel * kernel, bilinear on the diagonal, else zero.

    Returns:
        A module; its maps measure (h - 1) * stride + kernel, and the centre of cell i lies at i * stride + (kernel - 1) / 2.

    Example:
        >>> up = bilinear_upsampling(3, kernel=4, stride=2, learnt=True)
        >>> tuple(up(torch.zeros(1, 3, 5, 6)).shape), up.weight.numel()
        ((1, 3, 12, 14), 144)
    """
    if not learnt:
        return FixedBilinear(channels, kernel=kernel, stride=stride)
    return learnt_bilinear(channels, kernel=kernel, stride=stride)


def learnt_bilinear(channels: int, *, kernel: int, stride: int, padding: int = 0) -> nn.ConvTranspose2d:
    """A transposed convolution that starts as bilinear interpolation, channel by channel; `padding` cells go at each border.

    Example:
        >>> tuple(learnt_bilinear(3, kernel=4, stride=2, padding=1)(torch.zeros(1, 3, 5, 6)).shape)
        (1, 3, 10, 12)
    """
    deconv = nn.ConvTranspose2d(channels, channels, kernel, stride=stride, padding=padding, bias=False)
    diagonal = torch.arange(channels)
    with torch.no_grad():
        deconv.weight.zero_()
        deconv.weight[diagonal, diagonal] = bilinear_kernel(kernel)
    return deconv
