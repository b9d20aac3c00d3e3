"""The drawing board of the street scenes: random choices, colours, noise and an exact polygon fill.

A scene must be the same on every machine, so the drawing keeps to arithmetic that is: additions, multiplications,
divisions and roundings of IEEE numbers, the Mersenne twister for choices and the raw PCG64 stream for noise. Vectorised
`exp` and `sin`, normal deviates, BLAS and the polygon fill of an imaging library differ between processors or versions.

Colours are float32 arrays (3, 1), or (3, n) for n pixels: three long planes are several times faster than n short rows.
"""

import colorsys
import math
import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")
Point = tuple[float, float]
Range = tuple[float, float]
TABLE = 256  # noise tables have 256 x 256 entries and repeat
FAR = 1e4  # depth of the sky, in metres


class Chooser(random.Random):
    """Random choices that use `random()` alone, the one method whose stream Python promises to keep."""

    def pick(self, items: Sequence[Item]) -> Item:
        """One of `items`, all equally likely."""
        return items[int(self.random() * len(items))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random() < probability

    def colour(self, saturation: Range, value: Range, hue: Range = (0, 1)) -> np.ndarray:
        """A colour (3, 1) with hue, saturation and value from these ranges."""
        return hsv(self.uniform(*hue), self.uniform(*saturation), self.uniform(*value))


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """A colour (3, 1) in 0..1 from hue (1 is a full turn), saturation and value."""
    return rgb(*colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


def rgb(red: float, green: float, blue: float) -> np.ndarray:
    """A colour (3, 1); lamps may be brighter than 1."""
    return np.array([[red], [green], [blue]], np.float32)


def mix(colour: np.ndarray, where: np.ndarray, other: np.ndarray, share: np.ndarray | float = 1.0) -> None:
    """Replace a `share` of `colour` (3, n) by `other` (3, m) or (3, 1), at the m places `where`."""
    for plane, values in zip(colour, other, strict=True):
        old = plane[where]
        plane[where] = old + (values - old) * share


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


def noise(finest: int, octaves: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The noise table's entries nearest to (u, v), which may be any numbers: the table repeats."""
    place = ((v.astype(np.int32) & (TABLE - 1)) << 8) | (u.astype(np.int32) & (TABLE - 1))
    return noise_table(finest, octaves).take(place)


def fraction(values: np.ndarray) -> np.ndarray:
    """What stands after the point, 0..1; `values % 1` is several times slower."""
    return values - np.floor(values)


class Pixels(NamedTuple):
    """The canvas pixels inside a shape: their flat places and the coordinates of their centres, float32 (n,)."""

    at: np.ndarray
    x: np.ndarray
    y: np.ndarray


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

    def inside(self, polygon: Sequence[Point], *, free: bool = False) -> Pixels:
        """The pixels whose centre lies inside `polygon` (n, 2), by the even-odd rule; `free` keeps those not drawn on yet.

        The polygon may be concave or leave the canvas.
        """
        x, y = np.array([*polygon, polygon[0]]).T
        rows = np.arange(max(math.ceil(y.min()), 0), min(math.ceil(y.max()), self.rows))
        above = y[:, None] <= rows
        edge, row = np.nonzero(above[1:] != above[:-1])
        slope = (x[edge + 1] - x[edge]) / (y[edge + 1] - y[edge])
        crossing = np.ceil(x[edge] + (rows[row] - y[edge]) * slope)
        # In each row the shape lies between the first and the second crossing, the third and the fourth, and so on.
        width = self.columns + 1
        ordered = np.sort(rows[row] * width + np.minimum(np.maximum(crossing, 0), self.columns).astype(np.intp))
        first, length = ordered[::2], ordered[1::2] - ordered[::2]
        row = (first // width).repeat(length)
        at = np.arange(len(row)) + (first - length.cumsum() + length).repeat(length) - row
        if free:
            chosen = np.flatnonzero(self.depth[at] == np.float32(FAR))
            at, row = at[chosen], row[chosen]
        return Pixels(at, (at - row * self.columns).astype(np.float32), row.astype(np.float32))

    def rest(self, top: float = 0.0) -> Pixels:
        """The pixels from row `top` down that nothing has been drawn on."""
        right, bottom = self.columns, self.rows
        return self.inside([(-1, top), (right, top), (right, bottom), (-1, bottom)], free=True)

    def paint(
        self, pixels: Pixels, colour: np.ndarray | None, label: int | np.ndarray, depth: np.ndarray | float | None
    ) -> None:
        """Give `pixels` a colour (3, 1) or (3, n), a class and a depth in metres; None leaves what is there."""
        if colour is not None:
            for plane, values in zip(self.colour, colour, strict=True):
                plane[pixels.at] = values
        self.label[pixels.at] = label
        if depth is not None:
            self.depth[pixels.at] = depth

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image float32 (3, H, W), mask uint8 (H, W) and depth float32 (H, W) in metres, at the size of the scene."""
        fine = self.colour.reshape(3, self.rows, self.columns)
        tall = (fine[:, :-1:2] + fine[:, 2::2]) * 0.25 + fine[:, 1::2] * 0.5
        image = (tall[..., :-1:2] + tall[..., 2::2]) * 0.25 + tall[..., 1::2] * 0.5
        shape = (self.rows, self.columns)
        return image, self.label.reshape(shape)[1::2, 1::2].copy(), self.depth.reshape(shape)[1::2, 1::2]


def circle(x: float, y: float, radius_x: float, radius_y: float | None = None, *, corners: int = 16) -> list[Point]:
    """A polygon around (x, y) that looks like an ellipse."""
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    radius_y = radius_x if radius_y is None else radius_y
    return [(x + radius_x * math.cos(turn), y + radius_y * math.sin(turn)) for turn in turns]


def bar(start: Point, stop: Point, start_width: float, stop_width: float | None = None) -> list[Point]:
    """A bar between two canvas points with these widths at its ends."""
    stop_width = start_width if stop_width is None else stop_width
    x, y = stop[0] - start[0], stop[1] - start[1]
    length = math.hypot(x, y) or 1.0
    across = (-y / length / 2, x / length / 2)
    ends = ((start, start_width), (stop, stop_width), (stop, -stop_width), (start, -start_width))
    return [(end[0] + across[0] * width, end[1] + across[1] * width) for end, width in ends]


def hull(points: Sequence[Point]) -> list[Point]:
    """The convex hull of `points` (Andrew's monotone chain)."""

    def half(ordered: list[Point]) -> list[Point]:
        chain: list[Point] = []
        for x, y in ordered:
            while len(chain) > 1:
                (x0, y0), (x1, y1) = chain[-2:]
                if (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) > 0:
                    break
                chain.pop()
            chain.append((x, y))
        return chain[:-1]

    ordered = sorted(set(points))
    return half(ordered) + half(ordered[::-1])
