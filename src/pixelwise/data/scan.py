"""A look into every mask of a folder: which values it holds. Remembered, since proposing and checking both need it."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from pixelwise.data.labels import Value, value_counts
from pixelwise.data.pairs import Pair
from pixelwise.errors import DataError
from pixelwise.formats.raster import Palette, printable
from pixelwise.formats.readers import read_image, read_mask_file

MAX_VALUES = 4096

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class MaskScan:
    """What one mask holds: `counts` in pixels per value, `digest` of the decoded pixels, `format` of the file."""

    width: int
    height: int
    kind: Literal["index", "rgb"]
    counts: Mapping[Value, int]
    palette: Palette | None
    digest: str
    format: str


def scan_mask(path: Path) -> MaskScan:
    """Read a mask and count its values; asked again about an unchanged file, it answers from memory.

    Raises:
        DataError: as `read_mask`, or the mask holds so many values that they cannot be classes.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return _scan(path, 0, 0)  # which raises the reader's own message
    return _scan(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=50_000)
def _scan(path: Path, _mtime_ns: int, _size: int) -> MaskScan:
    raw, raster = read_mask_file(path)
    counts = value_counts(raw)
    if len(counts) > MAX_VALUES:
        raise DataError(
            f"{printable(path)}: holds {len(counts):,} different values; it looks like a photograph, not a mask of classes."
        )
    return MaskScan(
        width=raw.shape[1],
        height=raw.shape[0],
        kind="rgb" if raw.ndim == 3 else "index",
        counts=counts,
        palette=raster.palette,
        digest=pixel_digest(raw),
        format=raster.format,
    )


def pixel_digest(array: np.ndarray) -> str:
    """SHA-256 of the decoded pixels with their shape and type: equal for one image in two lossless formats."""
    digest = hashlib.sha256(f"{array.shape} {array.dtype.name}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def in_threads(
    work: Callable[[T], R], items: Sequence[T], on_progress: Callable[[int, int], None] | None = None
) -> list[R]:
    """The results of `work` in the order of `items`; decoding leaves Python's lock, so threads do help.

    `on_progress(done, total)` is called in this thread as results come in.
    """
    results = []
    with ThreadPoolExecutor(max_workers=worker_count()) as pool:
        for result in pool.map(work, items):
            results.append(result)
            if on_progress is not None:
                on_progress(len(results), len(items))
    return results


def worker_count() -> int:
    """How many cores this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


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
