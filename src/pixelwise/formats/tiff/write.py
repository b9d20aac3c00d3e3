"""Labels and maps as TIFF and OME-TIFF: tiled, compressed without loss, with colours, pixel size and planes.

Both hold one JSON object {"kind", "classes", "pixelwise": the provenance record}: TIFF in its image description (with the
shape, as tifffile writes it), OME-TIFF in a comment annotation of the namespace "pixelwise".
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.files import writing
from pixelwise.formats.base import LABELS, Result
from pixelwise.formats.image import MARK

NODATA_TAG = 42113  # GDAL's
TILE_PX = 512
BIG_BYTES = 2**32 - 2**25  # beyond this, a classic TIFF might not be able to point at its own tiles
BUFFER_BYTES = 2**24
_SMALLEST_LEVEL_PX = 1024


def write_tiff(path: Path, result: Result) -> None:
    """Write a TIFF (BigTIFF where it may become larger than 4 GiB); a slide gets smaller copies as well.

    Only a row of tiles is in memory. uint8 labels have the colours of their classes as palette. The planes, their axes
    and the resolution of the source are kept, and its nodata becomes the tag that GDAL reads.
    """
    axes, shape = _stack(result)
    if shape and result.source.width == 1:  # tifffile would take this stack for one page; OME names its axes
        write_ome_tiff(path, result)
        return
    metadata = {"axes": axes + "YX"} if len(axes) == len(shape) else {}
    _write(path, result, shape, {**metadata, **_about(result)}, ome=False)


def write_ome_tiff(path: Path, result: Result) -> None:
    """Write an OME-TIFF with the pixel size, the planes and the name of the source; otherwise as `write_tiff`."""
    axes, shape = _stack(result)
    if not set(axes) <= set("TZ") or len(set(axes)) != len(shape):  # what OME-TIFF can name besides channels
        axes, shape = ("Z", (result.source.planes,)) if result.source.planes > 1 else ("", ())
    metadata: dict[str, Any] = {"axes": axes + "YX", "Channel": {"Name": [result.kind]}}
    metadata["Name"] = str(result.metadata.get("image_name") or Path(result.source.location).name)
    for axis, size in result.metadata.get("pixel_size_um", {}).items():
        metadata[f"PhysicalSize{axis.upper()}"], metadata[f"PhysicalSize{axis.upper()}Unit"] = float(size), "µm"
    if "time_increment_s" in result.metadata:
        metadata["TimeIncrement"], metadata["TimeIncrementUnit"] = result.metadata["time_increment_s"], "s"
    metadata["CommentAnnotation"] = {"Namespace": MARK, "Value": json.dumps(_about(result), sort_keys=True)}
    _write(path, result, shape, metadata, ome=True)


def _write(path: Path, result: Result, shape: tuple[int, ...], metadata: dict[str, Any], ome: bool) -> None:
    height, width = result.source.height, result.source.width
    size = result.source.planes * height * width * result.dtype.itemsize
    levels = _levels(result)
    tags = [] if result.nodata is None else [(NODATA_TAG, "s", 0, str(result.nodata), True)]
    with (
        writing(path) as part,
        part.open("w+b") as file,
        tifffile.TiffWriter(file, bigtiff=size > BIG_BYTES, ome=ome) as writer,
    ):
        for level in range(levels + 1):
            kind: dict[str, Any] = {"shape": (_shrunk(height, level), _shrunk(width, level)), "subfiletype": 1}
            if level == 0:
                kind = {"shape": (*shape, height, width), "subifds": levels or None, "extratags": tags}
            kind["metadata"] = None if level else metadata
            pixels = tiles(result, (TILE_PX, TILE_PX), level)
            writer.write(pixels, **kind, **_options(result), **_resolution(result, level))


def _options(result: Result) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": result.dtype,
        "tile": (TILE_PX, TILE_PX),
        "compression": "zlib",
        "photometric": "minisblack",
        "software": "pixelwise",
        "buffersize": BUFFER_BYTES,
    }
    if result.dtype.kind == "f":
        options["predictor"] = 3
    elif result.kind == LABELS and result.dtype == np.uint8:
        colors = np.frombuffer(result.spec.palette_bytes(), dtype=np.uint8).reshape(256, 3)
        options["photometric"], options["colormap"] = "palette", colors.T.astype(np.uint16) * 257
    return options


def _about(result: Result) -> dict[str, Any]:
    pairs = zip(result.spec.names, result.spec.colors, strict=True)
    classes = [{"label": index, "name": name, "color": list(color)} for index, (name, color) in enumerate(pairs)]
    return {"kind": result.kind, "classes": classes, MARK: dict(result.mark)}


def _stack(result: Result) -> tuple[str, tuple[int, ...]]:
    """Letters and lengths of the axes of the planes; letters are missing where the source does not name them."""
    planes = result.source.planes
    axes, shape = str(result.metadata.get("plane_axes", "")), tuple(result.metadata.get("plane_shape", ()))
    if math.prod(shape) != planes or len(axes) != len(shape):
        return "", (() if planes == 1 else (planes,))
    return axes, shape


def _resolution(result: Result, level: int) -> dict[str, Any]:
    """Pixels per unit as tags: those of the source, or of its micrometres per pixel."""
    metadata = result.metadata
    size = metadata.get("pixel_size_um", {})
    if "resolution" in metadata and metadata.get("resolution_unit") in ("none", "inch", "centimeter"):
        found, unit = metadata["resolution"], metadata["resolution_unit"]
    elif size.get("x") and size.get("y"):
        found, unit = (10_000 / size["x"], 10_000 / size["y"]), "centimeter"
    else:
        return {}
    return {"resolution": tuple(float(value) / 2**level for value in found), "resolutionunit": unit}


def _levels(result: Result) -> int:
    """How many smaller copies are kept; viewers of slides need them."""
    if result.source.format != "slide" or result.source.planes > 1:
        return 0
    longest = max(result.source.height, result.source.width)
    return max(0, math.ceil(math.log2(longest / _SMALLEST_LEVEL_PX)))


def _shrunk(length: int, level: int) -> int:
    return -(-length // 2**level)


def tiles(result: Result, size: tuple[int, int], level: int = 0) -> Iterator[NDArray[Any]]:
    """The tiles of all planes, row by row, of every 2^level-th pixel."""
    length = _shrunk(result.source.height, level)
    for plane in range(result.source.planes):
        for top in range(0, length, size[0]):
            band = _band(result, plane, top, min(top + size[0], length), level)
            for left in range(0, band.shape[1], size[1]):
                tile = np.zeros(size, dtype=result.dtype)
                inside = band[:, left : left + size[1]]
                tile[: inside.shape[0], : inside.shape[1]] = inside
                yield tile


def _band(result: Result, plane: int, top: int, bottom: int, level: int) -> NDArray[Any]:
    """Some rows of a level; about one row of tiles of the whole result is asked for at once."""
    step = 2**level
    if step == 1:
        return result.rows(plane, top, bottom)
    band = np.empty((bottom - top, _shrunk(result.source.width, level)), dtype=result.dtype)
    at_once = max(1, TILE_PX // step)
    for start in range(top, bottom, at_once):
        stop = min(start + at_once, bottom)
        last = min((stop - 1) * step + 1, result.source.height)
        band[start - top : stop - top] = result.rows(plane, start * step, last)[::step, ::step]
    return band
