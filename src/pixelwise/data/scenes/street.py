"""The street itself: its geometry, the stage things are drawn on, the sky and the ground."""

from typing import NamedTuple

import numpy as np

from pixelwise.data.scenes.canvas import FAR, Canvas, Chooser, Pixels, Point, fraction, hsv, mix, noise
from pixelwise.data.scenes.weather import Weather

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
NEAR = 1.0  # nothing nearer than this is drawn, in metres

World = tuple[float, float, float]  # a point in metres: right, up, ahead


class Lot(NamedTuple):
    """A stretch of one side of the street: "house" or "garden", its depths, the height of its walls or fence in metres."""

    kind: str
    near: float
    far: float
    height: float
    seed: int  # of its look


class Street:
    """A random straight street seen from a lane; x = 0 is the camera; metres."""

    def __init__(self, chooser: Chooser) -> None:
        self.half = chooser.uniform(3.0, 4.4)  # half the width of the road
        self.end = chooser.uniform(42, 75)  # depth of what closes the street
        self.crossing: tuple[float, float] | None = None  # depths of a side street
        if chooser.chance(0.35):
            start = chooser.uniform(14, 26)
            self.crossing = (start, start + chooser.uniform(6, 9))
        fenced = chooser.pick((-1, 1))
        self.centre = chooser.pick((-1, 1)) * self.half * chooser.uniform(0.1, 0.5)  # the middle of the road
        self.walk = chooser.uniform(2.0, 3.2)  # width of a pavement
        # By side, -1 left and 1 right; near to far.
        self.lots = {side: _choose_lots(chooser, self.end, self.crossing, side == fenced) for side in (-1, 1)}

    def kerb(self, side: int) -> float:
        """x of the kerb."""
        return self.centre + side * self.half

    def wall(self, side: int) -> float:
        """x of the line on which houses and fences stand."""
        return self.centre + side * (self.half + self.walk)


def _choose_lots(chooser: Chooser, end: float, crossing: tuple[float, float] | None, fenced: bool) -> tuple[Lot, ...]:
    """Houses and gardens up to the end; a `fenced` side has a garden where it fills much of the picture."""
    lots: list[Lot] = []
    start, fence_from = chooser.uniform(-4, 2), chooser.uniform(3, 9)
    while start < end:
        wanted = fenced and start > fence_from
        fenced = fenced and not wanted
        garden = wanted or chooser.chance(0.28)
        kind = "garden" if garden else "house"
        stop = min(start + chooser.uniform(7, 13 if garden else 15), end)
        high = chooser.uniform(1.65, 2.3) if garden else chooser.uniform(4.5, 14)
        look = int(chooser.random() * 2**31)
        if crossing is not None and start < crossing[1] and stop > crossing[0]:
            if crossing[0] - start > 3:
                lots.append(Lot(kind, start, crossing[0], high, look))
            start = crossing[1]
            continue
        lots.append(Lot(kind, start, stop, high, look))
        start = stop
    return tuple(lots)


class Stage:
    """All that a thing needs to draw itself: canvas, street, weather, and a pinhole camera that looks along the street.

    World axes are x right, y up, z ahead, in metres; the camera stands at x = z = 0.
    """

    def __init__(self, chooser: Chooser, height: int, width: int) -> None:
        self.weather, self.street = Weather(chooser), Street(chooser)
        self.focal = 2 * height * chooser.uniform(1.0, 1.25)  # canvas pixels
        self.vanish_x = width + 2 * height * chooser.uniform(-0.28, 0.28)  # the street's vanishing point, canvas pixels
        self.vanish_y = 2 * height * chooser.uniform(0.40, 0.52)
        self.eye = chooser.uniform(1.4, 1.7)  # height of the camera above the road
        self.canvas = Canvas(height, width)
        self.unit = 2 * height / 240  # canvas pixels that make one pixel of a 240-line scene

    def scale(self, z: float) -> float:
        """Canvas pixels per metre at depth `z`."""
        return self.focal / z

    def project(self, points: list[World]) -> list[Point]:
        """World points to canvas points; what lies behind `NEAR` is pulled to it."""
        seen = []
        for x, y, z in points:
            scale = self.focal / max(z, NEAR)
            seen.append((float(self.vanish_x + x * scale), float(self.vanish_y + (self.eye - y) * scale)))
        return seen

    def inside(self, points: list[World], *, free: bool = False) -> Pixels:
        """The pixels inside a polygon of world points; `free` keeps those that nothing has been drawn on."""
        return self.canvas.inside(self.project(points), free=free)

    def across(self, pixels: Pixels, z: np.ndarray | float) -> np.ndarray:
        """World x of `pixels` at depth `z`."""
        return (pixels.x - np.float32(self.vanish_x)) * (z / np.float32(self.focal))

    def up(self, pixels: Pixels, z: np.ndarray | float) -> np.ndarray:
        """World y of `pixels` at depth `z`."""
        return np.float32(self.eye) - (pixels.y - np.float32(self.vanish_y)) * (z / np.float32(self.focal))


def draw_sky(stage: Stage, chooser: Chooser) -> None:
    """A gradient with clouds on a plane above the street, wherever nothing else has been drawn."""
    weather, pixels = stage.weather, stage.canvas.rest()
    rise = np.clip((stage.vanish_y - pixels.y) / np.float32(stage.vanish_y + 1), 0, 1)
    colour = weather.horizon + (weather.zenith - weather.horizon) * (rise * (2 - rise))
    height = 1 / (rise + 0.12)
    across = (pixels.x - stage.vanish_x) / stage.focal * height
    puffs = noise(4, 5, across * 46 + chooser.uniform(0, 256), height * 30 + chooser.uniform(0, 256))
    puffs = puffs + 0.35 * noise(2, 3, across * 150, height * 90)
    veil = np.clip((puffs + (2.4 * weather.cover - 1.25)) * 1.6, 0, 1) * np.minimum(1, rise * 5)
    shade = 1 - 0.10 * np.clip(puffs + (weather.cover - 0.4), 0, 1)
    colour += (weather.cloud * shade - colour) * (veil * 0.92)
    stage.canvas.paint(pixels, colour, SKY, FAR)


def draw_ground(stage: Stage, chooser: Chooser, shadows: list[list[Point]]) -> None:
    """Road and pavements with paint, slabs and kerbs, wherever nothing else has been drawn; `shadows` are polygons."""
    canvas, street, weather = stage.canvas, stage.street, stage.weather
    pixels = canvas.rest(stage.vanish_y + 0.5)
    z = np.float32(stage.focal * stage.eye) / (pixels.y - np.float32(stage.vanish_y))
    x = stage.across(pixels, z)
    offset = np.abs(x - street.centre)
    on_road = offset <= street.half
    if street.crossing is not None:
        on_road |= (z > street.crossing[0]) & (z < street.crossing[1])
    road, walk = np.flatnonzero(on_road), np.flatnonzero(~on_road)
    colour = np.zeros((3, len(x)), np.float32)
    mix(colour, road, _road_colour(street, chooser, x[road], z[road]))
    mix(colour, walk, _walk_colour(chooser, x[walk], z[walk], offset[walk]))
    dark = np.zeros(canvas.rows * canvas.columns, bool)
    for polygon in shadows:
        dark[canvas.inside(polygon).at] = True
    shaded = dark[pixels.at] | _in_shade_of_houses(stage, x, z)
    colour *= np.where(shaded, weather.ambient * 0.92, weather.light(0, 1, 0))
    canvas.paint(pixels, colour, np.where(on_road, ROAD, PAVEMENT), z)
    for side in (-1, 1):
        _draw_kerb(stage, side, chooser.uniform(0.45, 0.75))


def _road_colour(street: Street, chooser: Chooser, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Asphalt: grain, patches, tyre tracks and worn paint; (3, n)."""
    tone = chooser.colour((0, 0.07), (0.30, 0.70))
    grain = noise(1, 2, x * 40, z * 40) * (1 / (1 + z * 0.08))
    patches = noise(4, 5, x * 9 + 50, z * 4 + chooser.random() * 200)
    lane = np.abs(np.abs(x - street.centre) - street.half / 2)
    track = np.where(np.abs(lane - 0.75) < 0.25, np.float32(0.08), np.float32(0))
    colour = tone * (1 + 0.20 * grain + 0.13 * patches - track)
    paint = np.flatnonzero(_paint(street, chooser, x, z) & (patches < 0.62))
    mix(colour, paint, hsv(0.12, chooser.pick((0.0, 0.0, 0.05, 0.55)), 0.88) * (1 + 0.1 * grain[paint]))
    return colour


def _paint(street: Street, chooser: Chooser, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Where the road is painted, bool (n,): centre line, edge lines, zebra crossing."""
    line = x - street.centre
    half_width = 0.07 + z * 0.0012
    painted = (np.abs(line) < half_width) & (fraction(z / 6 + chooser.random()) < 0.53)
    if chooser.chance(0.4):
        painted |= np.abs(np.abs(line) - (street.half - 0.3)) < half_width
    stop = chooser.uniform(7, 16) if street.crossing is None else street.crossing[0] - 3.5
    if street.crossing is not None:
        painted &= (z < stop) | (z > street.crossing[1] + 1)
    if chooser.chance(0.5) and stop > 4:
        zebra = np.abs(z - (stop + 1.2)) < 1.3
        painted = np.where(zebra, fraction(line / 1.1) < 0.5, painted)
    return painted


def _walk_colour(chooser: Chooser, x: np.ndarray, z: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Slabs with joints, (3, n)."""
    tone = chooser.colour((0, 0.08), (0.36, 0.76))
    if chooser.chance(0.3):
        tone = chooser.colour((0.15, 0.4), (0.45, 0.75), (0.02, 0.12))
    size = chooser.uniform(0.55, 1.0)
    column, row = offset / size, z / size
    near = np.clip(1.25 - z * 0.05, 0, 1)
    slab = noise(1, 1, np.floor(column) * 5 + 128, np.floor(row) * 3)
    joint = (fraction(column) < 0.09) | (fraction(row) < 0.09 + z * 0.008)
    value = 1 + near * (0.09 * slab - np.where(joint, np.float32(0.24), np.float32(0)))
    value += 0.10 * noise(1, 3, x * 24, z * 24) * near
    return tone * (value + 0.07 * noise(4, 5, x * 9, z * 5))


def _in_shade_of_houses(stage: Stage, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Which ground points the houses on the sun's side keep from the sun, bool (n,)."""
    right, up, ahead = stage.weather.to_sun
    side = 1 if right > 0 else -1
    heights = np.zeros(160, np.float32)
    for lot in stage.street.lots[side]:
        heights[max(int(lot.near), 0) : max(int(lot.far), 0)] = lot.height
    away = np.maximum((stage.street.wall(side) - x) * side, 0) / (abs(right) + 1e-3)
    met = np.clip(z + away * ahead, 0, 159)
    return heights[met.astype(np.int32)] > away * up


def _draw_kerb(stage: Stage, side: int, tone: float) -> None:
    """The kerb stones: a light top and a dark face."""
    street, weather, edge = stage.street, stage.weather, stage.street.kerb(side)
    gap = street.crossing or (street.end, street.end)
    for near, far in ((1.2, gap[0]), (gap[1], street.end)):
        for wide, low, shade, light in (
            (0.0, 0.0, 0.62, weather.light(-side, 0, 0)),
            (0.22, 0.13, 1.0, weather.light(0, 1, 0)),
        ):
            outer = edge + side * wide
            corners = [(edge, low, near), (edge, low, far), (outer, 0.13, far), (outer, 0.13, near)]
            stage.canvas.paint(stage.inside(corners), hsv(0.1, 0.06, tone * shade) * light, PAVEMENT, None)
