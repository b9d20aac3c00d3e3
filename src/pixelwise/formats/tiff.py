"""TIFF, BigTIFF and OME-TIFF of any size, window by window, through tifffile.

What the pixels mean (palette, WhiteIsZero, opacity, orientation) is as `read_image` has it. Of a file with several
images the first is read, at its full resolution; a stack of equal pages gives planes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.blocks import Bytes, FileView, Opener, local_opener
from pixelwise.formats.local import Identity, readable
from pixelwise.formats.ome import Ome, read_ome
from pixelwise.formats.raster import Raster, orient
from pixelwise.formats.readers import meant
from pixelwise.formats.tiff_decode import MAGIC, PLAIN, count_pages, page_header, quiet
from pixelwise.formats.tiff_layout import arrange, tag_metadata
from pixelwise.formats.tiff_pages import Part
from pixelwise.formats.tiff_series import SeriesReader

_NODATA_TAG = 42113  # GDAL's
_MAX_LEVELS = 64
_SPARSE_RATIO = 2**20  # tiles that were left out take 8 or 16 bytes each


def is_tiff(head: bytes, name: str) -> bool:
    """Whether a file that begins with `head` is a TIFF or BigTIFF, whatever its name.

    Example:
        >>> is_tiff(b"II*\\0....", "scan.png")
        True
    """
    return head[:4] in MAGIC


def open_tiff(
    location: str,
    opener: Opener | None = None,
    *,
    identity: Identity | None = None,
    channels: int | None = None,
) -> "TiffSource":
    """Open a TIFF; only its tags are read.

    Args:
        location: path, or the name of what `opener` opens.
        opener: opens the file anew at each call, for reading, seekable; None opens the path.
        identity: how to tell whether it changed; needed with `opener`.
        channels: how many the network takes; decides where a file leaves open whether a stack of pages is channels or
            planes.

    Raises:
        DataError: it is missing, damaged, or of a kind that cannot be read in windows.
        UsageError: an opener without an identity.

    Example:
        >>> import tempfile
        >>> path = str(Path(tempfile.mkdtemp()) / "a.tif")
        >>> tifffile.imwrite(path, np.arange(12, dtype=np.uint8).reshape(3, 4))
        >>> with open_tiff(path) as source:
        ...     source.read(1, 2, 2, 2)[:, :, 0].tolist()
        [[6, 7], [10, 11]]
    """
    if opener is None:
        identity = Identity.local(location)
    elif identity is None:
        raise UsageError(f"{location}: whoever opens it must also say how to tell whether it changed (identity).")
    with readable(location), quiet():
        file = Bytes(opener or local_opener(location))
        try:
            return TiffSource(location, file, cast(Identity, identity), channels)
        except BaseException:
            file.close()
            raise


class TiffSource(Source):
    """The first image, or stack of images, of a TIFF; made by `open_tiff`.

    Attributes:
        metadata: where the file knows them: "resolution" (pixels per unit, x and y), "resolution_unit", "pixel_size_um",
            "channel_names", "image_name", "time_increment_s", "plane_axes" (as "TZ") and "plane_shape", "nodata".
        cache_bytes: the most that decoded blocks take in memory.
    """

    def __init__(self, location: str, file: Bytes, identity: Identity, channels: int | None) -> None:
        if not file.size:
            raise DataError("the file is empty (0 bytes).")
        self._location, self._file, self._identity = location, file, identity
        pages = count_pages(cast(BinaryIO, FileView(file)))
        ome = self._describe(pages)
        self._tiff = self._open(None if ome is None else ome.layout)
        first = self._tiff.pages.first
        copies = 0 if first.subifds is None else len(first.subifds)
        if copies > _MAX_LEVELS:
            raise DataError(f"it says it has {copies:,} smaller copies of its image.")
        single = pages == 1 and ome is None and not self._tiff.is_shaped and not self._tiff.is_imagej
        series = first if single else self._tiff.series[0]
        self._page = getattr(series, "keyframe", series)
        self._layout = arrange(series.axes, tuple(series.shape), channels)
        planes, height, width, stored = self._layout.size
        self._header = page_header(self._page, np.dtype(series.dtype), height, width, stored)
        self._check_size(file.size)
        self._series = SeriesReader(file, series, self._layout, pages)
        self.cache_bytes, block = self._series.cache_bytes, self._series.block
        self._nodata = _nodata(self._page)
        turned = self._header.orientation in (5, 6, 7, 8)
        self.info = SourceInfo(
            location=location,
            format="tiff" if ome is None else "ome-tiff",
            height=width if turned else height,
            width=height if turned else width,
            channels=3 if self._header.palette is not None else stored - self._header.has_alpha,
            dtype=self._dtype(),
            planes=planes,
            block_px=(block[1], block[0]) if turned else block,
        )
        self.metadata = self._metadata(ome)

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        where = f"rows {top}..{top + height}, columns {left}..{left + width}"
        with readable(self._location, where if self.info.planes == 1 else f"plane {plane}, {where}"):
            pixels = self._pixels(top, left, height, width, plane)
            if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
                if self._nodata is not None and math.isnan(self._nodata):
                    pixels[np.isnan(pixels)] = 0
                bad = int((~np.isfinite(pixels)).sum())
                if bad:
                    raise DataError(f"{bad:,} numbers in {where} are NaN or infinite. Replace them.")
        return pixels

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        if self._nodata is None:
            return None
        rows, columns = self._as_stored((top, top + height), (left, left + width))
        with readable(self._location):
            stored = self._series.read(plane, rows, columns)
        if self._header.has_alpha:
            stored = stored[:, :, :-1]
        is_number = ~np.isnan(stored).any(axis=2) if math.isnan(self._nodata) else (stored != self._nodata).any(axis=2)
        return np.ascontiguousarray(orient(np.asarray(is_number), self._header.orientation))

    def fingerprint(self) -> str:
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        self._identity.check()

    def close(self) -> None:
        self._tiff.close()
        self._file.close()

    def _pixels(self, top: int, left: int, height: int, width: int, plane: int) -> NDArray[Any]:
        """The window as it is meant to be seen, NaN and all."""
        rows, columns = self._as_stored((top, top + height), (left, left + width))
        array = self._series.read(plane, rows, columns)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        header = self._header
        raster = Raster(
            array=array, format="", palette=header.palette, has_alpha=header.has_alpha, inverted=header.inverted
        )
        return np.ascontiguousarray(orient(meant(raster), header.orientation))

    def _as_stored(self, rows: Part, columns: Part) -> tuple[Part, Part]:
        """The window before it is turned as the file asks: `orient` backwards."""
        orientation = self._header.orientation
        if orientation in (3, 4, 7, 8):
            rows = self.info.height - rows[1], self.info.height - rows[0]
        if orientation in (2, 3, 6, 7):
            columns = self.info.width - columns[1], self.info.width - columns[0]
        return (columns, rows) if orientation in (5, 6, 7, 8) else (rows, columns)

    def _describe(self, pages: int) -> Ome | None:
        with self._open(None) as tiff:
            description = tiff.pages.first.description
        return read_ome(description, pages) if description[-10:].strip().endswith("OME>") else None

    def _open(self, layout: str | None) -> tifffile.TiffFile:
        flags = dict(PLAIN)
        if layout is not None:
            flags.pop("is_ome", None)
        name = Path(self._location).name or "tiff"
        return tifffile.TiffFile(
            cast(BinaryIO, FileView(self._file)), name=name, omexml=layout, _multifile=False, **flags
        )

    def _check_size(self, file_bytes: int) -> None:
        size = math.prod(self._layout.size) * self._header.dtype.itemsize
        if not size:
            raise DataError(f"its size is {' x '.join(map(str, self._layout.shape))}.")
        if size > max(2**26, _SPARSE_RATIO * file_bytes):
            raise DataError(f"it says it takes {size:,} bytes when decoded, which {file_bytes:,} bytes cannot hold.")

    def _dtype(self) -> str:
        dtype = np.dtype(self._header.dtype)
        if dtype.kind not in "buif":
            raise DataError(f"its numbers are of type {dtype}; whole numbers and floats can be used.")
        return "uint8" if self._header.palette is not None or dtype.kind == "b" else dtype.newbyteorder("=").name

    def _metadata(self, ome: Ome | None) -> Mapping[str, Any]:
        metadata = tag_metadata(self._page, turned=self._header.orientation in (5, 6, 7, 8))
        if ome is not None:
            metadata.update(ome.metadata)
        if self._layout.planes:
            metadata["plane_axes"] = "".join(self._layout.axes[axis] for axis in self._layout.planes)
            metadata["plane_shape"] = tuple(self._layout.shape[axis] for axis in self._layout.planes)
        if self._nodata is not None:
            metadata["nodata"] = self._nodata
        return metadata


def _nodata(page: Any) -> float | None:
    """The number that stands for missing data, if the file names one."""
    tag = page.tags.get(_NODATA_TAG)
    try:
        return None if tag is None else float(str(tag.value).strip(" \0"))
    except ValueError:
        return None
