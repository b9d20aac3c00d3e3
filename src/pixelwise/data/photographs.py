"""What tells masks from photographs: masks have areas of one value."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pixelwise.data.pairs import Pair
from pixelwise.data.scan import MaskScan, scan_mask
from pixelwise.errors import DataError

_PHOTO_VALUES, _PHOTO_SOLID, _PHOTO_FILLING = 32, 0.2, 0.25


def check_areas(counts: Mapping[Any, int], solid: Mapping[Any, int]) -> None:
    """Raise `DataError` if there are many values, of which few fill an area.

    Args:
        counts: pixels per value, over all masks.
        solid: how many of these have only equal neighbours.
    """
    filling = sum(value in solid for value in counts)
    photo = _solid_share(counts, solid) < _PHOTO_SOLID or filling < _PHOTO_FILLING * len(counts)
    if len(counts) > _PHOTO_VALUES and photo:
        raise DataError(
            f"the masks hold {len(counts):,} different values, of which {filling:,} fill areas. They look like photographs, "
            "or like masks that were saved as JPEG or resized with interpolation. Save them without, or say in classes.yaml "
            "which values mean which class (values: 128-255)."
        )


def fills_areas(scan: MaskScan) -> bool:
    """Whether a mask has areas of one value, as masks have and photographs have not."""
    return len(scan.counts) <= _PHOTO_VALUES or _solid_share(scan.counts, scan.solid) > _PHOTO_SOLID


def looks_swapped(pairs: Sequence[Pair]) -> str | None:
    """A sentence, if what lies among the images looks like masks; asked where the masks do not look like any."""
    some = [pair for pair in pairs if pair.mask is not None][:4]
    for pair in some:
        try:
            scan = scan_mask(replace(pair, mask=pair.image, more_masks=()))
        except DataError:
            return None
        if not 2 <= len(scan.counts) <= _PHOTO_VALUES or _solid_share(scan.counts, scan.solid) < _PHOTO_SOLID:
            return None
    if not some:
        return None
    return (
        "images and masks seem to be swapped: files among the images hold few values, in areas, as masks do, for example "
        f"{some[0].image.name}, and the masks look like photographs. "
        "Exchange the two folders (or the columns of the CSV file)."
    )


def _solid_share(counts: Mapping[Any, int], solid: Mapping[Any, int]) -> float:
    """The share of pixels that lie in areas of one value."""
    return sum(solid.get(value, 0) for value in counts) / max(1, sum(counts.values()))
