"""Whether the band that a TIFF marks as opacity is that: GDAL and tifffile mark a fourth band so by default, infrared too.

Its numbers tell. Opacity is 0 and the full value nearly everywhere; a measurement has many values. A band of one value could
be both, so there the number of bands that the network takes decides, or the other images of a data folder do.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

_WHOLE_PX = 1 << 20  # a larger band is judged by samples
_SAMPLES, _SAMPLE_PX = 4, 256  # along each side, and the side of each
_SOFT = 0.05  # share of pixels at the rims of opacity that may be half covered
_FULL = (1, 255, 65535)  # besides the largest number of the type

_SEEN = {"opacity": "its values (nothing, or the full value)", "constant": "one value everywhere"}


class Pixels(Protocol):
    """Stored pixels of which windows are read; a `Stack` is that."""

    size: tuple[int, int, int, int]  # planes, rows, columns, channels

    def read(
        self, plane: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> NDArray[Any]: ...  # (rows, columns, C)


@dataclass(frozen=True, kw_only=True)
class Opacity:
    """What a band that is marked as opacity is, and what becomes of it."""

    band: int  # counted from 1
    bands: int  # of the file, this one included
    kind: Literal["opacity", "band", "constant"]  # what its numbers say
    is_kept: bool  # read as a band like the others

    @property
    def hides(self) -> bool:
        """Whether pixels with 0 in it have no data."""
        return not self.is_kept and self.kind != "band"

    @property
    def metadata(self) -> dict[str, Any]:
        """ "opacity", what was done in words, "opacity_kind", and "opacity_is_kept"."""
        name, others = f"band {self.band}", [n + 1 for n in range(self.bands) if n + 1 != self.band]
        if self.is_kept:
            text = f"{name}, which is marked as opacity, has the values of a measurement and is read as a band"
            text += f" (--bands {','.join(map(str, others))} leaves it out)"
        elif self.kind == "band":
            text = f"{name}, which is marked as opacity, has the values of a measurement, but is left out: the network takes"
            text += f" {len(others)} bands"
        else:
            text = f"{name} is left out: it is marked as opacity, and has {_SEEN[self.kind]}"
        return {"opacity": text, "opacity_kind": self.kind, "opacity_is_kept": self.is_kept}


def look(pixels: Pixels, band: int, wanted: int | None) -> Opacity:
    """Judge the band with this index (from 0), which is marked as opacity.

    Args:
        pixels: as stored.
        band: its index.
        wanted: how many bands the network takes; None if there is none yet.
    """
    kind, bands = _kind(_sample(pixels, band)), pixels.size[3]
    is_kept = kind == "band" or (kind == "constant" and wanted == bands)
    is_kept = is_kept and wanted != bands - 1
    return Opacity(band=band + 1, bands=bands, kind=kind, is_kept=is_kept)


def _sample(pixels: Pixels, band: int) -> NDArray[Any]:
    """All numbers of the band, or those of windows spread over a large image."""
    _, height, width, _ = pixels.size
    if height * width <= _WHOLE_PX:
        return pixels.read(0, (0, height), (0, width))[:, :, band].ravel()
    spans = []
    for length in (height, width):
        side = min(_SAMPLE_PX, length)
        starts = np.linspace(0, length - side, _SAMPLES).astype(int).tolist()
        spans.append([(start, start + side) for start in dict.fromkeys(starts)])
    return np.concatenate([pixels.read(0, *window)[:, :, band].ravel() for window in product(*spans)])


def _kind(numbers: NDArray[Any]) -> Literal["opacity", "band", "constant"]:
    low, high = numbers.min(), numbers.max()
    if low == high:
        return "constant"
    is_full = high in _FULL or (numbers.dtype.kind in "ui" and high == np.iinfo(numbers.dtype).max)
    between = np.count_nonzero((numbers != 0) & (numbers != high))
    return "opacity" if is_full and low >= 0 and between <= _SOFT * numbers.size else "band"
