"""What lines the street: houses with windows, doors and shops; gardens with fences and hedges; the far end."""

import numpy as np

from pixelwise.data.scenes.canvas import Chooser, Pixels, fraction, hsv, mix, noise, rgb
from pixelwise.data.scenes.street import BUILDING, FENCE, TREE, Lot, Stage, World
from pixelwise.data.scenes.weather import Weather

# hue, saturation and value of the walls
_MATERIALS = {
    "brick": ((0.0, 0.07), (0.30, 0.60), (0.42, 0.75)),
    "pale brick": ((0.07, 0.12), (0.20, 0.45), (0.50, 0.80)),
    "cream": ((0.06, 0.16), (0.08, 0.35), (0.70, 0.96)),
    "white": ((0.0, 1.0), (0.0, 0.06), (0.72, 0.97)),
    "pastel": ((0.0, 1.0), (0.12, 0.34), (0.60, 0.92)),
    "stone": ((0.05, 0.16), (0.04, 0.18), (0.42, 0.75)),
    "concrete": ((0.5, 0.7), (0.03, 0.20), (0.35, 0.72)),
    "leafy": ((0.2, 0.42), (0.20, 0.42), (0.35, 0.70)),
}


class House:
    """Materials and proportions of a house, chosen at random: the colours reach over every hue and most greys."""

    def __init__(self, chooser: Chooser) -> None:
        material = chooser.pick(tuple(_MATERIALS))
        hue, saturation, value = _MATERIALS[material]
        self.bricks = "brick" in material
        self.colour = chooser.colour(saturation, value, hue)
        self.bay, self.storey = chooser.uniform(1.7, 3.0), chooser.uniform(2.7, 3.4)  # metres
        self.window = chooser.uniform(0.36, 0.72), chooser.uniform(0.42, 0.66)  # shares of the bay and of the storey
        self.frame = hsv(chooser.random(), chooser.pick((0.0, 0.0, 0.25)), chooser.pick((0.25, 0.8, 0.9, 0.97)))
        self.glass = chooser.colour((0.1, 0.4), (0.18, 0.5), (0.5, 0.66))
        self.ground = chooser.pick(("shop", "door", "door", "plain"))
        self.accent = chooser.colour((0.3, 0.75), (0.3, 0.8))
        self.roof = chooser.colour((0.1, 0.55), (0.25, 0.6), (-0.02, 0.1))
        self.pitch = chooser.pick((0.0, 1.8, 2.6))  # height of the roof, 0 for a flat one
        self.seed = int(chooser.random() * 200)

    def facade(self, weather: Weather, u: np.ndarray, v: np.ndarray, sharp: np.ndarray, height: float) -> np.ndarray:
        """The wall at `u` metres along and `v` metres above the street, before light, (3, n).

        `sharp` is 1 where details are larger than pixels, towards 0 where they would flicker.
        """
        colour = self.colour * self._masonry(u, v, sharp, height)
        column, row = u / self.bay, (v - 0.15) / self.storey
        side = np.abs(fraction(column) - 0.5)  # distance from the middle of the bay
        share = 0.3 + 0.7 * sharp

        def put(where: np.ndarray, detail: np.ndarray) -> None:
            mix(colour, where, detail, share[where])

        wide, tall = self.window
        rise, low = fraction(row), np.float32(0.26)
        upper = (row >= 1) & (v < height - 0.75)
        glass = upper & (rise > low) & (rise < low + np.float32(tall)) & (side < wide / 2)
        framed = upper & (rise > low - np.float32(0.05)) & (rise < low + np.float32(tall + 0.05))
        put(np.flatnonzero(framed & (side < wide / 2 + 0.045) & ~glass), self.frame)
        panes = np.flatnonzero(glass & ((side > 0.02) | (sharp < 0.5)))  # a bar in the middle
        put(panes, self._glass(weather, column[panes], row[panes], rise[panes]))
        if self.ground == "shop":  # windows under an awning
            window = (side < 0.44) & (v > 0.5) & (v < 2.25)
            awning = np.flatnonzero((v > 2.3) & (v < 2.95))
            put(awning, self.accent * np.where(fraction(column[awning] * 4) < 0.5, np.float32(1), np.float32(0.8)))
        else:
            window = (side < 0.27) & (v > 0.95) & (v < 2.2)
        if self.ground == "door":
            third = fraction(np.floor(column) / 3) < 0.2
            put(np.flatnonzero(third & (side < 0.24) & (v < 2.15)), self.accent)
            window &= ~third
        panes = np.flatnonzero(window)
        rise = (v[panes] - 0.5) / 2
        put(panes, self._glass(weather, column[panes], np.zeros_like(rise), rise))
        return colour

    def _masonry(self, u: np.ndarray, v: np.ndarray, sharp: np.ndarray, height: float) -> np.ndarray:
        """Brightness of the wall itself, (n,): stains, grain, bricks, a dark foot and a light cornice."""
        value = 1 + 0.10 * noise(4, 5, u * 7 + self.seed, v * 7) + 0.05 * noise(1, 2, u * 22, v * 22) * sharp
        if self.bricks:
            course = np.floor(v * 4.5)
            brick = u * 2.2 + fraction(course * 0.5)
            joint = (fraction(v * 4.5) < 0.18) | (fraction(brick) < 0.10)
            value += sharp * (0.09 * noise(1, 1, brick + 999, course * 7) + np.float32(0.16) * joint)
        value *= 0.80 + 0.20 * np.clip(v * 0.6, 0, 1)
        return value + np.float32(0.10) * ((v > height - 0.45) & (v < height - 0.12))

    def _glass(self, weather: Weather, column: np.ndarray, row: np.ndarray, rise: np.ndarray) -> np.ndarray:
        """Window panes, (3, n): each its own darkness, some lit; more sky towards the top."""
        seed, column, row = self.seed, np.floor(column), np.floor(row)
        one = noise(1, 1, column * 3 + seed, row * 5 + seed)
        mirror = np.clip(0.30 + 0.25 * one + 0.35 * (rise - 0.5), 0, 1)
        colour = self.glass + (weather.horizon - self.glass) * mirror
        lit = np.flatnonzero(noise(1, 1, column * 7 + seed, row * 11 + 31) > 1 - 2 * weather.lamps)
        mix(colour, lit, rgb(1.5, 1.22, 0.74) * (0.9 + 0.2 * one[lit]))
        return colour


def draw_house(stage: Stage, side: int, lot: Lot) -> None:
    """A house behind what has been drawn: the gable that looks at the camera, the wall along the street, the roof."""
    house, weather = House(Chooser(lot.seed)), stage.weather
    x, high, near, far = stage.street.wall(side), lot.height, max(lot.near, 1.2), lot.far
    ridge, back = high + house.pitch, x + side * 4.0
    if lot.near > 1.5:
        gable = [(x, 0.0, near), (x, high, near), (back, ridge, near)]
        draw_front(stage, house, [*gable, (x + side * 9.0, high, near), (x + side * 9.0, 0.0, near)], near, high)
    pixels, z, v = _along_street(stage, x, [(x, 0.0, near), (x, high, near), (x, high, far), (x, 0.0, far)])
    sharp = np.clip(1.3 - z * z / (abs(x) * stage.focal) * 2.2, 0, 1)
    stage.canvas.paint(pixels, house.facade(weather, z, v, sharp, high) * weather.light(-side, 0, 0), BUILDING, z)
    if house.pitch:
        pixels = stage.inside([(x, high, near), (x, high, far), (back, ridge, far), (back, ridge, near)], free=True)
        tiles = 1 + 0.14 * noise(1, 3, pixels.x * 0.7, pixels.y * 1.4)
        colour = house.roof * tiles * weather.light(-side * 0.5, 0.85, 0)
        stage.canvas.paint(pixels, colour, BUILDING, (near + far) / 2)


def draw_front(stage: Stage, house: House, outline: list[World], z: float, high: float) -> None:
    """A wall that faces the camera at depth `z`, behind what has been drawn."""
    pixels, weather = stage.inside(outline, free=True), stage.weather
    u, v = stage.across(pixels, z), stage.up(pixels, z)
    sharp = np.full(len(u), min(max(1.2 - z / stage.focal * 4, 0), 1), np.float32)
    stage.canvas.paint(pixels, house.facade(weather, u, v, sharp, high) * weather.light(0, 0, -1), BUILDING, z)


def _along_street(stage: Stage, x: float, outline: list[World]) -> tuple[Pixels, np.ndarray, np.ndarray]:
    """The visible pixels of a wall at `x` along the street, with their depth z and height v in metres."""
    pixels = stage.inside(outline, free=True)
    z = np.float32(stage.focal * x) / (pixels.x - stage.vanish_x + 1e-3)
    depths = [point[2] for point in outline]
    z = np.clip(z, min(depths), max(depths))
    return pixels, z, stage.up(pixels, z)


def draw_garden(stage: Stage, side: int, lot: Lot) -> None:
    """A fence along the pavement and a hedge behind it; what shows through the fence counts as fence."""
    chooser, weather = Chooser(lot.seed), stage.weather
    x, near, far, high = stage.street.wall(side), max(lot.near, 1.2), lot.far, lot.height
    leaf = leaf_colour(chooser)
    pixels, z, v = _along_street(stage, x, [(x, 0.0, near), (x, high, near), (x, high, far), (x, 0.0, far)])
    colour = leaf * (0.42 + 0.2 * noise(1, 4, z * 14, v * 14))
    _paint_boards(colour, z, v, high, chooser)
    lit = weather.light(-side, 0, 0) * 0.7 + weather.ambient * 0.3
    stage.canvas.paint(pixels, colour * lit, FENCE, z)
    x, top = x + side * 1.2, high + chooser.uniform(0.2, 1.6)
    ragged = [(x, top * chooser.uniform(0.9, 1.1), near + (far - near) * step / 14) for step in range(15)]
    pixels, z, v = _along_street(stage, x, [(x, 0.0, near), *ragged, (x, 0.0, far)])
    value = 0.62 + 0.42 * noise(1, 4, z * 14, v * 14) + 0.2 / top * v
    stage.canvas.paint(pixels, leaf * np.maximum(value, 0.2) * weather.light(-side, 0.4, 0), TREE, z)


def _paint_boards(colour: np.ndarray, u: np.ndarray, v: np.ndarray, high: float, chooser: Chooser) -> None:
    """Draw boards, pickets or railings with two rails over `colour` (3, n)."""
    kind = chooser.pick(("boards", "pickets", "pickets", "railing"))
    hue, wooden = chooser.random(), chooser.chance(0.6)
    tone = hsv(0.06 + 0.06 * hue, chooser.uniform(0.15, 0.55), chooser.uniform(0.35, 0.8))
    if not wooden:
        tone = hsv(hue, chooser.pick((0.02, 0.05, 0.35)), chooser.uniform(0.2, 0.95))
    pitch, share = {"boards": (0.42, 0.86), "pickets": (0.46, 0.58), "railing": (0.40, 0.36)}[kind]
    board = u / pitch
    phase = fraction(board)
    rail = np.abs(np.abs(v / high - 0.52) - 0.3) < 0.07
    seen = np.flatnonzero((phase < share) | rail)
    grain = 0.86 + 0.15 * noise(1, 3, np.floor(board[seen]) * 9, v[seen] * 30)
    shade = grain + np.float32(0.14) * (phase[seen] < share * 0.6) - np.float32(0.12) * rail[seen]
    mix(colour, seen, tone * shade)


def leaf_colour(chooser: Chooser) -> np.ndarray:
    """Mostly some green; also autumn, blossom and dusty grey-green."""
    kind = chooser.random()
    if kind < 0.68:
        return chooser.colour((0.3, 0.62), (0.42, 0.80), (0.19, 0.37))
    if kind < 0.84:
        return chooser.colour((0.4, 0.72), (0.55, 0.92), (0.03, 0.15))
    if kind < 0.91:
        return chooser.colour((0.10, 0.38), (0.70, 0.97), (0.92, 1.02))
    return chooser.colour((0.03, 0.2), (0.40, 0.75), (0.15, 0.5))


def draw_far_end(stage: Stage, chooser: Chooser) -> None:
    """A row of houses, or a line of trees, across the end of the street."""
    z = stage.street.end
    x, right = (z / stage.focal * (edge - stage.vanish_x) for edge in (-2, stage.canvas.columns + 1))
    town = chooser.chance(0.7)
    while x < right:
        wide = chooser.uniform(7, 16)
        house = House(chooser)
        high = chooser.uniform(5, 15)
        if town and chooser.chance(0.85):
            outline = [(x, 0.0, z), (x, high, z), (x + wide / 2, high + house.pitch, z), (x + wide, high, z)]
            draw_front(stage, house, [*outline, (x + wide, 0.0, z)], z, high)
        else:
            _draw_grove(stage, x, wide, z, chooser)
        x += wide


def _draw_grove(stage: Stage, x: float, wide: float, z: float, chooser: Chooser) -> None:
    """Trees that stand so close that only a ragged outline shows."""
    steps, base, crowns = 40, chooser.uniform(3.0, 7.0), chooser.pick((2, 3, 3, 4))
    sizes = [chooser.uniform(0.8, 1.3) for _ in range(crowns)]
    top = []
    for step in range(steps + 1):
        place = min(step * crowns / steps, crowns - 1e-6)
        arch = 4 * (place % 1) * (1 - place % 1)
        rise = base * (0.62 + 0.38 * arch * sizes[int(place)]) * chooser.uniform(0.96, 1.04)
        top.append((x - 1 + (wide + 2) * step / steps, rise, z))
    pixels = stage.inside([(x - 1, 0.0, z), *top, (x + wide + 1, 0.0, z)], free=True)
    u, v = stage.across(pixels, z), stage.up(pixels, z)
    value = 0.72 + 0.35 * noise(1, 4, u * 6, v * 6) + 0.02 * v
    stage.canvas.paint(pixels, leaf_colour(chooser) * value * stage.weather.light(0, 0.5, -0.8), TREE, z)
