"""Zarr arrays and OME-Zarr images as sources, through zarr-python: windows of their planes, and what NGFF 0.1 to 0.5 says.

NGFF tells levels, scales, channels and labels of an image.
"""

import base64
import math
import re
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.axes import axes_of, axes_of_mask, role_of
from pixelwise.formats.base import Source, SourceInfo, check_finite, pixel_type, whole_numbers
from pixelwise.formats.local import readable, shown
from pixelwise.formats.zarr.store import Place, open_node, open_place

WORKING_BYTES = 256 * 2**20
"""So much is decompressed at once at most (or one chunk, if that is larger)."""

_KEPT_MASKS = 8


def open_zarr(
    location: str, *, level: int = 0, series: int | None = None, axes: str | None = None, channels: int | None = None,
    labels: bool = False,
) -> "ZarrSource":  # fmt: skip
    """Open an array or an image: a folder, a ZIP archive of one, or its URL.

    Rows, columns and channels are found by the names that the file gives its axes, or as `axes` says ("tczyx"). An array
    without names is (H, W), (H, W, C) or (C, H, W) with as many `channels` as the network takes or up to four, else a
    stack of planes. All other axes (z, t) are planes, in order. `series` is the number of the image where a file holds
    several (else the first is read, which "warnings" of the metadata tell), `level` that in its pyramid; as `labels` those
    of an OME-Zarr image are read, where it has any, not the image.
    """
    for option, value in (("level", level), ("series", series or 0)):
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
        self, place: Place, level: int, series: int | None, axes: str | None, channels: int | None, labels: bool
    ) -> None:
        self._place, self._labels = place, labels
        prefix, node, image = _find(place, series or 0, labels)
        attributes = node.attrs.asdict()
        if image is not None:
            levels = image["levels"]
            if level >= len(levels):
                raise UsageError(f"level {level}: the image has {len(levels)} (0..{len(levels) - 1}).")
            nodes = []
            for inner, *_ in levels[: level + 1]:
                nodes.append(open_node(place, f"{prefix}/{inner}".lstrip("/")))
                if not hasattr(nodes[-1], "shape"):
                    raise DataError(f"its level {inner!r} is a group, not an array.")
            prefix, node = f"{prefix}/{levels[level][0]}".lstrip("/"), nodes[-1]
        elif level or series:
            raise UsageError("this is a plain array; it has level 0 and series 0 only.")
        self._array = node
        names = _axis_names(node, image)
        if labels:  # of the image, while the mask may name its own
            axes = None if names and all(names) else axes_of_mask(node.shape, axes)
        self._axes = axes_of(node.shape, names, axes, channels)
        self._planes = [index for index, name in enumerate(self._axes) if name not in ("y", "x", "c")]
        known = {} if labels or image is not None else node.attrs.asdict()
        self._scale, self._offset = (_number(known.get(key)) for key in ("scale_factor", "add_offset"))
        self._is_packed = self._scale is not None or self._offset is not None
        self._void = _void(node, known, self._is_packed)
        self._masks: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        self._lock = threading.Lock()
        self.identity = place.identity(f"{place.top}/{prefix}".strip("/"))
        sides, chunks = (dict(zip(self._axes, lengths, strict=True)) for lengths in (node.shape, node.chunks))
        channels = sides.get("c", 1)
        self.info = SourceInfo(
            location=place.name, format="zarr" if image is None else "ome-zarr", height=sides["y"], width=sides["x"],
            channels=channels, dtype="float32" if self._is_packed else pixel_type(node.dtype, channels, labels),
            planes=math.prod(node.shape[axis] for axis in self._planes),
            block_px=(min(chunks["y"], sides["y"]), min(chunks["x"], sides["x"])),
        )  # fmt: skip
        self.metadata = _metadata(node, self._axes, image, level, attributes)
        if image is not None:
            y, x = self._axes.index("y"), self._axes.index("x")
            self.metadata["level_shapes"] = tuple((item.shape[y], item.shape[x]) for item in nodes)
            if image["has_others"] and series is None:
                told = "it holds several images, of which only the first is read; take another by series (--series 1)"
                self.metadata["warnings"] = (told,)

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window (height, width, C), unpacked as CF says (section 8.1: times scale_factor plus add_offset).

        Where the array has its number for missing data (`_FillValue`, or NaN as fill value), there is no data, read as 0.
        """
        where = f"rows {top}..{top + height}, columns {left}..{left + width}" + f", plane {plane}" * (
            self.info.planes > 1
        )
        with readable(self.info.location, where):
            window = self._window(top, left, height, width, plane)
            there = (
                None if self._void is None or self._labels else self._mask(window, (top, left, height, width, plane))
            )
            if there is not None:
                window[~there] = 0
            if window.dtype.kind == "f" and not self._labels:
                check_finite(window, where)
            if self._is_packed:
                scale, offset = 1.0 if self._scale is None else self._scale, self._offset or 0.0
                window = (window * np.float64(scale) + offset).astype(np.float32)
                if there is not None:
                    window[~there] = 0
            return whole_numbers(window) if self._labels or window.dtype.kind == "b" else window

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where the window holds numbers; None unless the array has a number for missing data."""
        key = (top, left, height, width, plane)
        kept = self._masks.get(key)  # once: another thread may replace the table
        if self._void is None or kept is not None:
            return kept
        with readable(self.info.location):
            return self._mask(self._window(*key), key)

    def _mask(self, window: NDArray[Any], key: tuple[int, ...]) -> NDArray[np.bool_]:
        """Where a window holds numbers; kept, for whoever reads one asks for the other next."""
        void = self._void
        missing = np.isnan(window) if void != void else window == void
        in_all = void == 0 or (window.dtype.kind in "bu" and void == void)  # then the number is an ordinary one as well
        mask: NDArray[np.bool_] = ~(missing.all(axis=2) if in_all else missing.any(axis=2))
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


def _number(value: Any) -> float | None:
    """A number among attributes; None if it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _void(node: Any, known: Mapping[str, Any], is_packed: bool) -> float | None:
    """The number that stands for missing data; None if there is none.

    NaN where it is the fill value of an array of floats, else what CF's attributes say. In Zarr 2 xarray keeps it as the
    fill value, where 0 is everybody's default.
    """
    if node.dtype.kind == "f" and node.fill_value is not None and np.isnan(node.fill_value):
        return math.nan
    for value in (known.get("_FillValue"), known.get("missing_value")):
        found = _fill_value(value) if node.dtype.kind == "f" else _number(value)
        if found is not None and (found == found or node.dtype.kind == "f"):
            return found
    if node.metadata.zarr_format != 2 or node.fill_value is None:
        return None
    is_of_xarray = "_ARRAY_DIMENSIONS" in known and node.dtype.kind == "f" and node.fill_value != 0
    return float(node.fill_value) if is_packed or is_of_xarray else None


def _fill_value(value: Any) -> float | None:
    """A number for missing data; of floats in Zarr 3 xarray writes the bytes of a double as base64."""
    if isinstance(value, str):
        with suppress(ValueError, struct.error):
            return float(struct.unpack("<d", base64.b64decode(value, validate=True))[0])
    return _number(value)


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
        if image is not None:
            with suppress(DataError):
                image["has_others"] = open_node(place, str(series + 1)) is not None
    if image is None:
        for kind in ("plate", "well"):
            if kind in ome:
                raise DataError(f"this is a {kind} of many images. Name one of them, for example …/A/1/0.")
        names = []
        with suppress(NotImplementedError):  # behind a URL nothing is listed
            names = [name for name, item in node.arrays() if len(item.shape) > 1]  # coordinates have one axis
        if len(names) == 1:  # as xarray writes an image
            return names[0], open_node(place, names[0]), None
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
    names = tuple("c" if item.get("type") == "channel" else role_of(item["name"]) for item in items)
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
    found = {"version": version, "name": name, "axes": names, "types": types, "units": units, "levels": levels}
    return found | {"has_others": len(images) > 1}


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
