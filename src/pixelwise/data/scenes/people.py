"""People: pedestrians, and riders with their bicycles."""

import math

import numpy as np

from pixelwise.data.scenes.canvas import Chooser, Point, bar, circle, hsv
from pixelwise.data.scenes.street import BICYCLIST, PEDESTRIAN, Stage
from pixelwise.data.scenes.things import round_paint

_SKIN = ((0.07, 0.30, 0.95), (0.07, 0.40, 0.80), (0.06, 0.50, 0.58), (0.05, 0.55, 0.38))
_HAIR = ((0.08, 0.6, 0.15), (0.07, 0.6, 0.30), (0.11, 0.55, 0.72), (0.0, 0.0, 0.55), (0.04, 0.7, 0.42))


class _Figure:
    """Draws in metres around a foot point: x forward, y up."""

    def __init__(self, stage: Stage, x: float, z: float, size: float, facing: int, turn: float, label: int) -> None:
        self.stage, self.z, self.label = stage, z, label
        (self.foot,) = stage.project([(x, 0.0, z)])
        self.scale = stage.scale(z) * size
        self.facing = facing  # 1 looks right, -1 left
        self.turn = turn  # 1 seen from the side, towards 0 seen from behind

    def at(self, x: float, y: float) -> Point:
        """Figure metres to canvas pixels."""
        return self.foot[0] + self.facing * self.turn * x * self.scale, self.foot[1] - y * self.scale

    def limb(self, start: Point, stop: Point, colour: np.ndarray, width: float, end: float | None = None) -> None:
        """An arm, a leg or a tube."""
        end = width if end is None else end
        self.draw(bar(self.at(*start), self.at(*stop), width * self.scale, end * self.scale), colour)

    def disc(self, centre: Point, radius: float, colour: np.ndarray, radius_y: float | None = None) -> None:
        """A head or a hand: not narrowed when the figure is seen from behind."""
        radius_y = radius_y or radius
        self.draw(circle(*self.at(*centre), radius * self.scale, radius_y * self.scale, corners=12), colour)

    def dome(self, x: float, y: float, wide: float, high: float, colour: np.ndarray, corners: int) -> None:
        """A helmet or an umbrella: the upper half of an ellipse."""
        turns = [math.pi * corner / corners for corner in range(corners + 1)]
        self.draw([self.at(x + wide * math.cos(turn), y + high * math.sin(turn)) for turn in turns], colour)

    def draw(self, polygon: list[Point], colour: np.ndarray) -> None:
        """Fill a canvas polygon."""
        round_paint(self.stage, polygon, colour, self.label, self.z)


def _clothes(chooser: Chooser) -> np.ndarray:
    """Any colour, a third of them greyish."""
    if chooser.chance(0.35):
        return chooser.colour((0, 0.15), (0.1, 0.9))
    return chooser.colour((0.2, 0.85), (0.2, 0.9))


def draw_pedestrian(stage: Stage, x: float, z: float, chooser: Chooser) -> None:
    """Somebody who stands or walks, from any side, now and then with a bag or an umbrella."""
    size, facing, turn = chooser.uniform(1.6, 1.9) / 1.75, chooser.pick((-1, 1)), chooser.uniform(0.45, 1.0)
    figure = _Figure(stage, x, z, size, facing, turn, PEDESTRIAN)
    top, trousers, shoe = _clothes(chooser), _clothes(chooser), hsv(0.07, 0.3, chooser.uniform(0.08, 0.4))
    skin, hair = hsv(*chooser.pick(_SKIN)), hsv(*chooser.pick(_HAIR))
    stride, skirt = chooser.uniform(0.06, 0.30), chooser.chance(0.25)
    spread = 0.07 * (1 - turn) + 0.02
    for way, shade in ((-1, 0.78), (1, 1.0)):
        ankle = (way * (stride + spread), 0.07)
        figure.limb((way * spread, 0.92), ankle, (skin if skirt else trousers) * shade, 0.21, 0.15)
        figure.limb((ankle[0] - 0.06, 0.045), (ankle[0] + 0.15, 0.045), shoe, 0.10)
    if skirt:
        figure.limb((0.0, 0.98), (0.0, 0.52), trousers, 0.34, 0.54)
    swing, wide = stride * 0.8, 0.40 + 0.12 * (1 - turn)
    figure.limb((0.0, 1.36), (-swing, 0.86), top * 0.8, 0.13, 0.10)
    figure.limb((0.0, 0.84), (0.02, 1.45), top, wide * 0.86, wide)
    figure.limb((0.0, 1.36), (swing, 0.88), top * 0.9, 0.13, 0.10)
    figure.disc((swing, 0.84), 0.055, skin)
    _head(figure, 0.03, 1.62, skin, hair, chooser)
    if chooser.chance(0.3):
        figure.limb((-swing, 0.78), (-swing, 0.52), _clothes(chooser), 0.24)
    if stage.weather.rain and chooser.chance(0.6):
        figure.limb((swing, 0.95), (0.12, 1.95), hsv(0, 0, 0.2), 0.05)
        figure.dome(0.12 / turn, 1.82, 0.62 / turn, 0.36, _clothes(chooser), corners=10)


def _head(figure: _Figure, x: float, y: float, skin: np.ndarray, hair: np.ndarray, chooser: Chooser) -> None:
    """Neck, hair, and mostly a face."""
    figure.limb((x - 0.02, y - 0.2), (x, y), skin, 0.12)
    figure.disc((x - 0.02, y + 0.03), 0.125, hair, 0.145)
    if chooser.chance(0.7):
        figure.disc((x + 0.035, y - 0.015), 0.095, skin, 0.12)


def draw_bicyclist(stage: Stage, x: float, z: float, chooser: Chooser) -> None:
    """A rider on a bicycle, from the side or obliquely; the wheels and the frame count as filled."""
    size, facing = chooser.uniform(1.0, 1.12), chooser.pick((-1, 1))
    turn = chooser.pick((1.0, chooser.uniform(0.6, 1.0), chooser.uniform(0.38, 0.6)))
    figure = _Figure(stage, x, z, size, facing, turn, BICYCLIST)
    frame, tyre = _clothes(chooser), hsv(0.0, 0.0, chooser.uniform(0.05, 0.2))
    back, front = (-0.54, 0.36), (0.54, 0.36)
    _wheel(figure, back, tyre)
    _wheel(figure, front, tyre)
    fork, saddle, pedal, handle = (0.40, 0.86), (-0.24, 0.92), (-0.06, 0.34), (0.36, 1.06)
    body = stage.canvas.inside([figure.at(*point) for point in (back, saddle, fork, front, pedal)])
    stage.canvas.paint(body, None, BICYCLIST, z)
    for tube in ((back, saddle), (back, pedal), (saddle, pedal), (pedal, fork), (saddle, fork), (front, handle)):
        figure.limb(*tube, frame, 0.075)
    _rider(figure, saddle, pedal, handle, chooser)


def _wheel(figure: _Figure, hub: Point, tyre: np.ndarray) -> None:
    """A tyre around the hub; what shows through the spokes keeps its colour but belongs to the bicycle."""
    narrow = max(figure.turn, 0.2) * figure.scale
    outer, inner = (circle(*figure.at(*hub), r * narrow, r * figure.scale, corners=20) for r in (0.36, 0.27))
    figure.stage.canvas.paint(figure.stage.canvas.inside(outer), None, BICYCLIST, figure.z)
    figure.draw([*outer, outer[0], *inner, inner[0]], tyre)
    for step in range(3 if figure.scale > 60 else 0):  # smaller wheels would be all spokes
        turn = math.pi * step / 3 + 0.3
        x, y = 0.3 * math.cos(turn), 0.3 * math.sin(turn)
        figure.limb((hub[0] - x, hub[1] - y), (hub[0] + x, hub[1] + y), tyre * 2, 0.025)


def _rider(figure: _Figure, saddle: Point, pedal: Point, handle: Point, chooser: Chooser) -> None:
    """Legs on the pedals, a bent back, an arm, and now and then a helmet."""
    top, trousers, skin = _clothes(chooser), _clothes(chooser), hsv(*chooser.pick(_SKIN))
    hip, shoulder, elbow = (saddle[0] + 0.02, saddle[1] + 0.08), (0.08, 1.50), (0.24, 1.18)
    turn = chooser.uniform(0, 2 * math.pi)
    for way, shade in ((-1, 0.72), (1, 1.0)):
        x, y = way * math.cos(turn), way * math.sin(turn)
        knee, ankle = (0.20 + 0.08 * x, 0.80 + 0.08 * y), (pedal[0] + 0.15 * x, pedal[1] + 0.06 + 0.15 * y)
        figure.limb(hip, knee, trousers * shade, 0.20, 0.16)
        figure.limb(knee, ankle, trousers * shade, 0.15, 0.11)
        figure.limb((ankle[0] - 0.06, ankle[1] - 0.04), (ankle[0] + 0.14, ankle[1] - 0.04), hsv(0, 0, 0.12), 0.10)
    figure.limb(hip, shoulder, top, 0.28, 0.36)
    figure.limb((shoulder[0] + 0.02, shoulder[1] - 0.08), elbow, top * 0.85, 0.13, 0.11)
    figure.limb(elbow, handle, skin, 0.10, 0.09)
    _head(figure, shoulder[0] + 0.12, shoulder[1] + 0.20, skin, hsv(*chooser.pick(_HAIR)), chooser)
    if chooser.chance(0.6):
        figure.dome(shoulder[0] + 0.10, shoulder[1] + 0.24, 0.16, 0.14, _clothes(chooser), corners=8)
