"""Zarr arrays and OME-Zarr images as sources, through zarr-python: windows of their planes, and what NGFF 0.1 to 0.5 says.

NGFF tells levels, scales, channels and labels of an image.
"""

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.base import Source, SourceInfo, check_finite, pixel_type, whole_numbers
from pixelwise.formats.local import readable, shown
from pixelwise.formats.zarr.store import Place, open_node, open_place

WORKING_BYTES = 256 * 2**20
"""So much is decompressed at once at most (or one chunk, if that is larger)."""

_KEPT_MASKS = 8
_ROLES = {
    "y": ("y", "lat", "latitude", "north", "northing", "row", "rows", "height", "h"),
    "x": ("x", "lon", "longitude", "east", "easting", "col", "cols", "column", "columns", "width", "w"),
    "c": ("c", "channel", "channels", "band", "bands", "wavelength", "s"),
}
_MAX_COLORS = 4  # an axis nobody names is the channels if it is no longer than this: grey, grey + opacity, RGB, RGBA


def open_zarr(
    location: str, *, level: int = 0, series: int = 0, axes: str | None = None, channels: int | None = None,
    labels: bool = False,
) -> "ZarrSource":  # fmt: skip
    """Open an array or an image: a folder, a ZIP archive of one, or its URL.

    Rows, columns and channels are found by the names that the file gives its axes, or as `axes` says ("tczyx"). An array
    without names is (H, W), (H, W, C) or (C, H, W) with as many `channels` as the network takes or up to four, else a
    stack of planes. All other axes (z, t) are planes, in order. `series` is the number of the image where a file holds
    several, `level` that in its pyramid; as `labels` those of an OME-Zarr image are read, where it has any, not the image.
    """
    for option, value in (("level", level), ("series", series)):
        if value < 0:
            raise UsageError(f"{option} {value}: levels and series are counted from 0.")
    with readable(shown(location)):
        place = open_place(location)
    try:
        with readable(place.name):
            return ZarrSource(place, level, series, axes, channels, labels)
    except BaseException:
        place.close()
        raise


class ZarrSource(Source):
    """An array of numbers in chunks; see `open_zarr`."""

    def __init__(
        self, place: Place, level: int, series: int, axes: str | None, channels: int | None, labels: bool
    ) -> None:
        self._place, self._labels = place, labels
        prefix, node, image = _find(place, series, labels)
        attributes = node.attrs.asdict()
        if image is not None:
            levels = image["levels"]
            if level >= len(levels):
                raise UsageError(f"level {level}: the image has {len(levels)} (0..{len(levels) - 1}).")
            prefix = f"{prefix}/{levels[level][0]}".lstrip("/")
            node = open_node(place, prefix)
            if not hasattr(node, "shape"):
                raise DataError(f"its level {prefix!r} is a group, not an array.")
        elif level or series:
            raise UsageError("this is a plain array; it has level 0 and series 0 only.")
        self._array = node
        self._axes = _axes_of(node.shape, _axis_names(node, image), axes, channels)
        self._planes = [index for index, name in enumerate(self._axes) if name not in ("y", "x", "c")]
        self._gaps = bool(node.dtype.kind == "f" and node.fill_value is not None and np.isnan(node.fill_value))
        self._masks: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        self._lock = threading.Lock()
        self.identity = place.identity(f"{place.top}/{prefix}".strip("/"))
        sides, chunks = (dict(zip(self._axes, lengths, strict=True)) for lengths in (node.shape, node.chunks))
        channels = sides.get("c", 1)
        self.info = SourceInfo(
            location=place.name, format="zarr" if image is None else "ome-zarr", height=sides["y"], width=sides["x"],
            channels=channels, dtype=pixel_type(node.dtype, channels, labels),
            planes=math.prod(node.shape[axis] for axis in self._planes),
            block_px=(min(chunks["y"], sides["y"]), min(chunks["x"], sides["x"])),
        )  # fmt: skip
        self.metadata = _metadata(node, self._axes, image, level, attributes)

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window (height, width, C). Where NaN is the fill value of the array, NaN pixels are no data and read as 0."""
        where = f"rows {top}..{top + height}, columns {left}..{left + width}" + f", plane {plane}" * (
            self.info.planes > 1
        )
        with readable(self.info.location, where):
            window = self._window(top, left, height, width, plane)
            if window.dtype.kind == "f" and not self._labels:
                if self._gaps:
                    window[~self._mask(window, (top, left, height, width, plane))] = 0
                check_finite(window, where)
            return whole_numbers(window) if self._labels or window.dtype.kind == "b" else window

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where the window holds numbers; None unless NaN is the fill value of the array."""
        key = (top, left, height, width, plane)
        if not self._gaps or key in self._masks:
            return self._masks.get(key)
        with readable(self.info.location):
            return self._mask(self._window(*key), key)

    def _mask(self, window: NDArray[Any], key: tuple[int, ...]) -> NDArray[np.bool_]:
        """Where a window holds numbers; kept, for whoever reads one asks for the other next."""
        mask: NDArray[np.bool_] = ~np.isnan(window).any(axis=2)
        with self._lock:
            self._masks = dict([*self._masks.items(), (key, mask)][-_KEPT_MASKS:])
        return mask

    def _window(self, top: int, left: int, height: int, width: int, plane: int) -> NDArray[Any]:
        """The window (height, width, C), as stored."""
        shape, dtype = self._array.shape, self._array.dtype.newbyteorder("=")
        starts = np.unravel_index(plane, [shape[axis] for axis in self._planes]) if self._planes else ()
        box = [(0, side) for side in shape]
        y, x = self._axes.index("y"), self._axes.index("x")
        box[y], box[x] = (top, top + height), (left, left + width)
        for axis, start in zip(self._planes, starts, strict=True):
            box[axis] = (int(start), int(start) + 1)
        out = np.empty([high - low for low, high in box], dtype)
        for part in self._parts(box):
            inner = (slice(low - start, high - start) for (low, high), (start, _) in zip(part, box, strict=True))
            out[tuple(inner)] = self._array[tuple(slice(low, high) for low, high in part)]
        order = [y, x, *(axis for axis, name in enumerate(self._axes) if name == "c")]
        return np.ascontiguousarray(out.transpose(*order, *self._planes).reshape(height, width, -1))

    def _parts(self, box: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """A box, halved along the chunks until each part needs few of them."""
        chunks = self._array.chunks
        counts = [(high - 1) // size - low // size + 1 for (low, high), size in zip(box, chunks, strict=True)]
        axis = int(np.argmax(counts))
        if counts[axis] == 1 or math.prod(counts) * math.prod(chunks) * self._array.dtype.itemsize <= WORKING_BYTES:
            yield box
            return
        low, high = box[axis]
        middle = (low // chunks[axis] + counts[axis] // 2) * chunks[axis]
        for half in ((low, middle), (middle, high)):
            yield from self._parts([*box[:axis], half, *box[axis + 1 :]])

    def close(self) -> None:
        self._place.close()


def _find(place: Place, series: int, labels: bool) -> tuple[str, Any, dict[str, Any] | None]:
    """The image or array that a location means: the path of its group or array, that itself, and the image, if any."""
    node = open_node(place, "")
    if hasattr(node, "shape"):
        return "", node, None
    ome = _ome_of(node.attrs.asdict())
    image, path = _multiscale_of(node.attrs.asdict(), series), ""
    if image is None and "bioformats2raw.layout" in ome:
        path = str(series)
        try:
            node = open_node(place, path)
        except DataError:
            raise UsageError(f"series {series}: there is no such image in it.") from None
        image = _multiscale_of(node.attrs.asdict())
    if image is None:
        for kind in ("plate", "well"):
            if kind in ome:
                raise DataError(f"this is a {kind} of many images. Name one of them, for example …/A/1/0.")
        raise DataError("this is a group of arrays, not an image. Name one of its arrays, or one with multiscales.")
    if labels and "labels" in node:
        folder = f"{path}/labels".lstrip("/")
        names = _ome_of(open_node(place, folder).attrs.asdict()).get("labels") or []
        if len(names) > 1:
            choice = ", ".join(f"{folder}/{name}" for name in names)
            raise DataError(f"it has several labels. Name one of them: {choice}.")
        if names:
            path = f"{folder}/{_inner_path(names[0])}"
            node = open_node(place, path)
            image = _multiscale_of(node.attrs.asdict())
    return path, node, image


def _axis_names(node: Any, image: dict[str, Any] | None) -> Sequence[str | None] | None:
    """What the file calls the axes; those of NGFF before 0.3 have one order."""
    if image is not None:
        return image["axes"] or ("t", "c", "z", "y", "x")[: 5 * (len(node.shape) == 5)]
    names = node.metadata.dimension_names if node.metadata.zarr_format == 3 else node.attrs.get("_ARRAY_DIMENSIONS")
    return names if isinstance(names, list | tuple) else None


def _metadata(
    array: Any, axes: tuple[str, ...], image: dict[str, Any] | None, level: int, attributes: dict[str, Any]
) -> dict[str, Any]:
    """What the writer of the same format keeps."""
    sizes = {name: side for name, side in zip(axes, array.shape, strict=True) if name not in ("y", "x", "c")}
    found: dict[str, Any] = {"zarr_format": array.metadata.zarr_format, "axes": axes, "sizes": sizes}
    if image is None:
        return found
    _, scale, translation = image["levels"][level]
    found |= {"ngff_version": image["version"], "level": level, "levels": len(image["levels"])}
    found |= {key: image[key] for key in ("name", "types", "units")}
    for key, values in (("scale", scale), ("translation", translation)):
        found[key] = dict(zip(axes, values, strict=True)) if len(values) == len(axes) else {}
    omero = _ome_of(attributes).get("omero")
    return found | ({"omero": omero} if isinstance(omero, dict) else {})


def _axes_of(
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


def _ome_of(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the keys of NGFF stand: under "ome" since 0.5, before that among the attributes."""
    inner = attributes.get("ome")
    return inner if isinstance(inner, dict) else attributes


def _multiscale_of(attributes: Mapping[str, Any], series: int = 0) -> dict[str, Any] | None:
    """The image that the attributes of a group describe; None if they describe none.

    Its axes, types and units are empty where the file gives none. Its levels start with the finest: the path of the array,
    the scale and the place of the first number along each axis.
    """
    within = _ome_of(attributes)
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
        (_inner_path(item.get("path")), *_placed([*(item.get(key) or ()), *common], len(names)))
        for item in image["datasets"]
    ]
    version = str(within.get("version") or image.get("version") or "")
    name = str(image.get("name") or "")
    return {"version": version, "name": name, "axes": names, "types": types, "units": units, "levels": levels}


def _inner_path(path: object) -> str:
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
