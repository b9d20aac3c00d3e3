"""Mask files as sources: numbers or colours, as they are stored; several masks of one image joined into one."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.data.image_files import is_zarr
from pixelwise.data.pairs import Pair
from pixelwise.data.views import PaletteColors
from pixelwise.errors import DataError, PixelwiseError
from pixelwise.formats import FORMATS, Source, open_source
from pixelwise.formats.base import View
from pixelwise.formats.local import printable

Reading = Mapping[str, Any]
"""Options of `open_source` (axis, level, series, intensity, ...), `bands`, `slices` and
`channel_files`; a model card stores them."""

_AXES = {"axis": ("nifti",), "axes": ("npy", "zarr")}  # options of the images that count for masks of these formats
_JOINED_PX = 64_000_000  # masks are joined in memory


def open_mask_of(pair: Pair, reading: Reading | None = None, *, by_color: bool = False) -> Source:
    """Open the mask of a pair, or its masks as one: 0 where none of them marks anything, else what they mark.

    Raises:
        DataError: a mask cannot be read, or masks of one image contradict each other.
    """
    first = open_mask(pair.mask or "", reading, pair.image, by_color=by_color)
    if not pair.more_masks:
        return first
    try:
        joined = _whole(first)
        for path in pair.more_masks:
            with open_mask(path, reading, pair.image, by_color=by_color) as other:
                here = _whole(other)
                if not by_color and _contradict(first, other, set(np.unique(joined)) & set(np.unique(here))):
                    raise DataError(
                        f"{printable(path)}: a number has another colour in it than in another mask of its image, so it may "
                        "mean another class. Save the masks as RGB, or as numbers without a palette."
                    )
                joined = _joined(joined, here, path)
        return _Joined(first, joined)
    except PixelwiseError:
        first.close()
        raise


def open_mask(
    path: str | Path, reading: Reading | None = None, image: str | Path | None = None, *, by_color: bool = False
) -> Source:
    """Open a mask: the numbers as they are stored, or 8-bit colours; `by_color` those of its palette, if it has one.

    Its planes are cut as those of its image. A DICOM segmentation gets the planes of `image`.
    """
    options: dict[str, Any] = {"allow_no_affine": True}
    for option, names in _AXES.items():
        if str(path).lower().endswith(tuple(suffix for name in names for suffix in FORMATS[name].suffixes)):
            options[option] = (reading or {}).get(option)
    if may_be_segmentation(path):
        options["like"] = None if image is None else str(image)
    source = open_source(path, labels=True, **options)
    palette = source.metadata.get("palette") if by_color else None
    return PaletteColors(source, palette) if palette else source


def may_be_segmentation(path: str | Path) -> bool:
    """Whether a mask is DICOM, by its name or because it is a folder that is no Zarr."""
    return str(path).lower().endswith(FORMATS["dicom"].suffixes) or (Path(path).is_dir() and not is_zarr(Path(path)))


def mask_values(array: NDArray[Any]) -> NDArray[Any]:
    """What a mask's source gave, (h, w, 1) or (h, w, 3), as `LabelSpec` takes it: (h, w) numbers or (h, w, 3) colours."""
    return array[:, :, 0] if array.shape[2] == 1 else array


class _Joined(View):
    """Several masks of one image as one."""

    def __init__(self, first: Source, planes: NDArray[Any]) -> None:
        super().__init__(first, dtype=planes.dtype.name)
        self._planes = planes

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        return self._planes[plane, top : top + height, left : left + width]


def _whole(source: Source) -> NDArray[Any]:
    """All planes of a mask: (planes, height, width, channels)."""
    info = source.info
    if info.planes * info.height * info.width > _JOINED_PX:
        raise DataError(
            f"{info.location}: is one of several masks of an image, which are joined up to {_JOINED_PX:,} pixels. Draw them "
            "into one file."
        )
    return np.stack([source.read(0, 0, info.height, info.width, plane) for plane in range(info.planes)])


def _contradict(one: Source, other: Source, both: Collection[int]) -> bool:
    """Whether a number, but 0, has different colours in the palettes of two masks that hold it."""
    mine, its = one.metadata.get("palette"), other.metadata.get("palette")
    if not mine or not its:
        return False
    return any(0 < value < min(len(mine), len(its)) and mine[value] != its[value] for value in both)


def _joined(one: NDArray[Any], other: NDArray[Any], path: Path) -> NDArray[Any]:
    """What two masks mark, `other` of the file `path`."""
    if one.shape != other.shape:
        raise DataError(
            f"{printable(path)}: is one of several masks of an image, but not of the size, number of planes or kind "
            "(numbers or colours) of the first."
        )
    marked = np.asarray(other.any(axis=-1))
    both = marked & one.any(axis=-1) & (one != other).any(axis=-1)
    if both.any():
        at = tuple(map(int, np.argwhere(both)[0]))
        values = " and ".join(str(array[at].tolist()).strip("[]") for array in (one, other))
        raise DataError(
            f"{printable(path)}: marks {int(both.sum()):,} pixels that another mask of its image marks with another value "
            f"(the first in row {at[1]}, column {at[2]}: {values}). A pixel has one class: draw the masks into one file, "
            "in the order in which they hide each other."
        )
    return np.where(marked[..., None], other, one)
