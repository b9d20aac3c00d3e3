"""From pixels to longitude and latitude: where the polygons of an image lie, if the image knows where it lies itself."""

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.files import extra
from pixelwise.formats.base import Result
from pixelwise.formats.gdal import gdal

_WGS84 = "EPSG:4326"  # rasterio keeps the order longitude, latitude
_STRAIGHT_PX = 256.0  # edges are cut into such pieces before they are bent: at 10 m per pixel they err by 0.02 px
_PROBES = 17  # places along each side where it is tried whether the image has longitude and latitude
_AREA_ERROR = 0.02
_EQUATOR_M, _ECCENTRICITY_2 = 6_378_137.0, 0.00669437999014
_PIXELS = "pixels of the image: x to the right, y down, (0, 0) is its upper left corner"
_DEGREES = "longitude and latitude in degrees, WGS 84"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an image lies.

    Attributes:
        coordinates: what the coordinates of the polygons are, in words.
        crs: rasterio's coordinate system of the image; None if the polygons stay in pixels.
        transform: (a, b, c, d, e, f): x = a column + b row + c, y = d column + e row + f.
        pixel_m2: the area of a pixel in square metres, if the coordinate system has a unit of length.
        decimals: of degrees, so that they are about a hundredth of a pixel, and at least the 7 that RFC 7946 names.
    """

    coordinates: str
    crs: Any = None
    transform: tuple[float, ...] = ()
    pixel_m2: float | None = None
    decimals: int = 7

    def to_world(self, rasterio: ModuleType, polygons: NDArray[Any]) -> NDArray[Any]:
        """Polygons in pixels, in the coordinates of the file; those that cross the antimeridian are cut there."""
        if self.crs is None or len(polygons) == 0:
            return polygons
        shapely, warp = (extra(name, "geo", "GeoJSON") for name in ("shapely", "rasterio.warp"))
        local = shapely.transform(shapely.segmentize(polygons, _STRAIGHT_PX), self._to_crs)
        world = shapely.transform(local, lambda points: np.stack(warp.transform(self.crs, _WGS84, *points.T), axis=1))
        west, _, east, _ = shapely.bounds(world).T
        for index in np.flatnonzero(east - west > 180):
            cut = warp.transform_geom(self.crs, _WGS84, shapely.geometry.mapping(local[index]))
            world[index] = shapely.geometry.shape(cut)
        return shapely.transform(world, lambda points: np.round(points, self.decimals))

    def _to_crs(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b, c, d, e, f = self.transform
        x, y = points.T
        return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)


def find_place(rasterio: ModuleType, result: Result) -> Place:
    """The place of the image that a result was made from; to be used inside `gdal()`."""
    metadata = result.metadata if result.source.format == "geotiff" else {}
    transform = metadata.get("transform")
    if metadata.get("gcps") or metadata.get("rpcs"):
        return Place(coordinates=f"{_PIXELS}; its control points or RPCs are not followed, warp the image (gdalwarp)")
    if not metadata.get("crs") or not transform:
        return Place(coordinates=_PIXELS + _level_in_words(result))
    try:
        with gdal():
            crs = rasterio.crs.CRS.from_user_input(metadata["crs"])
            place = Place(coordinates=_DEGREES, crs=crs, transform=transform)
            pixel = _pixels_of(place, result)
    except (OSError, ValueError):  # the coordinate system of a building site, for example
        pixel = np.full((1, 4), np.nan)
    if not np.isfinite(pixel).all():
        return Place(coordinates=f"{_PIXELS}; parts of it have no longitude and latitude in its coordinate system")
    decimals = 2 - math.floor(math.log10(max(float(np.hypot(pixel[:, 0], pixel[:, 1]).min()), 1e-12)))
    return replace(place, pixel_m2=_plane_area(crs, transform, pixel[:, 3]), decimals=min(12, max(7, decimals)))


def _level_in_words(result: Result) -> str:
    """A viewer takes coordinates for those of the finest level."""
    level = result.metadata.get("level")
    if result.source.format != "slide" or not level:
        return ""
    return f"; of level {level} of the slide, times {result.metadata['downsample']:g} they are those of level 0"


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
    flat = 1 - _ECCENTRICITY_2 * np.sin(angle) ** 2
    return _EQUATOR_M**2 * (1 - _ECCENTRICITY_2) / flat**2 * np.cos(angle) * np.radians(1) ** 2


def _plane_area(crs: Any, transform: tuple[float, ...], true_m2: NDArray[np.float64]) -> float | None:
    """The area of a pixel in the plane of the map, if that is the true one to 2 %; Mercator's is not, for example."""
    if not crs.is_projected:
        return None
    a, b, _, d, e, _ = transform
    area = abs(a * e - b * d) * float(crs.linear_units_factor[1]) ** 2
    return area if np.all(np.abs(true_m2 - area) <= _AREA_ERROR * area) else None
