"""How the numbers of medical images become what networks take: 0..1, by their type, by a range, or by the display window.

A scanner stores Hounsfield units or counts of any height. Networks want 0..1, and which part of the numbers that is
changes the labels, so the range in use stands in the source's metadata.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import UsageError

Intensity = Literal["auto", "type"] | tuple[float, float]
"""How stored numbers become 0..1.

"type": stored integers over the largest of their type, before any slope; 8 bit stay as they are, and so do floats.
(low, high): linear, low is 0, high is 1, beyond them clipped, in the file's own unit (Hounsfield units for CT).
"auto": what the format suggests: DICOM's display table or window, or 0.5 to 99.5 percent of a NIfTI volume; 8 bit as they
are.
"""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A map of numbers to 0..1: a line, or the sigmoid of PS3.3 C.11.2.1.3.1."""

    low: float  # becomes 0, or is the centre of a sigmoid
    high: float  # becomes 1, or is the centre plus the width of a sigmoid
    sigmoid: bool = False
    inverted: bool = False  # the largest number is black (MONOCHROME1)

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Float32 in 0..1, of the same shape; where low is high, the numbers above it are 1 and all others 0."""
        if self.sigmoid:
            turn = np.clip(-4.0 * (values.astype(np.float64) - self.low) / (self.high - self.low), -700, 700)
            unit = 1.0 / (1.0 + np.exp(turn))  # which stays finite
        elif self.high > self.low:
            # halves, because the difference of two of the largest floats is no float any more
            unit = np.multiply(values, 0.5, dtype=np.float64)
            unit -= self.low / 2
            unit /= self.high / 2 - self.low / 2
            np.clip(unit, 0.0, 1.0, out=unit)
        else:
            unit = (values > self.low).astype(np.float64)
        return (1.0 - unit if self.inverted else unit).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that say what was done."""
        if self.sigmoid:
            done: dict[str, Any] = {"function": "sigmoid", "center": self.low, "width": self.high - self.low}
        else:
            done = {"function": "linear", "low": self.low, "high": self.high}
        return done | ({"inverted": True} if self.inverted else {})


@dataclass(frozen=True, kw_only=True)
class LookUp:
    """A map of numbers to 0..1 by a table, as the VOI LUT of DICOM (PS3.3 C.11.2.1.1); those beyond it take its ends."""

    first: int  # the number that the first value belongs to
    values: tuple[int, ...]
    largest: int  # becomes 1
    inverted: bool = False  # the largest number is black (MONOCHROME1)

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        unit = np.array(self.values, np.float64) / self.largest
        return (1.0 - unit if self.inverted else unit).astype(np.float32)

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Float32 in 0..1, of the same shape."""
        places = np.clip(np.rint(values) - self.first, 0, len(self.values) - 1)
        return self._table[places.astype(np.intp)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that say what was done."""
        done = {"function": "table", "first": self.first, "entries": len(self.values), "largest": self.largest}
        return done | ({"inverted": True} if self.inverted else {})


def check_intensity(value: Any) -> Intensity:
    """What a user wrote, as an `Intensity`; a pair may also be text such as "-160,240"."""
    if value in ("auto", "type"):
        return value
    parts = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(
            f"intensity {value!r} cannot be used. Allowed are 'auto', 'type' (over the largest number of the type) and "
            "two numbers low,high of which the first is smaller, such as -160,240: they become 0 and 1."
        )
    return low, high


def display_window(center: float, width: float, function: str = "LINEAR", inverted: bool = False) -> Scaling | None:
    """DICOM's display window as a map to 0..1 (PS3.3 C.11.2.1.2 and C.11.2.1.3); None if the numbers are no window."""
    least = 1.0 if function == "LINEAR" else np.nextafter(0.0, 1.0)
    if not (math.isfinite(center) and math.isfinite(width) and width >= least):
        return None
    if function == "SIGMOID":
        return Scaling(low=center, high=center + width, sigmoid=True, inverted=inverted)
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        return None
    return Scaling(low=center - width / 2, high=center + width / 2, inverted=inverted)


def percentile_scaling(sample: NDArray[Any]) -> Scaling:
    """The map of the 0.5th percentile of a sample to 0 and of its 99.5th to 1; numbers that are not finite do not count.

    Where almost all numbers are the same, such as zeros around a small organ, its least and largest are taken instead.
    """
    finite = sample[np.isfinite(sample)].astype(np.float64)
    if finite.size == 0:
        return Scaling(low=0.0, high=1.0)
    low, high = np.percentile(finite, (0.5, 99.5)).tolist()
    if not low < high:
        low, high = float(finite.min()), float(finite.max())
    return Scaling(low=low, high=high)


def by_type(values: NDArray[Any], largest: int | None = None) -> NDArray[np.float32]:
    """Integers over the largest of their type (or over `largest`), floats as they are, all as float32."""
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    return (values / np.float64(largest or np.iinfo(values.dtype).max)).astype(np.float32)
