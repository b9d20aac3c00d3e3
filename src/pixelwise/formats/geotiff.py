"""GeoTIFF through rasterio: windows of any size, the place on Earth, and where there is no data.

What tells a GeoTIFF from any other TIFF are its tags, which are read without rasterio: where it is not installed, the
answer is what to install, not a picture that has lost its place.
"""

import io
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.files import extra
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.blocks import Opener
from pixelwise.formats.gdal import Handle, gdal
from pixelwise.formats.geotiff_tags import check_tags, geo_metadata, is_geo, read_tags
from pixelwise.formats.local import Identity, readable
from pixelwise.formats.raster import MAX_DECODED_BYTES
from pixelwise.formats.tiff import MAGIC

__all__ = ["GeoTIFF", "is_geotiff", "open_geotiff"]

_BOMB_BYTES, _BLOCK_RATIO = 64 * 2**20, 4096  # below these no claim is too bold
_SPARSE_RATIO = 2**20  # tiles that were left out take 8 or 16 bytes each
_BITS = [str(bits) for bits in range(1, 65)]


def is_geotiff(head: bytes, name: str | os.PathLike[str], opener: Opener | None = None) -> bool:
    """Whether a file is a TIFF with a place on Earth or with GDAL's tags; never raises.

    Args:
        head: its first bytes; often the tags lie there, else they are looked up in the file.
        name: its path.
        opener: gives the file where `name` is not a local path.

    Example:
        >>> is_geotiff(b"II*\\0", "no/such.tif")
        False
    """
    if head[:4] not in MAGIC:
        return False
    try:
        return is_geo(read_tags(io.BytesIO(head)))
    except DataError:
        pass  # they lie further back
    try:
        with opener() if opener is not None else Path(name).open("rb") as file:
            return is_geo(read_tags(file))
    except (DataError, OSError, ValueError):
        return False


def open_geotiff(location: str, opener: Opener | None = None, *, identity: Identity | None = None) -> "GeoTIFF":
    """Open a GeoTIFF; only its header is read.

    Args:
        location: its path, or the name of what `opener` opens.
        opener: gives a new seekable file object at each call; None opens the path.
        identity: how to tell whether it changed; needed with `opener`.

    Raises:
        DataError: the file is missing or damaged, has a coordinate system but no transform, or holds what no network
            takes (complex numbers, CMYK).
        UsageError: rasterio is not installed, or an opener is given without an identity.

    Example:
        >>> import tempfile
        >>> from pixelwise.formats.gdal import gdal
        >>> path = Path(tempfile.mkdtemp()) / "field.tif"
        >>> kind = {"width": 5, "height": 4, "count": 1, "dtype": "uint8", "crs": "EPSG:32633", "nodata": 0}
        >>> with gdal() as rasterio, rasterio.open(
        ...     path, "w", driver="GTiff", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), **kind
        ... ) as file:
        ...     file.write(np.arange(20, dtype=np.uint8).reshape(1, 4, 5))
        >>> with open_geotiff(str(path)) as image:
        ...     image.read(1, 2, 2, 2)[:, :, 0].tolist(), bool(image.valid(0, 0, 1, 1)[0, 0]), image.metadata["transform"]
        ([[7, 8], [12, 13]], False, (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0))
    """
    extra("rasterio", "geo", "GeoTIFF")
    if opener is None:
        identity = Identity.local(location)
    elif identity is None:
        raise UsageError(f"{location}: whoever opens it must also say how to tell whether it changed (identity).")
    return GeoTIFF(location, opener, cast(Identity, identity))


class GeoTIFF(Source):
    """A GeoTIFF of which windows are read from any number of threads, each with a handle of its own.

    `metadata` has "crs" (WKT, or None), "transform" (a, b, c, d, e, f: x = a column + b row + c, y = d column + e row + f;
    or None), "gcps", "gcps_crs" and "rpcs" where the file has them, "nodata", "band_names", "colors" and "tags".

    A pixel has no data where the file's mask or opacity says so; and by its nodata value: if that is 0, or the numbers are
    unsigned, where all bands have it (0 and 255 are also ordinary values), else where any band has it.
    """

    def __init__(self, location: str, opener: Opener | None, identity: Identity) -> None:
        self._opener, self._identity = opener, identity
        self._idle: list[Handle] = []
        weakref.finalize(self, _close_all, self._idle)  # for those who forget to close it
        self._lock = threading.Lock()
        self._closed = False
        self._name = location
        with readable(location), self._file() as file:
            self._photometric = check_tags(file)
            self._size = file.seek(0, os.SEEK_END)
        try:
            with self._dataset("header") as dataset:
                self._look(dataset)
        except BaseException:
            self.close()
            raise

    def _look(self, dataset: Any) -> None:
        """Everything that is known without pixels."""
        colors = [color.name for color in dataset.colorinterp]
        self._bands = [band for band, color in enumerate(colors, 1) if color != "alpha"]
        self._alpha = [band for band, color in enumerate(colors, 1) if color == "alpha"]
        dtypes = {dataset.dtypes[band - 1] for band in self._bands}
        if len(dtypes) != 1 or np.dtype(next(iter(dtypes))).kind not in "uif":
            raise DataError(
                f"its numbers are of type {', '.join(sorted(dtypes))}; whole numbers and floats can be used."
            )
        self._stored = np.dtype(next(iter(dtypes)))
        self._check_size(dataset)
        bits = str(dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", ""))
        self._bits = min(int(bits), 8 * self._stored.itemsize) if bits in _BITS else 8 * self._stored.itemsize
        self._palette = _palette(dataset, self._bits) if self._photometric == 3 and len(self._bands) == 1 else None
        self._masked = any(flag.name == "per_dataset" for flag in dataset.mask_flag_enums[0]) and not self._alpha
        self._nodata = _nodata(dataset.nodata, self._stored)
        self.metadata: Mapping[str, Any] = MappingProxyType(geo_metadata(dataset))
        self.info = SourceInfo(
            location=self._name,
            format="geotiff",
            height=dataset.height,
            width=dataset.width,
            channels=len(self._bands) if self._palette is None else 3,
            dtype=self._stored.name if self._palette is None else "uint8",
            block_px=dataset.block_shapes[0],
        )

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window as (height, width, C); 0 where the nodata value stands, palettes as RGB, opacity dropped.

        Raises:
            DataError: it cannot be decoded, or holds NaN or infinity that are not declared as nodata.
        """
        where = f"rows {top}..{top + height}, columns {left}..{left + width}"
        with self._dataset(where) as dataset:
            window = _window(top, left, height, width)
            pixels = np.ascontiguousarray(dataset.read(self._bands, window=window).transpose(1, 2, 0))
            empty = self._is_nodata(pixels)
            if self._stored.kind == "f" and not (finite := np.isfinite(pixels)).all():
                self._refuse(~finite if empty is None else ~finite & ~empty[:, :, None], dataset, window, where)
                pixels[~finite] = 0
            pixels = self._meant(pixels)
            if empty is not None:
                pixels[empty] = 0
            return pixels

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where the window holds data, bool (height, width); None if the image holds data everywhere."""
        if self._nodata is None and not self._alpha and not self._masked:
            return None
        window = _window(top, left, height, width)
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
            handle = handle or Handle(rasterio, self._file())
            try:
                yield handle.dataset
            finally:
                with self._lock:
                    keep = not self._closed and handle.is_whole
                    if keep:
                        self._idle.append(handle)
                if not keep:
                    handle.close()
                handle.check()

    def _check_size(self, dataset: Any) -> None:
        """Refuse what claims far more than its bytes can hold, or stores more in a block than memory should take."""
        one = self._stored.itemsize * dataset.count
        block = int(np.prod(dataset.block_shapes[0], dtype=np.int64)) * one
        if block > MAX_DECODED_BYTES:
            raise DataError(
                f"each of its blocks takes {block / 2**30:,.1f} GiB when decoded; at most {MAX_DECODED_BYTES >> 30} GiB are "
                "read. Store it in tiles: gdal_translate -co TILED=YES."
            )
        wanted = dataset.height * dataset.width * one
        if wanted > max(_BOMB_BYTES, _SPARSE_RATIO * self._size) or block > max(_BOMB_BYTES, _BLOCK_RATIO * self._size):
            raise DataError(
                f"it says it takes {max(wanted, block):,} bytes when decoded, which {self._size:,} bytes cannot hold."
            )

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

    def _refuse(self, bad: NDArray[np.bool_], dataset: Any, window: Any, where: str) -> None:
        """Raise `DataError` if any of these numbers (h, w, bands), which are none, is not masked."""
        unmasked = self._unmasked(dataset, window) if bad.any() else None
        count = int(bad.sum() if unmasked is None else bad[unmasked].sum())
        if count:
            raise DataError(
                f"{count:,} of its numbers in {where} are NaN or infinite, and the file does not declare them as nodata. "
                "Replace them, or declare them: gdal_edit.py -a_nodata nan FILE."
            )

    def _meant(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Stored pixels (h, w, bands) as they are meant to be seen: palette looked up, black as 0, one bit as 0 and 255."""
        if self._palette is not None:
            return self._palette[pixels[:, :, 0]]
        if self._photometric == 0 and self._stored.kind == "u":
            pixels = self._stored.type((1 << self._bits) - 1) - pixels
        return pixels * self._stored.type(255) if self._bits == 1 else pixels


def _close_all(handles: list[Handle]) -> None:
    if handles:
        with gdal():
            while handles:
                handles.pop().close()


def _window(top: int, left: int, height: int, width: int) -> Any:
    return ((top, top + height), (left, left + width))


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


def _palette(dataset: Any, bits: int) -> NDArray[np.uint8]:
    """The colours (n, 3) of all indices that these bits can hold; black where the file names none."""
    if bits > 16 or np.dtype(dataset.dtypes[0]).kind != "u":
        raise DataError(f"its palette has indices of type {dataset.dtypes[0]}; they have at most 16 bits.")
    table = np.zeros((1 << np.dtype(dataset.dtypes[0]).itemsize * 8, 3), dtype=np.uint8)
    for index, color in dataset.colormap(1).items():
        table[index] = color[:3]
    return table
