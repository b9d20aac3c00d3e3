"""Light, weather and camera: what makes two pictures of one street differ."""

import math

import numpy as np

from pixelwise.data.scenes.canvas import FAR, Chooser, hsv, noise, raw_bytes, rgb

# kind: (sun's elevation in degrees, direct light, ambient light, cloud cover, fog, half depth of the fog in metres)
_KINDS = {
    "clear": ((28, 58), (0.68, 0.64, 0.56), (0.47, 0.50, 0.54), (0.0, 0.6), (0.15, 0.35), (90, 160)),
    "golden": ((13, 24), (0.92, 0.68, 0.42), (0.48, 0.46, 0.52), (0.1, 0.7), (0.2, 0.5), (60, 120)),
    "overcast": ((40, 60), (0.08, 0.08, 0.08), (0.74, 0.76, 0.78), (0.8, 1.0), (0.2, 0.5), (60, 120)),
    "fog": ((40, 60), (0.04, 0.04, 0.04), (0.74, 0.75, 0.76), (1.0, 1.0), (0.65, 0.85), (20, 45)),
    "rain": ((40, 60), (0.02, 0.02, 0.02), (0.62, 0.65, 0.69), (0.9, 1.0), (0.4, 0.65), (40, 80)),
    "dusk": ((8, 12), (0.30, 0.20, 0.15), (0.52, 0.50, 0.58), (0.2, 0.8), (0.2, 0.5), (60, 120)),
}
_OFTEN = ("clear",) * 6 + ("golden",) * 3 + ("overcast",) * 4 + ("fog", "fog", "rain", "rain", "dusk", "dusk")


class Weather:
    """A random sun and sky, and what the air and the camera do to the colours of a scene; colours are (3, 1)."""

    def __init__(self, chooser: Chooser) -> None:
        kind = chooser.pick(_OFTEN)
        elevation, direct, ambient, cover, fog, fog_half_m = _KINDS[kind]
        self.zenith, self.horizon, self.cloud = _sky_colours(kind, chooser.uniform(-0.05, 0.05))
        warmth = chooser.uniform(-0.06, 0.06)
        self.exposure = chooser.uniform(1.02, 1.30) * rgb(1 + warmth, 1.0, 1 - warmth)  # includes the white balance
        self.direct = rgb(*direct) * chooser.uniform(0.85, 1.15)  # the sun's light; multiplies what it falls on
        self.ambient = rgb(*ambient)
        height = math.radians(chooser.uniform(*elevation))
        # Mostly from a side and somewhat from behind, so that shadows fall into the picture.
        azimuth = math.radians(chooser.uniform(25, 150)) * chooser.pick((-1, 1))
        level = math.cos(height)
        self.to_sun = level * math.sin(azimuth), math.sin(height), -level * math.cos(azimuth)  # unit: right, up, ahead
        self.cover = chooser.uniform(*cover)  # share of the sky in clouds, 0..1
        self.fog = chooser.uniform(*fog)  # share of the light from very far that fog replaces, 0..1
        self.fog_half_m = chooser.uniform(*fog_half_m)  # the depth at which half of that is reached
        self.rain = kind == "rain"
        self.wet = (
            chooser.uniform(0.3, 0.55) if self.rain else 0.12 if kind == "fog" else 0.0
        )  # how much the road mirrors
        self.lamps = {"dusk": 0.5, "rain": 0.25, "fog": 0.2}.get(kind, 0.03)  # share of windows and lamps that are lit
        self.saturation = chooser.uniform(0.75, 1.12)
        self.grain = chooser.uniform(0.008, 0.026)  # noise of the sensor, in 0..1 units
        self.light_on_figures = self.ambient + self.direct * (0.55 - 0.3 * self.to_sun[2])  # on what is small and round

    def light(self, right: float, up: float, ahead: float) -> np.ndarray:
        """The light (3, 1) on a surface with this unit normal."""
        facing = right * self.to_sun[0] + up * self.to_sun[1] + ahead * self.to_sun[2]
        return (self.ambient + self.direct * max(facing, 0.0)).astype(np.float32)


def _sky_colours(kind: str, vary: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zenith, horizon and clouds, each (3, 1)."""
    if kind == "clear":
        return hsv(0.585 + vary / 3, 0.62 + vary, 0.80 + vary), hsv(0.56, 0.14, 0.95), rgb(0.97, 0.97, 0.97)
    if kind == "golden":
        return hsv(0.60, 0.40, 0.70 + vary), hsv(0.10 + vary / 3, 0.32, 0.99), rgb(0.99, 0.86, 0.74)
    if kind == "dusk":
        return hsv(0.64, 0.52, 0.50 + vary), hsv(0.05 + vary / 2, 0.40, 0.93), rgb(0.78, 0.52, 0.52)
    if kind == "fog":
        greys = ((0.74 + vary, 0.01), (0.80 + vary, 0.0), (0.78 + vary, 0.0))
    else:
        base = 0.62 if kind == "overcast" else 0.52
        greys = ((base + 2 * vary, 0.02), (base + 0.18 + vary, 0.01), (base + 0.24 + vary, 0.0))
    zenith, horizon, cloud = (rgb(grey - blue, grey, grey + blue) for grey, blue in greys)
    return zenith, horizon, cloud


def develop(image: np.ndarray, depth: np.ndarray, weather: Weather, seed: int) -> np.ndarray:
    """The photograph, uint8 (H, W, 3), of the drawing `image` (3, H, W): fog by depth, rain, exposure, vignette, noise."""
    share = weather.fog * depth / (depth + np.float32(weather.fog_half_m))
    share *= depth < FAR  # the sky has its own colours
    image = image + (weather.horizon[..., None] * 0.96 - image) * share
    grey = (image[0] + image[1] + image[2]) / 3
    image = grey + (image - grey) * weather.saturation
    height, width = depth.shape
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    image *= weather.exposure[..., None] * (1 - 0.09 * (x * x + y * y))
    if weather.rain:
        image = _rain(image, seed)
    dust = raw_bytes(seed, 2 * image.size).reshape(2, *image.shape).astype(np.int16)
    image += (dust[0] + dust[1] - np.int16(255)) * np.float32(weather.grain / 104)  # 104: standard deviation of the sum
    image = np.minimum(np.maximum(image, 0), 1) * 255 + 0.5
    return np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))


def _rain(image: np.ndarray, seed: int) -> np.ndarray:
    """Slanting streaks: noise stretched along the falling drops."""
    height, width = image.shape[1:]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    along, across = (y + x * 0.2) * (240 / height), (x - y * 0.2) * (240 / height)
    drops = noise(1, 1, across + seed % 251, along / 14 + np.floor(across) * 7)
    return image + (0.9 - image) * (np.clip(drops - 0.93, 0, 1) * 3)
