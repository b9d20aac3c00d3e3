"""Bilinear upsampling as the FCN papers do it: a transposed convolution without padding, then a crop at a fixed offset."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.ops.resize import bilinear_kernel


class FixedBilinear(nn.Module):
    """A transposed convolution of `channels` maps whose bilinear kernel never changes (FCN, arXiv:1411.4038, section 3.3).

    It gives what a full (K, K, k, k) kernel with bilinear filters on its diagonal gives, from the k numbers of one row:
    no channel mixes with another, and the filter is the product of a row and a column. They are no part of the state.
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

    Its maps measure (h - 1) * stride + kernel, and the centre of cell i lies at i * stride + (kernel - 1) / 2. If `learnt`,
    the filters are K * K * kernel * kernel parameters, bilinear on the diagonal, else zero.
    """
    if not learnt:
        return FixedBilinear(channels, kernel=kernel, stride=stride)
    return learnt_bilinear(channels, kernel=kernel, stride=stride)


def learnt_bilinear(channels: int, *, kernel: int, stride: int, padding: int = 0) -> nn.ConvTranspose2d:
    """A transposed convolution that starts as bilinear interpolation of each channel; `padding` is cut at each border."""
    deconv = nn.ConvTranspose2d(channels, channels, kernel, stride=stride, padding=padding, bias=False)
    diagonal = torch.arange(channels)
    with torch.no_grad():
        deconv.weight.zero_()
        deconv.weight[diagonal, diagonal] = bilinear_kernel(kernel)
    return deconv
