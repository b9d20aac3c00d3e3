"""Zarr arrays and OME-Zarr images as sources: windows of their planes, read by chunks through zarr-python."""

import lzma
import math
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import local
from pixelwise.formats.base import Source, SourceInfo, whole_numbers
from pixelwise.formats.remote import shown
from pixelwise.formats.zarr.ngff import axes_of, inner_path, multiscale_of, ome_of
from pixelwise.formats.zarr.store import Place, open_node, open_place

WORKING_BYTES = 256 * 2**20
"""So much is decompressed at once at most (or one chunk, if that is larger)."""

_KEPT_MASKS = 8


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
    with _readable(shown(location)):
        place = open_place(location)
    try:
        with _readable(place.name):
            return ZarrSource(place, level, series, axes, channels, labels)
    except BaseException as error:
        place.close()
        if isinstance(error, UsageError):
            raise UsageError(f"{place.name}: {error}") from None
        raise


@contextmanager
def _readable(name: str, where: str = "") -> Iterator[None]:
    """As `local.readable`, also for errors that are relatives of no other error."""
    with local.readable(name, where):
        try:
            yield
        except (lzma.LZMAError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            raise ValueError(str(error)) from error


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
        self._axes = axes_of(node.shape, _axis_names(node, image), axes, channels)
        self._planes = [index for index, name in enumerate(self._axes) if name not in ("y", "x", "c")]
        self._gaps = bool(node.dtype.kind == "f" and node.fill_value is not None and np.isnan(node.fill_value))
        self._masks: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        self._lock = threading.Lock()
        self._identity = place.identity(f"{place.top}/{prefix}".strip("/"))
        self.info = self._describe("zarr" if image is None else "ome-zarr")
        self.metadata = _metadata(node, self._axes, image, level, attributes)

    def _describe(self, kind: str) -> SourceInfo:
        sides, dtype = dict(zip(self._axes, self._array.shape, strict=True)), self._array.dtype
        chunks = dict(zip(self._axes, self._array.chunks, strict=True))
        channels = sides.get("c", 1)
        name = "uint8" if dtype.kind == "b" else dtype.newbyteorder("=").name
        if self._labels:
            name = "int64" if dtype.kind == "f" else name
            if channels != 1 and (channels, name) != (3, "uint8"):
                raise DataError(
                    f"it has {channels} channels of {name}; a mask has one channel of whole numbers, or 8-bit RGB."
                )
        planes = math.prod(self._array.shape[axis] for axis in self._planes)
        return SourceInfo(
            location=self._place.name, format=kind, height=sides["y"], width=sides["x"], channels=channels, dtype=name,
            planes=planes, block_px=(min(chunks["y"], sides["y"]), min(chunks["x"], sides["x"])),
        )  # fmt: skip

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window (height, width, C). Where NaN is the fill value of the array, NaN pixels are no data and read as 0."""
        where = f"rows {top}..{top + height}, columns {left}..{left + width}" + f", plane {plane}" * (
            self.info.planes > 1
        )
        with _readable(self.info.location, where):
            window = self._window(top, left, height, width, plane)
            if window.dtype.kind == "f":
                if self._gaps:
                    window[~self._mask(window, (top, left, height, width, plane))] = 0
                bad = int(np.count_nonzero(~np.isfinite(window)))
                if bad:
                    raise DataError(f"{bad:,} of its numbers are NaN or infinite ({where}). Replace them.")
            return whole_numbers(window) if self._labels or window.dtype.kind == "b" else window

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where the window holds numbers; None unless NaN is the fill value of the array."""
        key = (top, left, height, width, plane)
        if not self._gaps or key in self._masks:
            return self._masks.get(key)
        with _readable(self.info.location):
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

    def fingerprint(self) -> str:
        """SHA-256 over names and contents of the files; of large folders over sizes and times, of URLs over tags."""
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        """Raise `DataError` if a chunk or the metadata were changed, added or removed."""
        self._identity.check()

    def close(self) -> None:
        self._place.close()


def _find(place: Place, series: int, labels: bool) -> tuple[str, Any, dict[str, Any] | None]:
    """The image or array that a location means: the path of its group or array, that itself, and the image, if any."""
    node = open_node(place, "")
    if hasattr(node, "shape"):
        return "", node, None
    ome = ome_of(node.attrs.asdict())
    image, path = multiscale_of(node.attrs.asdict(), series), ""
    if image is None and "bioformats2raw.layout" in ome:
        path = str(series)
        try:
            node = open_node(place, path)
        except DataError:
            raise UsageError(f"series {series}: there is no such image in it.") from None
        image = multiscale_of(node.attrs.asdict())
    if image is None:
        for kind in ("plate", "well"):
            if kind in ome:
                raise DataError(f"this is a {kind} of many images. Name one of them, for example …/A/1/0.")
        raise DataError("this is a group of arrays, not an image. Name one of its arrays, or one with multiscales.")
    if labels and "labels" in node:
        folder = f"{path}/labels".lstrip("/")
        names = ome_of(open_node(place, folder).attrs.asdict()).get("labels") or []
        if len(names) > 1:
            choice = ", ".join(f"{folder}/{name}" for name in names)
            raise DataError(f"it has several labels. Name one of them: {choice}.")
        if names:
            path = f"{folder}/{inner_path(names[0])}"
            node = open_node(place, path)
            image = multiscale_of(node.attrs.asdict())
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
    omero = ome_of(attributes).get("omero")
    return found | ({"omero": omero} if isinstance(omero, dict) else {})
