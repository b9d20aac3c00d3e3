"""Whole-slide images at one of their levels: Aperio, Hamamatsu, Leica, Philips, Ventana and tiled pyramids.

tiffslide knows the vendors' dialects (levels, micrometres per pixel, how the areas of a slide lie); the tiles are read
as those of any TIFF, only where a window touches them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.files import extra
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.blocks import Bytes, FileView, Opener, local_opener
from pixelwise.formats.local import Identity, readable
from pixelwise.formats.ome import parse_xml, read_ome
from pixelwise.formats.raster import Raster
from pixelwise.formats.readers import meant, silence
from pixelwise.formats.tiff_decode import MAGIC, PLAIN, TiffHeader, count_pages, page_header, quiet
from pixelwise.formats.tiff_layout import arrange
from pixelwise.formats.tiff_series import SeriesReader

SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".bif")

_DIALECTS = ("svs", "ndpi", "scn", "bif", "philips", "avs")
_MAX_LEVELS = 64
_XMP_TAG = 700


def is_slide(head: bytes, name: str) -> bool:
    """Whether a file is a TIFF with the name of a slide.

    Example:
        >>> is_slide(b"II*\\0", "biopsy.svs"), is_slide(b"II*\\0", "biopsy.tif")
        (True, False)
    """
    return head[:4] in MAGIC and PurePath(name).suffix.lower() in SLIDE_SUFFIXES


def open_slide(
    location: str, level: int = 0, opener: Opener | None = None, *, identity: Identity | None = None
) -> "SlideSource":
    """Open a slide at one level; only its tags are read.

    Args:
        location: path, or the name of what `opener` opens.
        level: 0 is the full resolution.
        opener: opens the file anew at each call, for reading, seekable; None opens the path.
        identity: how to tell whether it changed; needed with `opener`.

    Raises:
        DataError: the file is missing, damaged, or of a kind that cannot be read.
        UsageError: it has no such level, tiffslide is not installed, or there is an opener without an identity.

    Example:
        >>> import tempfile, tifffile
        >>> path = f"{tempfile.mkdtemp()}/a.tif"
        >>> image = np.zeros((64, 96, 3), dtype=np.uint8)
        >>> with tifffile.TiffWriter(path) as writer:
        ...     _ = writer.write(image, tile=(16, 16), photometric="rgb", subifds=1)
        ...     _ = writer.write(image[::2, ::2], tile=(16, 16), photometric="rgb", subfiletype=1)
        >>> with open_slide(path, level=1) as source:
        ...     source.info.height, source.info.width, source.metadata["downsample"]
        (32, 48, 2.0)
    """
    tiffslide = extra("tiffslide", "slide", what="a whole-slide image")
    if opener is None:
        identity = Identity.local(location)
    elif identity is None:
        raise UsageError(f"{location}: whoever opens it must also say how to tell whether it changed (identity).")
    with readable(location), quiet():
        file = Bytes(opener or local_opener(location))
        try:
            return SlideSource(location, file, cast(Identity, identity), level, tiffslide)
        except BaseException:
            file.close()
            raise


@dataclass(frozen=True)
class _Area:
    """One scanned rectangle: where it lies on the level, in pixels, and how to read it."""

    top: int
    left: int
    height: int
    width: int
    reader: SeriesReader


class SlideSource(Source):
    """One level of a slide; made by `open_slide`.

    Attributes:
        metadata: "vendor", "level", "level_shapes" ((H, W) of each), "downsample", "objective_power", and where they are
            known "mpp" and "pixel_size_um" of this level.
        cache_bytes: the most that decoded blocks take in memory.
    """

    def __init__(self, location: str, file: Bytes, identity: Identity, level: int, tiffslide: Any) -> None:
        if not file.size:
            raise DataError("the file is empty (0 bytes).")
        self._file, self._identity = file, identity
        pages = count_pages(cast(BinaryIO, FileView(file)))
        self._slide, ome = _open(tiffslide, file, PurePath(location).name or "slide", pages)
        properties = self._slide.properties
        shapes = tuple((int(height), int(width)) for width, height in self._slide.level_dimensions)
        _check_levels(location, shapes, level)
        self._areas, self._header = _areas(self._slide, file, level, pages)
        block = self._areas[0].reader.block
        self.cache_bytes = sum(area.reader.cache_bytes for area in self._areas)
        height, width = shapes[level]
        header = self._header
        self.info = SourceInfo(
            location=location,
            format="slide",
            height=height,
            width=width,
            channels=3 if header.palette is not None else header.channels - header.has_alpha,
            dtype="uint8" if header.palette is not None or header.dtype.kind == "b" else header.dtype.name,
            block_px=block,
        )
        self.metadata = _metadata(properties, shapes, level, ome)

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        where = f"rows {top}..{top + height}, columns {left}..{left + width}"
        with readable(self.info.location, where):
            header = self._header
            raster = Raster(
                array=self._stored(top, left, height, width),
                format="",
                palette=header.palette,
                has_alpha=header.has_alpha,
                inverted=header.inverted,
            )
            pixels = np.ascontiguousarray(meant(raster))
            if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
                raise DataError(f"numbers in {where} are NaN or infinite. Replace them.")
        return pixels

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        whole = (0, 0, self.info.height, self.info.width)
        is_full = any((area.top, area.left, area.height, area.width) == whole for area in self._areas)
        if is_full and not self._header.has_alpha:
            return None
        there = np.zeros((height, width), dtype=bool)
        for area in self._areas:
            target, _ = _overlap(area, top, left, height, width)
            there[target] = True
        if self._header.has_alpha:
            with readable(self.info.location):
                there &= self._stored(top, left, height, width)[:, :, -1] > 0
        return there

    def fingerprint(self) -> str:
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        self._identity.check()

    def close(self) -> None:
        self._slide.close()
        self._file.close()

    def _stored(self, top: int, left: int, height: int, width: int) -> NDArray[Any]:
        """The window as stored; 0 where nothing was scanned."""
        result = np.zeros((height, width, self._header.channels), dtype=self._header.dtype)
        for area in self._areas:
            target, (rows, columns) = _overlap(area, top, left, height, width)
            if rows[0] < rows[1] and columns[0] < columns[1]:
                result[target] = area.reader.read(0, rows, columns)
        return result


def _open(tiffslide: Any, file: Bytes, name: str, pages: int) -> tuple[Any, Mapping[str, Any]]:
    """tiffslide's slide and what OME-XML says of it. As the file is a view, no other file can be opened by its name."""
    flags = {flag: value for flag, value in PLAIN.items() if flag.removeprefix("is_") not in _DIALECTS}

    def slide(**options: Any) -> Any:
        return tiffslide.TiffSlide(
            FileView(file), tifffile_options={"name": name, "_multifile": False, **flags, **options}
        )

    found = slide()
    first = found.ts_tifffile.pages.first
    texts = [first.description, first.tags.valueof(_XMP_TAG, default="")]
    for text in texts:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        if isinstance(text, str) and re.match(r"\s*<", text):
            parse_xml(text.strip().strip("\0"))
    copies = 0 if first.subifds is None else len(first.subifds)
    if copies > _MAX_LEVELS:
        raise DataError(f"it says it has {copies:,} smaller copies of its image.")
    ome = read_ome(first.description, pages)
    if ome is not None:
        flags.pop("is_ome", None)
        found = slide(omexml=ome.layout)
    with silence():  # tiffslide warns that it knows some dialects in part
        _ = found.properties
    return found, {} if ome is None else ome.metadata


def _check_levels(location: str, shapes: tuple[tuple[int, int], ...], level: int) -> None:
    if not 0 <= level < len(shapes):
        sizes = ", ".join(f"{number} ({width} x {height})" for number, (height, width) in enumerate(shapes))
        raise UsageError(f"{location}: it has no level {level}. Its levels are {sizes} pixels.")
    if min(shapes[level]) < 1:
        raise DataError(f"its level {level} has no pixels.")


def _areas(slide: Any, file: Bytes, level: int, pages: int) -> tuple[list[_Area], TiffHeader]:
    properties, tiff = slide.properties, slide.ts_tifffile
    composition = properties.get("tiffslide.series-composition")
    if composition:
        places = {number: offsets[level] for number, offsets in composition["located_series"].items()}
    else:
        places = {properties["tiffslide.series-index"]: (0, 0)}
    areas, header = [], None
    for number, place in places.items():
        series = tiff.series[number].levels[level]
        layout = arrange(series.axes, tuple(series.shape))
        planes, height, width, channels = layout.size
        found = page_header(series.keyframe, np.dtype(series.dtype), height, width, channels)
        if planes != 1 or found.dtype.kind not in "buif":
            raise DataError(f"its level {level} has {planes} planes of {found.dtype}; one of numbers is meant.")
        if header is not None and (found.channels, found.dtype) != (header.channels, header.dtype):
            raise DataError("the areas of the slide differ in channels or number type.")
        header = header or found
        areas.append(_Area(int(place[0]), int(place[1]), height, width, SeriesReader(file, series, layout, pages)))
    if header is None:
        raise DataError("it has no scanned area.")
    return areas, header


def _overlap(
    area: _Area, top: int, left: int, height: int, width: int
) -> tuple[tuple[slice, slice], tuple[tuple[int, int], tuple[int, int]]]:
    """Where an area lies in a window, and which of the area's rows and columns those are; both empty if nowhere."""
    rows = max(top, area.top), min(top + height, area.top + area.height)
    columns = max(left, area.left), min(left + width, area.left + area.width)
    if rows[0] >= rows[1] or columns[0] >= columns[1]:
        return (slice(0, 0), slice(0, 0)), ((0, 0), (0, 0))
    target = slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)
    inside = (rows[0] - area.top, rows[1] - area.top), (columns[0] - area.left, columns[1] - area.left)
    return target, inside


def _metadata(
    properties: Mapping[str, Any], shapes: tuple[tuple[int, int], ...], level: int, ome: Mapping[str, Any]
) -> dict[str, Any]:
    down = (shapes[0][1] / shapes[level][1], shapes[0][0] / shapes[level][0])
    metadata: dict[str, Any] = {
        "vendor": properties.get("tiffslide.vendor") or "generic",
        "level": level,
        "level_shapes": shapes,
        "downsample": sum(down) / 2,
    }
    if properties.get("tiffslide.objective-power"):
        metadata["objective_power"] = float(properties["tiffslide.objective-power"])
    size = ome.get("pixel_size_um", {})
    mpp = [size.get(axis) or properties.get(f"tiffslide.mpp-{axis}") for axis in "xy"]
    if all(mpp):
        metadata["mpp"] = tuple(float(cast(float, value)) * factor for value, factor in zip(mpp, down, strict=True))
        metadata["pixel_size_um"] = dict(zip("xy", metadata["mpp"], strict=True))
    return metadata
