"""The numbers of training images: unit scale, brightness and contrast in each band's own spread, and pixels without data.

An image that has pixels without data says where its data are in one channel more (`with_validity`). That channel goes
through the same geometry as the image; at the end (`FillNoData`) such pixels, and what lies outside the image, have exactly
the mean of the data: 0 after normalisation, as in prediction.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


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


class RandomPhotometric(v2.Transform):
    """Brightness, contrast and, for three channels, saturation, about the mean and spread of each band in the data.

    In deviations from the mean, z = (x - mean) / std: z is multiplied by a factor drawn from [1 - strength, 1 + strength]
    (contrast), shifted by up to `strength` (brightness), and its distance to the grey of its pixel is multiplied by another
    such factor (saturation). So the unit and the zero of a band mean nothing: Kelvin, counts and reflectance beside metres
    change as much as photos do (torchvision's own needs RGB or grey in [0, 1] and clips).

    Args:
        strength: 0 changes nothing.
        mean: of each band of the data, in unit scale; channels beyond these (`with_validity`) are left alone.
        std: likewise.
    """

    def __init__(self, strength: float, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.strength = strength
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factors = {name: uniform(1 - self.strength, 1 + self.strength) for name in ("contrast", "saturation")}
        return factors | {"brightness": uniform(-self.strength, self.strength)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = inpt.as_subclass(Tensor)
        bands, validity = image[: len(self.mean)], image[len(self.mean) :]
        z = (bands - self.mean) / self.std * params["contrast"] + params["brightness"]
        if len(bands) == 3:
            grey = F.rgb_to_grayscale(z)
            z = grey + (z - grey) * params["saturation"]
        return tv_tensors.Image(torch.cat([self.mean + self.std * z, validity]))


class FillNoData(v2.Transform):
    """`fill`, per channel, where the channel of `with_validity` says that there is no data; that channel is dropped."""

    def __init__(self, fill: tuple[float, ...]) -> None:
        super().__init__()
        self.fill = torch.tensor(fill)[:, None, None]

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image) or len(inpt) == len(self.fill):
            return inpt
        image = inpt.as_subclass(Tensor)
        # In between, where neighbours were mixed, what is mostly data counts as data.
        return tv_tensors.Image(torch.where(image[-1:] > 0.5, image[:-1], self.fill))


class ToUnit(v2.Transform):
    """A float32 image in unit scale: uint8 is divided by 255 (torchvision would multiply by 1 / 255), floats stay."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        return tv_tensors.Image(inpt.float() / 255 if inpt.dtype == torch.uint8 else inpt.float())
