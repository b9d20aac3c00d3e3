"""The palettes of masks: whether they agree, and the colours that they give to values."""

import math
from collections.abc import Sequence

from pixelwise.data.labels import Color, Value
from pixelwise.data.scan import MaskScan
from pixelwise.formats.base import Palette

_SAME_COLOR = 16  # programs that make palettes round


def palettes_differ(scans: Sequence[MaskScan]) -> bool:
    """Whether one index has different colours in two masks, or some masks have a palette and others colours."""
    colors: dict[Value, Color] = {}
    for scan in scans:
        used = {value: _color(scan.palette, value) for value in scan.counts if scan.palette}
        if all(color == (value,) * 3 for value, color in used.items()):
            continue  # greys that show the numbers
        for value, color in used.items():
            if math.dist(colors.setdefault(value, color), color) > _SAME_COLOR:
                return True
    return bool(colors) and any(scan.kind == "rgb" for scan in scans)


def _color(palette: Palette | None, value: Value) -> Color:
    if palette is not None and isinstance(value, int) and value < len(palette):
        return palette[value]
    return (0, 0, 0)


def common_palette(scans: Sequence[MaskScan]) -> Palette | None:
    """The palette of the masks, if they have one that tells the values apart."""
    palette = next((scan.palette for scan in scans if scan.palette), None)
    used = {value for scan in scans for value in scan.counts if isinstance(value, int)}
    if palette is None or not used or not 0 <= min(used) <= max(used) < len(palette):
        return None
    return palette if len({_color(palette, value) for value in used}) == len(used) else None
