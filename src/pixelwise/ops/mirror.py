"""Mirrored borders: what lies outside an image is its reflection, however far outside and however small the image."""

import torch
from torch import Tensor


def mirror_pad(image: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """`image` (..., H, W) with mirrored margins of any width, from one pixel on; gradients flow back to the mirrored pixels.

    The border itself is not doubled: of (a, b, c) one sees ... c b a b c b a .... `torch.nn.functional.pad` mirrors once,
    so margins as wide as the image are too much for it; in margins that it can fill, the result is the same.

    Args:
        image: of any number of leading axes.
        left: columns added, as the others below at least 0; they may depend on the size in an exported graph.
        right: columns added.
        top: rows added.
        bottom: rows added.

    Returns:
        (..., top + H + bottom, left + W + right)

    Example:
        >>> mirror_pad(torch.tensor([[1, 2, 3]]), 3, 2, 0, 1)
        tensor([[2, 3, 2, 1, 2, 3, 2, 1],
                [2, 3, 2, 1, 2, 3, 2, 1]])
    """
    height, width = image.shape[-2:]
    return mirror_crop(image, -top, -left, top + height + bottom, left + width + right)


def mirror_crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """`height` x `width` pixels from row `top` and column `left` on, which may be negative; outside, `image` is mirrored.

    Returns:
        (..., height, width)

    Example:
        >>> mirror_crop(torch.tensor([[1, 2, 3]]), 0, -1, 1, 3)
        tensor([[2, 1, 2]])
    """
    rows = _mirrored(top, height, image.shape[-2], image.device)
    columns = _mirrored(left, width, image.shape[-1], image.device)
    return image.index_select(-2, rows).index_select(-1, columns)


def _mirrored(start: int, count: int, length: int, device: torch.device) -> Tensor:
    """The places, in 0 ... `length` - 1, that a mirrored axis shows from `start` on; no branch on the length, for export."""
    period = torch.sym_max(2 * (length - 1), 1)
    place = torch.arange(start, start + count, device=device).remainder(period)
    return torch.minimum(place, -place + period)
