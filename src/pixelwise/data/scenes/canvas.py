"""The drawing board of the street scenes: a pinhole camera, an exact polygon fill, noise tables and random numbers.

A scene must be the same on every machine, so the drawing keeps to arithmetic that is: additions, multiplications,
divisions and roundings of IEEE numbers, the Mersenne twister for choices and the raw PCG64 stream for noise. Vectorised
`exp` and `sin`, normal deviates, BLAS and the polygon fill of an imaging library differ between processors or versions.

Colours are float32 arrays (3, 1), or (3, n) for n pixels: three long planes are several times faster than n short rows.
"""

import colorsys
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

Item = TypeVar("Item")
Point = tuple[float, float]
TABLE = 256  # noise tables have 256 x 256 entries and repeat
FAR = 1e4  # depth of the sky, in metres
NEAR = 1.0  # nothing nearer than this is drawn, in metres


class Chooser(random.Random):
    """Random choices that use `random()` alone, the one method whose stream Python promises to keep."""

    def pick(self, items: Sequence[Item]) -> Item:
        """One of `items`, all equally likely."""
        return items[int(self.random() * len(items))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random() < probability


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """A colour (3, 1) in 0..1 from hue (1 is a full turn), saturation and value."""
    return rgb(*colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


def rgb(red: float, green: float, blue: float) -> np.ndarray:
    """A colour (3, 1); lamps may be brighter than 1."""
    return np.array([[red], [green], [blue]], np.float32)


def mix(colour: np.ndarray, where: np.ndarray, other: np.ndarray, share: np.ndarray | float = 1.0) -> None:
    """Replace a `share` of `colour` (3, n) by `other` (3, m) or (3, 1), at the m places `where`."""
    for plane, part in zip(colour, other, strict=True):
        old = plane[where]
        plane[where] = old + (part - old) * share


def raw_bytes(seed: int, count: int) -> np.ndarray:
    """`count` random bytes, uint8 (count,), from the PCG64 stream of `seed`."""
    words = np.random.PCG64(seed).random_raw(count // 8 + 1).astype("<u8")
    return words.view(np.uint8)[:count]


@cache
def noise_table(finest: int, octaves: int) -> np.ndarray:
    """Periodic noise in -1..1, float32 (256, 256): value noise with features of `finest` entries and larger."""
    total = np.zeros((TABLE, TABLE), np.float32)
    for octave in range(octaves):
        cell = finest * 2**octave
        knots = raw_bytes(1000 * finest + octave, (TABLE // cell) ** 2).reshape(TABLE // cell, -1)
        layer = np.repeat(np.repeat(knots.astype(np.float32), cell, 0), cell, 1)
        for axis in (0, 1, 0, 1) if cell > 1 else ():
            layer = sum((np.roll(layer, shift, axis) for shift in range(cell)), np.zeros_like(layer)) / cell
        total += (layer / 127.5 - 1) * 2**octave
    total /= np.abs(total).max()
    total.flags.writeable = False  # every caller gets the same table
    return total


def fraction(values: np.ndarray) -> np.ndarray:
    """What stands after the point, 0..1; `values % 1` is several times slower."""
    return values - np.floor(values)


def noise(table: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The table's entries nearest to (u, v), which may be any numbers: the table repeats."""
    return table.take(((v.astype(np.int32) & (TABLE - 1)) << 8) | (u.astype(np.int32) & (TABLE - 1)))


class Pixels(NamedTuple):
    """The canvas pixels inside a shape: their flat places and the coordinates of their centres, float32 (n,)."""

    at: np.ndarray
    x: np.ndarray
    y: np.ndarray


_LEVEL = 1e-300  # keeps the slope of a level edge, which no row crosses, from being a division by zero
NO_PIXELS = Pixels(np.zeros(0, np.intp), np.zeros(0, np.float32), np.zeros(0, np.float32))


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera that looks along the street: world axes x right, y up, z ahead, in metres; it stands at x = z = 0."""

    focal: float  # canvas pixels
    vanish_x: float  # the street's vanishing point, in canvas pixels
    vanish_y: float
    height: float  # of the camera above the road, in metres

    def scale(self, z: float) -> float:
        """Canvas pixels per metre at depth `z`."""
        return self.focal / z

    def project(self, points: ArrayLike) -> np.ndarray:
        """World points (n, 3) to canvas points (n, 2); what lies behind `NEAR` is pulled to it."""
        x, y, z = np.asarray(points, np.float64).T
        scale = self.focal / np.maximum(z, NEAR)
        seen = np.empty((len(x), 2))
        seen[:, 0], seen[:, 1] = self.vanish_x + x * scale, self.vanish_y + (self.height - y) * scale
        return seen

    def on_ground(self, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
        """World (x, z) of the road points seen at `pixels`, which must lie below the horizon."""
        z = np.float32(self.focal * self.height) / (pixels.y - np.float32(self.vanish_y))
        return self.across(pixels, z), z

    def across(self, pixels: Pixels, z: np.ndarray | float) -> np.ndarray:
        """World x of `pixels` at depth `z`."""
        return (pixels.x - np.float32(self.vanish_x)) * (z / np.float32(self.focal))

    def up(self, pixels: Pixels, z: np.ndarray | float) -> np.ndarray:
        """World y of `pixels` at depth `z`."""
        return np.float32(self.height) - (pixels.y - np.float32(self.vanish_y)) * (z / np.float32(self.focal))


class Canvas:
    """Colour, class and depth of every pixel, at twice the size of the scene.

    Odd rows and columns are the centres of the scene's pixels: the mask takes exactly those and never mixes, the image
    averages each with its eight neighbours.
    """

    def __init__(self, height: int, width: int) -> None:
        self.rows, self.columns = 2 * height + 1, 2 * width + 1
        self.colour = np.full((3, self.rows * self.columns), 0.12, np.float32)
        self.label = np.zeros(self.rows * self.columns, np.uint8)
        self.depth = np.full(self.rows * self.columns, FAR, np.float32)

    def inside(self, polygon: ArrayLike) -> Pixels:
        """The pixels whose centre lies inside `polygon` (n, 2), by the even-odd rule; it may be concave or leave the canvas.

        In each row the edges cross, sorted from left to right, the shape lies between the first and the second crossing,
        the third and the fourth, and so on.
        """
        x, y = np.asarray(polygon, np.float64).T
        top, bottom = max(math.ceil(y.min()), 0), min(math.ceil(y.max()), self.rows)
        if top >= bottom:
            return NO_PIXELS
        line = np.arange(top, bottom)
        above = y[:, None] <= line
        edge, row = np.nonzero(above != np.concatenate((above[1:], above[:1])))
        slope = (np.concatenate((x[1:], x[:1])) - x) / (np.concatenate((y[1:], y[:1])) - y + _LEVEL)
        row += top
        crossing = np.ceil(x[edge] + (row - y[edge]) * slope[edge])
        column = np.minimum(np.maximum(crossing, 0), self.columns).astype(np.intp)
        ordered = np.sort(row * (self.columns + 1) + column)
        first, length = ordered[::2], ordered[1::2] - ordered[::2]
        return self._spans(first // (self.columns + 1), first % (self.columns + 1), length)

    def _spans(self, row: np.ndarray, column: np.ndarray, length: np.ndarray) -> Pixels:
        """The pixels of horizontal runs that begin at (row, column)."""
        ends = length.cumsum()
        if len(ends) == 0 or ends[-1] == 0:
            return NO_PIXELS
        place = np.arange(ends[-1])
        column = place + (column - ends + length).repeat(length)
        row = row.repeat(length)
        return Pixels(row * self.columns + column, column.astype(np.float32), row.astype(np.float32))

    def behind(self, polygon: ArrayLike) -> Pixels:
        """Like `inside`, without the pixels that something has been drawn on: for drawing near to far."""
        pixels = self.inside(polygon)
        free = np.flatnonzero(self.depth[pixels.at] == np.float32(FAR))
        return Pixels(pixels.at[free], pixels.x[free], pixels.y[free])

    def untouched(self, first: float, last: float) -> Pixels:
        """The pixels of the rows with first < row <= last that nothing has been drawn on."""
        start, stop = (min(max(math.floor(row) + 1, 0), self.rows) for row in (first, last))
        free = self.depth[start * self.columns : stop * self.columns] == np.float32(FAR)
        at = np.flatnonzero(free) + start * self.columns
        row, column = np.divmod(at.astype(np.int32), np.int32(self.columns))
        return Pixels(at, column.astype(np.float32), row.astype(np.float32))

    def paint(
        self, pixels: Pixels, colour: np.ndarray | None, label: int | None, depth: np.ndarray | float | None
    ) -> None:
        """Give `pixels` a colour (3, 1) or (3, n), a class and a depth in metres; None leaves what is there."""
        if colour is not None:
            for plane, values in zip(self.colour, colour, strict=True):
                plane[pixels.at] = values
        if label is not None:
            self.label[pixels.at] = label
        if depth is not None:
            self.depth[pixels.at] = depth

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image float32 (3, H, W), mask uint8 (H, W) and depth float32 (H, W) in metres, at the size of the scene."""
        fine = self.colour.reshape(3, self.rows, self.columns)
        tall = (fine[:, :-1:2] + fine[:, 2::2]) * np.float32(0.25) + fine[:, 1::2] * np.float32(0.5)
        image = (tall[..., :-1:2] + tall[..., 2::2]) * np.float32(0.25) + tall[..., 1::2] * np.float32(0.5)
        shape = (self.rows, self.columns)
        return image, self.label.reshape(shape)[1::2, 1::2].copy(), self.depth.reshape(shape)[1::2, 1::2]


def circle(x: float, y: float, radius_x: float, radius_y: float | None = None, *, corners: int = 16) -> list[Point]:
    """A polygon around (x, y) that looks like an ellipse."""
    radius_y = radius_x if radius_y is None else radius_y
    return [(x + radius_x * cosine, y + radius_y * sine) for cosine, sine in _turns(corners)]


@cache
def _turns(corners: int) -> list[Point]:
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    return [(math.cos(turn), math.sin(turn)) for turn in turns]


def hull(points: Sequence[Point]) -> list[Point]:
    """The convex hull of `points` (Andrew's monotone chain)."""

    def half(ordered: list[Point]) -> list[Point]:
        chain: list[Point] = []
        for x, y in ordered:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], (x, y)) <= 0:
                chain.pop()
            chain.append((x, y))
        return chain[:-1]

    ordered = sorted(set(points))
    return half(ordered) + half(ordered[::-1])


def _turn(a: Point, b: Point, c: Point) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
