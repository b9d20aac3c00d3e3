"""The street itself: its geometry, the stage things are drawn on, the sky and the ground."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pixelwise.data.scenes.canvas import (
    FAR,
    Camera,
    Canvas,
    Chooser,
    Pixels,
    Point,
    fraction,
    hsv,
    mix,
    noise,
    noise_table,
)
from pixelwise.data.scenes.weather import Weather

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)

World = tuple[float, float, float]  # a point in metres: right, up, ahead


class Lot(NamedTuple):
    """A stretch of one side of the street."""

    kind: str  # "house" or "garden"
    near: float  # depths, metres
    far: float
    height: float  # of the house's walls or of the garden's fence, metres
    seed: int  # of its look


@dataclass(frozen=True, kw_only=True)
class Street:
    """A straight street seen from a lane; x = 0 is the camera, `centre` the middle of the road."""

    centre: float
    half: float  # half the width of the road, metres
    walk: float  # width of a pavement
    end: float  # depth of what closes the street
    lots: dict[int, tuple[Lot, ...]]  # by side: -1 left, 1 right; near to far
    crossing: tuple[float, float] | None  # depths of a side street

    def kerb(self, side: int) -> float:
        """x of the kerb."""
        return self.centre + side * self.half

    def wall(self, side: int) -> float:
        """x of the line on which houses and fences stand."""
        return self.centre + side * (self.half + self.walk)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """All that a thing needs to draw itself."""

    canvas: Canvas
    camera: Camera
    street: Street
    weather: Weather
    unit: float  # canvas pixels that make one pixel of a 240-line scene

    def inside(self, points: list[World]) -> Pixels:
        """The pixels inside a polygon of world points."""
        return self.canvas.inside(self.camera.project(points))

    def behind(self, points: list[World]) -> Pixels:
        """The pixels inside a polygon of world points that nothing has been drawn on."""
        return self.canvas.behind(self.camera.project(points))


def draw_sky(stage: Stage, chooser: Chooser) -> None:
    """A gradient with clouds on a plane above the street, wherever nothing else has been drawn."""
    canvas, camera, weather = stage.canvas, stage.camera, stage.weather
    pixels = canvas.untouched(-1, canvas.rows)
    rise = np.clip((camera.vanish_y - pixels.y) / np.float32(camera.vanish_y + 1), 0, 1)
    blend = rise * (2 - rise)
    colour = weather.horizon + (weather.zenith - weather.horizon) * blend
    height = 1 / (rise + np.float32(0.12))
    across = (pixels.x - np.float32(camera.vanish_x)) / np.float32(camera.focal) * height
    table = noise_table(4, 5)
    puffs = noise(table, across * 46 + chooser.uniform(0, 256), height * 30 + chooser.uniform(0, 256))
    puffs = puffs + np.float32(0.35) * noise(noise_table(2, 3), across * 150, height * 90)
    veil = np.clip((puffs + np.float32(2.4 * weather.cover - 1.25)) * np.float32(1.6), 0, 1) * np.minimum(1, rise * 5)
    shade = 1 - np.float32(0.10) * np.clip(puffs + np.float32(weather.cover - 0.4), 0, 1)
    colour += (weather.cloud * shade - colour) * (veil * np.float32(0.92))
    canvas.paint(pixels, colour, SKY, FAR)


def draw_ground(stage: Stage, chooser: Chooser, shadows: list[list[Point]]) -> None:
    """Road and pavements with paint, slabs and kerbs, wherever nothing else has been drawn.

    Args:
        stage: the canvas with all walls on it.
        chooser: choices of colours and patterns.
        shadows: canvas polygons that lie in the shade.
    """
    canvas, street = stage.canvas, stage.street
    pixels = canvas.untouched(stage.camera.vanish_y + 0.5, canvas.rows)
    x, z = stage.camera.on_ground(pixels)
    offset = np.abs(x - np.float32(street.centre))
    on_road = offset <= np.float32(street.half)
    if street.crossing is not None:
        on_road |= (z > np.float32(street.crossing[0])) & (z < np.float32(street.crossing[1]))
    road = np.flatnonzero(on_road)
    walk = np.flatnonzero(~on_road)
    colour = np.empty((3, len(x)), np.float32)
    for where, part in (
        (road, _road_colour(stage, chooser, x[road], z[road])),
        (walk, _walk_colour(stage, chooser, x[walk], z[walk], offset[walk])),
    ):
        for plane, values in zip(colour, part, strict=True):
            plane[where] = values
    dark = np.zeros(canvas.rows * canvas.columns, bool)
    for polygon in shadows:
        dark[canvas.inside(polygon).at] = True
    light = stage.weather.light
    shaded = dark[pixels.at] | _in_shade_of_houses(stage, x, z)
    for plane, shadow, sun in zip(colour, light.ambient * np.float32(0.92), light.on(0, 1, 0), strict=True):
        plane *= np.where(shaded, shadow, sun)
    canvas.paint(pixels, colour, None, z)
    canvas.label[pixels.at] = np.where(on_road, ROAD, PAVEMENT)
    for side in (-1, 1):
        _draw_kerb(stage, side, chooser)


def _road_colour(stage: Stage, chooser: Chooser, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Asphalt: grain, patches, tyre tracks and worn paint; (3, n)."""
    street = stage.street
    tone = hsv(chooser.random(), chooser.uniform(0, 0.07), chooser.uniform(0.30, 0.70))
    near = 1 / (1 + z * np.float32(0.08))
    grain = noise(noise_table(1, 2), x * 40, z * 40) * near
    patches = noise(noise_table(4, 5), x * 9 + 50, z * 4 + chooser.random() * 200)
    value = 1 + np.float32(0.20) * grain + np.float32(0.13) * patches
    lane = np.abs(np.abs(x - np.float32(street.centre)) - np.float32(street.half / 2))
    value -= np.float32(0.08) * (np.abs(lane - np.float32(0.75)) < np.float32(0.25))
    colour = tone * value
    paint = np.flatnonzero(_paint(street, chooser, x, z) & (patches < np.float32(0.62)))
    white = hsv(0.12, chooser.pick((0.0, 0.0, 0.05, 0.55)), 0.88)
    mix(colour, paint, white * (1 + np.float32(0.1) * grain[paint]))
    return colour


def _paint(street: Street, chooser: Chooser, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Where the road is painted, bool (n,): centre line, edge lines, zebra crossing."""
    line = x - np.float32(street.centre)
    half_width = np.float32(0.07) + z * np.float32(0.0012)
    dashes = fraction(z / 6 + np.float32(chooser.random())) < np.float32(0.53)
    painted = (np.abs(line) < half_width) & dashes
    if chooser.chance(0.4):
        painted |= np.abs(np.abs(line) - np.float32(street.half - 0.3)) < half_width
    stop = chooser.uniform(7, 16) if street.crossing is None else street.crossing[0] - 3.5
    if street.crossing is not None:
        painted &= (z < np.float32(stop)) | (z > np.float32(street.crossing[1] + 1))
    if chooser.chance(0.5) and stop > 4:
        zebra = np.abs(z - np.float32(stop + 1.2)) < np.float32(1.3)
        painted = (painted & ~zebra) | (zebra & (fraction(line / np.float32(1.1)) < np.float32(0.5)))
    return painted


def _walk_colour(stage: Stage, chooser: Chooser, x: np.ndarray, z: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Slabs with joints, (3, n)."""
    tone = hsv(chooser.random(), chooser.uniform(0, 0.08), chooser.uniform(0.36, 0.76))
    if chooser.chance(0.3):
        tone = hsv(chooser.uniform(0.02, 0.12), chooser.uniform(0.15, 0.4), chooser.uniform(0.45, 0.75))
    size = np.float32(chooser.uniform(0.55, 1.0))
    column, row = offset / size, z / size
    near = np.clip(np.float32(1.25) - z * np.float32(0.05), 0, 1)
    slab = noise(noise_table(1, 1), np.floor(column) * 5 + 128, np.floor(row) * 3)
    joint = (fraction(column) < np.float32(0.09)) | (fraction(row) < np.float32(0.09) + z * np.float32(0.008))
    value = 1 + near * (np.float32(0.09) * slab - np.float32(0.24) * joint)
    value += np.float32(0.10) * noise(noise_table(1, 3), x * 24, z * 24) * near
    return tone * (value + np.float32(0.07) * noise(noise_table(4, 5), x * 9, z * 5))


def _in_shade_of_houses(stage: Stage, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Which ground points the houses on the sun's side keep from the sun, bool (n,)."""
    right, up, ahead = stage.weather.light.to_sun
    side = 1 if right > 0 else -1
    heights = np.zeros(160, np.float32)
    for lot in stage.street.lots[side]:
        heights[max(int(lot.near), 0) : max(int(lot.far), 0)] = lot.height
    away = np.maximum((np.float32(stage.street.wall(side)) - x) * side, 0) / np.float32(abs(right) + 1e-3)
    met = np.clip(z + away * np.float32(ahead), 0, 159)
    return heights[met.astype(np.int32)] > away * np.float32(up)


def _draw_kerb(stage: Stage, side: int, chooser: Chooser) -> None:
    """The kerb stones: a light top and a dark face."""
    street, light = stage.street, stage.weather.light
    edge, tone = street.kerb(side), chooser.uniform(0.45, 0.75)
    gap = street.crossing or (street.end, street.end)
    for near, far in ((1.2, gap[0]), (gap[1], street.end)):
        for wide, low, high, shade in ((0.0, 0.0, 0.13, 0.62), (0.22, 0.13, 0.13, 1.0)):
            outer = edge + side * wide
            corners = [(edge, low, near), (edge, low, far), (outer, high, far), (outer, high, near)]
            falling = light.on(0, 1, 0) if wide else light.on(-side, 0, 0)
            stage.canvas.paint(stage.inside(corners), hsv(0.1, 0.06, tone * shade) * falling, PAVEMENT, None)
