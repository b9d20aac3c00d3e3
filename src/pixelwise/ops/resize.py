"""Padding, cropping and bilinear upsampling, shared by every network."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


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


def upsample_to(features: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear resampling of (N, C, h, w) to `size` = (H, W) pixels, pixel areas aligned; unchanged if it has that size."""
    if has_known_size(features) and tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def bilinear_kernel(size: int) -> Tensor:
    """The (size, size) weights with which a transposed convolution interpolates bilinearly (FCN, arXiv:1411.4038, 4.3)."""
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    row = 1 - (torch.arange(size) - centre).abs() / factor
    return row[:, None] * row[None, :]
