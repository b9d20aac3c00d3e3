"""How a run reads images: with the options of their format, and of volumes neighbouring planes as channels (2.5-D)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import UsageError
from pixelwise.formats import FORMATS, Source, open_source
from pixelwise.formats.registry import suffix_of

_PICTURES = {suffix for known in FORMATS.values() if known.opens == FORMATS["png"].opens for suffix in known.suffixes}

Reading = Mapping[str, Any]
"""Options of `open_source` (axis, level, series, intensity, ...) and `slices`; what a model card stores as `reading`."""


def is_picture(path: str | Path) -> bool:
    """Whether a file is named as one of the formats that are decoded as a whole, in this process: PNG, JPEG, ..."""
    return suffix_of(str(path)) in _PICTURES


def open_image(path: str | Path, reading: Reading | None = None, channels: int | None = None) -> Source:
    """Open an image as the network of a run sees it, which takes so many `channels`, neighbouring planes included."""
    options = dict(reading or {})
    slices = options.pop("slices", None) or 1
    source = open_source(path, channels=channels and channels // slices, **options)
    return source if slices == 1 else SliceStack(source, slices)


class SliceStack(Source):
    """A volume of which each plane has its neighbours as further channels; at both ends the last plane is repeated."""

    def __init__(self, source: Source, slices: int) -> None:
        if slices < 1 or slices % 2 == 0:
            raise UsageError(f"slices must be an odd number such as 3 (a plane and one on each side), not {slices}.")
        self._source, self._around = source, slices // 2
        self.info = replace(source.info, channels=source.info.channels * slices)
        self.metadata = source.metadata
        shape, axis = source.metadata.get("shape"), source.metadata.get("axis", 2)
        is_series = shape is not None and len(shape) == 4  # points in time: neighbours belong to one volume
        self._depth = int(shape[axis]) if shape and is_series else source.info.planes

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        first = plane // self._depth * self._depth
        wanted = [
            min(max(other, first), first + self._depth - 1)
            for other in range(plane - self._around, plane + self._around + 1)
        ]
        planes = {number: self._source.read(top, left, height, width, number) for number in dict.fromkeys(wanted)}
        return np.concatenate([planes[number] for number in wanted], axis=2)

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        return self._source.valid(top, left, height, width, plane)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._source.close()
