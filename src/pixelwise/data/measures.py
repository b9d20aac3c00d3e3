"""What is measured of pixels: sums, a hash, and how many of a value have equal neighbours or lie on the frame."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.data.labels import Value, pack_pixels, value_counts
from pixelwise.formats import Source

_BLOCK_PX = 1 << 20


@dataclass
class Sums:
    """Of numbers in unit scale (divided by the largest of their type), per channel; zero and infinite for none."""

    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def none(cls, channels: int) -> "Sums":
        """Of no numbers."""
        zeros, ends = np.zeros(channels), np.full(channels, np.inf)
        return cls(zeros, zeros, ends, -ends)

    def add(self, array: NDArray[Any]) -> None:
        """Count pixels (..., C) too. Whole numbers of 8 bit are added exactly, others in float64."""
        flat, values = array.reshape(-1, array.shape[-1]), np.arange(256)
        scale = float(np.iinfo(array.dtype).max) if array.dtype.kind in "ui" else 1.0
        for start in range(0, len(flat), _BLOCK_PX):
            block = flat[start : start + _BLOCK_PX].T
            if array.dtype == np.uint8:
                counts = np.stack([np.bincount(channel, minlength=256) for channel in block])
                total, squares = counts @ values, counts @ values**2
                low, high = (counts > 0).argmax(axis=1), 255 - (counts[:, ::-1] > 0).argmax(axis=1)
            else:
                wide = block.astype(np.float64, order="C")
                total, squares = wide.sum(axis=1), np.einsum("cn,cn->c", wide, wide)
                low, high = wide.min(axis=1), wide.max(axis=1)
            self.total, self.squares = self.total + total / scale, self.squares + squares / scale**2
            self.low, self.high = np.minimum(self.low, low / scale), np.maximum(self.high, high / scale)


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
