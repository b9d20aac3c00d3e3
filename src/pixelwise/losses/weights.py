"""Class weights from pixel counts."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from pixelwise.errors import UsageError

Scheme = Literal["none", "median_frequency", "sqrt_median_frequency", "enet", "linknet"]


def class_weights(scheme: Scheme | Sequence[float], pixels: Sequence[int], image_pixels: Sequence[int]) -> Tensor:
    """One loss weight per class; a scheme gives 0 to a class without pixels.

    * `median_frequency` (Eigen, Fergus, ICCV 2015; SegNet): the median of all classes' frequencies over the class's own, a
      frequency being the class's pixels over all pixels of the images that contain it.
    * `sqrt_median_frequency`: its square root; between balance and none.
    * `enet` (Paszke et al., arXiv:1606.02147): 1 / ln(1.02 + the class's share of all labelled pixels).
    * `linknet` (Chaurasia, Culurciello, arXiv:1707.03718, the authors' code): 1 / ln(1.02 + the class's pixels over those of
      the most frequent class).
    * numbers, one per class, are taken as they are: weights that a paper prints need not follow from the pixels (SegNet's
      for CamVid do not).

    Args:
        scheme: one of the above, or `none` (all 1).
        pixels: labelled pixels per class in the training split.
        image_pixels: per class, all pixels of the images that contain it.

    Returns:
        (K,) float32.

    Raises:
        UsageError: an unknown scheme, or numbers that are not one weight of at least 0 per class.

    Example:
        >>> class_weights("median_frequency", pixels=[80, 20, 0], image_pixels=[100, 40, 0])
        tensor([0.8125, 1.3000, 0.0000])
    """
    if not isinstance(scheme, str):
        return _given(scheme, len(pixels))
    if scheme not in get_args(Scheme):
        raise UsageError(f"class weights: {scheme!r} is not one of {', '.join(get_args(Scheme))}.")
    counts = torch.tensor(pixels, dtype=torch.float64)
    present = counts > 0
    if scheme == "none" or not present.any():
        return torch.ones(len(counts))
    if scheme in ("enet", "linknet"):
        weights = 1 / torch.log(1.02 + counts / (counts.sum() if scheme == "enet" else counts.max()))
    else:
        frequency = counts / torch.tensor(image_pixels, dtype=torch.float64).clamp(min=1)
        weights = frequency[present].quantile(0.5) / frequency
        if scheme == "sqrt_median_frequency":
            weights = weights.sqrt()
    return torch.where(present, weights, 0.0).float()


def _given(weights: Sequence[float], classes: int) -> Tensor:
    if len(weights) != classes:
        raise UsageError(
            f"class weights: {len(weights)} numbers were given, but there are {classes} classes. Give one for each, in the "
            "order of the classes, or the name of a scheme."
        )
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not any(weights):
        raise UsageError(
            f"class weights: must be finite numbers of at least 0 and not all 0, not {', '.join(map(str, weights))}."
        )
    return torch.tensor(weights, dtype=torch.float32)
