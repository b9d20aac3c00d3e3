"""Crops as the network sees them, but in unit scale: geometry, changes of colours and normalisation in one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from pixelwise.data.photometric import Photometric, network_input, packed
from pixelwise.data.transforms import training_transform, window_transform

Made = tuple[Tensor, ...]


def seen_in_units(image: Tensor, mean: tuple[float, ...], changes: Tensor) -> Tensor:
    """(C, H, W), of whose numbers `mean` was taken away: what is 0 to the network is exactly the mean here."""
    return network_input(packed(image, len(mean))[None], changes[None])[0] + torch.tensor(mean)[:, None, None]


def augmentation(
    *,
    photometric: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    fill: tuple[float, ...] | None = None,
    **geometry: Any,
) -> Callable[..., Made]:
    """A function of image, mask and weights, as `CropSet` and the training step together are."""
    zero = mean if fill is None else fill
    transform = window_transform(**geometry) if "window_px" in geometry else training_transform(fill=zero, **geometry)

    def make(image: Tensor, *masks: Tensor) -> Made:
        image, *masks = transform(image, *masks)
        how = {"seen_mean": zero, "seen_std": (1.0,) * len(mean), "is_uint8": image.dtype == torch.uint8}
        changes = Photometric(photometric, mean, std, **how).draw()
        return seen_in_units(image.as_subclass(Tensor), zero, changes), *masks

    return make


def recolored(strength: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[..., Made]:
    """Changes of colours alone, of images in unit scale."""
    how = {"seen_mean": mean, "seen_std": (1.0,) * len(mean), "is_uint8": False}

    def make(image: Tensor, mask: Tensor) -> Made:
        changes = Photometric(strength, mean, std, **how).draw()
        return seen_in_units(image.as_subclass(Tensor), mean, changes), tv_tensors.wrap(mask, like=mask)

    return make
