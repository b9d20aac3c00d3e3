"""Objects of rare classes, cut out of one training image and pasted into the crop of another.

Source: Ghiasi, Cui, Srinivas, Qian, Lin, Cubuk, Le, Zoph. Simple Copy-Paste is a Strong Data Augmentation Method for
Instance Segmentation. CVPR 2021 (arXiv:2012.07177). Differs from it: an object is a connected region of a class in a mask,
since semantic masks number no instances; classes are drawn by their rarity; what is pasted lies anywhere in the crop.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.data.photometric import uniform
from pixelwise.errors import UsageError

TOUCHING = np.ones((3, 3), dtype=bool)  # pixels that share an edge or a corner are of one object


@dataclass(frozen=True)
class Found:
    """An object that was cut out."""

    image: Tensor  # (C, h, w) around it, as stored; with the channel of validity where its image has one
    mask: Tensor  # uint8 (h, w): 1 where the object is, else 0
    label: int  # its class


def rarities(pixels: Sequence[int]) -> dict[int, float]:
    """How often each rare class is to be drawn: in inverse proportion to its pixels; sums to 1.

    Rare is what has less than an even share of the labelled pixels, so that grounds and skies are never pasted.

    Example:
        >>> rarities((900, 80, 20, 0))
        {1: 0.2, 2: 0.8}
    """
    present = {label: count for label, count in enumerate(pixels) if count}
    rare = {label: 1 / count for label, count in present.items() if count * len(present) < sum(present.values())}
    return {label: weight / sum(rare.values()) for label, weight in rare.items()}


class Objects:
    """Draws objects of rare classes from the images of a data set, by torch's global generator.

    Args:
        share: of the draws that give an object.
        pixels: of each class in the training images.
        images_of: for each class, the indices of the images that show it and can be loaded as a whole.
    """

    def __init__(self, share: float, pixels: Sequence[int], images_of: Sequence[Sequence[int]]) -> None:
        self.share, self.images_of = share, images_of
        known = {label: weight for label, weight in rarities(pixels).items() if images_of[label]}
        if not known:
            raise UsageError(
                "copy_paste: no class has less than an even share of the labelled pixels, in images that are read as a "
                "whole, so there is no rare object to paste. Leave it out."
            )
        self.labels, self.weights = list(known), torch.tensor(list(known.values()))

    def draw(self, load: Callable[[int], tuple[Any, ...]]) -> Found | None:
        """An object, or None as often as no object is wanted; `load` gives image and mask of an index."""
        if uniform(0, 1) >= self.share:
            return None
        label = self.labels[int(torch.multinomial(self.weights, 1))]
        images = self.images_of[label]
        image, mask, *_ = load(images[int(torch.randint(len(images), ()))])
        regions, _ = ndimage.label(mask.numpy() == label, structure=TOUCHING)
        places = np.flatnonzero(regions)
        if not len(places):  # what the image has no data for is void, whatever its file says
            return None
        region = regions.flat[places[int(torch.randint(len(places), ()))]]  # by pixels: specks are drawn rarely
        box = ndimage.find_objects(regions)[region - 1]
        shown = torch.from_numpy((regions[box] == region).astype(np.uint8))
        return Found(image.as_subclass(Tensor)[:, *box], shown, label)


class Paste(v2.Transform):
    """Pastes the object that may come last among the inputs: image, mask, object -> image, mask.

    It is magnified by a factor drawn as those of crops are, and lies anywhere in the crop; of one that is larger, a part is
    shown. Only labelled pixels are covered: what is void stays so, with its colours, and so does what has no data.
    """

    def __init__(self, scale: tuple[float, float], fill: tuple[float, ...]) -> None:
        super().__init__()
        self.scale, self.fill = scale, fill

    def forward(self, *inputs: Any) -> Any:
        *rest, found = inputs
        if not isinstance(found, Found):
            return inputs
        image, mask = (item.as_subclass(Tensor).clone() for item in rest)
        factor = math.exp(uniform(*map(math.log, self.scale)))
        size = [max(1, round(length * factor)) for length in found.mask.shape]
        pixels, shown = self._resized(found, size)
        rows, columns = (_overlap(side, length) for side, length in zip(mask.shape, size, strict=True))
        into, of = (rows[0], columns[0]), (rows[1], columns[1])
        is_covered = (shown[of] > 0) & (mask[into] != IGNORE_INDEX)
        image[:, *into] = torch.where(is_covered, _as_channels(pixels[:, *of], len(image)), image[:, *into])
        mask[into] = mask[into].masked_fill(is_covered, found.label)
        return tv_tensors.Image(image), tv_tensors.Mask(mask)

    def _resized(self, found: Found, size: list[int]) -> tuple[Tensor, Tensor]:
        """The object's picture (C, h, w) without numbers of pixels that have no data, and where it is (h, w)."""
        image, channels = found.image, len(self.fill)
        if len(image) > channels:
            colors = torch.tensor(self.fill).to(image.dtype)[:, None, None]
            image = torch.where(image[-1:] > 0, image[:-1], colors)
        shown = F.resize(found.mask[None], size, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
        return F.resize(image, size, antialias=True), shown


def _overlap(side: int, length: int) -> tuple[slice, slice]:
    """Where something of `length` lies on a side of the crop, evenly drawn, and which part of it is seen."""
    low, high = sorted((0, side - length))
    start = int(torch.randint(low, high + 1, ()))
    end = min(side, start + length)
    return slice(max(start, 0), end), slice(max(-start, 0), end - start)


def _as_channels(pixels: Tensor, channels: int) -> Tensor:
    """With the channel of `with_validity` that says that there are data, if it is wanted."""
    if len(pixels) == channels:
        return pixels
    return torch.cat([pixels, torch.full_like(pixels[:1], 1 if pixels.is_floating_point() else 255)])
