"""The embedded street scenes: pictures with exact masks, drawn on the spot, so that everything here can be tried at once.

A scene is a street in perspective with the eleven classes of CamVid: houses, gardens behind fences, trees, lamps, signs,
parked cars, pedestrians and bicyclists, in sun, fog, rain or dusk. Colours are shared among the classes on purpose: a
network that does well has learnt shape and context.

Read in this order: `compose` (what goes where), `street` and `houses` (what stands still), `things`, `cars` and `people`,
`weather` (light and camera), `canvas` (how pixels are filled).
"""

from pixelwise.data.scenes.writing import SCENE_LABELS, SCENE_SIZES, draw_scene, write_scenes

__all__ = ["SCENE_LABELS", "SCENE_SIZES", "draw_scene", "write_scenes"]
