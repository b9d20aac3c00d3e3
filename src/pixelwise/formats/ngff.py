"""The axes of Zarr arrays, and what OME-Zarr (NGFF 0.1 to 0.5) says about levels, scales and channels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pixelwise.errors import DataError, UsageError

_ROLES = {
    "y": ("y", "lat", "latitude", "north", "northing", "row", "rows", "height", "h"),
    "x": ("x", "lon", "longitude", "east", "easting", "col", "cols", "column", "columns", "width", "w"),
    "c": ("c", "channel", "channels", "band", "bands", "wavelength", "s"),
}
_MAX_COLORS = 4  # an axis nobody names is the channels if it is no longer than this: grey, grey + opacity, RGB, RGBA
_OLD_AXES = ("t", "c", "z", "y", "x")  # of NGFF before 0.3
_MAX_PATH = 512


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of an image.

    Attributes:
        path: of its array, below the image.
        scale: the step along each axis, in its unit; empty if the file gives none.
        translation: the position of the first number along each axis; empty if the file gives none.
    """

    path: str
    scale: tuple[float, ...] = ()
    translation: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Multiscale:
    """An image of OME-Zarr.

    Attributes:
        version: of NGFF, as the file gives it.
        axes: their names, in the order of the arrays; empty if the file gives none.
        types: "time", "channel" or "space" by name, where the file gives them.
        units: by name, where the file gives them.
        levels: from the finest to the coarsest.
        name: of the image.
    """

    version: str
    axes: tuple[str, ...]
    types: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    levels: tuple[Level, ...] = ()
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Which axis of an array means what.

    Attributes:
        names: of all axes, in order.
        y: the axis of the rows.
        x: the axis of the columns.
        c: the axis of the channels, or None.
        planes: all others, in order; a plane is one place along each.
    """

    names: tuple[str, ...]
    y: int
    x: int
    c: int | None
    planes: tuple[int, ...]


def axes_of(
    shape: Sequence[int], names: Sequence[str | None] | None, wanted: str | None = None, channels: int | None = None
) -> Axes:
    """Find rows, columns and channels among the axes of an array.

    Args:
        shape: its lengths.
        names: what the file calls its axes, if it does.
        wanted: what the user calls them, one letter each, for example "zyx" or "yxc".
        channels: how many the network takes, which decides where the file leaves it open.

    Raises:
        UsageError: `wanted` does not fit the shape.
        DataError: nothing says which axis is what.

    Example:
        >>> axes_of((512, 640, 3), None).names, axes_of((20, 512, 640), None).names
        (('y', 'x', 'c'), ('z', 'y', 'x'))
        >>> axes_of((4, 512, 640), ("band", "lat", "lon")).c
        0
    """
    size = " x ".join(map(str, shape))
    if wanted is not None:
        if len(wanted) != len(shape) or len(set(wanted)) != len(wanted) or not {"y", "x"} <= set(wanted):
            raise UsageError(
                f"axes {wanted!r} do not fit an array of {size}. Write one letter for each axis, y and x among them, "
                'for example "zyx", "cyx" or "tczyx".'
            )
        return _axes(tuple(wanted))
    if names and all(names):
        roles = [_role(str(name)) for name in names]
        if len(roles) == len(shape) and {"y", "x"} <= set(roles) and len(set(roles)) == len(roles):
            return _axes(tuple(roles))
    guess = _guess(tuple(shape), channels)
    if guess is None:
        raise DataError(
            f"nothing says which of its axes ({size}) are rows and columns. Say so, for example axes='tcyx'."
        )
    return _axes(tuple(guess))


def _axes(names: tuple[str, ...]) -> Axes:
    y, x, c = names.index("y"), names.index("x"), names.index("c") if "c" in names else None
    return Axes(names=names, y=y, x=x, c=c, planes=tuple(i for i in range(len(names)) if i not in (y, x, c)))


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


def multiscale_of(attributes: Mapping[str, Any], series: int = 0) -> Multiscale | None:
    """The image that the attributes of a group describe; None if they describe none.

    Raises:
        DataError: what they say is damaged, or leads out of the group.
        UsageError: there is no such series.

    Example:
        >>> image = multiscale_of({"multiscales": [{"version": "0.4", "axes": ["y", "x"], "datasets": [{"path": "0"}]}]})
        >>> image.axes, image.levels[0].path
        (('y', 'x'), '0')
        >>> multiscale_of({"multiscales": [{"axes": ["y", "x"], "datasets": [{"path": "../../etc"}]}]})
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: its level lies at '../../etc', which is no place inside the image.
    """
    within = ome_of(attributes)
    images = within.get("multiscales")
    if images is None:
        return None
    if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
        raise DataError("its multiscales are no list of mappings.")
    if series >= len(images):
        raise UsageError(f"series {series}: there are {len(images)} (0..{len(images) - 1}).")
    image = images[series]
    names, types, units = _named_axes(image.get("axes"))
    datasets = image.get("datasets")
    if not isinstance(datasets, list) or not datasets or not all(isinstance(item, dict) for item in datasets):
        raise DataError("its multiscales name no datasets.")
    common = _transforms(image.get("coordinateTransformations"))
    levels = tuple(_level(item, common, len(names)) for item in datasets)
    version = str(within.get("version") or image.get("version") or "")[:20]
    return Multiscale(
        version=version, axes=names, types=types, units=units, levels=levels, name=str(image.get("name") or "")[:200]
    )


def ome_of(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the keys of NGFF stand: under "ome" since 0.5, before that among the attributes."""
    inner = attributes.get("ome")
    return inner if isinstance(inner, dict) else attributes


def inner_path(path: object, what: str = "its level") -> str:
    """A path that stays inside its folder, without needless parts.

    Raises:
        DataError: it does not.
    """
    parts = path.split("/") if isinstance(path, str) else [""]
    plain = [part for part in parts if part != "."]
    bad = any(part in ("", "..") or set(part) & set("\\:?#\0%*") for part in plain)
    if bad or len(str(path)) > _MAX_PATH:
        raise DataError(f"{what} lies at {str(path)[:60]!r}, which is no place inside the image.")
    return "/".join(plain)


def _named_axes(axes: Any) -> tuple[tuple[str, ...], dict[str, str], dict[str, str]]:
    if axes is None:
        return (), {}, {}
    items = [{"name": item} if isinstance(item, str) else item for item in axes] if isinstance(axes, list) else []
    if not items or not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items):
        raise DataError("its axes are no list of names.")
    names = []
    types, units = {}, {}
    for item in items:
        name = "c" if item.get("type") == "channel" else _role(item["name"][:40])
        names.append(name)
        if isinstance(item.get("type"), str):
            types[name] = item["type"][:40]
        if isinstance(item.get("unit"), str):
            units[name] = item["unit"][:40]
    if len(set(names)) != len(names):
        raise DataError(f"two of its axes have the same name ({', '.join(names)}).")
    return tuple(names), types, units


def _level(item: Mapping[str, Any], common: Mapping[str, tuple[float, ...]], axes: int) -> Level:
    own = _transforms(item.get("coordinateTransformations"))
    for values in (*own.values(), *common.values()):
        if axes and len(values) != axes:
            raise DataError(f"a transformation has {len(values)} numbers for {axes} axes.")
    scale, shift = own.get("scale", ()), own.get("translation", ())
    outer, outer_shift = common.get("scale", ()), common.get("translation", ())
    if outer:  # applied after that of the level
        shift = tuple(a * b for a, b in zip(shift, outer, strict=True)) if shift else ()
        scale = tuple(a * b for a, b in zip(scale, outer, strict=True)) if scale else outer
    if outer_shift:
        shift = tuple(a + b for a, b in zip(shift, outer_shift, strict=True)) if shift else outer_shift
    return Level(path=inner_path(item.get("path")), scale=scale, translation=shift)


def _transforms(items: Any) -> dict[str, tuple[float, ...]]:
    """The scale and translation of a list of transformations; "identity" adds nothing."""
    if items is None:
        return {}
    found: dict[str, tuple[float, ...]] = {}
    for item in items if isinstance(items, list) else [None]:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "identity":
            continue
        values = item.get(kind) if isinstance(item, dict) and kind in ("scale", "translation") else None
        plain = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        numbers = tuple(float(value) for value in values) if plain and values is not None else ()
        if not numbers or not all(map(math.isfinite, numbers)) or (kind == "scale" and min(numbers) <= 0):
            raise DataError(f"a transformation is {str(item)[:80]!r}; scales are positive numbers, one for each axis.")
        found[str(kind)] = numbers
    return found
