"""Whole-slide images at one of their levels: Aperio, Hamamatsu, Leica, Philips, Ventana and tiled pyramids.

tiffslide knows the vendors' dialects (levels, micrometres per pixel, how the areas of a slide lie); the tiles are read
as those of any TIFF, only where a window touches them.
"""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.extras import extra
from pixelwise.formats.base import TIFF_MAGIC, Opener, SourceInfo
from pixelwise.formats.local import Identity
from pixelwise.formats.ranges import Handles, opening
from pixelwise.formats.tiff.read import PLAIN, Rendering, TiffSource, check_pages, ome_metadata
from pixelwise.formats.tiff.windows import Span, Stack, arrange

_SUFFIXES = (".svs", ".ndpi", ".scn", ".bif")
_FOLLOWED = ("svs", "ndpi", "scn", "bif", "philips", "avs")


def is_slide(head: bytes, name: str) -> bool:
    """Whether a file is a TIFF with the name of a slide."""
    return head[:4] in TIFF_MAGIC and PurePath(name).suffix.lower() in _SUFFIXES


def open_slide(
    location: str,
    level: int = 0,
    opener: Opener | None = None,
    *,
    identity: Identity | None = None,
    channels: int | None = None,
    labels: bool = False,
) -> "SlideSource":
    """Open a slide at one level (0 is the full resolution); only its tags are read. Otherwise as `open_tiff`."""
    tiffslide = extra("tiffslide", "slide", what="a whole-slide image")
    with opening(location, opener, identity) as file:
        options = {"name": file.name, **PLAIN}
        for name in _FOLLOWED:
            del options[f"is_{name}"]
        slide = tiffslide.TiffSlide(file.buffered, tifffile_options=options)
        if not slide.ts_tifffile.is_ndpi:
            check_pages(slide.ts_tifffile)
        shapes = tuple((int(height), int(width)) for width, height in slide.level_dimensions)
        if not 0 <= level < len(shapes):
            sizes = ", ".join(f"{number} ({width} x {height})" for number, (height, width) in enumerate(shapes))
            raise UsageError(f"{location}: it has no level {level}. Its levels are {sizes} pixels.")
        areas, renderings = _areas(slide, level, file, labels)
        renderings[0].look(areas[0][2], channels)
        info = renderings[0].info(location, "slide", (1, *shapes[level]), areas[0][2].block)
        ome = ome_metadata(slide.ts_tifffile.ome_metadata) or {}
        metadata = _metadata(slide.properties, shapes, level, ome) | renderings[0].metadata
        return SlideSource(file, areas, renderings[0], info, metadata)


Area = tuple[int, int, Stack]
"""One scanned rectangle: its top and left on the level, in pixels, and its pixels."""


class SlideSource(TiffSource):
    """One level of a slide.

    `metadata` has "vendor", "level", "level_shapes" ((H, W) of each), "downsample", "objective_power", and where they are
    known "mpp" and "pixel_size_um" of this level.
    """

    def __init__(
        self, file: Handles, areas: list[Area], rendering: Rendering, info: SourceInfo, metadata: Mapping[str, Any]
    ) -> None:
        super().__init__(file, self._composed, rendering, info, metadata)
        self._areas = areas
        self._is_full = any((y, x, *stack.size[1:3]) == (0, 0, info.height, info.width) for y, x, stack in areas)

    def _unmasked(self, plane: int, rows: Span, columns: Span) -> NDArray[np.bool_] | None:
        opacity = self._rendering.opacity
        hides = self._rendering.has_opacity and (opacity is None or opacity.hides)
        if self._is_full and not hides:
            return None
        there = np.zeros((rows[1] - rows[0], columns[1] - columns[0]), dtype=bool)
        for target, _, _, _ in self._overlaps(rows, columns):
            there[target] = True
        return there & (self._stored(plane, rows, columns)[:, :, -1] > 0) if hides else there

    def _composed(self, plane: int, rows: Span, columns: Span) -> NDArray[Any]:
        """A window as the file holds it; 0 where nothing was scanned."""
        channels = self._rendering.channels + self._rendering.has_opacity
        stored = np.zeros((rows[1] - rows[0], columns[1] - columns[0], channels), dtype=self._rendering.stored)
        for target, down, across, stack in self._overlaps(rows, columns):
            stored[target] = stack.read(plane, down, across)
        return stored

    def _overlaps(self, rows: Span, columns: Span) -> Iterator[tuple[tuple[slice, slice], Span, Span, Stack]]:
        """For each area: its place in a window, its own rows and columns there, its pixels."""
        for y, x, stack in self._areas:
            top, bottom = max(rows[0], y), min(rows[1], y + stack.size[1])
            left, right = max(columns[0], x), min(columns[1], x + stack.size[2])
            if top < bottom and left < right:
                target = slice(top - rows[0], bottom - rows[0]), slice(left - columns[0], right - columns[0])
                yield target, (top - y, bottom - y), (left - x, right - x), stack


def _areas(slide: Any, level: int, file: Handles, labels: bool) -> tuple[list[Area], list[Rendering]]:
    properties = slide.properties
    composition = properties.get("tiffslide.series-composition")
    places = {properties["tiffslide.series-index"]: (0, 0)}
    if composition:
        places = {number: offsets[level] for number, offsets in composition["located_series"].items()}
    areas, renderings = [], []
    for number, (top, left, *_) in places.items():
        series = slide.ts_tifffile.series[number].levels[level]
        layout = arrange(series.axes, tuple(series.shape))
        if layout.size[0] != 1:
            raise DataError(f"its level {level} has {layout.size[0]} planes; one is meant.")
        rendering = Rendering(series.keyframe, np.dtype(series.dtype), layout.size[3], labels)
        rendering.orientation = 1
        renderings.append(rendering)
        areas.append((int(top), int(left), Stack(series, layout, file)))
    if len({(rendering.stored, rendering.channels) for rendering in renderings}) != 1:
        raise DataError("the areas of the slide differ in channels or number type, or there are none.")
    return areas, renderings


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
    mpp: list[Any] = [size.get(axis) or properties.get(f"tiffslide.mpp-{axis}") for axis in "xy"]
    if all(mpp):
        metadata["mpp"] = tuple(float(value) * factor for value, factor in zip(mpp, down, strict=True))
        metadata["pixel_size_um"] = dict(zip("xy", metadata["mpp"], strict=True))
    return metadata
