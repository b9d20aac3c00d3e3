"""Where classes come from: `classes.yaml`, or the values that are found in the masks."""

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
    distinct_colors,
    is_color,
    pack_value,
)
from pixelwise.errors import DataError
from pixelwise.files import read_yaml, write_text


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

    Each class is a name, or a name with a `color` ([r, g, b] or "#rrggbb") and the mask `values` that mean it (one, or
    a list that is merged). Without `values`, a class means its position, or its colour where `masks: rgb` stands.
    `ignore_index` is the value (or list of values) of void.

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
    rows = zip(labels.names, as_lists(labels.colors), as_lists(labels.values), strict=True)
    content = {"masks": labels.kind, "classes": [dict(zip(names, row, strict=True)) for row in rows]}
    if labels.ignore_values:
        content["ignore_index"] = as_lists(labels.ignore_values)
    write_text(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True))


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
    """One value or a list of them; a list of three numbers is one colour where masks hold colours."""
    single = isinstance(content, int | str) or (rgb and isinstance(content, list) and is_color(tuple(content)))
    items = [content] if single else content
    if not isinstance(items, list):
        raise DataError(f"{content!r} is neither a mask value nor a list of them.")
    return tuple(_read_color(item) if rgb else item for item in items)


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
