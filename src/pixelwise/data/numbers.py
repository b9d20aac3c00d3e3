"""What the numbers of images are, band by band, and whether those of another image are far from them.

All are in unit scale: whole numbers as shares of the largest of their type, fractions as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FAR = 5.0  # deviations that the mean may be off
_NARROW, _OFF = 0.25, 0.5  # deviations that the numbers may be spread and off at once
_SLIGHT = 0.1  # deviations that numbers of a type that was not learnt may be spread
_OUTSIDE = 0.05  # share of the numbers of a band that may lie further outside the range than the range is wide


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of the images that a network was trained on, for each of their bands."""

    mean: tuple[float, ...]
    std: tuple[float, ...]  # above zero
    low: tuple[float, ...] = ()  # the smallest; empty where nobody knows
    high: tuple[float, ...] = ()  # the largest; likewise
    dtypes: tuple[str, ...] = ()  # as numpy names them; likewise

    def difference(self, pixels: NDArray[Any]) -> str:
        """How far the `pixels` (N, C) of another image are from these, both in words; "" if they are not.

        Far are numbers whose mean is off by five deviations, and those that lie outside the range by more than its width.
        Far are also those that are spread over less than a quarter of the deviation and off by half of it, as reflectances
        in 16 bits are for a network that learnt bytes; in a type that was not learnt, those spread over a tenth. Of 8 bits
        such are dark or hazy photos.
        """
        if pixels.shape[1] not in (1, len(self.mean)):
            return ""
        unit = pixels.astype(np.float64)
        if pixels.dtype.kind in "ui":
            unit /= np.iinfo(pixels.dtype).max
        mean, std = np.array(self.mean), np.array(self.std)
        found, spread = unit.mean(axis=0), unit.std(axis=0)  # (C,)
        off, outside = np.abs(found - mean) / std, self._outside(unit)
        ratio = float((spread / std).mean())
        is_slight = bool(self.dtypes) and not _known(pixels.dtype, self.dtypes) and ratio < _SLIGHT
        is_flat = pixels.dtype != np.uint8 and 0 < ratio < _NARROW and (off.mean() > _OFF or is_slight)
        if not is_flat and off.mean() <= _FAR and outside.max() <= _OUTSIDE:
            return ""
        bands = np.flatnonzero((off > _FAR) | (outside > _OUTSIDE))
        one = bands[np.argmax(off[bands])] if not is_flat and 0 < len(bands) < len(mean) else None
        here = Numbers(
            mean=tuple(np.broadcast_to(found, mean.shape)),
            std=tuple(np.broadcast_to(spread, mean.shape)),
            low=tuple(np.broadcast_to(unit.min(axis=0), mean.shape)),
            high=tuple(np.broadcast_to(unit.max(axis=0), mean.shape)),
            dtypes=(pixels.dtype.name,),
        )
        where = "" if one is None else f" of band {one + 1}"
        return (
            f"its numbers{where} ({here.in_words(one)}) are far from those that the network was trained on "
            f"({self.in_words(one)}), so its labels may mean nothing. Whole numbers count as shares of the largest of "
            "their type, fractions as they are; scale them as the training images were"
        )

    def mismatch(self, images: "Numbers") -> str:
        """How far other images are from these, whose normalisation they get, in words; "" if they are not."""
        if len(images.mean) != len(self.mean):
            return ""
        mean, std = np.array(self.mean), np.array(self.std)
        off, ratio = np.abs(np.array(images.mean) - mean) / std, np.array(images.std) / std
        if off.mean() <= _FAR and (off.mean() <= _OFF or ratio.mean() >= _NARROW):
            return ""
        return (
            f"the images here ({images.in_words()}) are far from those it was trained on ({self.in_words()}), and are "
            "normalised as those were; scale them alike"
        )

    def in_words(self, band: int | None = None) -> str:
        """Type, range, mean and deviation; of all bands together, unless one is given."""
        bands = slice(None) if band is None else slice(band, band + 1)
        parts = [", ".join(self.dtypes[:3])] if self.dtypes else []
        if self.low:
            parts.append(f"{min(self.low[bands]):.3g}..{max(self.high[bands]):.3g}")
        return ", ".join([*parts, f"mean {np.mean(self.mean[bands]):.3g}, deviation {np.mean(self.std[bands]):.3g}"])

    def _outside(self, unit: NDArray[np.float64]) -> NDArray[np.float64]:
        """For each band, the share of numbers that lie further outside its range than that is wide."""
        if not self.low:
            return np.zeros(len(self.mean))
        low, high = np.array(self.low), np.array(self.high)
        width = np.maximum(high - low, self.std)
        return np.asarray(((unit < low - width) | (unit > high + width)).mean(axis=0))


def _known(dtype: np.dtype[Any], names: Sequence[str]) -> bool:
    """Whether numbers of a type were learnt; fractions are the same in all of theirs."""
    return dtype.name in names or (dtype.kind == "f" and any(name.startswith("float") for name in names))
