"""Pixel weights that make a network learn the thin background between cells that touch.

Instance maps lie in a folder `instances` beside the folder of masks, under the names of the masks; every value but 0 is one
object. Objects that touch are parted by a line of background (class 0), in the labels too: without it there would be no gap
to learn. Without instance maps, the connected regions of a mask's classes are the objects, and those that touch are one.

Source: Ronneberger, Fischer, Brox. U-Net. MICCAI 2015 (arXiv:1505.04597), section 3, equation 2.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, from_numpy

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.data.masks import Reading, mask_values, open_mask
from pixelwise.data.pairs import Pair
from pixelwise.data.samples import Sample
from pixelwise.errors import DataError, UsageError
from pixelwise.formats.local import printable

INSTANCES = "instances"
NEGLECTED = 1e-3  # an extra weight below this is left out, so that a cell acts on its neighbourhood only
EIGHT = np.ones((3, 3), dtype=bool)  # pixels that share an edge or a corner touch


def separation_weights(
    labels: NDArray[Any],
    *,
    w0: float = 10.0,
    sigma_px: float = 5.0,
    is_instances: bool = False,
) -> NDArray[np.float32]:
    """The loss weight of each pixel where all classes weigh 1: w(x) = 1 + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2)).

    d1 and d2 are the distances to the borders of the nearest and the second nearest cell, in pixels. The border of a cell is
    the ring of background around it, so a pixel beside two cells has d1 = d2 = 0 and the full w0. Only background gets the
    second term, and only near two cells; a cell's own pixels keep 1, as in figure 3 of the paper, and void pixels get 0.

    Cells that touch have no background between them, so nothing to weigh: `separate_touching` puts it there, and the network
    must be trained on the labels that it returns.

    Args:
        labels: (H, W); either class ids with 0 for background and 255 for void, of which each connected component (over
            edges and corners) of a class is a cell, or, with `is_instances`, a number for each cell and 0 for background.
        w0: largest extra weight.
        sigma_px: how far it reaches.
        is_instances: what `labels` holds.

    Returns:
        float32 (H, W). Extra weights below 0.001 are 0.

    Raises:
        UsageError: labels that are not a plane of whole numbers from 0 on, w0 or sigma out of range.
    """
    _check_plane(labels)
    if not (w0 >= 0 and sigma_px > 0):
        raise UsageError(
            f"separation weights: w0 must be at least 0 and sigma_px more than 0, not {w0:g} and {sigma_px:g}."
        )
    is_void = labels == (-1 if is_instances else IGNORE_INDEX)  # instances have no void
    cells = _number(labels) if is_instances else _components(np.where(is_void, 0, labels))
    weights = np.ones(labels.shape, dtype=np.float32)
    if w0 > NEGLECTED:
        nearest, second = _two_nearest(cells, reach=sigma_px * math.sqrt(2 * math.log(w0 / NEGLECTED)))
        extra = w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma_px**2))
        weights += np.where((extra < NEGLECTED) | (cells > 0), 0, extra)
    weights[is_void] = 0
    return weights


def separate_touching(instances: NDArray[Any]) -> NDArray[Any]:
    """Put background between cells that touch, so that no connected component holds two of them.

    The larger of two cells gives up its pixels; one that is nowhere wider than what it gives up vanishes.

    Args:
        instances: (H, W), a number for each cell and 0 for background.

    Returns:
        As `instances`; no two cells share an edge or a corner.

    Raises:
        UsageError: labels that are not a plane of whole numbers from 0 on.
    """
    _check_plane(instances)
    values, inverse, counts = np.unique(instances, return_inverse=True, return_counts=True)
    is_cell = instances != 0
    by_size = np.argsort(np.argsort(np.where(values == 0, 0, counts), kind="stable"), kind="stable") + 1
    rank = np.where(is_cell, by_size[inverse.reshape(instances.shape)], 0)  # the larger the cell, the larger its rank
    lowest = ndimage.minimum_filter(np.where(is_cell, rank, len(values) + 1), footprint=EIGHT)
    return np.where(is_cell & (lowest < rank), 0, instances).astype(instances.dtype)


def _check_plane(labels: NDArray[Any]) -> None:
    if labels.ndim != 2 or labels.dtype.kind not in "biu" or labels.min(initial=0) < 0:
        raise UsageError(
            f"separation weights: labels must be whole numbers from 0 on, (H, W), not {labels.dtype} {labels.shape} "
            f"from {labels.min(initial=0):g} on."
        )


def _number(instances: NDArray[Any]) -> NDArray[np.int64]:
    """Cells numbered 1, 2, ... without a gap."""
    values, inverse = np.unique(instances, return_inverse=True)
    return inverse.reshape(instances.shape) + (0 if values.size and values[0] == 0 else 1)


def _components(classes: NDArray[Any]) -> NDArray[np.int64]:
    """As `_number`, for the connected components of each class but 0."""
    cells = np.zeros(classes.shape, dtype=np.int64)
    for value in np.unique(classes[classes > 0]):
        part, _ = ndimage.label(classes == value, structure=EIGHT)
        cells[part > 0] = part[part > 0] + cells.max(initial=0)
    return cells


def _two_nearest(cells: NDArray[np.int64], reach: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Distances in pixels to the borders of the nearest and the second nearest cell; infinite beyond `reach`."""
    nearest = np.full(cells.shape, np.inf, dtype=np.float32)
    second = nearest.copy()
    margin = math.ceil(reach) + 1
    for number, box in enumerate(ndimage.find_objects(cells), start=1):
        around = tuple(slice(max(side.start - margin, 0), side.stop + margin) for side in box)
        # From pixel to pixel the cell itself is at least 1 px away, its border 0 px.
        distance = ndimage.distance_transform_edt(cells[around] != number).astype(np.float32) - 1
        np.minimum(second[around], np.maximum(nearest[around], distance), out=second[around])
        np.minimum(nearest[around], distance, out=nearest[around])
    return nearest, second


def separate(
    pair: Pair, sample: Sample, *, w0: float, sigma_px: float, reading: Reading | None = None
) -> tuple[Sample, Tensor]:
    """The sample with touching objects parted, and what gaps weigh beside their class: (H, W) float32, 0 far from any."""
    if sample.mask is None:
        raise DataError(f"{printable(pair.image)}: has no mask, so its objects cannot be separated.")
    mask, path = sample.mask.numpy(), instance_file(pair)
    if path is None:
        weights = separation_weights(mask, w0=w0, sigma_px=sigma_px)
    else:
        instances = _read_instances(path, mask.shape, pair.plane or 0, reading)
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
    return next((path for path in places if path.exists()), None)


def where_objects_come_from(pairs: Sequence[Pair]) -> str:
    """In words, for the plan: between what gaps are weighed."""
    count = sum(instance_file(pair) is not None for pair in pairs)
    if not count:
        return "between the connected regions of the masks"
    if count < len(pairs):
        return f"between the objects that {INSTANCES}/ numbers in {count:,} images, else between connected regions"
    return f"between the objects that {INSTANCES}/ numbers"


def _read_instances(path: Path, shape: tuple[int, ...], plane: int, reading: Reading | None) -> NDArray[Any]:
    """One number per pixel (H, W), also where a file tells objects by RGB colours."""
    with open_mask(path, reading) as source:
        values = mask_values(source.read(0, 0, source.info.height, source.info.width, plane))
    if values.shape[:2] != shape:
        raise DataError(
            f"{printable(path)}: the instance map is {values.shape[1]} x {values.shape[0]} px, but its mask is {shape[1]} x "
            f"{shape[0]} px. Both must have the same size."
        )
    if values.ndim == 2:
        return values
    red, green, blue = np.moveaxis(values.astype(np.int32), 2, 0)
    return (red << 16) | (green << 8) | blue
