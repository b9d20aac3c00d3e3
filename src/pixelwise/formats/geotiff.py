"""GeoTIFF through rasterio: windows of any size, the place on Earth, and where there is no data.

What tells a GeoTIFF from any other TIFF, and how its numbers become pixels, its tags say, which are read without rasterio:
where that is not installed, the answer is what to install, not a picture that has lost its place.
"""

import math
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.files import extra
from pixelwise.formats.base import Opener
from pixelwise.formats.gdal import Dataset, gdal
from pixelwise.formats.local import DECODE_ERRORS, Identity, readable
from pixelwise.formats.tiff.read import MAGIC, PLAIN, Rendering, TiffSource
from pixelwise.formats.tiff.windows import Span, identity_of

_GEO = {  # ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GDAL_METADATA, GDAL_NODATA, RPCCoefficient
    33550, 33922, 34264, 34735, 42112, 42113, 50844,
}  # fmt: skip
_MAX_TAGS, _MAX_TAG_TEXT = 4096, 1 << 16
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def is_geotiff(head: bytes, name: str | os.PathLike[str], opener: Opener | None = None) -> bool:
    """Whether a file is a TIFF with a place on Earth or with GDAL's tags; `opener` gives it where `name` is no path."""
    if head[:4] not in MAGIC:
        return False
    order, is_big = "<" if head[:2] == b"II" else ">", b"+" in head[2:4]
    start, link, length, entry = (8, "Q", "Q", 20) if is_big else (4, "I", "H", 12)
    try:
        with opener() if opener is not None else Path(name).open("rb") as file:
            file.seek(struct.unpack_from(order + link, head, start)[0])
            (count,) = struct.unpack(order + length, file.read(struct.calcsize(length)))
            entries = file.read(min(count, _MAX_TAGS) * entry)
        return any(struct.unpack_from(order + "H", entries, at)[0] in _GEO for at in range(0, len(entries), entry))
    except DECODE_ERRORS:
        return False


def open_geotiff(
    location: str, opener: Opener | None = None, *, identity: Identity | None = None, labels: bool = False
) -> "GeoTIFF":
    """Open a GeoTIFF by its path, or by what opens it anew at each call; only its header is read."""
    extra("rasterio", "geo", "GeoTIFF")
    identity = identity_of(location, opener, identity)
    with readable(location):
        file = Datasets(opener or cast(Opener, partial(Path(location).open, "rb")), identity)
        with (
            file.opener() as stream,
            tifffile.TiffFile(stream, name="tiff", **PLAIN) as tiff,
            file.borrowed() as dataset,
        ):
            return GeoTIFF(location, file, tiff.pages.first, dataset, labels)


class Datasets:
    """A GeoTIFF that any number of threads read, each with a dataset of its own."""

    def __init__(self, opener: Opener, identity: Identity) -> None:
        self.opener, self.identity = opener, identity
        self._idle: list[Dataset] = []
        weakref.finalize(self, _close_all, self._idle)  # for those who forget to close it
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def borrowed(self) -> Iterator[Any]:
        """A dataset that no other thread uses meanwhile."""
        with gdal() as rasterio:
            with self._lock:
                if self._closed:
                    raise DataError("the image is closed.")
                handle = self._idle.pop() if self._idle else None
            handle = handle or Dataset(rasterio, lambda mode: cast(Any, self.opener()), GEOREF_SOURCES="INTERNAL")
            try:
                yield handle.dataset
            finally:
                with self._lock:
                    keep = not self._closed and not handle.has_failed
                    if keep:
                        self._idle.append(handle)
                if not keep:
                    handle.close()
                handle.check()

    def close(self) -> None:
        """Let go of the file; a window that is being read is read to its end."""
        with self._lock:
            self._closed = True
            idle, self._idle[:] = self._idle[:], []
        _close_all(idle)


def _close_all(handles: list[Dataset]) -> None:
    if handles:
        with gdal():
            while handles:
                handles.pop().close()


class GeoTIFF(TiffSource):
    """A GeoTIFF, whose pixels GDAL decodes.

    `metadata` has "crs" (WKT, or None), "transform" (a, b, c, d, e, f: x = a column + b row + c, y = d column + e row + f;
    or None), "gcps", "gcps_crs" and "rpcs" where the file has them, "nodata", "band_names", "colors", "tags" and "palette".
    A pixel has data where the file's mask, opacity and nodata value all say so.
    """

    def __init__(self, location: str, file: Datasets, page: Any, dataset: Any, labels: bool) -> None:
        colors = [color.name for color in dataset.colorinterp]
        self._bands = [band for band, color in enumerate(colors, 1) if color != "alpha"]
        self._alpha = [band for band, color in enumerate(colors, 1) if color == "alpha"]
        self._has_mask = any(flag.name == "per_dataset" for flag in dataset.mask_flag_enums[0])
        rendering = Rendering.of(page, np.dtype(dataset.dtypes[self._bands[0] - 1]), len(self._bands), labels)
        if rendering.orientation not in (0, 1):
            raise DataError(
                f"its Orientation tag is {rendering.orientation}, which would turn the pixels but not their place on Earth. "
                "Turn it for good (gdalwarp IN OUT), or remove that tag."
            )
        info = rendering.info(location, "geotiff", (1, dataset.height, dataset.width), dataset.block_shapes[0])
        super().__init__(file, self._decoded, rendering, info, _metadata(dataset) | rendering.metadata)

    def _decoded(self, plane: int, rows: Span, columns: Span) -> NDArray[Any]:
        with self._file.borrowed() as dataset:
            return np.asarray(dataset.read(self._bands, window=(rows, columns)).transpose(1, 2, 0))

    def _unmasked(self, plane: int, rows: Span, columns: Span) -> NDArray[np.bool_] | None:
        if not self._alpha and not self._has_mask:
            return None
        with self._file.borrowed() as dataset:
            if self._alpha:
                return np.asarray((dataset.read(self._alpha, window=(rows, columns)) != 0).all(axis=0))
            return np.asarray(dataset.read_masks(1, window=(rows, columns)) != 0)


def _metadata(dataset: Any) -> dict[str, Any]:
    """What a dataset says besides its pixels; `DataError` if its place is unknown or its transform cannot be inverted."""
    gcps, gcps_crs = dataset.gcps
    rpcs = _texts(dataset, ns="RPC")
    transform = tuple(float(value) for value in tuple(dataset.transform)[:6])
    has_place = transform != _IDENTITY
    if dataset.crs and not (has_place or gcps or rpcs):
        raise DataError(
            f"it has a coordinate system ({dataset.crs.to_string()[:80]}) but no transform, so where its pixels lie is "
            "unknown. Add it (gdal_edit.py -a_ullr LEFT TOP RIGHT BOTTOM FILE), or remove the coordinate system "
            "(gdal_edit.py -a_srs None FILE)."
        )
    if not all(map(math.isfinite, transform)) or transform[0] * transform[4] == transform[1] * transform[3]:
        raise DataError(
            f"its transform {transform} gives pixels no place or no area. Correct it: gdal_edit.py -a_ullr LEFT TOP RIGHT "
            "BOTTOM FILE."
        )
    metadata = {
        "crs": dataset.crs.to_wkt() if dataset.crs else None,
        "transform": transform if has_place else None,
        "nodata": dataset.nodata,
        "band_names": _names(dataset),
        "colors": tuple(color.name for color in dataset.colorinterp),
        "tags": _texts(dataset),
    }
    if gcps:
        metadata["gcps"] = tuple((gcp.row, gcp.col, gcp.x, gcp.y, gcp.z) for gcp in gcps)
        metadata["gcps_crs"] = gcps_crs.to_wkt() if gcps_crs else None
    return metadata | ({"rpcs": rpcs} if rpcs else {})


def _texts(dataset: Any, **where: Any) -> dict[str, str]:
    """Tags of a domain that are UTF-8, as GDAL has them; older programs wrote other text, of which nobody knows which."""
    try:
        tags = dataset.tags(**where)
    except UnicodeDecodeError:
        return {}
    return {str(key): str(value) for key, value in tags.items() if len(str(value)) <= _MAX_TAG_TEXT}


def _names(dataset: Any) -> tuple[str, ...]:
    try:
        return tuple(name or "" for name in dataset.descriptions)
    except UnicodeDecodeError:
        return ("",) * dataset.count
