"""Polygons in longitude and latitude on the ellipsoid of WGS 84: cut at the 180th meridian, and their areas."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.extras import extra

EQUATOR_M, ECCENTRICITY_2 = 6_378_137.0, 0.00669437999014
_POLYGON = 3  # what shapely calls its type


def cut_at_antimeridian(polygons: NDArray[Any]) -> NDArray[Any]:
    """Polygons with longitudes in -180..180, none of which crosses the 180th meridian (RFC 7946, section 3.1.9).

    One that does becomes a MultiPolygon with a part on each side; one around a pole reaches up to it. Neighbouring corners
    must lie less than 180 degrees apart.
    """
    shapely = extra("shapely", "geo", "GeoJSON")
    _, points, (rings, parts) = shapely.to_ragged_array(polygons)
    jumps = np.abs(np.diff(points[:, 0], append=points[-1:, 0])) > 180
    jumps[rings[1:] - 1] = False  # from the end of one ring to the start of the next
    ring = np.searchsorted(rings, np.flatnonzero(jumps | (np.abs(points[:, 0]) > 180)), "right") - 1
    found = polygons.copy()
    for index in np.unique(np.searchsorted(parts, ring, "right") - 1):
        outer, *holes = (_inside(points[rings[at] : rings[at + 1]]) for at in range(parts[index], parts[index + 1]))
        found[index] = _polygons_of(shapely.difference(outer, shapely.union_all(holes)))
    return found


def made_valid(polygons: NDArray[Any]) -> NDArray[Any]:
    """The same polygons, but for those whose rings cross or touch themselves after bending and rounding."""
    shapely = extra("shapely", "geo", "GeoJSON")
    found = polygons.copy()
    for index in np.flatnonzero(~shapely.is_valid(polygons)):
        found[index] = _polygons_of(shapely.make_valid(polygons[index]))
    return found


def areas_m2(polygons: NDArray[Any]) -> NDArray[np.float64]:
    """The areas of polygons with their holes, whose corners are longitude and latitude in degrees.

    Each edge counts as the area between it and the equator, as Snyder (Map Projections: A Working Manual, 1987, equations
    3-11 and 3-12) gives it for the ellipsoid: a^2 / 2 times the difference in longitude times q of the latitude. Of edges
    along meridians and parallels this is exact; others must be short.
    """
    shapely = extra("shapely", "geo", "GeoJSON")
    _, points, (rings, parts) = shapely.to_ragged_array(polygons)
    step = (np.diff(points[:, 0], append=points[-1:, 0]) + 180) % 360 - 180
    step[rings[1:] - 1] = 0
    q = _authalic(points[:, 1])
    strips = np.radians(step) * (q + np.roll(q, -1)) / 2
    below, turns = (np.add.reduceat(values, rings[:-1]) for values in (strips, np.radians(step)))
    below = np.abs(below)
    around_pole = np.abs(turns) > np.pi
    below[around_pole] = 2 * np.pi * _authalic(np.array(90.0)) - below[around_pole]
    sign = np.full(len(below), -1.0)
    sign[parts[:-1]] = 1
    return np.asarray(EQUATOR_M**2 / 2 * np.add.reduceat(sign * below, parts[:-1]))


def _authalic(latitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """q of latitudes in degrees (Snyder 1987, equation 3-12)."""
    sine, e = np.sin(np.radians(latitude)), ECCENTRICITY_2**0.5
    flat = sine / (1 - ECCENTRICITY_2 * sine**2) - np.log((1 - e * sine) / (1 + e * sine)) / (2 * e)
    return np.asarray((1 - ECCENTRICITY_2) * flat)


def _inside(ring: NDArray[np.float64]) -> Any:
    """What a closed ring encloses, with longitudes in -180..180; the pole, if it goes around the globe."""
    shapely = extra("shapely", "geo", "GeoJSON")
    ring = ring.copy()
    ring[:, 0] = np.unwrap(ring[:, 0], period=360)
    if abs(ring[-1, 0] - ring[0, 0]) > 180:
        pole = np.copysign(90.0, ring[:, 1].mean())
        nearest = int(np.argmax(ring[:-1, 1] * pole))  # nothing lies between it and the pole
        ring = np.concatenate([ring[nearest:-1], ring[: nearest + 1]])
        ring[:, 0] = np.unwrap(ring[:, 0], period=360)
        ring = np.concatenate([ring, [[ring[-1, 0], pole], [ring[0, 0], pole]]])
    area = shapely.make_valid(shapely.Polygon(ring))
    first, last = (int((end + 180) // 360) for end in (ring[:, 0].min(), ring[:, 0].max()))
    pieces = []
    for turn in range(first, last + 1):
        piece = shapely.intersection(area, shapely.box(360 * turn - 180, -90, 360 * turn + 180, 90))
        pieces.append(shapely.transform(piece, lambda points, turn=turn: points - (360 * turn, 0)))
    return shapely.union_all(pieces)


def _polygons_of(geometry: Any) -> Any:
    """The areas of a geometry, without its lines and points: a Polygon or MultiPolygon."""
    shapely = extra("shapely", "geo", "GeoJSON")
    parts = shapely.get_parts(shapely.get_parts(geometry))
    parts = parts[(shapely.get_type_id(parts) == _POLYGON) & (shapely.area(parts) > 0)]
    return parts[0] if len(parts) == 1 else shapely.multipolygons(parts)
