"""Where everything in a street scene goes, and the order in which it is drawn."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from pixelwise.data.scenes.canvas import Chooser, Point, circle, hull, mix
from pixelwise.data.scenes.cars import draw_car
from pixelwise.data.scenes.houses import draw_far_end, draw_garden, draw_house
from pixelwise.data.scenes.people import draw_bicyclist, draw_pedestrian
from pixelwise.data.scenes.street import NEAR, ROAD, Lot, Stage, Street, draw_ground, draw_sky
from pixelwise.data.scenes.things import draw_board, draw_crown, draw_lamp, draw_sign, draw_traffic_light, draw_tree
from pixelwise.data.scenes.weather import develop


class Box(NamedTuple):
    """The room that a thing takes, and what of it throws a shadow; metres."""

    half_x: float
    half_z: float
    low: float
    high: float


class Thing(NamedTuple):
    """Something to draw on the street."""

    draw: Callable[[Stage], None]
    x: float
    z: float
    box: Box


def compose(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (H, W, 3) and mask uint8 (H, W) of the scene `seed`.

    Walls, ground and sky are drawn near to far, each on what is still free, so that no hidden pixel is computed; the
    things on the street follow far to near, over it.
    """
    chooser = Chooser(seed)
    stage = Stage(chooser, height, width)
    things = _choose_things(chooser, stage)
    lots = [(lot, side) for side in (-1, 1) for lot in stage.street.lots[side]]
    for lot, side in sorted(lots, key=lambda item: item[0].near):
        if lot.kind == "house":
            draw_house(stage, side, lot)
        else:
            draw_garden(stage, side, lot)
            _draw_garden_trees(stage, side, lot)
    draw_far_end(stage, chooser)
    draw_ground(stage, chooser, [_shadow(stage, thing) for thing in things])
    draw_sky(stage, chooser)
    for thing in sorted(things, key=lambda thing: -thing.z):
        thing.draw(stage)
    if stage.weather.wet:
        _mirror_in_road(stage)
    image, mask, depth = stage.canvas.finish()
    return develop(image, depth, stage.weather, seed), mask


def _draw_garden_trees(stage: Stage, side: int, lot: Lot) -> None:
    """Crowns above the hedge."""
    chooser = Chooser(lot.seed + 1)
    x = stage.street.wall(side) + side * chooser.uniform(2.5, 4)
    depths = [lot.near + (lot.far - lot.near) * chooser.random() for _ in range(chooser.pick((1, 1, 2)))]
    for z in sorted(depths):
        if z > 5:
            draw_crown(stage, x, z, chooser, free=True)


def _choose_things(chooser: Chooser, stage: Stage) -> list[Thing]:
    """Everything that stands or moves between the houses."""
    street = stage.street
    things = _choose_cars(chooser, street)

    def add(
        draw: Callable[..., None], count: int, x: Callable[[], float], near: float, far: float, *box: float
    ) -> None:
        for _ in range(count):
            spot = _free_spot(chooser, stage, things, x, near, far)
            if spot is not None:
                things.append(_thing(draw, *spot, Box(*box), chooser))

    def walk(low: float, high: float) -> float:
        side = chooser.pick((-1, 1))
        return street.kerb(side) + side * street.walk * chooser.uniform(low, high)

    def road(share: float) -> float:
        return street.centre + street.half * chooser.uniform(-share, share)

    add(draw_tree, chooser.pick((0, 1, 2, 3)), partial(walk, 0.3, 0.4), 9, 34, 1.6, 1.6, 2.3, 5.5)
    add(draw_lamp, chooser.pick((1, 1, 2, 2)), partial(walk, 0.12, 0.16), 6, 22, 0.1, 0.1, 0.0, 6.0)
    add(draw_sign, chooser.pick((1, 1, 2)), partial(walk, 0.14, 0.2), 5.5, 14, 0.25, 0.05, 0.0, 2.6)
    if street.crossing is not None or chooser.chance(0.35):
        add(draw_traffic_light, chooser.pick((1, 2)), partial(walk, 0.1, 0.15), 8, 18, 0.25, 0.2, 0.0, 3.8)
    if chooser.chance(0.3):
        add(draw_board, 1, partial(walk, 0.4, 0.5), 8, 17, 0.9, 0.05, 1.9, 3.2)
    add(draw_pedestrian, chooser.pick((2, 3, 4, 5)), partial(walk, 0.3, 0.85), 4.5, 12.5, 0.22, 0.15, 0.0, 1.75)
    if chooser.chance(0.4):
        add(draw_pedestrian, 1, partial(road, 0.9), 6, 13, 0.22, 0.15, 0.0, 1.75)
    add(draw_bicyclist, chooser.pick((1, 1, 2)), partial(road, 0.85), 6, 13, 0.7, 0.15, 0.0, 1.6)
    return things


def _thing(draw: Callable[..., None], x: float, z: float, box: Box, chooser: Chooser, **more: float) -> Thing:
    """A thing with random choices of its own."""
    own = Chooser(int(chooser.random() * 2**31))
    return Thing(partial(draw, x=x, z=z, chooser=own, **more), x, z, box)


def _free_spot(
    chooser: Chooser, stage: Stage, things: list[Thing], place: Callable[[], float], near: float, far: float
) -> tuple[float, float] | None:
    """A place (x, z) inside the picture where nothing else stands, and in line with nothing unless far before it."""
    for _ in range(12):
        x, z = place(), near + (far - near) * chooser.random() ** 1.5
        aside = x * stage.scale(z)
        if 0.04 < (stage.vanish_x + aside) / stage.canvas.columns < 0.96 and all(
            (abs(aside - other.x * stage.scale(other.z)) > 11 * stage.unit or abs(z - other.z) > 14)
            and (abs(x - other.x) > other.box.half_x + 0.35 or abs(z - other.z) > other.box.half_z + 0.4)
            for other in things
        ):
            return x, z
    return None


def _choose_cars(chooser: Chooser, street: Street) -> list[Thing]:
    """Cars along both kerbs, those on the right driving away; now and then one in the side street."""
    cars: list[Thing] = []
    gap = (street.crossing[0] - 3, street.crossing[1] + 3) if street.crossing else (0.0, 0.0)
    for side in (-1, 1):
        z = chooser.uniform(6, 14)
        while z < 36:
            if chooser.chance(0.42) and not gap[0] < z < gap[1]:
                x = street.kerb(side) - side * chooser.uniform(1.0, 1.15)
                heading = (0.0 if side == 1 else math.pi) + chooser.uniform(-0.04, 0.04)
                cars.append(_thing(draw_car, x, z, Box(0.9, 2.2, 0.0, 1.4), chooser, heading=heading))
            z += chooser.uniform(5.6, 9)
    if street.crossing is not None and chooser.chance(0.5):
        x, z = street.centre + chooser.uniform(-7, 7), sum(street.crossing) / 2
        heading = chooser.pick((-1, 1)) * math.pi / 2
        cars.append(_thing(draw_car, x, z, Box(2.2, 0.9, 0.0, 1.4), chooser, heading=heading))
    return cars


def _shadow(stage: Stage, thing: Thing) -> list[Point]:
    """The canvas polygon of a thing's shadow on the road: its box, slanted along the light, seven metres long at most."""
    right, up, ahead = stage.weather.to_sun
    right, ahead = -right / up, -ahead / up  # how far a point one metre above the road throws its shadow
    share = min(1.0, 7 / (math.hypot(right, ahead) * thing.box.high))
    corners = [
        (x + level * right, 0.0, max(z + level * ahead, NEAR))
        for level in (thing.box.low * share, thing.box.high * share)
        for x, z in circle(thing.x, thing.z, thing.box.half_x, thing.box.half_z, corners=10)
    ]
    return hull(stage.project(corners))


def _mirror_in_road(stage: Stage) -> None:
    """A wet road mirrors what lies beyond it, flipped at the horizon and the more the flatter it is seen."""
    canvas, horizon = stage.canvas, np.float32(stage.vanish_y)
    index = np.flatnonzero(canvas.label == ROAD)
    y = (index // canvas.columns).astype(np.float32)
    mirrored = np.clip(np.floor(2 * horizon - y), 0, canvas.rows - 1).astype(np.intp)
    seen = canvas.colour[:, mirrored * canvas.columns + index % canvas.columns]
    grazing = 1 - (y - horizon) / (canvas.rows - horizon)
    mix(canvas.colour, index, seen, stage.weather.wet * (0.35 + 0.65 * grazing))
