"""Smooth random deformation of image and mask together.

Source: Ronneberger, Fischer, Brox. U-Net. MICCAI 2015 (arXiv:1505.04597), section 3.1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.errors import UsageError


class RandomElastic(v2.Transform):
    """Displacements drawn on a coarse grid, interpolated to every pixel.

    Each point of a `grid` x `grid` lattice, whose corners are those of the image, gets a random vector, both parts normal of
    standard deviation `sigma_px`; bicubic interpolation gives the displacement of the pixels between. The image is resampled
    bilinearly, the mask by nearest neighbour. What comes from outside is mirrored in the image and void (255) in the mask;
    in a mask of floats, which are weights of pixels, it is 0.
    """

    def __init__(self, sigma_px: float = 10.0, grid: int = 3) -> None:
        super().__init__()
        if not sigma_px >= 0:
            raise UsageError(f"elastic deformation: sigma_px must be at least 0, not {sigma_px}.")
        if grid < 2:
            raise UsageError(f"elastic deformation: grid must be at least 2, not {grid}.")
        self.sigma_px, self.grid = sigma_px, grid

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = next(item.shape[-2:] for item in flat_inputs if isinstance(item, tv_tensors.Image | tv_tensors.Mask))
        coarse = self.sigma_px * torch.randn(1, 2, self.grid, self.grid)
        rows, columns = F.interpolate(coarse, size=tuple(size), mode="bicubic", align_corners=True)[0]  # (H, W) each
        height, width = size
        return {"rows": torch.arange(height)[:, None] + rows, "columns": torch.arange(width) + columns}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        rows, columns = params["rows"], params["columns"]
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(_nearest(inpt.as_subclass(Tensor), rows, columns), like=inpt)
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.Image(_bilinear(inpt.as_subclass(Tensor), rows, columns))
        return inpt


def _nearest(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The labels, or weights, (..., H, W) at the places (H, W) given in pixels; void outside, which weighs 0."""
    height, width = mask.shape[-2:]
    rows, columns = rows.round().long(), columns.round().long()
    is_outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
    out = mask[..., rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return out.masked_fill(is_outside, 0 if mask.is_floating_point() else IGNORE_INDEX)


def _bilinear(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The image (C, H, W) at the places (H, W) given in pixels; mirrored outside, the border pixel not repeated."""
    places = torch.stack(
        [
            2 * place / max(length - 1, 1) - 1
            for place, length in zip((columns, rows), image.shape[:-3:-1], strict=True)
        ],
        dim=-1,
    )  # (H, W, 2) in -1..1, x before y
    out = F.grid_sample(image.float()[None], places[None], "bilinear", "reflection", align_corners=True)[0]
    return out if image.is_floating_point() else out.round().to(image.dtype)
