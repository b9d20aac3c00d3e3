"""The axes of Zarr arrays, and what OME-Zarr (NGFF 0.1 to 0.5) says about levels, scales, channels and labels."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.base import LABELS, Result

_ROLES = {
    "y": ("y", "lat", "latitude", "north", "northing", "row", "rows", "height", "h"),
    "x": ("x", "lon", "longitude", "east", "easting", "col", "cols", "column", "columns", "width", "w"),
    "c": ("c", "channel", "channels", "band", "bands", "wavelength", "s"),
}
_MAX_COLORS = 4  # an axis nobody names is the channels if it is no longer than this: grey, grey + opacity, RGB, RGBA


def axes_of(
    shape: Sequence[int], names: Sequence[str | None] | None, wanted: str | None = None, channels: int | None = None
) -> tuple[str, ...]:
    """The names of the axes of an array, among them "y" and "x", and "c" if it has channels; all others are planes.

    What the user wants ("zyx") counts before the names of the file; where both are missing, the lengths and the number of
    channels that the network takes decide.
    """
    size = " x ".join(map(str, shape))
    if wanted is not None:
        if len(wanted) != len(shape) or len(set(wanted)) != len(wanted) or not {"y", "x"} <= set(wanted):
            raise UsageError(
                f"axes {wanted!r} do not fit an array of {size}. Write one letter for each axis, y and x among them, "
                'for example "zyx", "cyx" or "tczyx".'
            )
        return tuple(wanted)
    if names and all(names):
        roles = tuple(_role(str(name)) for name in names)
        if len(roles) == len(shape) and {"y", "x"} <= set(roles) and len(set(roles)) == len(roles):
            return roles
    guess = _guess(tuple(shape), channels)
    if guess is None:
        raise DataError(
            f"nothing says which of its axes ({size}) are rows and columns. Say so, for example axes='tcyx'."
        )
    return tuple(guess)


def _role(name: str) -> str:
    plain = name.strip().lower()
    return next((role for role, names in _ROLES.items() if plain in names), plain)


def _guess(shape: tuple[int, ...], channels: int | None) -> str | None:
    """Axes without names: as many channels as the network takes, or few, first or last; else a stack."""
    if len(shape) == 2:
        return "yx"
    if len(shape) not in (3, 4):
        return None
    planes, last, first = ("", shape[-1], shape[0]) if len(shape) == 3 else ("z", shape[3], shape[1])
    tests = [lambda length: length == channels] if channels else []
    for is_channels in (*tests, lambda length: length <= _MAX_COLORS):
        if is_channels(last) != is_channels(first):
            return f"{planes}yxc" if is_channels(last) else f"{planes}cyx"
    if len(shape) == 3:
        return "yxc" if last <= _MAX_COLORS and shape[1] > _MAX_COLORS else "zyx"
    return None


def ome_of(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the keys of NGFF stand: under "ome" since 0.5, before that among the attributes."""
    inner = attributes.get("ome")
    return inner if isinstance(inner, dict) else attributes


def multiscale_of(attributes: Mapping[str, Any], series: int = 0) -> dict[str, Any] | None:
    """The image that the attributes of a group describe; None if they describe none.

    Its axes, types and units are empty where the file gives none. Its levels start with the finest: the path of the array,
    the scale and the place of the first number along each axis.
    """
    within = ome_of(attributes)
    images = within.get("multiscales")
    if images is None:
        return None
    if series >= len(images):
        raise UsageError(f"series {series}: there are {len(images)} (0..{len(images) - 1}).")
    image = images[series]
    items = [{"name": item} if isinstance(item, str) else item for item in image.get("axes") or ()]
    names = tuple("c" if item.get("type") == "channel" else _role(item["name"]) for item in items)
    if len(set(names)) != len(names):
        raise DataError(f"two of its axes have the same name ({', '.join(names)}).")
    types, units = (
        {name: str(item[key]) for name, item in zip(names, items, strict=True) if item.get(key)}
        for key in ("type", "unit")
    )
    common, key = image.get("coordinateTransformations") or (), "coordinateTransformations"
    levels = [
        (inner_path(item.get("path")), *_placed([*(item.get(key) or ()), *common], len(names)))
        for item in image["datasets"]
    ]
    version = str(within.get("version") or image.get("version") or "")
    name = str(image.get("name") or "")
    return {"version": version, "name": name, "axes": names, "types": types, "units": units, "levels": levels}


def inner_path(path: object) -> str:
    """A path that stays inside its image."""
    parts = [part for part in str(path).split("/") if part != "."]
    if (
        not isinstance(path, str)
        or not parts
        or not all(re.fullmatch(r"(?!\.\.$)[^\\:?#\0%*]+", part) for part in parts)
    ):
        raise DataError(f"its level lies at {str(path)[:60]!r}, which is no place inside the image.")
    return "/".join(parts)


def _placed(transforms: Sequence[Any], axes: int) -> tuple[list[float], list[float]]:
    """The scale and the translation of each axis that transformations, one after the other, come to."""
    scale, shift = np.ones(axes), np.zeros(axes)
    for item in transforms if axes else ():
        kind = item.get("type")
        if kind == "identity":
            continue
        values = np.asarray(item.get(kind) if kind in ("scale", "translation") else None)
        is_sound = values.dtype.kind in "iuf" and values.shape == shift.shape and np.isfinite(values).all()
        if not is_sound or (kind == "scale" and values.min() <= 0):
            raise DataError(f"a transformation is {str(item)[:80]!r}; scales are positive numbers, one for each axis.")
        scale, shift = (scale * values, shift * values) if kind == "scale" else (scale, shift + values)
    return scale.tolist(), shift.tolist()


def plane_axes(result: Result) -> tuple[list[str], list[int]]:
    """Names and lengths of the axes before the rows: the source's own where they fit, else one for all planes."""
    sizes = result.metadata.get("sizes") or {}
    if isinstance(sizes, Mapping) and math.prod(sizes.values()) == result.source.planes:
        return [str(name) for name in sizes], [int(size) for size in sizes.values()]
    return (["z"], [result.source.planes]) if result.source.planes > 1 else ([], [])


def group_attributes(result: Result, labels: str, levels: int, zarr_format: int) -> dict[str, dict[str, Any]]:
    """The NGFF attributes of each group of a result, by its path."""
    version = {"version": "0.4"} if zarr_format == 2 else {}
    groups: dict[str, dict[str, Any]] = {"": {"multiscales": [_image(result, levels, "") | version]}}
    if result.kind == LABELS:
        inner = f"labels/{labels}"
        classes = zip(result.spec.names, result.spec.colors, strict=True)
        about = [(index, name, [*color, 255]) for index, (name, color) in enumerate(classes)]
        if result.nodata is not None:
            about.append((int(result.nodata), "no data", [0, 0, 0, 0]))
        label = {
            "colors": [{"label-value": value, "rgba": rgba} for value, _, rgba in about],
            "properties": [{"label-value": value, "name": name} for value, name, _ in about],
            "source": {"image": "../../"},
        }
        groups = {
            inner: groups[""] | {"image-label": label | version},
            "labels": {"labels": [labels]},
            "": {"multiscales": [_image(result, levels, f"{inner}/") | version]},
        }
    return groups if version else {path: {"ome": {"version": "0.5", **group}} for path, group in groups.items()}


def _image(result: Result, levels: int, prefix: str) -> dict[str, Any]:
    """The description of an image of which each level takes every second pixel, so that the first stays in its place."""
    metadata = result.metadata if result.source.format == "ome-zarr" else {}
    names = [*plane_axes(result)[0], "y", "x"]
    types, units, scale, shift = (metadata.get(key) or {} for key in ("types", "units", "scale", "translation"))
    axes = []
    for name in names:
        axis = {"name": name, "type": types.get(name, "time" if name == "t" else "space")}
        axes.append(axis | ({"unit": units[name]} if name in units else {}))
    datasets = []
    for level in range(levels):
        steps = [scale.get(name, 1.0) * (2**level if name in ("y", "x") else 1) for name in names]
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": steps}]
        if any(shift.values()):
            transforms.append({"type": "translation", "translation": [shift.get(name, 0.0) for name in names]})
        datasets.append({"path": f"{prefix}{level}", "coordinateTransformations": transforms})
    return {"name": metadata.get("name") or result.kind, "axes": axes, "datasets": datasets}
