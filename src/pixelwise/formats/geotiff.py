"""GeoTIFF through rasterio: windows of any size, the place on Earth, and where there is no data.

What tells a GeoTIFF from any other TIFF are its tags, which are read without rasterio: where it is not installed, the
answer is what to install, not a picture that has lost its place.
"""

import math
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.files import extra
from pixelwise.formats.base import Opener, Source, SourceInfo
from pixelwise.formats.gdal import Dataset, gdal
from pixelwise.formats.geotiff_write import read_geotiff_mark, write_cog, write_geotiff
from pixelwise.formats.image import whole_numbers
from pixelwise.formats.local import Identity, readable

__all__ = ["GeoTIFF", "is_geotiff", "open_geotiff", "read_geotiff_mark", "write_cog", "write_geotiff"]

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GEO = {  # ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GDAL_METADATA, GDAL_NODATA, RPCCoefficient
    33550, 33922, 34264, 34735, 42112, 42113, 50844,
}  # fmt: skip
_COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 259, 262, 274
_GRAY_OR_RGB, _YCBCR, _JPEG = (0, 1, 2, 3, 32803), 6, (6, 7)
_WHITE_IS_ZERO, _PALETTE = 0, 3
_COLOR_NAMES = {4: "a mask", 5: "CMYK", 6: "YCbCr", 8: "CIELAB", 9: "ICCLAB", 10: "ITULAB"}
_SHORT, _MAX_TAGS, _MAX_TAG_TEXT = 3, 4096, 1 << 16
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def is_geotiff(head: bytes, name: str | os.PathLike[str], opener: Opener | None = None) -> bool:
    """Whether a file is a TIFF with a place on Earth or with GDAL's tags; `opener` gives it where `name` is no path."""
    if head[:4] not in _MAGIC:
        return False
    try:
        with opener() if opener is not None else Path(name).open("rb") as file:
            return not _GEO.isdisjoint(_tags(file))
    except (DataError, OSError, ValueError):
        return False


def open_geotiff(
    location: str, opener: Opener | None = None, *, identity: Identity | None = None, labels: bool = False
) -> "GeoTIFF":
    """Open a GeoTIFF; only its header is read.

    Args:
        location: its path, or the name of what `opener` opens.
        opener: gives a new seekable file object at each call; None opens the path.
        identity: how to tell whether it changed; needed with `opener`.
        labels: read a mask: numbers as they are stored, also of palettes and where there is no data.

    Raises:
        DataError: the file is missing or damaged, has a coordinate system but no transform, or holds what no network
            takes (complex numbers, CMYK), or is no mask.
        UsageError: rasterio is not installed, or an opener is given without an identity.
    """
    extra("rasterio", "geo", "GeoTIFF")
    if opener is None:
        identity = Identity.local(location)
    elif identity is None:
        raise UsageError(f"{location}: whoever opens it must also say how to tell whether it changed (identity).")
    return GeoTIFF(location, opener, cast(Identity, identity), labels)


class GeoTIFF(Source):
    """A GeoTIFF of which windows are read from any number of threads, each with a dataset of its own.

    `metadata` has "crs" (WKT, or None), "transform" (a, b, c, d, e, f: x = a column + b row + c, y = d column + e row + f;
    or None), "gcps", "gcps_crs" and "rpcs" where the file has them, "nodata", "band_names", "colors" and "tags"; and of
    masks "palette".

    A pixel has no data where the file's mask or opacity says so; and by its nodata value: if that is 0, or the numbers are
    unsigned, where all bands have it (0 and 255 are also ordinary values), else where any band has it.
    """

    def __init__(self, location: str, opener: Opener | None, identity: Identity, labels: bool) -> None:
        self._name, self._opener, self._identity, self._labels = location, opener, identity, labels
        self._idle: list[Dataset] = []
        weakref.finalize(self, _close_all, self._idle)  # for those who forget to close it
        self._lock = threading.Lock()
        self._closed = False
        with readable(location), self._file() as file:
            self._photometric = _checked_photometric(_tags(file))
        with self._dataset("header") as dataset:
            self._look(dataset)

    def _look(self, dataset: Any) -> None:
        """Everything that is known without pixels."""
        colors = [color.name for color in dataset.colorinterp]
        self._bands = [band for band, color in enumerate(colors, 1) if color != "alpha"]
        self._alpha = [band for band, color in enumerate(colors, 1) if color == "alpha"]
        dtypes = sorted({dataset.dtypes[band - 1] for band in self._bands})
        if len(dtypes) != 1 or np.dtype(dtypes[0]).kind not in "uif":
            raise DataError(f"its numbers are of type {', '.join(dtypes)}; whole numbers and floats can be used.")
        self._stored, channels = np.dtype(dtypes[0]), len(self._bands)
        bits = str(dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", ""))
        self._bits = min(int(bits) if bits.isdecimal() else 64, 8 * self._stored.itemsize)
        self._masked = any(flag.name == "per_dataset" for flag in dataset.mask_flag_enums[0]) and not self._alpha
        self._nodata = _nodata(dataset.nodata, self._stored)
        metadata, dtype = _metadata(dataset), self._stored.name
        self._colors = _palette(dataset, self._stored) if self._photometric == _PALETTE and channels == 1 else None
        if self._labels:
            if channels != 1 and (channels, dtype) != (3, "uint8"):
                raise DataError(f"it has {channels} bands of {dtype}; a mask has one of integers, or 8-bit RGB.")
            dtype = "int64" if self._stored.kind == "f" else dtype
            if self._colors is not None:
                metadata["palette"] = tuple(map(tuple, self._colors[: 1 << self._bits].tolist()))
                self._colors = None
        elif self._colors is not None:
            channels, dtype = 3, "uint8"
        self.metadata: Mapping[str, Any] = MappingProxyType(metadata)
        self.info = SourceInfo(
            location=self._name,
            format="geotiff",
            height=dataset.height,
            width=dataset.width,
            channels=channels,
            dtype=dtype,
            block_px=dataset.block_shapes[0],
        )

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window as (height, width, C); 0 where the nodata value stands, palettes as RGB, opacity dropped.

        Raises:
            DataError: it cannot be decoded, or holds NaN or infinity that are not declared as nodata.
        """
        window = ((top, top + height), (left, left + width))
        where = f"rows {top}..{top + height}, columns {left}..{left + width}"
        with self._dataset(where) as dataset:
            pixels = np.ascontiguousarray(dataset.read(self._bands, window=window).transpose(1, 2, 0))
            if self._labels:
                return self._as_seen(whole_numbers(pixels))
            empty = self._is_nodata(pixels)
            if self._stored.kind == "f" and not (finite := np.isfinite(pixels)).all():
                bad = ~finite if empty is None else ~finite & ~empty[:, :, None]
                unmasked = self._unmasked(dataset, window) if bad.any() else None
                if count := int(bad.sum() if unmasked is None else bad[unmasked].sum()):
                    raise DataError(
                        f"{count:,} of its numbers in {where} are NaN or infinite, and the file does not declare them as "
                        "nodata. Replace them, or declare them: gdal_edit.py -a_nodata nan FILE."
                    )
                pixels[~finite] = 0
            pixels = self._as_seen(pixels)
            if empty is not None:
                pixels[empty] = 0
            return pixels

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where the window holds data, bool (height, width); None if the image holds data everywhere."""
        if self._nodata is None and not self._alpha and not self._masked:
            return None
        window = ((top, top + height), (left, left + width))
        with self._dataset(f"rows {top}..{top + height}, columns {left}..{left + width}") as dataset:
            valid = self._unmasked(dataset, window)
            if self._nodata is not None:
                empty = self._is_nodata(dataset.read(self._bands, window=window).transpose(1, 2, 0))
                valid = ~empty if valid is None else valid & ~empty  # type: ignore[operator]
        return valid

    def fingerprint(self) -> str:
        """Hexadecimal text that changes when the content does."""
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        """Raise `DataError` if the file has changed since it was opened."""
        self._identity.check()

    def close(self) -> None:
        """Let go of the file; a window that is being read is read to its end."""
        with self._lock:
            self._closed = True
            idle, self._idle[:] = self._idle[:], []
        _close_all(idle)

    def _file(self) -> Any:
        return self._opener() if self._opener is not None else Path(self._name).open("rb")

    @contextmanager
    def _dataset(self, where: str) -> Iterator[Any]:
        """A dataset that no other thread uses meanwhile; what goes wrong with it is a `DataError`."""
        with readable(self._name, where), gdal() as rasterio:
            with self._lock:
                if self._closed:
                    raise DataError("the image is closed.")
                handle = self._idle.pop() if self._idle else None
            if handle is None:
                file = self._file()
                handle = Dataset(rasterio, lambda mode: file, GEOREF_SOURCES="INTERNAL")
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

    def _is_nodata(self, pixels: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Where stored pixels (h, w, bands) have the nodata value, bool (h, w)."""
        if self._nodata is None:
            return None
        equal = np.isnan(pixels) if self._nodata != self._nodata else pixels == self._nodata
        every = self._nodata == 0 or self._stored.kind == "u"
        return equal.all(axis=2) if every else equal.any(axis=2)

    def _unmasked(self, dataset: Any, window: Any) -> NDArray[np.bool_] | None:
        """Where opacity and mask let data through, bool (h, w); None if the file has neither."""
        if self._alpha:
            return (dataset.read(self._alpha, window=window) != 0).all(axis=0)
        return dataset.read_masks(1, window=window) != 0 if self._masked else None

    def _as_seen(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Stored pixels (h, w, bands): palette looked up and black as 0 unless it is a mask, one bit as 0 and 255."""
        if self._colors is not None:
            return self._colors[pixels[:, :, 0]]
        if self._photometric == _WHITE_IS_ZERO and self._stored.kind == "u" and not self._labels:
            pixels = self._stored.type((1 << self._bits) - 1) - pixels
        return pixels * pixels.dtype.type(255) if self._bits == 1 else pixels


def _close_all(handles: list[Dataset]) -> None:
    if handles:
        with gdal():
            while handles:
                handles.pop().close()


def _nodata(value: float | None, dtype: np.dtype[Any]) -> Any:
    """The nodata value as the pixels hold it; None if no pixel of this type can."""
    if value is None:
        return None
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(value)
    limits = np.iinfo(dtype)
    fits = np.isfinite(value) and float(value).is_integer() and limits.min <= int(value) <= limits.max
    return dtype.type(int(value)) if fits else None


def _palette(dataset: Any, dtype: np.dtype[Any]) -> NDArray[np.uint8]:
    """The colours (n, 3) of all indices of this type; black where the file names none."""
    if dtype not in (np.uint8, np.uint16):
        raise DataError(f"its palette has indices of type {dtype}; uint8 and uint16 can be used.")
    table = np.zeros((1 << dtype.itemsize * 8, 3), dtype=np.uint8)
    for index, color in dataset.colormap(1).items():
        table[index] = color[:3]
    return table


def _tags(file: IO[bytes]) -> dict[int, int]:
    """The tags of the first image by their numbers, with their value where it is a single one, else its place."""
    file.seek(0)
    start = file.read(16)
    if start[:4] not in _MAGIC:
        raise DataError("this is no TIFF.")
    order, big = "<" if start[:2] == b"II" else ">", 43 in start[2:4]
    link, length = ("Q", "Q") if big else ("I", "H")
    entry = struct.Struct(f"{order}HH{link}{link}")
    shift = 0 if order == "<" else 48 if big else 16  # of a number of two bytes in the field of a value
    try:
        file.seek(struct.unpack_from(order + link, start, 8 if big else 4)[0])
        (count,) = struct.unpack(order + length, file.read(struct.calcsize(length)))
        entries = file.read(min(count, _MAX_TAGS) * entry.size)
        if not 0 < count <= _MAX_TAGS or len(entries) < count * entry.size:
            raise DataError("its tags are damaged or cut off.")
    except (struct.error, OverflowError) as error:
        raise DataError("its tags are damaged or cut off.") from error
    return {
        number: value >> shift & 0xFFFF if (kind, values) == (_SHORT, 1) else value
        for number, kind, values, value in entry.iter_unpack(entries)
    }


def _checked_photometric(tags: Mapping[int, int]) -> int:
    """The photometric interpretation of pixels that can be used as they are: grey, RGB or a palette, and not turned."""
    photometric, compression, turned = (tags.get(tag, 1) for tag in (_PHOTOMETRIC, _COMPRESSION, _ORIENTATION))
    if photometric not in _GRAY_OR_RGB and not (photometric == _YCBCR and compression in _JPEG):
        name = _COLOR_NAMES.get(photometric, f"interpretation {photometric}")
        raise DataError(f"its colours are stored as {name}. Convert it to RGB or grey.")
    if turned not in (0, 1):
        raise DataError(
            f"its Orientation tag is {turned}, which would turn the pixels but not their place on Earth. Turn it for good "
            "(gdalwarp IN OUT), or remove that tag."
        )
    return photometric


def _metadata(dataset: Any) -> dict[str, Any]:
    """What an open rasterio dataset says besides its pixels, as plain values that JSON and other processes take.

    Raises:
        DataError: there is a coordinate system without a transform, or the transform cannot be turned round.
    """
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
