"""Classes for masks that come without a `classes.yaml`, proposed from the values found in them."""

from collections.abc import Mapping, Sequence

from pixelwise.data.label_spec import (
    CAMVID_COLORS,
    CAMVID_NAMES,
    CAMVID_VOID,
    IGNORE_INDEX,
    MAX_CLASSES,
    Color,
    LabelSpec,
    Value,
    distinct_colors,
    pack_value,
)
from pixelwise.errors import DataError


def propose_labels(
    found: Mapping[Value, int],
    *,
    palette: Sequence[Color] | None = None,
    camvid: bool = False,
    ignore: Sequence[int] = (),
) -> LabelSpec:
    """Classes for masks that come without `classes.yaml`, from the values found in them.

    0 with 1 or 255 is background and foreground. With `camvid` (SegNet's folder layout) the values 0..11 are CamVid's
    eleven classes and void. Otherwise each value is a class, except a 255 beside small indices: by custom that is void,
    but only the user can know, so it is left out here and the data check asks.

    Args:
        found: mask values and their pixel counts, over all masks.
        palette: colours of the palette masks, by index.
        camvid: whether the folder has the layout of SegNet's CamVid copy.
        ignore: values the user calls void.

    Raises:
        DataError: there are no values, or too many to be classes.
        UsageError: `ignore` cannot apply to colours.

    Example:
        >>> propose_labels({0: 900, 255: 100}).names
        ('background', 'foreground')
    """
    if camvid and found and set(found) <= set(range(12)) and CAMVID_VOID in found:
        spec = LabelSpec(
            names=CAMVID_NAMES,
            colors=CAMVID_COLORS,
            values=tuple((index,) for index in range(11)),
            ignore_values=(CAMVID_VOID,),
        )
        return spec.with_ignored(ignore)
    values: list[Value] = sorted((value for value in found if value not in ignore), key=pack_value)
    if not values or len(values) > MAX_CLASSES:
        raise DataError(
            f"the masks hold {len(values):,} different values, which cannot be classes (1 to {MAX_CLASSES} can). "
            "Numbered instances, photographs and lossy (JPEG) masks look like this. Give the classes in "
            "classes.yaml, or convert the masks."
        )
    if isinstance(values[0], tuple):
        return _propose_colors(values).with_ignored(ignore)
    return _propose_indices([value for value in values if isinstance(value, int)], palette, tuple(ignore))


def _propose_indices(values: list[int], palette: Sequence[Color] | None, ignore: tuple[int, ...]) -> LabelSpec:
    others = [value for value in values if value != IGNORE_INDEX]
    if len(others) >= 2 and max(others) < 64:
        values = others
    colors = distinct_colors(len(values))
    names = tuple(f"class {value}" for value in values)
    if values in ([0, 1], [0, 255]):
        names, colors = ("background", "foreground"), ((0, 0, 0), (230, 60, 60))
    if palette is not None and min(values) >= 0 and max(values) < len(palette):
        colors = tuple(palette[value] for value in values)
    return LabelSpec(names=names, colors=colors, values=tuple((value,) for value in values), ignore_values=ignore)


def _propose_colors(values: list[Value]) -> LabelSpec:
    colors = tuple(value for value in values if isinstance(value, tuple))
    names = tuple("#{:02x}{:02x}{:02x}".format(*color) for color in colors)
    if colors == ((0, 0, 0), (255, 255, 255)):
        names = ("background", "foreground")
    return LabelSpec(names=names, colors=colors, values=tuple((color,) for color in colors), kind="rgb")
