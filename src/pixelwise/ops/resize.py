"""Padding, cropping, mirroring and bilinear upsampling, shared by every network."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def has_known_size(*maps: Tensor) -> bool:
    """Whether heights and widths are numbers; not so while a graph is captured for all sizes."""
    return all(isinstance(length, int) for item in maps for length in item.shape[-2:])


def pad_to_multiple(image: Tensor, multiple: int, *, at_least: int = 1) -> Tensor:
    """Repeat the last row and column of (N, C, H, W) until both sides are multiples of `multiple`, and not below `at_least`.

    The image stays at the top left, so `crop_like` undoes it. Repeating the border works from one pixel on, which mirroring
    does not.
    """
    height, width = image.shape[-2:]
    below, right = (_missing(length, multiple, at_least) for length in (height, width))
    # While a graph is captured for all sizes, none of them may decide about a branch.
    if not has_known_size(image):
        rows, columns = (
            torch.arange(length + more, device=image.device).clamp(max=length - 1)
            for length, more in ((height, below), (width, right))
        )
        return image.index_select(-2, rows).index_select(-1, columns)
    return F.pad(image, (0, right, 0, below), mode="replicate") if below or right else image


def _missing(length: int, multiple: int, at_least: int) -> int:
    """What `length` lacks to be a multiple of `multiple` that is not below `at_least`."""
    whole = (length + multiple - 1) // multiple * multiple
    if isinstance(length, int):
        return max(whole, at_least) - length
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    # In a graph for sizes that are all large enough, no maximum is left for later steps to puzzle over.
    least: Any = whole if statically_known_true(whole >= at_least) else torch.sym_max(whole, at_least)
    return least - length


def crop_like(scores: Tensor, image: Tensor, offset: int = 0) -> Tensor:
    """The part of `scores` (N, K, H', W') from row and column `offset` on that has the height and width of `image`."""
    height, width = image.shape[-2:]
    if not has_known_size(scores, image):  # a slice would ask of every size whether it cuts anything
        rows, columns = (torch.arange(offset, offset + length, device=scores.device) for length in (height, width))
        return scores.index_select(-2, rows).index_select(-1, columns)
    return scores[..., offset : offset + height, offset : offset + width]


def mirror_pad(image: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """`image` (..., H, W) with mirrored margins of any width: (..., top + H + bottom, left + W + right); differentiable.

    The border itself is not doubled: of (a, b, c) one sees ... c b a b c b a .... `torch.nn.functional.pad` mirrors once,
    so margins as wide as the image are too much for it. Margins may depend on the size in an exported graph.
    """
    height, width = image.shape[-2:]
    return mirror_crop(image, -top, -left, top + height + bottom, left + width + right)


def mirror_crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """(..., height, width) pixels from row `top` and column `left` on, also negative ones; outside, `image` is mirrored."""
    rows = _mirrored(top, height, image.shape[-2], image.device)
    columns = _mirrored(left, width, image.shape[-1], image.device)
    return image.index_select(-2, rows).index_select(-1, columns)


def _mirrored(start: int, count: int, length: int, device: torch.device) -> Tensor:
    """The places, in 0 ... `length` - 1, that a mirrored axis shows from `start` on; no branch on the length, for export."""
    period = torch.sym_max(2 * (length - 1), 1)
    place = torch.arange(start, start + count, device=device).remainder(period)
    return torch.minimum(place, -place + period)


def upsample_to(features: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear resampling of (N, C, h, w) to `size` = (H, W) pixels, pixel areas aligned; unchanged if it has that size."""
    if has_known_size(features) and tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def bilinear_matrix(length: int, size: int, device: torch.device | None = None) -> Tensor:
    """The (size, length) weights with which `upsample_to` makes `size` rows (or columns) of `length`.

    Example:
        >>> bilinear_matrix(2, 4)
        tensor([[1.0000, 0.0000],
                [0.7500, 0.2500],
                [0.2500, 0.7500],
                [0.0000, 1.0000]])
    """
    return F.interpolate(torch.eye(length, device=device)[None], size=size, mode="linear")[0].T


@dataclass(frozen=True)
class CoarseLogits:
    """Logits that are computed on a coarse grid and then only enlarged; whoever needs them coarse need not enlarge them.

    Example:
        >>> coarse = CoarseLogits(torch.rand(1, 2, 3, 4), bilinear_matrix(3, 12), bilinear_matrix(4, 16)[:13])
        >>> coarse.enlarge().shape
        torch.Size([1, 2, 12, 13])
    """

    scores: Tensor  # (N, K, h, w)
    rows: Tensor  # (H, h): the weights of each row of the image
    columns: Tensor  # (W, w): likewise

    def enlarge(self) -> Tensor:
        """The logits (N, K, H, W)."""
        return self.rows.to(self.scores) @ self.scores @ self.columns.to(self.scores).T


def bilinear_kernel(size: int) -> Tensor:
    """The (size, size) weights with which a transposed convolution interpolates bilinearly (FCN, arXiv:1411.4038, 4.3)."""
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    row = 1 - (torch.arange(size) - centre).abs() / factor
    return row[:, None] * row[None, :]


class FixedBilinear(nn.Module):
    """A transposed convolution of `channels` maps whose bilinear kernel never changes (FCN, arXiv:1411.4038, section 3.3).

    It gives what a full (K, K, k, k) kernel with bilinear filters on its diagonal gives, from the k numbers of one row:
    no channel mixes with another, and the filter is the product of a row and a column. They are no part of the state.
    """

    row: Tensor

    def __init__(self, channels: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        with torch.device("cpu"):  # on meta, these steps import torch's compiler
            # The filter is row x row, so its diagonal is the row squared.
            row = bilinear_kernel(kernel).diagonal().sqrt().repeat(channels, 1, 1, 1)
        self.register_buffer("row", row.to(torch.get_default_device()), persistent=False)  # (K, 1, 1, k)

    def forward(self, x: Tensor) -> Tensor:
        """(N, K, h, w) -> (N, K, (h - 1) * stride + kernel, (w - 1) * stride + kernel)."""
        x = F.conv_transpose2d(x, self.row, stride=(1, self.stride), groups=self.channels)
        return F.conv_transpose2d(x, self.row.transpose(2, 3), stride=(self.stride, 1), groups=self.channels)


def bilinear_upsampling(channels: int, *, kernel: int, stride: int, learnt: bool) -> nn.Module:
    """An enlargement of (N, K, h, w) by `stride` that is bilinear, or starts so and may learn to mix the channels.

    Its maps measure (h - 1) * stride + kernel, and the centre of cell i lies at i * stride + (kernel - 1) / 2. If `learnt`,
    the filters are K * K * kernel * kernel parameters, bilinear on the diagonal, else zero.
    """
    make = learnt_bilinear if learnt else FixedBilinear
    return make(channels, kernel=kernel, stride=stride)


def learnt_bilinear(channels: int, *, kernel: int, stride: int, padding: int = 0) -> nn.ConvTranspose2d:
    """A transposed convolution that starts as bilinear interpolation of each channel; `padding` is cut at each border."""
    deconv = nn.ConvTranspose2d(channels, channels, kernel, stride=stride, padding=padding, bias=False)
    diagonal = torch.arange(channels)
    with torch.no_grad():
        deconv.weight.zero_()
        deconv.weight[diagonal, diagonal] = bilinear_kernel(kernel)
    return deconv
