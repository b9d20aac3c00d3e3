"""Pictures to look at: any image as 8-bit RGB, and the class colours laid over it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pixelwise.data.samples import to_tensor
from pixelwise.errors import UsageError
from pixelwise.formats import Result, Source
from pixelwise.formats.base import Classes
from pixelwise.formats.writers import write_png

OVERLAY_PX = 4096
"""Pictures of larger images are made smaller, for nobody can look at them otherwise."""


def displayable(image: Tensor) -> NDArray[np.uint8]:
    """An 8-bit RGB picture (H, W, 3) of any image (C, H, W).

    8-bit images keep their values; others (16 bit, float) are stretched between their 1st and 99th percentile, because
    their values need not fill the range. One or two channels are shown as grey, of more than three the first three.

    Example:
        >>> displayable(torch.tensor([[[0, 255]]], dtype=torch.uint8)).tolist()
        [[[0, 0, 0], [255, 255, 255]]]
    """
    channels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return np.ascontiguousarray(channels.permute(1, 2, 0).cpu().numpy())
    values = channels.permute(1, 2, 0).float().cpu().numpy()
    low, high = np.percentile(values, (1, 99)).tolist()
    scaled = (values - low) / max(high - low, 1e-12)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def blend(image: NDArray[np.uint8], labels: NDArray[np.uint8], spec: Classes, alpha: float = 0.5) -> Image.Image:
    """The class colours laid over a picture (H, W, 3); `alpha` 0 shows the picture alone, 1 the colours alone.

    Raises:
        UsageError: `alpha` is not in 0..1.

    Example:
        >>> from pixelwise.data.labels import LabelSpec
        >>> spec = LabelSpec(names=("a",), colors=((200, 0, 0),), values=((0,),))
        >>> image, labels = np.full((1, 1, 3), 100, dtype=np.uint8), np.zeros((1, 1), dtype=np.uint8)
        >>> blend(image, labels, spec, alpha=0.5).getpixel((0, 0))
        (150, 50, 50)
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha must be between 0 (only the image) and 1 (only the classes), got {alpha}.")
    mixed = image * np.float32(1 - alpha) + spec.colorize(labels) * np.float32(alpha)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def write_overlay(path: Path, result: Result, source: Source) -> None:
    """Write the class colours over the first plane of the image as PNG; larger sides than 4,096 px are made smaller.

    Args:
        path: where to.
        result: the labels.
        source: the image.

    Raises:
        DataError: the image cannot be read.
        PixelwiseError: the picture cannot be written.
    """
    info = source.info
    step = -(-max(info.height, info.width) // OVERLAY_PX)
    rows, labels = [], []
    band = max(1, (4 << 20) // info.width // step) * step  # rows that are read at once
    for top in range(0, info.height, band):
        bottom = min(top + band, info.height)
        rows.append(source.read(top, 0, bottom - top, info.width)[::step, ::step])
        labels.append(result.rows(0, top, bottom)[::step, ::step])
    picture, classes = displayable(_tensor(np.concatenate(rows))), np.concatenate(labels)
    mixed = blend(picture, classes.clip(0, result.spec.num_classes - 1), result.spec)
    if result.nodata is not None:  # no class, no colour
        array = np.array(mixed)
        array[classes == result.nodata] = picture[classes == result.nodata]
        mixed = Image.fromarray(array)
    write_png(path, mixed, result.mark)


def _tensor(pixels: NDArray[Any]) -> torch.Tensor:
    with np.errstate(over="ignore"):
        return to_tensor(pixels)
