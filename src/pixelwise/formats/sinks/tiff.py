"""Labels and maps as TIFF and OME-TIFF: tiled, compressed without loss, with colours, pixel size and planes.

Both hold one JSON object {"kind", "classes", "pixelwise": the mark}: TIFF in its image description (with the shape, as
tifffile writes it), OME-TIFF in a comment annotation of the namespace "pixelwise".
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.files import atomic_path, cannot_write
from pixelwise.formats.base import LABELS, Result
from pixelwise.formats.ome import parse_xml
from pixelwise.formats.raster import DECODE_ERRORS
from pixelwise.formats.tiff_decode import PLAIN, quiet
from pixelwise.formats.writers import MARK

TILE_PX = 512

_BIG_BYTES = 2**32 - 2**25  # beyond this, a classic TIFF might not be able to point at its own tiles
_BUFFER_BYTES = 2**24
_SMALLEST_LEVEL_PX = 1024
_NODATA_TAG = 42113
_STACK = "TZ"  # what OME-TIFF can name besides channels


def write_tiff(path: Path, result: Result) -> None:
    """Write a TIFF (BigTIFF where it may become larger than 4 GiB); a slide gets smaller copies as well.

    Only a row of tiles is in memory. uint8 labels have the colours of their classes as palette. The planes, their axes
    and the resolution of the source are kept, and its nodata becomes the tag that GDAL reads.

    Raises:
        PixelwiseError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.formats import SourceInfo
        >>> spec = LabelSpec(names=("sea", "land"), colors=((0, 0, 200), (0, 90, 0)), values=((0,), (1,)))
        >>> source = SourceInfo(location="a.tif", format="tiff", height=3, width=4, channels=3, dtype="uint8")
        >>> labels = np.eye(3, 4, dtype=np.uint8)
        >>> result = Result(kind="labels", spec=spec, source=source, dtype=labels.dtype,
        ...                 rows=lambda plane, top, bottom: labels[top:bottom], mark={"model": "abc"})
        >>> path = Path(tempfile.mkdtemp()) / "a.tif"
        >>> write_tiff(path, result)
        >>> tifffile.imread(path).tolist(), read_tiff_mark(path)
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], {'model': 'abc'})
    """
    axes, shape = _stack(result)
    if (
        shape and result.source.width == 1
    ):  # tifffile would take this stack for one page; the axes of OME tell it better
        write_ome_tiff(path, result)
        return
    metadata = {"axes": axes + "YX"} if len(axes) == len(shape) else {}
    _write(path, result, shape, {**metadata, **_about(result)}, ome=False)


def write_ome_tiff(path: Path, result: Result) -> None:
    """Write an OME-TIFF with the pixel size, the planes and the name of the source; otherwise as `write_tiff`.

    Raises:
        PixelwiseError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.formats import SourceInfo
        >>> spec = LabelSpec(names=("a",), colors=((0, 0, 200),), values=((0,),))
        >>> source = SourceInfo(location="a.tif", format="ome-tiff", height=3, width=4, channels=3, dtype="uint8", planes=2)
        >>> result = Result(kind="labels", spec=spec, source=source, dtype=np.dtype("uint8"),
        ...                 rows=lambda plane, top, bottom: np.zeros((bottom - top, 4), np.uint8))
        >>> path = Path(tempfile.mkdtemp()) / "a.ome.tif"
        >>> write_ome_tiff(path, result)
        >>> tifffile.imread(path).shape
        (2, 3, 4)
    """
    axes, shape = _stack(result)
    if not set(axes) <= set(_STACK) or len(set(axes)) != len(shape):
        axes, shape = ("Z", (result.source.planes,)) if result.source.planes > 1 else ("", ())
    metadata: dict[str, Any] = {"axes": axes + "YX", "Channel": {"Name": [result.kind]}}
    metadata["Name"] = str(result.metadata.get("image_name") or Path(result.source.location).name)
    for axis, size in dict(result.metadata.get("pixel_size_um", {})).items():
        metadata[f"PhysicalSize{axis.upper()}"] = float(size)
        metadata[f"PhysicalSize{axis.upper()}Unit"] = "µm"
    if "time_increment_s" in result.metadata:
        metadata["TimeIncrement"], metadata["TimeIncrementUnit"] = result.metadata["time_increment_s"], "s"
    metadata["CommentAnnotation"] = {"Namespace": MARK, "Value": json.dumps(_about(result), sort_keys=True)}
    _write(path, result, shape, metadata, ome=True)


def read_tiff_mark(path: str | Path) -> dict[str, Any] | None:
    """The mark of a file that this module wrote; None for every other file, however damaged.

    Example:
        >>> read_tiff_mark("no/such.tif") is None
        True
    """
    try:
        with quiet(), Path(path).open("rb") as file, tifffile.TiffFile(file, **PLAIN) as tiff:
            text = tiff.pages.first.description
        about = json.loads(_comment(text) if text.rstrip().endswith("OME>") else text)
        mark = about.get(MARK)
    except (*DECODE_ERRORS, DataError):
        return None
    return mark if isinstance(mark, dict) else None


def _comment(text: str) -> str:
    """What the comment annotation of OME-XML says that this module wrote."""
    root = parse_xml(text)
    for element in root.iter():
        if element.tag.endswith("CommentAnnotation") and element.get("Namespace") == MARK:
            return "".join(element.itertext())
    return "{}"


def _write(path: Path, result: Result, shape: tuple[int, ...], metadata: dict[str, Any], ome: bool) -> None:
    height, width = result.source.height, result.source.width
    size = result.source.planes * height * width * result.dtype.itemsize
    levels = _levels(result)
    options = _options(result)
    try:
        with (
            atomic_path(path) as part,
            part.open("w+b") as file,
            tifffile.TiffWriter(file, bigtiff=size > _BIG_BYTES, ome=ome) as writer,
        ):
            whole: dict[str, Any] = {"shape": (*shape, height, width), "metadata": metadata, "extratags": _tags(result)}
            options |= _resolution(result, 0)
            writer.write(_tiles(result, 0), subifds=levels or None, **whole, **options)
            for level in range(1, levels + 1):
                small: dict[str, Any] = {
                    "shape": (_shrunk(height, level), _shrunk(width, level)),
                    "subfiletype": 1,
                    "metadata": None,
                }
                options |= _resolution(result, level)
                writer.write(_tiles(result, level), **small, **options)
    except OSError as error:
        raise cannot_write(path, error) from error


def _options(result: Result) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": result.dtype,
        "tile": (TILE_PX, TILE_PX),
        "compression": "zlib",
        "photometric": "minisblack",
        "software": "pixelwise",
        "buffersize": _BUFFER_BYTES,
    }
    if result.dtype.kind == "f":
        options["predictor"] = 3
    elif result.kind == LABELS and result.dtype == np.uint8:
        colors = np.frombuffer(result.spec.palette_bytes(), dtype=np.uint8).reshape(256, 3)
        options["photometric"], options["colormap"] = "palette", colors.T.astype(np.uint16) * 257
    return options


def _tags(result: Result) -> list[tuple[int, str, int, str, bool]]:
    """GDAL's tag for pixels without data, which stands in the first page."""
    return [] if result.nodata is None else [(_NODATA_TAG, "s", 0, str(result.nodata), True)]


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
    metadata: Mapping[str, Any] = result.metadata
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


def _tiles(result: Result, level: int) -> Iterator[NDArray[Any]]:
    """The tiles of all planes, row by row, of every 2^level-th pixel."""
    step = 2**level
    height = _shrunk(result.source.height, level)
    for plane in range(result.source.planes):
        for top in range(0, height, TILE_PX):
            bottom = min(top + TILE_PX, height)
            band = _band(result, plane, (top, bottom), step)
            for left in range(0, band.shape[1], TILE_PX):
                tile = np.zeros((TILE_PX, TILE_PX), dtype=result.dtype)
                part = band[:, left : left + TILE_PX]
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile


def _band(result: Result, plane: int, rows: tuple[int, int], step: int) -> NDArray[Any]:
    if step == 1:
        return result.rows(plane, *rows)
    width = _shrunk(result.source.width, step.bit_length() - 1)
    band = np.empty((rows[1] - rows[0], width), dtype=result.dtype)
    at_once = max(1, TILE_PX // step)  # as many rows as fill about one row of tiles
    for start in range(rows[0], rows[1], at_once):
        stop = min(start + at_once, rows[1])
        last = min((stop - 1) * step + 1, result.source.height)
        band[start - rows[0] : stop - rows[0]] = result.rows(plane, start * step, last)[::step, ::step]
    return band
