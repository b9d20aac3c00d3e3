"""U-Net's weights for the gaps between touching objects, as a map for each training image.

Instance maps lie in a folder `instances` beside the folder of masks, under the names of the masks; every value but 0 is one
object. Objects that touch are parted by a line of background (class 0), in the labels too: without it there would be no gap
to learn. Without instance maps, the connected regions of a mask's classes are the objects, and those that touch are one.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from pixelwise.data.layouts import Pair
from pixelwise.data.samples import Sample
from pixelwise.data.separation import separate_touching, separation_weights
from pixelwise.errors import DataError
from pixelwise.formats.raster import printable
from pixelwise.formats.readers import read_mask

INSTANCES = "instances"


def separate(pair: Pair, sample: Sample, *, w0: float, sigma_px: float) -> tuple[Sample, Tensor]:
    """The sample with touching objects parted, and what gaps weigh beside their class: (H, W) float32, 0 far from any.

    Raises:
        DataError: the instance map cannot be read, or has another size than the mask.
    """
    if sample.mask is None:
        raise DataError(f"{printable(pair.image)}: has no mask, so its objects cannot be separated.")
    mask, path = sample.mask.numpy(), instance_file(pair)
    if path is None:
        weights = separation_weights(mask, w0=w0, sigma_px=sigma_px)
    else:
        instances = _read_instances(path, mask.shape)
        parted = separate_touching(instances)
        mask = np.where((instances != 0) & (parted == 0), 0, mask).astype(mask.dtype)
        weights = separation_weights(parted, w0=w0, sigma_px=sigma_px, is_instances=True)
    # The map holds 1 for the class beside the gap's weight; the classes' own weights are known to the loss.
    return replace(sample, mask=from_numpy(mask)), from_numpy((weights - 1).clip(min=0))


def instance_file(pair: Pair) -> Path | None:
    """The instance map that belongs to a pair, or None; splits may lie above or below the folders."""
    if pair.mask is None:
        return None
    folder, name = pair.mask.parent, pair.mask.name
    places = (folder.with_name(INSTANCES) / name, folder.parent.with_name(INSTANCES) / folder.name / name)
    return next((path for path in places if path.is_file()), None)


def where_objects_come_from(pairs: Sequence[Pair]) -> str:
    """In words, for the plan: between what gaps are weighed."""
    count = sum(instance_file(pair) is not None for pair in pairs)
    if not count:
        return "between the connected regions of the masks"
    if count < len(pairs):
        return f"between the objects that {INSTANCES}/ numbers in {count:,} images, else between connected regions"
    return f"between the objects that {INSTANCES}/ numbers"


def _read_instances(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    """One number per pixel (H, W), also where a file tells objects by RGB colours."""
    values = read_mask(path)
    if values.shape[:2] != shape:
        raise DataError(
            f"{printable(path)}: the instance map is {values.shape[1]} x {values.shape[0]} px, but its mask is {shape[1]} x "
            f"{shape[0]} px. Both must have the same size."
        )
    if values.ndim == 2:
        return values
    red, green, blue = np.moveaxis(values.astype(np.int32), 2, 0)
    return (red << 16) | (green << 8) | blue
