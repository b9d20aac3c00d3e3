"""What is measured of pixels: sums, a hash, and how many of a value have equal neighbours or lie on the frame."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.data.labels import Value, pack_pixels, value_counts
from pixelwise.formats import Source

_BLOCK_PX = 1 << 20


def sums_in_unit_scale(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per channel of pixels (..., C): the sum and the sum of squares of its numbers divided by their type's maximum.

    Whole numbers of 8 bit are added exactly, others in float64.
    """
    flat, values = array.reshape(-1, array.shape[-1]), np.arange(256)
    sums, squares = np.zeros(array.shape[-1]), np.zeros(array.shape[-1])
    scale = float(np.iinfo(array.dtype).max) if array.dtype.kind in "ui" else 1.0
    for start in range(0, len(flat), _BLOCK_PX):
        block = flat[start : start + _BLOCK_PX]
        if array.dtype == np.uint8:
            counts = np.stack([np.bincount(channel, minlength=256) for channel in block.T])
            added = counts @ values, counts @ values**2
        else:
            wide = block.astype(np.float64)
            added = wide.sum(axis=0), np.einsum("nc,nc->c", wide, wide)
        sums, squares = sums + added[0], squares + added[1]
    return sums / scale, squares / scale**2


def pixel_digest(source: Source, arrays: Iterator[NDArray[Any]]) -> str:
    """SHA-256 of decoded pixels with their shape and type: equal for one image in two lossless formats."""
    digest, info = None, source.info
    for array in arrays:
        if digest is None:
            shape = (info.planes,) * (info.planes > 1) + (info.height, info.width) + array.shape[2:]
            digest = hashlib.sha256(f"{shape} {array.dtype.name}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest() if digest else ""


def solid_counts(raw: NDArray[Any], found: Mapping[Value, int]) -> Mapping[Value, int]:
    """Pixels per value whose eight neighbours are equal to them; where only two values are found, all are taken as such."""
    if len(found) <= 2 or min(raw.shape[:2]) < 3:
        return found
    keys = pack_pixels(raw)
    across = keys[:, 1:-1] == keys[:, :-2]
    across &= keys[:, 1:-1] == keys[:, 2:]
    inner = across[1:-1] & across[:-2] & across[2:]
    inner &= (keys[1:-1, 1:-1] == keys[:-2, 1:-1]) & (keys[1:-1, 1:-1] == keys[2:, 1:-1])
    return value_counts(raw[1:-1, 1:-1][inner][None]) if inner.any() else {}


def border_counts(raw: NDArray[Any], is_first: bool, is_last: bool) -> Counter[Value]:
    """Pixels per value on the frame of a plane, of which this strip of rows is a part."""
    sides = [raw[:, :1], raw[:, -1:]] + [raw[:1].swapaxes(0, 1)] * is_first + [raw[-1:].swapaxes(0, 1)] * is_last
    return Counter(value_counts(np.concatenate(sides)))
