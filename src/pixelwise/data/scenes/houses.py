"""What lines the street: houses with windows, doors and shops; gardens with fences and hedges; the far end."""

from dataclasses import dataclass

import numpy as np

from pixelwise.data.scenes.canvas import Chooser, Pixels, fraction, hsv, mix, noise, noise_table, rgb
from pixelwise.data.scenes.street import BUILDING, FENCE, TREE, Lot, Stage, World


@dataclass(frozen=True, kw_only=True)
class HouseStyle:
    """Materials and proportions of a house; lengths in metres."""

    bricks: bool
    colour: np.ndarray
    bay: float
    storey: float
    window: tuple[float, float]  # shares of the bay and of the storey
    frame: np.ndarray
    glass: np.ndarray
    ground: str  # "shop", "door" or "plain"
    accent: np.ndarray
    roof: np.ndarray
    pitch: float  # height of the roof, 0 for a flat one
    seed: int


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


def choose_style(chooser: Chooser) -> HouseStyle:
    """A random style; the colours reach over every hue and most greys."""
    material = chooser.pick(tuple(_MATERIALS))
    hue, saturation, value = _MATERIALS[material]
    return HouseStyle(
        bricks="brick" in material,
        colour=hsv(chooser.uniform(*hue), chooser.uniform(*saturation), chooser.uniform(*value)),
        bay=chooser.uniform(1.7, 3.0),
        storey=chooser.uniform(2.7, 3.4),
        window=(chooser.uniform(0.36, 0.72), chooser.uniform(0.42, 0.66)),
        frame=hsv(chooser.random(), chooser.pick((0.0, 0.0, 0.25)), chooser.pick((0.25, 0.8, 0.9, 0.97))),
        glass=hsv(chooser.uniform(0.5, 0.66), chooser.uniform(0.1, 0.4), chooser.uniform(0.18, 0.5)),
        ground=chooser.pick(("shop", "door", "door", "plain")),
        accent=hsv(chooser.random(), chooser.uniform(0.3, 0.75), chooser.uniform(0.3, 0.8)),
        roof=hsv(chooser.uniform(-0.02, 0.1), chooser.uniform(0.1, 0.55), chooser.uniform(0.25, 0.6)),
        pitch=chooser.pick((0.0, 1.8, 2.6)),
        seed=int(chooser.random() * 200),
    )


@dataclass(frozen=True, kw_only=True)
class Wall:
    """The visible pixels of a facade, in metres along and above the street."""

    style: HouseStyle
    u: np.ndarray  # metres along the wall, (n,)
    v: np.ndarray  # metres above the street, (n,)
    sharp: np.ndarray  # 1 where details are larger than pixels, towards 0 where they would flicker, (n,)
    height: float
    lamps: float  # share of lit windows
    sky: np.ndarray  # what windows mirror, (3, 1)

    def colour(self) -> np.ndarray:
        """The facade before light, (3, n)."""
        colour = self.style.colour * self._masonry()
        column, row = self.u / np.float32(self.style.bay), (self.v - np.float32(0.15)) / np.float32(self.style.storey)
        side = np.abs(fraction(column) - np.float32(0.5))
        self._draw_windows(colour, side, column, row)
        self._draw_ground_floor(colour, side, column)
        return colour

    def _masonry(self) -> np.ndarray:
        """Brightness of the wall itself, (n,): stains, grain, bricks, a dark foot and a light cornice."""
        u, v, style = self.u, self.v, self.style
        value = 1 + np.float32(0.10) * noise(noise_table(4, 5), u * 7 + style.seed, v * 7)
        value += np.float32(0.05) * noise(noise_table(1, 2), u * 22, v * 22) * self.sharp
        if style.bricks:
            course = np.floor(v * np.float32(4.5))
            brick = u * np.float32(2.2) + fraction(course * np.float32(0.5))
            joint = (fraction(v * np.float32(4.5)) < np.float32(0.18)) | (fraction(brick) < np.float32(0.10))
            tones = np.float32(0.09) * noise(noise_table(1, 1), brick + 999, course * 7)
            value += self.sharp * (tones + np.float32(0.16) * joint)
        value *= np.float32(0.80) + np.float32(0.20) * np.clip(v * np.float32(0.6), 0, 1)
        return value + np.float32(0.10) * ((v > np.float32(self.height - 0.45)) & (v < np.float32(self.height - 0.12)))

    def _draw_windows(self, colour: np.ndarray, side: np.ndarray, column: np.ndarray, row: np.ndarray) -> None:
        """Framed windows on every storey above the street; `side` is the distance from the middle of the bay."""
        wide, tall = self.style.window
        rise, low = fraction(row), np.float32(0.26)
        upper = (row >= 1) & (self.v < np.float32(self.height - 0.75))
        glass = upper & (rise > low) & (rise < low + np.float32(tall)) & (side < np.float32(wide / 2))
        framed = upper & (rise > low - np.float32(0.05)) & (rise < low + np.float32(tall + 0.05))
        framed &= (side < np.float32(wide / 2 + 0.045)) & ~glass
        glass &= (side > np.float32(0.02)) | (self.sharp < np.float32(0.5))  # a bar in the middle
        self._put(colour, np.flatnonzero(framed), self.style.frame)
        panes = np.flatnonzero(glass)
        self._put(colour, panes, self._glass(column[panes], row[panes], rise[panes]))

    def _draw_ground_floor(self, colour: np.ndarray, side: np.ndarray, column: np.ndarray) -> None:
        """Shop windows under an awning, doors, or windows at street level."""
        v, accent = self.v, self.style.accent
        if self.style.ground == "shop":
            window = (side < np.float32(0.44)) & (v > np.float32(0.5)) & (v < np.float32(2.25))
            awning = np.flatnonzero((v > np.float32(2.3)) & (v < np.float32(2.95)))
            stripes = np.where(fraction(column[awning] * 4) < np.float32(0.5), np.float32(1), np.float32(0.8))
            self._put(colour, awning, accent * stripes)
        else:
            window = (side < np.float32(0.27)) & (v > np.float32(0.95)) & (v < np.float32(2.2))
        if self.style.ground == "door":
            third = fraction(np.floor(column) / 3) < np.float32(0.2)
            self._put(colour, np.flatnonzero(third & (side < np.float32(0.24)) & (v < np.float32(2.15))), accent)
            window &= ~third
        panes = np.flatnonzero(window)
        rise = (v[panes] - np.float32(0.5)) / 2
        self._put(colour, panes, self._glass(column[panes], np.zeros_like(rise), rise))

    def _glass(self, column: np.ndarray, row: np.ndarray, rise: np.ndarray) -> np.ndarray:
        """Window panes, (3, n): each its own darkness, some lit; more sky towards the top."""
        grain, seed = noise_table(1, 1), self.style.seed
        column, row = np.floor(column), np.floor(row)
        one = noise(grain, column * 3 + seed, row * 5 + seed)
        mirror = np.clip(np.float32(0.30) + np.float32(0.25) * one + np.float32(0.35) * (rise - np.float32(0.5)), 0, 1)
        colour = self.style.glass + (self.sky - self.style.glass) * mirror
        lit = np.flatnonzero(noise(grain, column * 7 + seed, row * 11 + 31) > np.float32(1 - 2 * self.lamps))
        mix(colour, lit, rgb(1.5, 1.22, 0.74) * (np.float32(0.9) + np.float32(0.2) * one[lit]))
        return colour

    def _put(self, colour: np.ndarray, where: np.ndarray, detail: np.ndarray) -> None:
        """Draw a detail, fainter where it would flicker."""
        mix(colour, where, detail, np.float32(0.3) + np.float32(0.7) * self.sharp[where])


def draw_house(stage: Stage, side: int, lot: Lot) -> None:
    """A house behind what has been drawn: the gable that looks at the camera, the wall along the street, the roof."""
    style = choose_style(Chooser(lot.seed))
    x, high, near, far = stage.street.wall(side), lot.height, max(lot.near, 1.2), lot.far
    ridge, light, weather = high + style.pitch, stage.weather.light, stage.weather
    if lot.near > 1.5:
        gable = [(x, 0.0, near), (x, high, near), (x + side * 4.0, ridge, near)]
        draw_front(stage, style, [*gable, (x + side * 9.0, high, near), (x + side * 9.0, 0.0, near)], near, high)
    pixels, z, v = _along_street(stage, x, [(x, 0.0, near), (x, high, near), (x, high, far), (x, 0.0, far)])
    if len(pixels.at):
        footprint = z * z / np.float32(abs(x) * stage.camera.focal)
        sharp = np.clip(np.float32(1.3) - footprint * np.float32(2.2), 0, 1)
        wall = Wall(style=style, u=z, v=v, sharp=sharp, height=high, lamps=weather.lamps, sky=weather.horizon)
        stage.canvas.paint(pixels, wall.colour() * light.on(-side, 0, 0), BUILDING, z)
    if style.pitch:
        back = x + side * 4.0
        pixels = stage.behind([(x, high, near), (x, high, far), (back, ridge, far), (back, ridge, near)])
        tiles = 1 + np.float32(0.14) * noise(noise_table(1, 3), pixels.x * np.float32(0.7), pixels.y * np.float32(1.4))
        colour = style.roof * tiles * light.on(-side * 0.5, 0.85, 0)
        stage.canvas.paint(pixels, colour, BUILDING, (near + far) / 2)


def _along_street(stage: Stage, x: float, outline: list[World]) -> tuple[Pixels, np.ndarray, np.ndarray]:
    """The visible pixels of a wall at `x` along the street, with their depth z and height v in metres."""
    pixels = stage.behind(outline)
    z = np.float32(stage.camera.focal * x) / (pixels.x - np.float32(stage.camera.vanish_x) + np.float32(1e-3))
    depths = [point[2] for point in outline]
    z = np.clip(z, np.float32(min(depths)), np.float32(max(depths)))
    return pixels, z, stage.camera.up(pixels, z)


def draw_front(stage: Stage, style: HouseStyle, outline: list[World], z: float, high: float) -> None:
    """A wall that faces the camera at depth `z`, behind what has been drawn."""
    pixels, weather = stage.behind(outline), stage.weather
    if not len(pixels.at):
        return
    u, v = stage.camera.across(pixels, z), stage.camera.up(pixels, z)
    sharp = np.full(len(u), min(max(1.2 - z / stage.camera.focal * 4, 0), 1), np.float32)
    wall = Wall(style=style, u=u, v=v, sharp=sharp, height=high, lamps=weather.lamps, sky=weather.horizon)
    stage.canvas.paint(pixels, wall.colour() * weather.light.on(0, 0, -1), BUILDING, z)


def draw_garden(stage: Stage, side: int, lot: Lot) -> None:
    """A fence along the pavement and a hedge behind it; what shows through the fence counts as fence."""
    chooser = Chooser(lot.seed)
    x, near, far, high = stage.street.wall(side), max(lot.near, 1.2), lot.far, lot.height
    light, leaf = stage.weather.light, leaf_colour(chooser)
    pixels, z, v = _along_street(stage, x, [(x, 0.0, near), (x, high, near), (x, high, far), (x, 0.0, far)])
    colour = leaf * (np.float32(0.42) + np.float32(0.2) * noise(noise_table(1, 4), z * 14, v * 14))
    _paint_boards(colour, z, v, high, chooser)
    lit = light.on(-side, 0, 0) * np.float32(0.7) + light.ambient * np.float32(0.3)
    stage.canvas.paint(pixels, colour * lit, FENCE, z)
    x, top = x + side * 1.2, high + chooser.uniform(0.2, 1.6)
    steps = [near + (far - near) * step / 14 for step in range(15)]
    ragged = [(x, top * chooser.uniform(0.9, 1.1), depth) for depth in steps]
    pixels, z, v = _along_street(stage, x, [(x, 0.0, near), *ragged, (x, 0.0, far)])
    value = np.float32(0.62) + np.float32(0.42) * noise(noise_table(1, 4), z * 14, v * 14) + np.float32(0.2 / top) * v
    colour = leaf * np.maximum(value, np.float32(0.2)) * light.on(-side, 0.4, 0)
    stage.canvas.paint(pixels, colour, TREE, z)


def _paint_boards(colour: np.ndarray, u: np.ndarray, v: np.ndarray, high: float, chooser: Chooser) -> None:
    """Draw boards, pickets or railings with two rails over `colour` (3, n)."""
    kind = chooser.pick(("boards", "pickets", "pickets", "railing"))
    hue, wooden = chooser.random(), chooser.chance(0.6)
    tone = hsv(0.06 + 0.06 * hue, chooser.uniform(0.15, 0.55), chooser.uniform(0.35, 0.8))
    if not wooden:
        tone = hsv(hue, chooser.pick((0.02, 0.05, 0.35)), chooser.uniform(0.2, 0.95))
    pitch, share = {"boards": (0.42, 0.86), "pickets": (0.46, 0.58), "railing": (0.40, 0.36)}[kind]
    board = u / np.float32(pitch)
    phase = fraction(board)
    rail = np.abs(np.abs(v / np.float32(high) - np.float32(0.52)) - np.float32(0.3)) < np.float32(0.07)
    seen = np.flatnonzero((phase < np.float32(share)) | rail)
    grain = np.float32(0.86) + np.float32(0.15) * noise(noise_table(1, 3), np.floor(board[seen]) * 9, v[seen] * 30)
    shade = grain + np.float32(0.14) * (phase[seen] < np.float32(share * 0.6)) - np.float32(0.12) * rail[seen]
    mix(colour, seen, tone * shade)


def leaf_colour(chooser: Chooser) -> np.ndarray:
    """Mostly some green; also autumn, blossom and dusty grey-green."""
    kind = chooser.random()
    if kind < 0.68:
        return hsv(chooser.uniform(0.19, 0.37), chooser.uniform(0.3, 0.62), chooser.uniform(0.42, 0.80))
    if kind < 0.84:
        return hsv(chooser.uniform(0.03, 0.15), chooser.uniform(0.4, 0.72), chooser.uniform(0.55, 0.92))
    if kind < 0.91:
        return hsv(chooser.uniform(0.92, 1.02), chooser.uniform(0.10, 0.38), chooser.uniform(0.70, 0.97))
    return hsv(chooser.uniform(0.15, 0.5), chooser.uniform(0.03, 0.2), chooser.uniform(0.40, 0.75))


def draw_far_end(stage: Stage, chooser: Chooser) -> None:
    """A row of houses, or a line of trees, across the end of the street."""
    z = stage.street.end
    x, right = (z / stage.camera.focal * (edge - stage.camera.vanish_x) for edge in (-2, stage.canvas.columns + 1))
    town = chooser.chance(0.7)
    while x < right:
        wide = chooser.uniform(7, 16)
        style = choose_style(chooser)
        high = chooser.uniform(5, 15)
        if town and chooser.chance(0.85):
            outline = [(x, 0.0, z), (x, high, z), (x + wide / 2, high + style.pitch, z), (x + wide, high, z)]
            draw_front(stage, style, [*outline, (x + wide, 0.0, z)], z, high)
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
    pixels = stage.behind([(x - 1, 0.0, z), *top, (x + wide + 1, 0.0, z)])
    u, v = stage.camera.across(pixels, z), stage.camera.up(pixels, z)
    leaves = noise(noise_table(1, 4), u * 6, v * 6)
    value = np.float32(0.72) + np.float32(0.35) * leaves + np.float32(0.02) * v
    light = stage.weather.light.on(0, 0.5, -0.8)
    stage.canvas.paint(pixels, leaf_colour(chooser) * value * light, TREE, z)
