"""Labels as polygons: GeoJSON (RFC 7946), one feature for each connected region of a class.

The regions are traced from a file on disk, so the labels need not fit into memory; their outlines must. Neighbours are
simplified together and keep sharing their border: no gaps, no overlaps.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from pixelwise.errors import UsageError
from pixelwise.files import atomic_path, cannot_write, extra
from pixelwise.formats.base import LABELS, Result
from pixelwise.formats.gdal import gdal
from pixelwise.formats.geojson_outlines import simplify, trace, with_shared_corners
from pixelwise.formats.geojson_place import Place, find_place
from pixelwise.formats.sinks.geotiff import write_rows

__all__ = ["write_geojson"]


def write_geojson(path: Path, result: Result, *, simplify_px: float = 1.0, min_area_px: int = 0) -> None:
    """Write one polygon, with its holes, for each connected region of a class (pixels that share an edge).

    Each feature says its `class`, `class_id` and `area_px` (the exact number of pixels), `area_m2` where the coordinate
    system has a unit of length and shows areas true to 2 %, and `plane` of images with several. Coordinates are longitude
    and latitude (WGS 84) where the image has a place on Earth, else pixels; the member `coordinates` of the file says
    which. Pixels without data become no polygon.

    Args:
        path: where to; replaced at the end, when all is written.
        result: labels.
        simplify_px: corners that make triangles smaller than about the square of this are left out; 0 keeps the exact
            outlines of the pixels.
        min_area_px: smaller regions are left out.

    Raises:
        UsageError: the result holds no labels, a number is negative, or a package is not installed.
        PixelwiseError: it cannot be written, or there are more outlines than memory should hold.

    Example:
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.formats import SourceInfo
        >>> info = SourceInfo(location="a.png", format="png", height=2, width=3, channels=3, dtype="uint8")
        >>> spec = LabelSpec(names=("sea", "land"), colors=((0, 0, 200), (0, 90, 0)), values=((0,), (1,)))
        >>> labels = np.array([[0, 1, 1], [0, 0, 0]], dtype=np.uint8)
        >>> result = Result(kind="labels", spec=spec, source=info, dtype=labels.dtype,
        ...                 rows=lambda plane, top, bottom: labels[top:bottom])
        >>> path = Path(tempfile.mkdtemp()) / "labels.geojson"
        >>> write_geojson(path, result, simplify_px=0)
        >>> [feature["properties"] for feature in json.loads(path.read_text())["features"]]
        [{'class': 'land', 'class_id': 1, 'area_px': 2}, {'class': 'sea', 'class_id': 0, 'area_px': 4}]
    """
    path = Path(path)
    if result.kind != LABELS:
        raise UsageError(f"{path}: polygons are made of labels; {result.kind} has none. Write it as GeoTIFF.")
    if not (math.isfinite(simplify_px) and simplify_px >= 0 and min_area_px >= 0):
        raise UsageError(f"simplify_px ({simplify_px}) and min_area_px ({min_area_px}) must not be negative.")
    extra("shapely", "geo", "GeoJSON")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with gdal("GeoJSON") as rasterio, tempfile.TemporaryDirectory(prefix=".pixelwise-", dir=path.parent) as folder:
            place = find_place(rasterio, result)
            spool = Path(folder, "labels.tif")
            write_rows(rasterio, spool, result, nodata=None)
            with atomic_path(path) as part, part.open("w", encoding="utf-8") as file:
                file.write(_head(path, result, place))
                separator = "\n"
                for plane in range(result.source.planes):
                    for feature in _features(rasterio, spool, plane, result, place, simplify_px, min_area_px):
                        file.write(separator + feature)
                        separator = ",\n"
                file.write("\n]}\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def _head(path: Path, result: Result, place: Place) -> str:
    """Everything of the collection before its features."""
    head = {"type": "FeatureCollection", "name": path.stem, "coordinates": place.coordinates}
    if result.mark:
        head["pixelwise"] = dict(result.mark)  # type: ignore[assignment]
    return json.dumps(head, ensure_ascii=False, sort_keys=False)[:-1] + ', "features": ['


def _features(
    rasterio: ModuleType,
    spool: Path,
    plane: int,
    result: Result,
    place: Place,
    simplify_px: float,
    min_area_px: int,
) -> Iterator[str]:
    """The features of one plane as text, one after the other."""
    shapely = extra("shapely", "geo", "GeoJSON")
    polygons, labels = trace(rasterio, spool, plane + 1)
    areas = np.rint(shapely.area(polygons)).astype(np.int64)
    polygons = simplify(with_shared_corners(polygons), simplify_px)
    keep = (areas >= min_area_px) & (labels != (-1 if result.nodata is None else result.nodata))
    polygons, labels, areas = polygons[keep], labels[keep], areas[keep]
    names = result.spec.names
    for chunk in np.array_split(np.arange(len(polygons)), -(-len(polygons) // 10_000) or 1):
        geometries = shapely.to_geojson(shapely.orient_polygons(place.to_world(rasterio, polygons[chunk])))
        for geometry, label, area in zip(geometries, labels[chunk].tolist(), areas[chunk].tolist(), strict=True):
            properties = {"class": names[label] if label < len(names) else f"value {label}", "class_id": label}
            properties["area_px"] = area
            if place.pixel_m2 is not None:
                properties["area_m2"] = float(f"{area * place.pixel_m2:.6g}")
            if result.source.planes > 1:
                properties["plane"] = plane
            told = json.dumps(properties, ensure_ascii=False)
            yield f'{{"type": "Feature", "properties": {told}, "geometry": {geometry}}}'
