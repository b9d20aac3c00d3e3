"""Where everything in a street scene goes, and the order in which it is drawn."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from pixelwise.data.scenes.canvas import NEAR, Camera, Canvas, Chooser, Point, circle, hull, mix
from pixelwise.data.scenes.cars import draw_car
from pixelwise.data.scenes.houses import draw_far_end, draw_garden, draw_house
from pixelwise.data.scenes.people import draw_bicyclist, draw_pedestrian
from pixelwise.data.scenes.street import ROAD, Lot, Stage, Street, draw_ground, draw_sky
from pixelwise.data.scenes.things import draw_board, draw_crown, draw_lamp, draw_sign, draw_traffic_light, draw_tree
from pixelwise.data.scenes.weather import choose_weather, develop


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
    stage = _set_stage(chooser, height, width)
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


def _set_stage(chooser: Chooser, height: int, width: int) -> Stage:
    """Weather, street, camera and an empty canvas."""
    return Stage(
        weather=choose_weather(chooser),
        street=_choose_street(chooser),
        camera=Camera(
            focal=2 * height * chooser.uniform(1.0, 1.25),
            vanish_x=width + 2 * height * chooser.uniform(-0.28, 0.28),
            vanish_y=2 * height * chooser.uniform(0.40, 0.52),
            height=chooser.uniform(1.4, 1.7),
        ),
        canvas=Canvas(height, width),
        unit=2 * height / 240,
    )


def _choose_street(chooser: Chooser) -> Street:
    half, end = chooser.uniform(3.0, 4.4), chooser.uniform(42, 75)
    crossing = None
    if chooser.chance(0.35):
        start = chooser.uniform(14, 26)
        crossing = (start, start + chooser.uniform(6, 9))
    fenced = chooser.pick((-1, 1))
    return Street(
        centre=chooser.pick((-1, 1)) * half * chooser.uniform(0.1, 0.5),
        half=half,
        walk=chooser.uniform(2.0, 3.2),
        end=end,
        lots={side: _choose_lots(chooser, end, crossing, side == fenced) for side in (-1, 1)},
        crossing=crossing,
    )


def _choose_lots(chooser: Chooser, end: float, crossing: tuple[float, float] | None, fenced: bool) -> tuple[Lot, ...]:
    """Houses and gardens up to the end; a `fenced` side has a garden where it fills much of the picture."""
    lots: list[Lot] = []
    start, fence_from = chooser.uniform(-4, 2), chooser.uniform(3, 9)
    while start < end:
        wanted = fenced and start > fence_from
        fenced = fenced and not wanted
        garden = wanted or chooser.chance(0.28)
        stop = min(start + chooser.uniform(7, 13 if garden else 15), end)
        high = chooser.uniform(1.65, 2.3) if garden else chooser.uniform(4.5, 14)
        look = int(chooser.random() * 2**31)
        if crossing is not None and start < crossing[1] and stop > crossing[0]:
            if crossing[0] - start > 3:
                lots.append(Lot("garden" if garden else "house", start, crossing[0], high, look))
            start = crossing[1]
            continue
        lots.append(Lot("garden" if garden else "house", start, stop, high, look))
        start = stop
    return tuple(lots)


def _draw_garden_trees(stage: Stage, side: int, lot: Lot) -> None:
    """Crowns above the hedge."""
    chooser = Chooser(lot.seed + 1)
    x = stage.street.wall(side) + side * chooser.uniform(2.5, 4)
    depths = [lot.near + (lot.far - lot.near) * chooser.random() for _ in range(chooser.pick((1, 1, 2)))]
    for z in sorted(depths):
        if z > 5:
            draw_crown(stage, x, z, chooser, behind=True)


def _choose_things(chooser: Chooser, stage: Stage) -> list[Thing]:
    """Everything that stands or moves between the houses."""
    street = stage.street
    things = _choose_cars(chooser, street)

    def add(
        draw: Callable[..., None], count: int, place: Callable[[], float], near: float, far: float, box: Box
    ) -> None:
        for _ in range(count):
            spot = _free_spot(chooser, stage, things, place, near, far)
            if spot is not None:
                things.append(_thing(draw, *spot, box, chooser))

    def walk(low: float, high: float) -> float:
        side = chooser.pick((-1, 1))
        return street.kerb(side) + side * street.walk * chooser.uniform(low, high)

    def road(share: float) -> float:
        return street.centre + street.half * chooser.uniform(-share, share)

    person = Box(0.22, 0.15, 0.0, 1.75)
    add(draw_tree, chooser.pick((0, 1, 2, 3)), partial(walk, 0.3, 0.4), 9, 34, Box(1.6, 1.6, 2.3, 5.5))
    add(draw_lamp, chooser.pick((1, 1, 2, 2)), partial(walk, 0.12, 0.16), 6, 22, Box(0.1, 0.1, 0.0, 6.0))
    add(draw_sign, chooser.pick((1, 1, 2)), partial(walk, 0.14, 0.2), 5.5, 14, Box(0.25, 0.05, 0.0, 2.6))
    if street.crossing is not None or chooser.chance(0.35):
        add(draw_traffic_light, chooser.pick((1, 2)), partial(walk, 0.1, 0.15), 8, 18, Box(0.25, 0.2, 0.0, 3.8))
    if chooser.chance(0.3):
        add(draw_board, 1, partial(walk, 0.4, 0.5), 8, 17, Box(0.9, 0.05, 1.9, 3.2))
    add(draw_pedestrian, chooser.pick((2, 3, 4, 5)), partial(walk, 0.3, 0.85), 4.5, 12.5, person)
    if chooser.chance(0.4):
        add(draw_pedestrian, 1, partial(road, 0.9), 6, 13, person)
    add(draw_bicyclist, chooser.pick((1, 1, 2)), partial(road, 0.85), 6, 13, Box(0.7, 0.15, 0.0, 1.6))
    return things


def _thing(draw: Callable[..., None], x: float, z: float, box: Box, chooser: Chooser, **more: float) -> Thing:
    own = Chooser(int(chooser.random() * 2**31))
    return Thing(partial(draw, x=x, z=z, chooser=own, **more), x, z, box)


def _free_spot(
    chooser: Chooser, stage: Stage, things: list[Thing], place: Callable[[], float], near: float, far: float
) -> tuple[float, float] | None:
    """A place (x, z) inside the picture where nothing else stands, and in line with nothing unless far before it."""
    camera = stage.camera
    for _ in range(12):
        x, z = place(), near + (far - near) * chooser.random() ** 1.5
        aside = x * camera.scale(z)
        if not 0.04 < (camera.vanish_x + aside) / stage.canvas.columns < 0.96:
            continue
        apart = all(
            abs(aside - other.x * camera.scale(other.z)) > 11 * stage.unit or abs(z - other.z) > 14 for other in things
        )
        if apart and all(abs(x - o.x) > o.box.half_x + 0.35 or abs(z - o.z) > o.box.half_z + 0.4 for o in things):
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
    right, ahead = stage.weather.light.shadow_shift
    low, high, steep = thing.box.low, thing.box.high, math.hypot(right, ahead)
    reach = min(1.0, 7 / (steep * high))
    corners = []
    for level in (low * reach, high * reach):
        for x, z in circle(thing.x, thing.z, thing.box.half_x, thing.box.half_z, corners=10):
            corners.append((x + level * right, 0.0, max(z + level * ahead, NEAR)))
    return hull([(float(x), float(y)) for x, y in stage.camera.project(corners)])


def _mirror_in_road(stage: Stage) -> None:
    """A wet road mirrors what lies beyond it, flipped at the horizon and the more the flatter it is seen."""
    canvas, horizon = stage.canvas, np.float32(stage.camera.vanish_y)
    index = np.flatnonzero(canvas.label == ROAD)
    y = (index // canvas.columns).astype(np.float32)
    mirrored = np.clip(np.floor(2 * horizon - y), 0, canvas.rows - 1).astype(np.intp)
    seen = canvas.colour[:, mirrored * canvas.columns + index % canvas.columns]
    grazing = 1 - (y - horizon) / (canvas.rows - horizon)
    share = np.float32(stage.weather.wet) * (np.float32(0.35) + np.float32(0.65) * grazing)
    mix(canvas.colour, index, seen, share)
