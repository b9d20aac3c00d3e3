"""Other pixels of open images: some bands, neighbouring planes, colours of a palette, several files as one, a region."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import Source
from pixelwise.formats.base import Palette, View
from pixelwise.formats.intensity import by_type


class ChannelFiles(View):
    """Several images of one size as the channels of one; where their types differ, in unit scale."""

    def __init__(self, sources: Sequence[Source]) -> None:
        kinds = {source.info.dtype for source in sources}
        dtype = kinds.pop() if len(kinds) == 1 else "float32"
        super().__init__(sources[0], channels=sum(source.info.channels for source in sources), dtype=dtype)
        self._sources = sources

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        arrays = [source.read(top, left, height, width, plane) for source in self._sources]
        mixed = any(array.dtype != self.info.dtype for array in arrays)
        return np.concatenate([by_type(array) for array in arrays] if mixed else arrays, axis=2)

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        found = [source.valid(top, left, height, width, plane) for source in self._sources]
        known = [valid for valid in found if valid is not None]
        return np.asarray(np.stack(known).all(axis=0)) if known else None

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(source.fingerprint() for source in self._sources).encode()).hexdigest()

    def check_unchanged(self) -> None:
        for source in self._sources:
            source.check_unchanged()

    def close(self) -> None:
        for source in self._sources:
            source.close()


class SelectedBands(View):
    """Some channels of an image, counted from 1, in any order."""

    def __init__(self, source: Source, bands: Sequence[int]) -> None:
        super().__init__(source, channels=len(bands))
        if missing := [band for band in bands if not 1 <= band <= source.info.channels]:
            wanted = ", ".join(map(str, missing))
            raise DataError(
                f"{source.info.location}: has {source.info.channels} bands, counted from 1 and without opacity, but band "
                f"{wanted} is wanted."
            )
        self._indices = [band - 1 for band in bands]
        self.metadata = {key: value for key, value in source.metadata.items() if key != "opacity"}  # it was chosen

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        return self.source.read(top, left, height, width, plane)[:, :, self._indices]


class SliceStack(View):
    """A volume of which each plane has its neighbours as further channels; at both ends the last plane is repeated."""

    def __init__(self, source: Source, slices: int) -> None:
        if slices < 1 or slices % 2 == 0:
            raise UsageError(f"slices must be an odd number such as 3 (a plane and one on each side), not {slices}.")
        super().__init__(source, channels=source.info.channels * slices)
        self._around = slices // 2
        shape, axis = source.metadata.get("shape"), source.metadata.get("axis", 2)
        is_series = shape is not None and len(shape) == 4  # points in time: neighbours belong to one volume
        self._depth = int(shape[axis]) if shape and is_series else source.info.planes

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        first = plane // self._depth * self._depth
        wanted = [
            min(max(other, first), first + self._depth - 1)
            for other in range(plane - self._around, plane + self._around + 1)
        ]
        planes = {number: self.source.read(top, left, height, width, number) for number in dict.fromkeys(wanted)}
        return np.concatenate([planes[number] for number in wanted], axis=2)


class PaletteColors(View):
    """A palette mask as the colours that its indices mean."""

    def __init__(self, source: Source, palette: Palette) -> None:
        super().__init__(source, channels=3, dtype="uint8")
        self._colors = np.zeros((max(256, len(palette)), 3), dtype=np.uint8)
        self._colors[: len(palette)] = palette

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        return self._colors[self.source.read(top, left, height, width, plane)[:, :, 0]]


class InRegion(View):
    """An image whose pixels outside of a region, where a mask is 0, count like those without data; closes both."""

    def __init__(self, source: Source, region: Source) -> None:
        super().__init__(source)
        self._region = region

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        return self.source.read(top, left, height, width, plane)

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        inside = np.asarray(self._region.read(top, left, height, width, plane).any(axis=2))
        valid = self.source.valid(top, left, height, width, plane)
        return inside if valid is None else inside & valid

    def close(self) -> None:
        self.source.close()
        self._region.close()
