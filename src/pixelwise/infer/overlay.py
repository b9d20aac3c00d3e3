"""Pictures to look at: any image as 8-bit RGB, and the class colours laid over it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pixelwise.data.samples import to_tensor
from pixelwise.errors import UsageError
from pixelwise.formats import Result, Source
from pixelwise.formats.base import Classes
from pixelwise.formats.image import write_png

OVERLAY_PX = 4096
"""Pictures of larger images are made smaller, for nobody can look at them otherwise."""


def displayable(image: Tensor) -> NDArray[np.uint8]:
    """An 8-bit RGB picture (H, W, 3) of any image (C, H, W).

    8-bit images keep their values; others (16 bit, float) are stretched between their 1st and 99th percentile, because
    their values need not fill the range. One or two channels are shown as grey, of more than three the first three.
    """
    channels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return np.ascontiguousarray(channels.permute(1, 2, 0).cpu().numpy())
    values = channels.permute(1, 2, 0).float().cpu().numpy()
    low, high = np.percentile(values, (1, 99)).tolist()
    scaled = (values - low) / max(high - low, 1e-12)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def blend(image: NDArray[np.uint8], labels: NDArray[np.uint8], spec: Classes, alpha: float = 0.5) -> Image.Image:
    """The class colours laid over a picture (H, W, 3); `alpha` 0 shows the picture alone, 1 the colours alone."""
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha must be between 0 (only the image) and 1 (only the classes), got {alpha}.")
    mixed = image * np.float32(1 - alpha) + spec.colorize(labels) * np.float32(alpha)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def thinned(source: Source, step: int, plane: int = 0) -> Tensor:
    """Every `step`-th row and column of a plane, (C, h, w); only a band of rows is in memory."""
    info, bands = source.info, []
    for top, bottom in _bands(info.height, info.width, step):
        bands.append(source.read(top, 0, bottom - top, info.width, plane)[::step, ::step])
    with np.errstate(over="ignore"):
        return to_tensor(np.concatenate(bands))


def write_overlay(path: Path, result: Result, source: Source) -> None:
    """Write the class colours over the first plane of the image as PNG; larger sides than 4,096 px are made smaller."""
    info = source.info
    step = -(-max(info.height, info.width) // OVERLAY_PX)
    picture = displayable(thinned(source, step))
    rows = [result.rows(0, top, bottom)[::step, ::step] for top, bottom in _bands(info.height, info.width, step)]
    classes = np.concatenate(rows)
    mixed = blend(picture, classes.clip(0, result.spec.num_classes - 1), result.spec)
    if result.nodata is not None:  # no class, no colour
        array = np.array(mixed)
        array[classes == result.nodata] = picture[classes == result.nodata]
        mixed = Image.fromarray(array)
    write_png(path, mixed, result.mark)


def _bands(height: int, width: int, step: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the rows that are read at once, whole steps."""
    band = max(1, (4 << 20) // width // step) * step
    return ((top, min(top + band, height)) for top in range(0, height, band))
