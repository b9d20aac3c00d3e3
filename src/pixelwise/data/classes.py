"""Where classes come from: `classes.yaml`, or the values that are found in the masks."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pixelwise.data.labels import (
    CAMVID_COLORS,
    CAMVID_NAMES,
    CAMVID_VOID,
    IGNORE_INDEX,
    MAX_CLASSES,
    Color,
    LabelSpec,
    Value,
    as_lists,
    as_ranges,
    distinct_colors,
    is_color,
    pack_value,
)
from pixelwise.errors import DataError
from pixelwise.files import read_yaml, write_text
from pixelwise.formats.base import NAN_VALUE

CLASSES_NAME = "classes.yaml"
MAX_VALUES = 65_536
_MANY = 16
_NEVER_A_CLASS = (NAN_VALUE, -9999, -32_768, -(2**31))
VOID_BY_CUSTOM = (*_NEVER_A_CLASS, -1, IGNORE_INDEX, 65_535, 2**31 - 1, 2**32 - 1)
_RANGE = re.compile(r"(-?\d{1,10})\s*-\s*(-?\d{1,10})")


class _ClassEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    color: list[int] | str | None = None
    values: Any = None


class _ClassesFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    classes: list[str | _ClassEntry] = Field(min_length=1)
    ignore_index: Any = None
    masks: Literal["index", "rgb"] = "index"


def load_labels(path: str | Path) -> LabelSpec:
    """Read a `classes.yaml`.

    Each class is a name, or a name with a `color` ([r, g, b] or "#rrggbb") and the mask `values` that mean it (one, a
    range such as 128-255, or a list that is merged). Without `values`, a class means its position, or its colour where
    `masks: rgb` stands; there a single number or range means greys. `ignore_index` is void, likewise; `.nan` is NaN.

    Raises:
        DataError: the file is missing, is not YAML, has unknown keys, or describes impossible classes.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "classes.yaml"
        >>> _ = path.write_text("classes: [road, {name: vehicle, values: [1, 2]}]\\nignore_index: 255")
        >>> load_labels(path).values
        ((0,), (1, 2))
    """
    content = read_yaml(path)
    try:
        return _from_file(_ClassesFile.model_validate(content))
    except ValidationError as error:
        raise DataError(f"{path}: {_describe(error)}. Allowed are classes, ignore_index and masks.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def save_labels(path: str | Path, labels: LabelSpec) -> None:
    """Write a `classes.yaml` that `load_labels` reads back to an equal LabelSpec."""
    names = ("name", "color", "values")
    values = [_short(values) for values in labels.values]
    rows = zip(labels.names, as_lists(labels.colors), values, strict=True)
    content: dict[str, Any] = {"masks": labels.kind, "classes": [dict(zip(names, row, strict=True)) for row in rows]}
    if labels.ignore_values:
        content["ignore_index"] = [math.nan if value == NAN_VALUE else value for value in _short(labels.ignore_values)]
    write_text(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True))


def _short(values: Sequence[Value]) -> list[Any]:
    """Mask values with ranges; many colours as #rrggbb."""
    shown = as_ranges(values)
    if len(shown) > _MANY:
        return ["#{:02x}{:02x}{:02x}".format(*value) if isinstance(value, tuple) else value for value in shown]
    return list(as_lists(shown))


def _from_file(parsed: _ClassesFile) -> LabelSpec:
    entries = [_ClassEntry(name=entry) if isinstance(entry, str) else entry for entry in parsed.classes]
    spare = distinct_colors(len(entries))
    colors = tuple(_read_color(entry.color) if entry.color else spare[i] for i, entry in enumerate(entries))
    rgb = parsed.masks == "rgb"
    if rgb and any(entry.color is None and entry.values is None for entry in entries):
        raise DataError("with `masks: rgb` every class needs a color, for that is what the masks hold.")
    defaults: list[Value] = list(colors) if rgb else list(range(len(entries)))
    values = [
        (defaults[i],) if entry.values is None else _read_values(entry.values, rgb) for i, entry in enumerate(entries)
    ]
    ignore = () if parsed.ignore_index is None else _read_values(parsed.ignore_index, rgb)
    names = tuple(entry.name for entry in entries)
    return LabelSpec(names=names, colors=colors, values=tuple(values), ignore_values=ignore, kind=parsed.masks)


def _read_values(content: Any, rgb: bool) -> tuple[Value, ...]:
    """One value or range, or a list of them; a list of three numbers is one colour where masks hold colours."""
    single = isinstance(content, int | str | float) or (rgb and isinstance(content, list) and is_color(tuple(content)))
    items = [content] if single else content
    if not isinstance(items, list):
        raise DataError(f"{content!r} is neither a mask value nor a list of them.")
    values: list[Value] = []
    for item in items:
        values += _read_range(item, rgb)
        if len(values) > MAX_VALUES:
            raise DataError(f"{item!r}: one class has at most {MAX_VALUES:,} mask values.")
    return tuple(values)


def _read_range(item: Any, rgb: bool) -> Sequence[Value]:
    """The values that one item names: a number, "128-255", a colour, or NaN; of colours, numbers are greys."""
    if isinstance(item, float) and math.isnan(item):
        return [NAN_VALUE]
    ends = _RANGE.fullmatch(item) if isinstance(item, str) else None
    if ends is None and not (rgb and isinstance(item, int)):
        return [_read_color(item) if rgb else item]
    low, high = (int(ends[1]), int(ends[2])) if ends else (item, item)
    if not (low <= high < low + MAX_VALUES) or (rgb and not 0 <= low <= high < 256):
        allowed = "greys are 0 to 255" if rgb else f"at most {MAX_VALUES:,} values"
        raise DataError(f"{item!r} is not a range from a smaller to a larger number ({allowed}).")
    return [(grey, grey, grey) for grey in range(low, high + 1)] if rgb else range(low, high + 1)


def _read_color(content: Any) -> Color:
    if isinstance(content, str) and re.fullmatch("#[0-9a-fA-F]{6}", content):
        return int(content[1:3], 16), int(content[3:5], 16), int(content[5:7], 16)
    if isinstance(content, list) and is_color(tuple(content)):
        return content[0], content[1], content[2]
    raise DataError(f"{content!r} is not a colour: write [r, g, b] with numbers in 0..255, or '#rrggbb'.")


def _describe(error: ValidationError) -> str:
    problems = []
    for item in error.errors()[:4]:
        where = ".".join(str(part) for part in item["loc"] if part not in ("str", "_ClassEntry"))
        what = item["msg"].lower()
        if len(item["loc"]) == 3 and item["type"] in ("string_type", "model_type"):
            what = f"{item['input']!r} is neither a name nor a mapping with a name (quote words like yes, no, on, off)"
        problems.append(f"{where or 'the file'}: {what}")
    return "; ".join(dict.fromkeys(problems))


def propose_labels(
    found: Mapping[Value, int],
    *,
    palette: Sequence[Color] | None = None,
    camvid: bool = False,
    ignore: Sequence[int] = (),
) -> LabelSpec:
    """Classes for masks that come without `classes.yaml`, from the values found in them.

    0 with 1, 255 or 65535 is background and foreground. With `camvid` (SegNet's folder layout) the values 0..11 are CamVid's
    eleven classes and void. Otherwise each value is a class, except numbers that by custom are void (a 255 or 65535
    beside small indices, -1, -9999, NaN): only the user can know, so they are left out here and the data check asks.

    Args:
        found: mask values and their pixel counts, over all masks.
        palette: colours of the palette masks, by index.
        camvid: whether the folder has the layout of SegNet's CamVid copy.
        ignore: values the user calls void.

    Raises:
        DataError: there are no values, or too many to be classes.
        UsageError: `ignore` cannot apply to colours.
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
    others = [value for value in values if value not in VOID_BY_CUSTOM]
    if len(others) >= 2:
        values = [value for value in values if value in others or (value > 0 and 4 * max(others) > value)]
    values = [value for value in values if value not in _NEVER_A_CLASS] or values
    colors = distinct_colors(len(values))
    names = tuple(f"class {value}" for value in values)
    if values in ([0, 1], [0, 255], [0, 65_535]):
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
