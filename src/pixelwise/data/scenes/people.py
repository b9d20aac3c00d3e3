"""People: pedestrians, and riders with their bicycles."""

import math
from dataclasses import dataclass

import numpy as np

from pixelwise.data.scenes.canvas import Chooser, Point, circle, hsv
from pixelwise.data.scenes.street import BICYCLIST, PEDESTRIAN, Stage
from pixelwise.data.scenes.things import limb, round_paint

_SKIN = ((0.07, 0.30, 0.95), (0.07, 0.40, 0.80), (0.06, 0.50, 0.58), (0.05, 0.55, 0.38))
_HAIR = ((0.08, 0.6, 0.15), (0.07, 0.6, 0.30), (0.11, 0.55, 0.72), (0.0, 0.0, 0.55), (0.04, 0.7, 0.42))


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """Draws in metres around a foot point: x forward, y up."""

    stage: Stage
    foot: Point  # canvas pixels
    scale: float  # canvas pixels per metre
    z: float
    facing: int  # 1 looks right, -1 left
    turn: float  # 1 seen from the side, towards 0 seen from behind
    label: int

    def at(self, x: float, y: float) -> Point:
        """Figure metres to canvas pixels."""
        return self.foot[0] + self.facing * self.turn * x * self.scale, self.foot[1] - y * self.scale

    def limb(self, start: Point, stop: Point, colour: np.ndarray, width: float, end: float | None = None) -> None:
        """An arm, a leg or a tube, with round ends."""
        a, b, end = self.at(*start), self.at(*stop), width if end is None else end
        self.draw(limb(a, b, width * self.scale, end * self.scale), colour)

    def disc(self, centre: Point, radius: float, colour: np.ndarray, radius_y: float | None = None) -> None:
        """A head or a hat: not narrowed when the figure is seen from behind."""
        x, y = self.at(*centre)
        self.draw(circle(x, y, radius * self.scale, (radius_y or radius) * self.scale, corners=12), colour)

    def draw(self, polygon: list[Point], colour: np.ndarray) -> None:
        round_paint(self.stage, polygon, colour, self.label, self.z)


def _clothes(chooser: Chooser) -> np.ndarray:
    if chooser.chance(0.35):
        return hsv(chooser.random(), chooser.uniform(0, 0.15), chooser.uniform(0.1, 0.9))
    return hsv(chooser.random(), chooser.uniform(0.2, 0.85), chooser.uniform(0.2, 0.9))


def draw_pedestrian(stage: Stage, x: float, z: float, chooser: Chooser) -> None:
    """Somebody who stands or walks, from any side, now and then with a bag or an umbrella."""
    (foot,) = stage.camera.project([(x, 0.0, z)])
    tall = chooser.uniform(1.6, 1.9)
    figure = _Figure(
        stage=stage,
        foot=(float(foot[0]), float(foot[1])),
        scale=stage.camera.scale(z) * tall / 1.75,
        z=z,
        facing=chooser.pick((-1, 1)),
        turn=chooser.uniform(0.45, 1.0),
        label=PEDESTRIAN,
    )
    top, trousers, shoe = _clothes(chooser), _clothes(chooser), hsv(0.07, 0.3, chooser.uniform(0.08, 0.4))
    skin, hair = hsv(*chooser.pick(_SKIN)), hsv(*chooser.pick(_HAIR))
    stride, skirt = chooser.uniform(0.06, 0.30), chooser.chance(0.25)
    _legs(figure, stride, skin if skirt else trousers, shoe)
    if skirt:
        figure.limb((0.0, 0.98), (0.0, 0.52), trousers, 0.34, 0.54)
    swing = stride * 0.8
    figure.limb((0.0, 1.36), (-swing, 0.86), top * np.float32(0.8), 0.13, 0.10)
    wide = 0.40 + 0.12 * (1 - figure.turn)
    figure.limb((0.0, 0.84), (0.02, 1.45), top, wide * 0.86, wide)
    figure.limb((0.0, 1.36), (swing, 0.88), top * np.float32(0.9), 0.13, 0.10)
    figure.disc((swing, 0.84), 0.055, skin)
    _head(figure, 0.03, 1.62, skin, hair, chooser)
    if chooser.chance(0.3):
        figure.limb((-swing, 0.78), (-swing, 0.52), _clothes(chooser), 0.24)
    if stage.weather.rain and chooser.chance(0.6):
        figure.limb((swing, 0.95), (0.12, 1.95), hsv(0, 0, 0.2), 0.05)
        canopy = [(0.12 + 0.62 * math.cos(t), 1.82 + 0.36 * math.sin(t)) for t in (math.pi * s / 10 for s in range(11))]
        figure.draw([figure.at(a / figure.turn, b) for a, b in canopy], _clothes(chooser))


def _legs(figure: _Figure, stride: float, colour: np.ndarray, shoe: np.ndarray) -> None:
    spread = 0.07 * (1 - figure.turn) + 0.02
    for way, shade in ((-1, 0.78), (1, 1.0)):
        ankle = (way * (stride + spread), 0.07)
        figure.limb((way * spread, 0.92), ankle, colour * np.float32(shade), 0.21, 0.15)
        figure.limb((ankle[0] - 0.06, 0.045), (ankle[0] + 0.15, 0.045), shoe, 0.10)


def _head(figure: _Figure, x: float, y: float, skin: np.ndarray, hair: np.ndarray, chooser: Chooser) -> None:
    figure.limb((x - 0.02, y - 0.2), (x, y), skin, 0.12)
    figure.disc((x - 0.02, y + 0.03), 0.125, hair, 0.145)
    if chooser.chance(0.7):
        figure.disc((x + 0.035, y - 0.015), 0.095, skin, 0.12)


def draw_bicyclist(stage: Stage, x: float, z: float, chooser: Chooser) -> None:
    """A rider on a bicycle, from the side or obliquely; the wheels and the frame count as filled."""
    (foot,) = stage.camera.project([(x, 0.0, z)])
    figure = _Figure(
        stage=stage,
        foot=(float(foot[0]), float(foot[1])),
        scale=stage.camera.scale(z) * chooser.uniform(1.0, 1.12),
        z=z,
        facing=chooser.pick((-1, 1)),
        turn=chooser.pick((1.0, chooser.uniform(0.6, 1.0), chooser.uniform(0.38, 0.6))),
        label=BICYCLIST,
    )
    frame, tyre = _clothes(chooser), hsv(0.0, 0.0, chooser.uniform(0.05, 0.2))
    hubs = ((-0.54, 0.36), (0.54, 0.36))
    for hub in hubs:
        _wheel(figure, hub, tyre)
    fork, saddle, pedal, bar = (0.40, 0.86), (-0.24, 0.92), (-0.06, 0.34), (0.36, 1.06)
    body = stage.canvas.inside([figure.at(*point) for point in (hubs[0], saddle, fork, hubs[1], pedal)])
    stage.canvas.paint(body, None, BICYCLIST, z)
    for tube in ((hubs[0], saddle), (hubs[0], pedal), (saddle, pedal), (pedal, fork), (saddle, fork), (hubs[1], bar)):
        figure.limb(*tube, frame, 0.075)
    _rider(figure, saddle, pedal, bar, chooser)


def _wheel(figure: _Figure, hub: Point, tyre: np.ndarray) -> None:
    """A tyre around the hub; what shows through the spokes keeps its colour but belongs to the bicycle."""
    x, y = figure.at(*hub)
    narrow = max(figure.turn, 0.2)
    outer = circle(x, y, 0.36 * narrow * figure.scale, 0.36 * figure.scale, corners=20)
    inner = circle(x, y, 0.27 * narrow * figure.scale, 0.27 * figure.scale, corners=20)
    disc = figure.stage.canvas.inside(outer)
    figure.stage.canvas.paint(disc, None, BICYCLIST, figure.z)
    figure.draw([*outer, outer[0], *inner, inner[0]], tyre)
    for step in range(3 if figure.scale > 60 else 0):  # smaller wheels would be all spokes
        turn = math.pi * step / 3 + 0.3
        along = (0.3 * math.cos(turn), 0.3 * math.sin(turn))
        figure.limb((hub[0] - along[0], hub[1] - along[1]), (hub[0] + along[0], hub[1] + along[1]), tyre * 2, 0.025)


def _rider(figure: _Figure, saddle: Point, pedal: Point, bar: Point, chooser: Chooser) -> None:
    top, trousers, skin = _clothes(chooser), _clothes(chooser), hsv(*chooser.pick(_SKIN))
    shoe, hip, shoulder = hsv(0, 0, 0.12), (saddle[0] + 0.02, saddle[1] + 0.08), (0.08, 1.50)
    turn = chooser.uniform(0, 2 * math.pi)
    for way, shade in ((-1, 0.72), (1, 1.0)):
        ankle = (pedal[0] + way * 0.15 * math.cos(turn), pedal[1] + 0.06 + way * 0.15 * math.sin(turn))
        knee = (0.20 + 0.08 * way * math.cos(turn), 0.80 + 0.08 * way * math.sin(turn))
        figure.limb(hip, knee, trousers * np.float32(shade), 0.20, 0.16)
        figure.limb(knee, ankle, trousers * np.float32(shade), 0.15, 0.11)
        figure.limb((ankle[0] - 0.06, ankle[1] - 0.04), (ankle[0] + 0.14, ankle[1] - 0.04), shoe, 0.10)
    figure.limb(hip, shoulder, top, 0.28, 0.36)
    elbow = (0.24, 1.18)
    figure.limb((shoulder[0] + 0.02, shoulder[1] - 0.08), elbow, top * np.float32(0.85), 0.13, 0.11)
    figure.limb(elbow, bar, skin, 0.10, 0.09)
    _head(figure, shoulder[0] + 0.12, shoulder[1] + 0.20, skin, hsv(*chooser.pick(_HAIR)), chooser)
    if chooser.chance(0.6):
        x, y = shoulder[0] + 0.10, shoulder[1] + 0.24
        dome = [(x + 0.16 * math.cos(t), y + 0.14 * math.sin(t)) for t in (math.pi * s / 8 for s in range(9))]
        figure.draw([figure.at(a, b) for a, b in dome], _clothes(chooser))
