"""Labels as polygons: GeoJSON (RFC 7946), one feature for each connected region of a class.

The regions are traced from a file on disk, so the labels need not fit into memory; their outlines must. Neighbours are
simplified together and keep sharing their border: no gaps, no overlaps.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import PixelwiseError
from pixelwise.extras import extra
from pixelwise.files import temporary_folder, writing
from pixelwise.formats.base import BACKGROUND, Result
from pixelwise.formats.geotiff import write_bands
from pixelwise.formats.geotiff_tags import gdal
from pixelwise.formats.globe import ECCENTRICITY_2, EQUATOR_M, areas_m2, cut_at_antimeridian, made_valid
from pixelwise.formats.local import printable, silence

MAX_CORNERS = 20_000_000
"""More in one plane are refused: they would take some 8 GB, and hardly any program opens the file."""

_WGS84 = "EPSG:4326"  # rasterio keeps the order longitude, latitude
_STRAIGHT_PX = 256.0  # edges are cut into such pieces before they are bent: at 10 m per pixel they err by 0.02 px
_PROBES = 17  # places along each side where it is tried whether the image has longitude and latitude
_AREA_ERROR = 0.02
_LONGEST_DEGREES = 45.0  # of such a piece, so that it is known which way round the globe it goes
_PIXELS = "pixels of the image: x to the right, y down, (0, 0) is its upper left corner"
_DEGREES = "longitude and latitude in degrees, WGS 84"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an image lies."""

    coordinates: str  # what those of the polygons are, in words
    crs: Any = None  # rasterio's, of the image; None if the polygons stay in pixels
    transform: tuple[float, ...] = ()  # x = a column + b row + c, y = d column + e row + f
    scale: tuple[float, float] = (1.0, 1.0)  # of the coordinates x and y, where they stay pixels
    pixel_m2: float | None = None  # if the plane of the map shows areas true
    straight_px: float = _STRAIGHT_PX  # longest piece of an edge that is bent
    decimals: int = 7  # of degrees: about a hundredth of a pixel, and at least the 7 that RFC 7946 names

    def to_world(self, polygons: NDArray[Any]) -> NDArray[Any]:
        """Polygons in pixels, in the coordinates of the file; those that cross the antimeridian are cut there."""
        shapely = extra("shapely", "geo", "GeoJSON")
        if self.crs is None or len(polygons) == 0:
            return polygons if self.scale == (1.0, 1.0) else shapely.transform(polygons, lambda p: p * self.scale)
        world = cut_at_antimeridian(self._on_globe(polygons))
        return made_valid(shapely.transform(world, lambda points: np.round(points, self.decimals)))

    def areas_m2(self, polygons: NDArray[Any], areas_px: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """The true areas of polygons in pixels; None without a place on Earth."""
        if self.crs is None or len(polygons) == 0:
            return None
        return areas_m2(self._on_globe(polygons)) if self.pixel_m2 is None else areas_px * np.float64(self.pixel_m2)

    def _on_globe(self, polygons: NDArray[Any]) -> NDArray[Any]:
        """Polygons in pixels, in longitude and latitude."""
        shapely, warp = (extra(name, "geo", "GeoJSON") for name in ("shapely", "rasterio.warp"))
        local = shapely.transform(shapely.segmentize(polygons, self.straight_px), self._to_crs)
        return shapely.transform(local, lambda points: np.stack(warp.transform(self.crs, _WGS84, *points.T), axis=1))

    def _to_crs(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b, c, d, e, f = self.transform
        x, y = points.T
        return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)


def write_geojson(path: Path, result: Result, *, simplify_px: float = 1.0, background: bool = False) -> None:
    """Write one polygon, with its holes, for each connected region of a class (pixels that share an edge).

    Each feature says its `class`, `class_id` and `area_px` (the exact number of pixels), `area_m2` where the image has a
    place on Earth, and `plane` of images with several. Coordinates are longitude and latitude (WGS 84, cut at the 180th
    meridian) where it has one, else pixels, of level 0 of a pyramid; the member `coordinates` of the file says which. In
    pixels features also say what QuPath reads: `objectType` and `classification` with name and color. Pixels without data
    become no polygon, nor do classes that are called background (`BACKGROUND`), unless `background`. Corners that make
    triangles smaller than about the square of `simplify_px` are left out; 0 keeps the exact outlines of the pixels.

    The area is that of the plane of the map where that shows areas true to 2 %, else that on the ellipsoid.
    """
    shapely = extra("shapely", "geo", "GeoJSON")
    head: dict[str, Any] = {"type": "FeatureCollection", "name": printable(path.stem)}
    beside = path.parent if str(path.parent).isprintable() else None  # GDAL takes no other names
    with (
        writing(path) as part,
        part.open("w", encoding="utf-8") as file,
        gdal("GeoJSON") as rasterio,
        temporary_folder(beside) as folder,
    ):
        place = find_place(rasterio, result)
        raster = Path(folder, "labels.tif")
        write_bands(raster, result)
        head |= {"coordinates": place.coordinates} | ({"pixelwise": dict(result.mark)} if result.mark else {})
        file.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "features": [')
        separator = "\n"
        for plane in range(result.source.planes):
            polygons, labels = trace(rasterio, raster, plane + 1)
            areas = np.rint(shapely.area(polygons)).astype(np.int64)
            hidden = (
                []
                if background
                else [id for id, name in enumerate(result.spec.names) if name.strip().casefold() in BACKGROUND]
            )
            keep = ~np.isin(labels, [*hidden, *([] if result.nodata is None else [result.nodata])])
            true = place.areas_m2(polygons[keep], areas[keep])
            polygons = simplify(with_shared_corners(polygons), simplify_px)
            found = (polygons[keep], labels[keep], areas[keep], true)
            for feature in _features(*found, plane, place, result):
                file.write(separator + feature)
                separator = ",\n"
        file.write("\n]}\n")


def _features(
    polygons: NDArray[Any],
    labels: NDArray[np.int64],
    areas: NDArray[np.int64],
    true_m2: NDArray[np.float64] | None,
    plane: int,
    place: Place,
    result: Result,
) -> Iterator[str]:
    """The features of one plane as text, one after the other."""
    shapely = extra("shapely", "geo", "GeoJSON")
    names = result.spec.names
    for chunk in np.array_split(np.arange(len(polygons)), -(-len(polygons) // 10_000) or 1):
        geometries = shapely.to_geojson(shapely.orient_polygons(place.to_world(polygons[chunk])))
        for index, geometry in zip(chunk.tolist(), geometries, strict=True):
            label = int(labels[index])
            name = names[label] if label < len(names) else f"value {label}"
            properties: dict[str, Any] = {"class": name, "class_id": label, "area_px": int(areas[index])}
            if true_m2 is not None:
                properties["area_m2"] = float(f"{true_m2[index]:.6g}")
            if place.crs is None:  # of a slide or a photo: as QuPath reads them
                color = result.spec.colors[label] if label < len(names) else (127, 127, 127)
                properties["objectType"] = "annotation"
                properties["classification"] = {"name": name, "color": list(color)}
            if result.source.planes > 1:
                properties["plane"] = plane
            text = json.dumps(properties, ensure_ascii=False)
            yield f'{{"type": "Feature", "properties": {text}, "geometry": {geometry}}}'


def trace(rasterio: ModuleType, path: Path, band: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All regions (pixels that share an edge) of one band of a file: polygons in pixels, with their holes, and labels."""
    shapely = extra("shapely", "geo", "polygons")
    shapes = extra("rasterio.features", "geo", "polygons").shapes
    polygons, labels, corners = [], [], 0
    with silence():  # of its lack of a place
        dataset = rasterio.open(path, driver="GTiff")
    with dataset:
        for outline, label in shapes(rasterio.band(dataset, band), connectivity=4):
            exterior, *holes = outline["coordinates"]
            polygons.append(shapely.Polygon(exterior, holes))
            labels.append(int(label))
            corners += len(exterior) + sum(map(len, holes))
            if corners > MAX_CORNERS:
                raise PixelwiseError(
                    f"the regions of the labels have more than {MAX_CORNERS:,} corners, too many for polygons. Clean the "
                    "labels up (--min-area), cut the image into parts, or write another format."
                )
    return np.array(polygons, dtype=object), np.array(labels, dtype=np.int64)


def simplify(polygons: NDArray[Any], tolerance_px: float) -> NDArray[Any]:
    """Leave out corners that make triangles smaller than about `tolerance_px` squared; borders stay shared.

    Where three regions meet, and along the edge of the whole, every corner stays. The polygons come from
    `with_shared_corners`.
    """
    shapely = extra("shapely", "geo", "polygons")
    if tolerance_px == 0 or len(polygons) == 0:
        return polygons
    return shapely.coverage_simplify(polygons, tolerance_px, simplify_boundary=False)


def with_shared_corners(polygons: NDArray[Any]) -> NDArray[Any]:
    """The same polygons, with a corner wherever a neighbour has one, also in the middle of a straight edge.

    Only then are the borders of neighbours the same lines, which stay the same however they are simplified or bent.
    All edges run along rows or columns, all corners are whole numbers and not negative, as outlines of pixels are.
    """
    shapely = extra("shapely", "geo", "polygons")
    if len(polygons) == 0:
        return polygons
    kind, points, (rings, parts) = shapely.to_ragged_array(polygons)
    corners = points.astype(np.int64)  # (N, 2) x, y; the last of each ring is its first again
    towards = np.sign(np.roll(corners, -1, axis=0) - corners)  # of the edge that begins there
    towards[rings[1:] - 1] = 0  # none begins at the last of a ring
    count, first = np.zeros(len(corners), dtype=np.int64), np.zeros(len(corners), dtype=np.int64)
    side = int(corners.max()) + 1
    orders = [np.unique(_keys(corners, axis, side)) for axis in (0, 1)]
    for axis, order in enumerate(orders):
        edges = np.flatnonzero(towards[:, axis])
        here, there = (_keys(points[edges], axis, side) for points in (corners, np.roll(corners, -1, axis=0)))
        low = np.searchsorted(order, np.minimum(here, there), "right")
        high = np.searchsorted(order, np.maximum(here, there), "left")
        count[edges] = high - low
        first[edges] = np.where(here < there, low, high - 1)
    starts = np.concatenate([[0], np.cumsum(count + 1)])
    owner = np.repeat(np.arange(len(corners)), count + 1)
    step = np.arange(len(owner)) - starts[owner]  # 0 is the corner itself, 1.. are those on its edge
    dense = corners[owner].astype(np.float64)
    for axis, order in enumerate(orders):
        added = np.flatnonzero((step > 0) & (towards[owner, axis] != 0))
        edge = owner[added]
        dense[added, axis] = order[first[edge] + towards[edge, axis] * (step[added] - 1)] % side
    return shapely.from_ragged_array(kind, dense, (starts[rings], parts))


def _keys(corners: NDArray[np.int64], axis: int, side: int) -> NDArray[np.int64]:
    """A number for each corner, ascending line by line, and within the line along `axis`."""
    return corners[:, 1 - axis] * side + corners[:, axis]


def find_place(rasterio: ModuleType, result: Result) -> Place:
    """The place of the image that a result was made from; to be used inside `gdal()`."""
    metadata = result.metadata if result.source.format == "geotiff" else {}
    crs_text, transform = metadata.get("crs"), metadata.get("transform")
    if metadata.get("gcps") or metadata.get("rpcs"):
        return Place(coordinates=f"{_PIXELS}; its control points or RPCs are not followed, warp the image (gdalwarp)")
    if not crs_text or not transform:
        level, shapes = result.metadata.get("level"), result.metadata.get("level_shapes")
        if not level or not shapes:
            return Place(coordinates=_PIXELS)
        y, x = (first / here for first, here in zip(shapes[0], shapes[level], strict=True))
        return Place(coordinates=f"{_PIXELS}, at level 0 of its pyramid; level {level} was labelled", scale=(x, y))
    try:
        with gdal():
            crs = rasterio.crs.CRS.from_user_input(crs_text)
            place = Place(coordinates=_DEGREES, crs=crs, transform=transform)
            pixel = _pixels_of(place, result)
    except (OSError, ValueError):  # the coordinate system of a building site, for example
        pixel = np.full((1, 4), np.nan)
    if not np.isfinite(pixel).all():
        return Place(coordinates=f"{_PIXELS}; parts of it have no longitude and latitude in its coordinate system")
    decimals = 2 - math.floor(math.log10(max(float(np.hypot(pixel[:, 0], pixel[:, 1]).min()), 1e-12)))
    straight_px = min(_STRAIGHT_PX, max(1.0, _LONGEST_DEGREES / max(float(np.abs(pixel[:, :2]).max()), 1e-12)))
    true = _plane_area(crs, transform, pixel[:, 3])
    return replace(place, pixel_m2=true, straight_px=straight_px, decimals=min(12, max(7, decimals)))


def _pixels_of(place: Place, result: Result) -> NDArray[np.float64]:
    """How far one pixel goes (degrees of longitude and latitude to the right), and its area (m2): (n, 4), all over it.

    Columns: longitude, latitude, latitude of the pixel itself, area on the ellipsoid.
    """
    warp = extra("rasterio.warp", "geo", "GeoJSON")
    grid = np.linspace(0, 1, _PROBES)
    y, x = (
        axis.ravel()
        for axis in np.meshgrid(grid * (result.source.height - 1), grid * (result.source.width - 1), indexing="ij")
    )
    here, right, below = (
        np.stack(warp.transform(place.crs, _WGS84, *place._to_crs(np.stack([x + dx, y + dy], axis=1)).T), axis=1)
        for dx, dy in ((0, 0), (1, 0), (0, 1))
    )
    across, down = ((step + 180 - here) for step in (right, below))
    across[:, 0], down[:, 0] = across[:, 0] % 360, down[:, 0] % 360
    across, down = across - 180, down - 180
    square = across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0]
    return np.stack([across[:, 0], across[:, 1], here[:, 1], np.abs(square) * _square_degree_m2(here[:, 1])], axis=1)


def _square_degree_m2(latitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """The area of one by one degree near a latitude on the ellipsoid of WGS 84: M N cos(latitude), both its radii."""
    angle = np.radians(latitude)
    flat = 1 - ECCENTRICITY_2 * np.sin(angle) ** 2
    return EQUATOR_M**2 * (1 - ECCENTRICITY_2) / flat**2 * np.cos(angle) * np.radians(1) ** 2


def _plane_area(crs: Any, transform: tuple[float, ...], true_m2: NDArray[np.float64]) -> float | None:
    """The area of a pixel in the plane of the map, if that is the true one to 2 %; Mercator's is not, for example."""
    if not crs.is_projected:
        return None
    a, b, _, d, e, _ = transform
    area = abs(a * e - b * d) * float(crs.linear_units_factor[1]) ** 2
    return area if np.all(np.abs(true_m2 - area) <= _AREA_ERROR * area) else None
