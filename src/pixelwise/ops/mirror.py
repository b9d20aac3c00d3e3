"""Mirrored borders: what lies outside an image is its reflection, however far outside and however small the image."""

import torch
from torch import Tensor


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
