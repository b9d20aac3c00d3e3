"""Zarr arrays (versions 2 and 3) and OME-Zarr images (NGFF 0.1 to 0.5), local, zipped or behind a URL, read by chunks.

Metadata and chunks are foreign input: `zarr_arrays` judges both before zarr-python decodes them.
"""

import itertools
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.files import extra
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.ngff import Axes, Multiscale, axes_of, inner_path, multiscale_of, ome_of
from pixelwise.formats.zarr_arrays import ArrayPlan, plan_v2, plan_v3
from pixelwise.formats.zarr_folders import Folder, open_folder, readable
from pixelwise.formats.zarr_store import open_array

MAX_DOCUMENT_BYTES = 64 * 2**20
WORKING_BYTES = 256 * 2**20
"""So much is decompressed at once at most (or one chunk, if that is larger)."""

_KEPT_MASKS = 8


def open_zarr(
    location: str, *, level: int = 0, series: int = 0, axes: str | None = None, channels: int | None = None
) -> "ZarrSource":
    """Open an array or an image.

    Rows, columns and channels are found by the names that the file gives its axes. An array without names is (H, W),
    (H, W, C) or (C, H, W) with up to four channels, else a stack of planes. All other axes (z, t) are planes, in order.

    Args:
        location: a folder, a ZIP archive of one, or its URL.
        level: of the pyramid of an OME-Zarr image; 0 is the finest.
        series: the number of the image where a file holds several.
        axes: one letter for each axis, which overrules the file: "zyx", "yxc", "tczyx".
        channels: how many the network takes; decides where a plain array leaves open what its axes are.

    Raises:
        DataError: there is no such array, or it is damaged, or cannot be used.
        UsageError: there is no such level or series, `axes` do not fit, or zarr is not installed.

    Example:
        >>> import tempfile, zarr
        >>> path = tempfile.mkdtemp() + "/a.zarr"
        >>> zarr.save_array(path, np.arange(35, dtype=np.uint8).reshape(5, 7))
        >>> with open_zarr(path) as source:
        ...     source.info.height, source.info.width, source.read(1, 2, 2, 2)[..., 0].tolist()
        (5, 7, [[9, 10], [16, 17]])
    """
    for name, value in (("level", level), ("series", series)):
        if value < 0:
            raise UsageError(f"{name} {value}: levels and series are counted from 0.")
    extra("zarr", "zarr", "Zarr")
    folder = open_folder(location)
    try:
        with readable(folder.name):
            try:
                return ZarrSource(folder, level=level, series=series, axes=axes, channels=channels)
            except UsageError as error:  # no fault of the file
                wrong = str(error)
        raise UsageError(f"{folder.name}: {wrong}")
    except BaseException:
        folder.close()
        raise


class ZarrSource(Source):
    """An array of numbers in chunks; see `open_zarr`."""

    def __init__(
        self, folder: Folder, *, level: int = 0, series: int = 0, axes: str | None = None, channels: int | None = None
    ) -> None:
        self._folder = folder
        image, prefix, attributes = _find(folder, series)
        names: tuple[str | None, ...] | None = None
        path = prefix
        if image is not None:
            if level >= len(image.levels):
                count = len(image.levels)
                raise UsageError(f"level {level}: the image has {count} (0..{count - 1}).")
            path = f"{prefix}/{image.levels[level].path}".lstrip("/")
        elif level or series:
            raise UsageError("this is a plain array; it has level 0 and series 0 only.")
        self._path = path
        self._plan, own = _array(folder, path)
        names = image.axes if image is not None else self._plan.names or own.get("_ARRAY_DIMENSIONS")
        if image is not None and not names and len(self._plan.shape) == 5:
            names = ("t", "c", "z", "y", "x")
        self._axes = axes_of(self._plan.shape, names if isinstance(names, tuple | list) else None, axes, channels)
        self._array = open_array(folder, path, self._plan)
        self._masks: OrderedDict[tuple[int, ...], NDArray[np.bool_]] = OrderedDict()
        self._lock = threading.Lock()
        self._state = folder.state(path)
        self.info = self._describe("zarr" if image is None else "ome-zarr")
        self.metadata = MappingProxyType(_metadata(self._plan, self._axes, image, level, attributes))

    def _describe(self, kind: str) -> SourceInfo:
        shape, axes = self._plan.shape, self._axes
        block = (self._plan.chunks[axes.y], self._plan.chunks[axes.x])
        return SourceInfo(
            location=self._folder.name,
            format=kind,
            height=shape[axes.y],
            width=shape[axes.x],
            channels=1 if axes.c is None else shape[axes.c],
            dtype="uint8" if self._plan.dtype == bool else self._plan.dtype.name,
            planes=math.prod(shape[axis] for axis in axes.planes),
            block_px=(min(block[0], shape[axes.y]), min(block[1], shape[axes.x])),
        )

    @property
    def _has_gaps(self) -> bool:
        fill = self._plan.fill
        return self._plan.dtype.kind == "f" and isinstance(fill, float) and math.isnan(fill)

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window (height, width, C). Where NaN is the fill value of the array, NaN pixels are no data and read as 0.

        Raises:
            DataError: a chunk is damaged or cannot be fetched, or the window holds NaN or infinity.
        """
        where = f"rows {top}..{top + height}, columns {left}..{left + width}" + f", plane {plane}" * (
            self.info.planes > 1
        )
        with readable(self._folder.name, where):
            window = self._window(top, left, height, width, plane)
            if window.dtype == bool:
                return window.astype(np.uint8) * np.uint8(255)
            if window.dtype.kind != "f":
                return window
            bad = ~np.isfinite(window)
            if self._has_gaps:
                gaps = np.isnan(window).any(axis=2)
                self._remember((top, left, height, width, plane), ~gaps)
                window[gaps] = 0
                bad &= ~gaps[:, :, None]
            if bad.any():
                raise DataError(f"{int(bad.sum()):,} of its numbers are NaN or infinite ({where}). Replace them.")
            return window

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where the window holds numbers; None unless NaN is the fill value of the array."""
        if not self._has_gaps:
            return None
        key = (top, left, height, width, plane)
        with self._lock:
            known = self._masks.get(key)
        if known is None:
            with readable(self._folder.name):
                known = ~np.isnan(self._window(*key)).any(axis=2)
        return known

    def _remember(self, key: tuple[int, ...], mask: NDArray[np.bool_]) -> None:
        with self._lock:
            self._masks[key] = mask
            while len(self._masks) > _KEPT_MASKS:
                self._masks.popitem(last=False)

    def _window(self, top: int, left: int, height: int, width: int, plane: int) -> NDArray[Any]:
        """The window (height, width, C), as stored, a few chunks at a time."""
        axes, plan = self._axes, self._plan
        place = np.unravel_index(plane, tuple(plan.shape[axis] for axis in axes.planes)) if axes.planes else ()
        channels = self.info.channels
        out = np.empty((height, width, channels), dtype=plan.dtype)
        order = [axis for axis in (axes.y, axes.x, axes.c) if axis is not None]
        spans = [(top, top + height), (left, left + width), (0, channels)][: len(order)]
        for part in _parts(spans, [plan.chunks[axis] for axis in order], plan.chunk_bytes):
            index: list[int | slice] = [0] * len(plan.shape)
            for axis, at in zip(axes.planes, place, strict=True):
                index[axis] = int(at)
            for axis, (start, stop) in zip(order, part, strict=True):
                index[axis] = slice(start, stop)
            piece = np.asarray(self._array[tuple(index)])
            kept = sorted(order)  # the axes of `piece`
            piece = piece.transpose([kept.index(axis) for axis in order])
            rows, columns = (
                (start - origin, stop - origin) for (start, stop), origin in zip(part, (top, left), strict=False)
            )
            low, high = part[2] if len(part) == 3 else (0, 1)
            out[slice(*rows), slice(*columns), low:high] = piece if piece.ndim == 3 else piece[:, :, None]
        return out

    def fingerprint(self) -> str:
        """SHA-256 over names and contents of the files; of large folders over sizes and times, of URLs over tags."""
        with readable(self._folder.name):
            return self._folder.fingerprint(self._path)

    def check_unchanged(self) -> None:
        """Raise `DataError` if a chunk or the metadata were changed, added or removed."""
        with readable(self._folder.name):
            if self._folder.state(self._path) != self._state:
                raise DataError("the array changed while it was read. Run again when nothing writes to it.")

    def close(self) -> None:
        """Let go of the files."""
        self._folder.close()


def _parts(spans: list[tuple[int, int]], chunks: list[int], chunk_bytes: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Cut a window along the chunks so that each part needs few of them."""
    counts = [(stop - 1) // size - start // size + 1 for (start, stop), size in zip(spans, chunks, strict=True)]
    if math.prod(counts) * chunk_bytes <= WORKING_BYTES:
        yield tuple(spans)
        return
    cuts = []
    budget = max(WORKING_BYTES // chunk_bytes, 1)  # chunks in one part
    for (start, stop), size, count in reversed(list(zip(spans, chunks, counts, strict=True))):
        step = min(count, budget) * size
        budget = max(budget // count, 1)
        edges = [start, *range((start // size) * size + step, stop, step), stop]
        cuts.append(list(itertools.pairwise(edges)))
    yield from itertools.product(*reversed(cuts))


def _find(folder: Folder, series: int) -> tuple[Multiscale | None, str, dict[str, Any]]:
    """The image or array that a location means: (image or None, path of its group or array, attributes)."""
    node, attributes = _node(folder, "")
    if node == "array":
        return None, "", attributes
    image = multiscale_of(attributes, series)
    if image is not None:
        return image, "", attributes
    ome = ome_of(attributes)
    if "bioformats2raw.layout" in ome:
        path = str(series)
        node, inner = _node(folder, path) if _exists(folder, path) else ("", {})
        found = multiscale_of(inner) if node else None
        if found is None:
            raise UsageError(f"series {series}: there is no such image in it.")
        return found, path, inner
    for kind in ("plate", "well"):
        if kind in ome:
            raise DataError(f"this is a {kind} of many images. Name one of them, for example …/A/1/0.")
    raise DataError("this is a group of arrays, not an image. Name one of its arrays, or one with multiscales.")


def _exists(folder: Folder, path: str) -> bool:
    return any(folder.read(f"{path}/{name}", 0, 1) is not None for name in ("zarr.json", ".zgroup"))


def _node(folder: Folder, path: str) -> tuple[str, dict[str, Any]]:
    """Whether an "array" or a "group" lies at a path, and its attributes.

    Raises:
        DataError: neither does.
    """
    new = _document(folder, path, "zarr.json")
    if new is not None:
        kind, attributes = new.get("node_type"), new.get("attributes") or {}
        if kind not in ("array", "group") or not isinstance(attributes, dict):
            raise DataError("its zarr.json describes neither an array nor a group.")
        return str(kind), attributes
    attributes = _document(folder, path, ".zattrs") or {}
    for name, kind in ((".zarray", "array"), (".zgroup", "group")):
        if _document(folder, path, name) is not None:
            return kind, attributes
    raise DataError("there is no Zarr array or group (no zarr.json, .zarray or .zgroup).")


def _array(folder: Folder, path: str) -> tuple[ArrayPlan, dict[str, Any]]:
    """The judged metadata of the array at a path, and its attributes."""
    node, attributes = _node(folder, path)
    if node != "array":
        raise DataError(f"its level {path!r} is a group, not an array.")
    new = _document(folder, path, "zarr.json")
    return (plan_v3(new) if new is not None else plan_v2(_document(folder, path, ".zarray"))), attributes


def _document(folder: Folder, path: str, name: str) -> dict[str, Any] | None:
    key = f"{inner_path(path)}/{name}" if path else name
    data = folder.read(key, 0, MAX_DOCUMENT_BYTES + 1)
    if data is None:
        return None
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DataError(f"its {key} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB.")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"its {key} is no JSON, so it is damaged or truncated.") from error
    if not isinstance(value, dict):
        raise DataError(f"its {key} is not a mapping.")
    return value


def _metadata(
    plan: ArrayPlan, axes: Axes, image: Multiscale | None, level: int, attributes: dict[str, Any]
) -> dict[str, Any]:
    """What the writer of the same format keeps."""
    found: dict[str, Any] = {
        "zarr_format": plan.zarr_format,
        "axes": axes.names,
        "sizes": {axes.names[axis]: plan.shape[axis] for axis in axes.planes},
    }
    if image is None:
        return found
    chosen = image.levels[level]
    ome = ome_of(attributes)
    found |= {"ngff_version": image.version, "name": image.name, "level": level, "levels": len(image.levels)}
    found |= {"types": dict(image.types), "units": dict(image.units)}
    for key in ("scale", "translation"):
        values = getattr(chosen, key)
        found[key] = dict(zip(axes.names, values, strict=True)) if len(values) == len(axes.names) else {}
    if isinstance(ome.get("omero"), dict):
        found["omero"] = ome["omero"]
    return found
