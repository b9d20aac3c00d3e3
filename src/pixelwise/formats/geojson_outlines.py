"""Outlines of labels: each connected region as a polygon, all of them one gapless coverage, simplified as such."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import PixelwiseError
from pixelwise.files import extra
from pixelwise.formats.gdal import Handle

MAX_CORNERS = 20_000_000
"""More in one plane are refused: they would take some 8 GB, and hardly any program opens the file."""


def trace(rasterio: ModuleType, path: Path, band: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All regions (pixels that share an edge) of one band of a file, read line by line; to be used inside `gdal()`.

    Returns:
        polygons in pixels, with their holes, as an array of shapely's, and the label of each.

    Raises:
        PixelwiseError: they have more than `MAX_CORNERS` corners.
        OSError: the file cannot be read.
    """
    shapely = extra("shapely", "geo", "polygons")
    shapes = extra("rasterio.features", "geo", "polygons").shapes
    polygons, labels, corners = [], [], 0
    with Handle(rasterio, path.open("rb")) as dataset:
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

    Example:
        >>> import shapely
        >>> stairs = shapely.Polygon([(0, 0), (0, 4), (4, 4), (4, 3), (3, 3), (3, 2), (2, 2), (2, 1), (1, 1), (1, 0)])
        >>> rest = shapely.difference(shapely.box(0, 0, 4, 4), stairs)
        >>> simple = simplify(np.array([stairs, rest]), 1.5)
        >>> shapely.get_num_coordinates(simple).tolist(), float(shapely.area(simple).sum())
        ([6, 4], 16.0)
    """
    shapely = extra("shapely", "geo", "polygons")
    if tolerance_px == 0 or len(polygons) == 0:
        return polygons
    return shapely.coverage_simplify(polygons, tolerance_px, simplify_boundary=False)


def with_shared_corners(polygons: NDArray[Any]) -> NDArray[Any]:
    """The same polygons, with a corner wherever a neighbour has one, also in the middle of a straight edge.

    Only then are the borders of neighbours the same lines, which stay the same however they are simplified or bent.
    All edges run along rows or columns, all corners are whole numbers and not negative, as outlines of pixels are.

    Example:
        >>> import shapely
        >>> left, upper, lower = shapely.box(0, 0, 1, 2), shapely.box(1, 0, 2, 1), shapely.box(1, 1, 2, 2)
        >>> shapely.get_num_coordinates(with_shared_corners(np.array([left, upper, lower]))).tolist()
        [6, 5, 5]
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
    orders = [_ordered(corners, axis, side) for axis in (0, 1)]
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


def _ordered(corners: NDArray[np.int64], axis: int, side: int) -> NDArray[np.int64]:
    """The keys of all corners, each once, ascending: line by line, and within the line along `axis`."""
    return np.unique(_keys(corners, axis, side))


def _keys(corners: NDArray[np.int64], axis: int, side: int) -> NDArray[np.int64]:
    return corners[:, 1 - axis] * side + corners[:, axis]
