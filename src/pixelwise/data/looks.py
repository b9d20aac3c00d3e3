"""One look at the two files of a pair: what can be known of them alone, before they are compared with the others."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixelwise.data.pairs import Pair
from pixelwise.data.scan import MaskScan, pixel_digest, scan_mask
from pixelwise.errors import DataError
from pixelwise.formats.raster import printable
from pixelwise.formats.readers import read_image

_BLOCK_PX = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ImageLook:
    """An image's size and type, and the sums that mean and deviation come from (per channel, in unit scale)."""

    width: int
    height: int
    channels: int
    dtype: str
    digest: str
    sums: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PairLook:
    """A pair and what its files hold; a file that cannot be read has an error instead."""

    pair: Pair
    image: ImageLook | None
    mask: MaskScan | None
    image_error: str | None = None
    mask_error: str | None = None


def look_at(pair: Pair) -> PairLook:
    """Read both files. Sums are taken of training images only, for the others nobody asks."""
    image = mask = image_error = mask_error = None
    try:
        image = _look_at_image(pair.image, with_sums=pair.split == "train")
    except DataError as error:
        image_error = _reason(error, pair.image)
    try:
        mask = scan_mask(pair.mask) if pair.mask is not None else None
    except DataError as error:
        mask_error = _reason(error, pair.mask)
    return PairLook(pair=pair, image=image, mask=mask, image_error=image_error, mask_error=mask_error)


def sums_in_unit_scale(array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel of an image (H, W, C): the sum and the sum of squares of its numbers divided by their type's maximum.

    Whole numbers of 8 bit are added exactly, others in float64.

    Example:
        >>> sums_in_unit_scale(np.full((2, 2, 1), 255, dtype=np.uint8))
        ((4.0,), (4.0,))
    """
    flat = array.reshape(-1, array.shape[2])
    sums = np.zeros(array.shape[2])
    squares = np.zeros(array.shape[2])
    scale = float(np.iinfo(array.dtype).max) if array.dtype.kind in "ui" else 1.0
    for start in range(0, len(flat), _BLOCK_PX):
        block = flat[start : start + _BLOCK_PX]
        added = _byte_sums(block) if array.dtype == np.uint8 else _float_sums(block)
        sums += added[0]
        squares += added[1]
    return tuple((sums / scale).tolist()), tuple((squares / scale**2).tolist())


def _look_at_image(path: Path, *, with_sums: bool) -> ImageLook:
    array = read_image(path)
    height, width, channels = array.shape
    sums, squares = sums_in_unit_scale(array) if with_sums else ((), ())
    return ImageLook(
        width=width,
        height=height,
        channels=channels,
        dtype=array.dtype.name,
        digest=pixel_digest(array),
        sums=sums,
        squares=squares,
    )


def _byte_sums(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = np.arange(256)
    counts = np.stack([np.bincount(channel, minlength=256) for channel in block.T])
    return counts @ values, counts @ values**2


def _float_sums(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = block.astype(np.float64)
    return wide.sum(axis=0), np.einsum("nc,nc->c", wide, wide)


def _reason(error: DataError, path: Path | None) -> str:
    return str(error).removeprefix(f"{printable(path or '')}: ")
