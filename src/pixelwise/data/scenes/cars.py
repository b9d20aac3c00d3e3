"""Cars, as solids: a side outline swept across the width of the car and seen from where the camera is."""

import math

import numpy as np

from pixelwise.data.scenes.canvas import Chooser, circle, hsv, hull
from pixelwise.data.scenes.street import CAR, Stage, World

# Side outlines from the front bumper over the roof to the rear bumper: length, height and half width in metres. The
# windscreen lies between points 2 and 3, the rear window between 4 and 5.
_OUTLINES = {
    "saloon": (
        (2.2, 0.22, 0.84), (2.15, 0.72, 0.84), (1.0, 0.95, 0.84), (0.3, 1.42, 0.64),
        (-0.9, 1.42, 0.64), (-1.6, 1.0, 0.82), (-2.2, 0.95, 0.82), (-2.25, 0.22, 0.84),
    ),
    "hatch": (
        (2.0, 0.22, 0.82), (1.95, 0.74, 0.82), (1.05, 0.98, 0.83), (0.35, 1.5, 0.64),
        (-1.35, 1.5, 0.64), (-1.85, 1.0, 0.80), (-1.95, 0.92, 0.82), (-1.95, 0.22, 0.82),
    ),
    "suv": (
        (2.2, 0.3, 0.90), (2.15, 0.97, 0.90), (1.05, 1.12, 0.90), (0.45, 1.75, 0.74),
        (-1.8, 1.75, 0.74), (-2.1, 1.12, 0.88), (-2.2, 1.0, 0.90), (-2.2, 0.3, 0.90),
    ),
    "van": (
        (2.4, 0.27, 0.94), (2.35, 1.0, 0.94), (1.8, 1.15, 0.94), (1.2, 2.1, 0.86),
        (-2.3, 2.1, 0.86), (-2.4, 1.2, 0.92), (-2.4, 1.1, 0.94), (-2.4, 0.27, 0.94),
    ),
}  # fmt: skip
_LAST = 6  # the face of the rear bumper and lamps; 0 is the front
_WHEEL, _AXLE = 0.33, 1.3  # radius, and distance from the middle of the car, in metres


class _Car:
    """A car of a random kind and paint; heading 0 (radians) drives away from the camera, a quarter turn to the right."""

    def __init__(self, stage: Stage, x: float, z: float, heading: float, chooser: Chooser) -> None:
        self.stage, self.x, self.z, self.heading = stage, x, z, heading
        self.outline = _OUTLINES[chooser.pick(("saloon", "saloon", "hatch", "hatch", "suv", "suv", "van"))]
        dull = chooser.chance(0.5)
        grey, bright = chooser.colour((0.0, 0.12), (0.12, 0.95)), chooser.colour((0.3, 0.8), (0.25, 0.8))
        self.paint = grey if dull else bright
        self.glass = hsv(0.58, chooser.uniform(0.05, 0.3), chooser.uniform(0.14, 0.34))
        self.tail_lit = chooser.chance(0.3) or stage.weather.lamps > 0.1

    def world(self, length: float, high: float, wide: float) -> World:
        """Car coordinates (ahead, up, right) to world coordinates."""
        sine, cosine = math.sin(self.heading), math.cos(self.heading)
        return self.x + length * sine + wide * cosine, high, self.z + length * cosine - wide * sine

    def fill(self, points: list[World], colour: np.ndarray, light: np.ndarray | float = 1.0) -> None:
        """Fill a face of the car."""
        self.stage.canvas.paint(self.stage.inside(points), colour * light, CAR, self.z)

    def light_on(self, face: list[World]) -> np.ndarray | None:
        """The light on a face, or None if it turns its back to the camera."""
        corners = np.array(face)
        normal = np.cross(corners[1] - corners[0], corners[len(face) // 2] - corners[0])
        middle = corners.sum(0) / len(face)
        outward = middle - np.array([self.x, 0.7, self.z])
        normal *= (1 if (normal * outward).sum() > 0 else -1) / math.sqrt((normal * normal).sum() + 1e-9)
        if (normal * (middle - np.array([0.0, self.stage.eye, 0.0]))).sum() > 0:
            return None
        return self.stage.weather.light(*normal) + np.float32(0.06)

    def across(self, face: int, left: float, right: float, start: float = 0, stop: float = 1) -> list[World]:
        """A patch of the face after outline point `face`: -1..1 across the car, 0..1 along the face."""
        first, second = self.outline[face], self.outline[face + 1]
        corners = []
        for along, ends in ((start, (left, right)), (stop, (right, left))):
            length, high, wide = (a + (b - a) * along for a, b in zip(first, second, strict=True))
            corners += [self.world(length, high, end * wide) for end in ends]
        return corners


def draw_car(stage: Stage, x: float, z: float, heading: float, chooser: Chooser) -> None:
    """A parked or driving car."""
    car = _Car(stage, x, z, heading, chooser)
    half, wide = abs(car.outline[-1][0]) - 0.45, car.outline[0][2] * 0.94
    corners = [car.world(length, up, side) for length in (-half, half) for up in (0.0, 0.35) for side in (-wide, wide)]
    shape = stage.canvas.inside(hull(stage.project(corners)))
    stage.canvas.paint(shape, hsv(0.0, 0.0, 0.05), CAR, z)  # the dark room between the wheels belongs to the car
    faces = [(index, car.across(index, -1, 1)) for index in range(len(car.outline) - 1)]
    for index, face in sorted(faces, key=lambda face: -sum(corner[2] for corner in face[1])):
        light = car.light_on(face)
        if light is not None:
            car.fill(face, car.paint, light)
            _draw_details(car, index, light)
    for side in (-1, 1):
        face = [car.world(length, high, side * wide) for length, high, wide in car.outline]
        light = car.light_on(face)
        if light is not None:
            car.fill(face, car.paint, light)
            _draw_side(car, side, light)


def _draw_details(car: _Car, face: int, light: np.ndarray) -> None:
    """Windows, lamps, grille and number plate on a face that goes across the car."""
    weather = car.stage.weather
    if face in (2, 4):
        mirror = car.glass + (weather.horizon - car.glass) * 0.22
        car.fill(car.across(face, -0.88, 0.88, 0.06, 0.92), mirror * 0.9, light)
        car.fill(car.across(face, -0.80, 0.0, 0.25 if face == 2 else 0.5, 0.9), mirror * 1.25, light)
    if face == 0:
        lamp = hsv(0.13, 0.1, 1.25 if weather.lamps > 0.1 else 0.95) * np.maximum(light, 0.75)
        car.fill(car.across(0, -0.55, 0.55, 0.50, 0.85), hsv(0, 0, 0.1), light)
        car.fill(car.across(0, -0.94, 0.94, 0.0, 0.22), hsv(0, 0, 0.16), light)
        car.fill(car.across(0, -0.95, -0.62, 0.58, 0.92), lamp)
        car.fill(car.across(0, 0.62, 0.95, 0.58, 0.92), lamp)
        car.fill(car.across(0, -0.30, 0.30, 0.22, 0.42), hsv(0.15, 0.1, 0.9), light)
    if face == _LAST:
        lamp = hsv(0.0, 0.85, 1.2 if car.tail_lit else 0.6) * np.maximum(light, 0.7)
        car.fill(car.across(_LAST, -0.94, 0.94, 0.74, 1.0), hsv(0, 0, 0.16), light)
        car.fill(car.across(_LAST, -0.97, -0.70, 0.08, 0.42), lamp)
        car.fill(car.across(_LAST, 0.70, 0.97, 0.08, 0.42), lamp)
        car.fill(car.across(_LAST, -0.30, 0.30, 0.34, 0.56), hsv(0.14, 0.2, 0.88), light)


def _draw_side(car: _Car, side: int, light: np.ndarray) -> None:
    """Side windows, a door post and two wheels."""
    corners = car.outline[2:6]
    middle_x, middle_y = (sum(corner[axis] for corner in corners) / 4 for axis in (0, 1))
    inner = [(middle_x + 0.86 * (a - middle_x), middle_y + 0.74 * (b - middle_y), wide) for a, b, wide in corners]
    pane = [car.world(length, high, side * wide) for length, high, wide in inner]
    car.fill(pane, car.glass + (car.stage.weather.horizon - car.glass) * 0.2, light)
    low, high = (inner[0][2] + inner[3][2]) / 2, (inner[1][2] + inner[2][2]) / 2
    post = (
        (-0.12, inner[0][1], low),
        (-0.12, inner[1][1], high),
        (-0.28, inner[1][1], high),
        (-0.28, inner[0][1], low),
    )
    car.fill([car.world(length, up, side * wide) for length, up, wide in post], car.paint, light)
    for axle in (-_AXLE, _AXLE):
        for radius, grey in ((_WHEEL + 0.06, 0.05), (_WHEEL, 0.11), (_WHEEL * 0.58, 0.62)):
            disc = circle(axle, _WHEEL, radius, corners=12)
            wheel = [car.world(length, max(up, 0.0), side * car.outline[0][2] * 1.005) for length, up in disc]
            car.fill(wheel, hsv(0, 0, grey), light)
