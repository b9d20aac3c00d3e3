"""The numbers of training images: from what is stored to what the network sees, changed in colour, in one pass.

A crop stays as it is stored (a quarter of the bytes of float32 for most) until it is on the device that trains. Beside it
lies what becomes of its numbers: unit scale, brightness, contrast, saturation and the network's normalisation are affine and
nothing is clipped in between, so together they are one affine map per crop, exact to the rounding of float32.

An image that has pixels without data says where its data are in one channel more (`with_validity`). That channel goes
through the same geometry as the image; at the end (`network_input`) such pixels, and what lies outside the image, are
exactly 0, as in prediction.
"""

import math

import numpy as np
import torch
from torch import Tensor

GREY = np.array([0.2989, 0.587, 0.114])  # weights of red, green and blue (ITU-R BT.601, as torchvision rounds them)
PIXELS = 4  # that one row of the matrix product holds: three columns alone would leave a CPU's vectors empty


def uniform(low: float, high: float) -> float:
    """A number drawn evenly by torch's global generator."""
    return float(torch.empty(()).uniform_(low, high))


def with_validity(image: Tensor, valid: Tensor | None) -> Tensor:
    """An image (C, H, W) with one channel more: the largest number of its type (1 of floats) where it has data, else 0.

    Args:
        image: uint8, or float in unit scale.
        valid: bool (H, W); None, where all pixels have data, leaves the image as it is.
    """
    if valid is None:
        return image
    largest = 1 if image.is_floating_point() else 255
    return torch.cat([image, (valid.to(image.dtype) * largest)[None]])


class Photometric:
    """Brightness, contrast and, for three channels, saturation, about the mean and spread of each band in the data.

    In deviations from the mean, z = (x - mean) / std: z is multiplied by a factor drawn from [1 - strength, 1 + strength]
    (contrast), shifted by up to `strength` (brightness), and its distance to the grey of its pixel is multiplied by another
    such factor (saturation). So the unit and the zero of a band mean nothing: Kelvin, counts and reflectance beside metres
    change as much as photos do (torchvision's own needs RGB or grey in [0, 1] and clips).

    Args:
        strength: 0 changes nothing.
        mean: of each band of the data, in unit scale.
        std: likewise.
        seen_mean: what the network takes for 0, in unit scale; weights from elsewhere bring their own.
        seen_std: what it takes for 1, likewise.
        is_uint8: whether crops are stored as 0..255, else in unit scale.

    Example:
        >>> changes = Photometric(0.0, (0.5,), (0.1,), seen_mean=(0.5,), seen_std=(0.25,), is_uint8=True)
        >>> seen = network_input(torch.tensor([[[[255]]]], dtype=torch.uint8), changes.draw()[None])
        >>> round(seen.item(), 5)
        2.0
    """

    def __init__(
        self,
        strength: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        seen_mean: tuple[float, ...],
        seen_std: tuple[float, ...],
        is_uint8: bool,
    ) -> None:
        self.strength, self.unit = strength, 1 / 255 if is_uint8 else 1.0
        self.mean, self.std, self.seen_mean, self.seen_std = map(np.array, (mean, std, seen_mean, seen_std))

    def draw(self) -> Tensor:
        """The map of one crop, for `network_input`: float32 (C + 1, C) for three channels, else (2, C).

        The last row is what is added. The rows before say what each stored channel adds to each seen one; where channels are
        not mixed, one row of factors says it.
        """
        low, high = 1 - self.strength, 1 + self.strength
        contrast, saturation, brightness = 1.0, 1.0, 0.0
        if self.strength:
            contrast, saturation, brightness = uniform(low, high), uniform(low, high), uniform(low - 1, high - 1)
        spread = self.std / self.seen_std
        factor, offset = (
            contrast * self.unit / self.std,
            brightness - contrast * self.mean / self.std,
        )  # z of what is stored
        if len(self.mean) == 3:
            mixed = saturation * np.eye(3) + (1 - saturation) * GREY[:, None]  # of each channel, in each
            factor, offset = factor[:, None] * mixed, offset @ mixed
        else:
            factor = factor[None]
        offset = (self.mean - self.seen_mean) / self.seen_std + spread * offset
        return torch.from_numpy(np.vstack([factor * spread, offset[None]]).astype(np.float32))


def packed(image: Tensor, channels: int) -> Tensor:
    """A crop (C, H, W), or (C + 1, H, W) `with_validity`, as batches hold it: (H, W, C), or (H, W, C + 1).

    The last channel is then 1 where there are data and 0 elsewhere, where all others are 0 too.
    """
    if len(image) > channels:
        # In between, where neighbours were mixed, what is mostly data counts as data.
        valid = image[-1:] > (0.5 if image.is_floating_point() else 127)
        image = torch.cat([image[:-1].masked_fill(~valid, 0), valid])
    return image.permute(1, 2, 0).contiguous()


def network_input(images: Tensor, changes: Tensor) -> Tensor:
    """What the network sees of a batch: float32 (N, C, H, W), channels last in memory; exactly 0 where there are no data.

    Args:
        images: (N, H, W, C), or (N, H, W, C + 1) with the validity of `packed`; as they are stored.
        changes: (N, C + 1, C) or (N, 2, C): of each image the map that `Photometric.draw` drew.
    """
    count, height, width, channels = images.shape
    seen = changes.shape[-1]
    if seen == 3:
        x = _mixed(images, changes)
    elif channels > seen:
        factor, offset = changes[:, None, None].unbind(3)
        x = images[..., :-1] * factor + images[..., -1:] * offset
    else:
        factor, offset = changes.repeat(1, 1, width).split(1, dim=1)  # long rows: adding to single pixels is slow
        x = torch.addcmul(offset, images.view(count, height, -1).float(), factor)
    return x.view(count, height, width, seen).permute(0, 3, 1, 2)


def _mixed(images: Tensor, changes: Tensor) -> Tensor:
    """`network_input` where each channel depends on all, as a product of matrices; (N, H W / p, 3 p), p pixels a row."""
    count, height, width, channels = images.shape
    pixels = math.gcd(height * width, PIXELS)
    has_validity = channels > 3
    matrix = changes if has_validity else changes[:, :-1]  # what is added where there are data comes with their channel
    apart = torch.eye(pixels, device=changes.device)[:, None, :, None]
    blocks = (apart * matrix[:, None, :, None]).view(count, pixels * channels, pixels * 3)
    with torch.autocast(images.device.type, enabled=False):
        x = images.view(count, -1, pixels * channels).float()
        return torch.bmm(x, blocks) if has_validity else torch.baddbmm(changes[:, -1:].repeat(1, 1, pixels), x, blocks)
