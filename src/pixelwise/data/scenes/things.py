"""What stands on the pavement: trees, street lamps, signs and traffic lights."""

import math

import numpy as np

from pixelwise.data.scenes.canvas import Chooser, Pixels, Point, bar, circle, hsv, noise, rgb
from pixelwise.data.scenes.houses import leaf_colour
from pixelwise.data.scenes.street import POLE, SIGN, TREE, Stage


def round_paint(stage: Stage, polygon: list[Point], colour: np.ndarray, label: int, z: float) -> None:
    """Fill a canvas polygon as if it were round: lighter towards the sun, darker away from it."""
    pixels = stage.canvas.inside(polygon)
    left, right = min(x for x, _ in polygon), max(x for x, _ in polygon)
    position = (pixels.x - left) * (2 / (right - left + 1e-6)) - 1
    shade = 1 + 0.26 * stage.weather.to_sun[0] * position
    stage.canvas.paint(pixels, colour * stage.weather.light_on_figures * shade, label, z)


def draw_tree(stage: Stage, x: float, z: float, chooser: Chooser) -> None:
    """A trunk under a crown of leaves."""
    scale, (foot,) = stage.scale(z), stage.project([(x, 0.0, z)])
    bark = chooser.colour((0.05, 0.5), (0.2, 0.55), (0.03, 0.12))
    thick = max(chooser.uniform(0.3, 0.42) * scale, 4 * stage.unit)
    round_paint(stage, bar(foot, (foot[0], foot[1] - 2.9 * scale), thick * 1.15, thick * 0.8), bark, TREE, z)
    draw_crown(stage, x, z, chooser)


def draw_crown(stage: Stage, x: float, z: float, chooser: Chooser, *, free: bool = False) -> None:
    """The leaves of a round, a tall or a conical tree; `free` behind what has been drawn, else over it."""
    kind = chooser.pick(("round", "round", "round", "tall", "conifer"))
    low, wide = {"round": (2.3, chooser.uniform(1.6, 2.5)), "tall": (1.7, 1.2), "conifer": (0.9, 1.5)}[kind]
    high = chooser.uniform(5.0, 8.5)
    scale, (middle,) = stage.scale(z), stage.project([(x, (low + high) / 2, z)])
    radius = (wide * scale, (high - low) / 2 * scale)
    outline = _crown(middle, *radius, kind == "conifer", chooser)
    pixels = stage.canvas.inside(outline, free=free)
    stage.canvas.paint(pixels, _leaves(stage, pixels, middle, radius, z, chooser), TREE, z)


def _crown(middle: Point, wide: float, half: float, conifer: bool, chooser: Chooser) -> list[Point]:
    """The outline of a crown in canvas points."""
    x, y = middle
    if conifer:
        levels = [(level / 8, 1.0 if level % 2 else 0.72) for level in range(9)]
        right, left = ([(x + s * wide * (1 - t) * w, y + half * (1 - 2 * t)) for t, w in levels] for s in (1, -1))
        return right + left[::-1]
    lobes, start = chooser.uniform(5, 8), chooser.uniform(0, 6)
    outline = []
    for turn in (2 * math.pi * step / 44 for step in range(44)):
        bulge = 0.93 + 0.10 * abs(math.sin(turn * lobes / 2 + start)) + chooser.uniform(-0.045, 0.045)
        outline.append((x + wide * bulge * math.cos(turn), y + half * bulge * math.sin(turn)))
    return outline


def _leaves(stage: Stage, pixels: Pixels, middle: Point, radius: Point, z: float, chooser: Chooser) -> np.ndarray:
    """Clumps of leaves, lit from the sun's side and from above; (3, n)."""
    across, up = (pixels.x - middle[0]) * (1 / radius[0]), (middle[1] - pixels.y) * (1 / radius[1])
    grain = min(max(24 / stage.scale(z), 0.35), 1.0)  # table entries per canvas pixel
    u, v = pixels.x * grain + chooser.uniform(0, 250), pixels.y * grain
    facing = across * stage.weather.to_sun[0] + up * 0.6
    value = 0.78 + 0.27 * noise(1, 3, u, v) + 0.2 * noise(8, 3, u * 2, v * 2) + 0.24 * facing
    return np.maximum(value, 0.22) * (leaf_colour(chooser) * stage.weather.light_on_figures)


def draw_lamp(stage: Stage, x: float, z: float, chooser: Chooser) -> None:
    """A street lamp: a tapering pole with an arm over the road."""
    scale, (foot,) = stage.scale(z), stage.project([(x, 0.0, z)])
    towards = -1 if x > stage.street.centre else 1
    colour = chooser.colour((0, 0.2), (0.15, 0.7))
    thick = max(chooser.uniform(0.22, 0.30) * scale, 5.5 * stage.unit)
    top = (foot[0], foot[1] - chooser.uniform(5.2, 6.8) * scale)
    end = (top[0] + towards * 1.3 * scale, top[1] - 0.25 * scale)
    head = ((end[0] - towards * 0.3 * scale, end[1]), (end[0] + towards * 0.5 * scale, end[1]))
    round_paint(stage, bar(foot, (foot[0], foot[1] - 0.8 * scale), thick * 1.5), colour, POLE, z)
    round_paint(stage, bar(foot, top, thick * 1.1, thick * 0.9), colour, POLE, z)
    round_paint(stage, bar(top, end, thick * 0.9, thick * 0.8), colour, POLE, z)
    round_paint(
        stage, bar(*head, thick * 1.4), rgb(1.8, 1.5, 1) if stage.weather.lamps > 0.2 else colour * 1.2, POLE, z
    )


def draw_sign(stage: Stage, x: float, z: float, chooser: Chooser) -> None:
    """A traffic sign on a post: round, triangular, square, a diamond or an octagon."""
    scale, (foot,) = stage.scale(z), stage.project([(x, 0.0, z)])
    radius = max(chooser.uniform(0.40, 0.52) * scale, 8 * stage.unit)
    centre = (foot[0], foot[1] - chooser.uniform(2.1, 2.5) * scale)
    post = chooser.colour((0, 0.25), (0.25, 0.75))
    round_paint(stage, bar(foot, centre, max(0.13 * scale, 4.6 * stage.unit)), post, POLE, z)
    corners, start = chooser.pick(((20, 0.0), (20, 0.0), (3, 0.75), (3, 0.25), (4, 0.125), (4, 0.0), (8, 0.0625)))
    rim, field = _sign_colours(chooser)
    turns = [2 * math.pi * (corner / corners + start) for corner in range(corners)]
    for size, colour in ((1.12, field * 0.75), (1.0, rim), (0.74, field)):
        plate = [(centre[0] + size * radius * math.cos(t), centre[1] + size * radius * math.sin(t)) for t in turns]
        round_paint(stage, plate, colour, SIGN, z)
    if chooser.chance(0.7):
        half = radius * 0.32
        tilt = chooser.pick((0.0, 0.6, 1.0)) * half
        stripe = bar((centre[0] - half, centre[1] + tilt), (centre[0] + half, centre[1] - tilt), radius * 0.22)
        round_paint(stage, stripe, rim * 0.8, SIGN, z)


def _sign_colours(chooser: Chooser) -> tuple[np.ndarray, np.ndarray]:
    """Rim and field, as signs have them somewhere: red, blue, yellow, green, brown, white, black."""
    white, black = hsv(0, 0, 0.92), hsv(0, 0, 0.12)
    hue = chooser.pick((0.0, 0.99, 0.6, 0.58, 0.13, 0.4, 0.06))
    strong = hsv(hue, chooser.uniform(0.5, 0.9), chooser.uniform(0.4, 0.9))
    return chooser.pick(((strong, white), (strong, white), (white, strong), (black, strong), (black, white)))


def draw_board(stage: Stage, x: float, z: float, chooser: Chooser) -> None:
    """A large direction board on two posts."""
    scale, (foot,) = stage.scale(z), stage.project([(x, 0.0, z)])
    half = chooser.uniform(0.75, 1.1) * scale
    low, high = foot[1] - 2.1 * scale, foot[1] - (2.1 + chooser.uniform(0.9, 1.3)) * scale
    post = chooser.colour((0, 0.2), (0.3, 0.7))
    for leg in (foot[0] - 0.6 * half, foot[0] + 0.6 * half):
        round_paint(stage, bar((leg, foot[1]), (leg, low), max(0.13 * scale, 4.6 * stage.unit)), post, POLE, z)
    rim, field = _sign_colours(chooser)
    for margin, colour in ((0.0, rim), (0.06 * scale, field)):
        left, right, top, bottom = foot[0] - half + margin, foot[0] + half - margin, high + margin, low - margin
        round_paint(stage, [(left, top), (right, top), (right, bottom), (left, bottom)], colour, SIGN, z)
    for line in range(3):
        y = high + (low - high) * (0.27 + 0.23 * line)
        text = bar((foot[0] - half * 0.7, y), (foot[0] + half * chooser.uniform(-0.1, 0.7), y), 0.1 * scale)
        round_paint(stage, text, rim, SIGN, z)


def draw_traffic_light(stage: Stage, x: float, z: float, chooser: Chooser) -> None:
    """A pole that carries a box with three lamps; the box counts as a sign, as it does in CamVid."""
    scale, (foot,) = stage.scale(z), stage.project([(x, 0.0, z)])
    half = max(0.28 * scale, 6.0 * stage.unit)
    top = (foot[0], foot[1] - 2.3 * scale - 6 * half)
    post, case = chooser.colour((0, 0.3), (0.15, 0.7)), chooser.colour((0.0, 0.4), (0.08, 0.35))
    round_paint(stage, bar(foot, (top[0], top[1] + half), max(0.18 * scale, 5.2 * stage.unit)), post, POLE, z)
    round_paint(stage, bar(top, (top[0], top[1] + 5.6 * half), 2 * half), case, SIGN, z)
    lit = chooser.pick((0, 0, 1, 2, 2))
    for lamp, hue in enumerate((0.0, 0.12, 0.42)):
        colour = hsv(hue, 0.8, 1.0) * (1.7 if lamp == lit else 0.28)
        disc = circle(top[0], top[1] + (1.05 + 1.75 * lamp) * half, 0.68 * half, corners=12)
        round_paint(stage, disc, colour, SIGN, z)
