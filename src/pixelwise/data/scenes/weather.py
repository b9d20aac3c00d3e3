"""Light, weather and camera: what makes two pictures of one street differ."""

import math
from dataclasses import dataclass

import numpy as np

from pixelwise.data.scenes.canvas import FAR, Chooser, hsv, noise, noise_table, raw_bytes, rgb


@dataclass(frozen=True, kw_only=True)
class Light:
    """A sun and a sky; colours multiply what they fall on."""

    to_sun: tuple[float, float, float]  # unit vector: right, up, ahead
    direct: np.ndarray  # (3, 1)
    ambient: np.ndarray  # (3, 1)

    def on(self, right: float, up: float, ahead: float) -> np.ndarray:
        """The light (3, 1) on a surface with this unit normal."""
        facing = right * self.to_sun[0] + up * self.to_sun[1] + ahead * self.to_sun[2]
        return (self.ambient + self.direct * max(facing, 0.0)).astype(np.float32)

    @property
    def on_figures(self) -> np.ndarray:
        """The light (3, 1) on something small and round, seen from the camera."""
        return (self.ambient + self.direct * (0.55 - 0.3 * self.to_sun[2])).astype(np.float32)

    @property
    def shadow_shift(self) -> tuple[float, float]:
        """How far (right, ahead) a point one metre above the road throws its shadow, in metres."""
        right, up, ahead = self.to_sun
        return -right / up, -ahead / up


@dataclass(frozen=True, kw_only=True)
class Weather:
    """The sky above a scene and what the air and the camera do to its colours."""

    light: Light
    zenith: np.ndarray  # sky colours, (3, 1)
    horizon: np.ndarray
    cloud: np.ndarray
    cover: float  # share of the sky in clouds, 0..1
    fog: float  # share of the light from very far that fog replaces, 0..1
    fog_half_m: float  # the depth at which half of that is reached
    wet: float  # how much the road mirrors, 0..1
    rain: bool
    lamps: float  # share of windows and lamps that are lit, 0..1
    exposure: np.ndarray  # (3, 1), includes the white balance
    saturation: float
    grain: float  # noise of the sensor, in 0..1 units


def _grey(value: float, blue: float = 0.0) -> np.ndarray:
    return rgb(value - blue, value, value + blue)


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


def choose_weather(chooser: Chooser) -> Weather:
    """A random light and weather, camera settings included."""
    kind = chooser.pick(_OFTEN)
    elevation, direct, ambient, cover, fog, fog_half_m = _KINDS[kind]
    zenith, horizon, cloud = _sky_colours(kind, chooser)
    warmth = chooser.uniform(-0.06, 0.06)
    exposure = chooser.uniform(1.02, 1.30) * rgb(1 + warmth, 1.0, 1 - warmth)
    strength = chooser.uniform(0.85, 1.15)
    return Weather(
        light=Light(
            to_sun=_to_sun(chooser.uniform(*elevation), chooser),
            direct=rgb(*direct) * strength,
            ambient=rgb(*ambient),
        ),
        zenith=zenith,
        horizon=horizon,
        cloud=cloud,
        cover=chooser.uniform(*cover),
        fog=chooser.uniform(*fog),
        fog_half_m=chooser.uniform(*fog_half_m),
        wet=chooser.uniform(0.3, 0.55) if kind == "rain" else 0.12 if kind == "fog" else 0.0,
        rain=kind == "rain",
        lamps={"dusk": 0.5, "rain": 0.25, "fog": 0.2}.get(kind, 0.03),
        exposure=exposure,
        saturation=chooser.uniform(0.75, 1.12),
        grain=chooser.uniform(0.008, 0.026),
    )


def _to_sun(elevation_degrees: float, chooser: Chooser) -> tuple[float, float, float]:
    """Mostly from a side and somewhat from behind, so that shadows fall into the picture."""
    elevation = math.radians(elevation_degrees)
    azimuth = math.radians(chooser.uniform(25, 150)) * chooser.pick((-1, 1))
    level = math.cos(elevation)
    return level * math.sin(azimuth), math.sin(elevation), -level * math.cos(azimuth)


def _sky_colours(kind: str, chooser: Chooser) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zenith, horizon and clouds, each (3, 1)."""
    vary = chooser.uniform(-0.05, 0.05)
    if kind == "clear":
        return hsv(0.585 + vary / 3, 0.62 + vary, 0.80 + vary), hsv(0.56, 0.14, 0.95), _grey(0.97)
    if kind == "golden":
        return hsv(0.60, 0.40, 0.70 + vary), hsv(0.10 + vary / 3, 0.32, 0.99), rgb(0.99, 0.86, 0.74)
    if kind == "dusk":
        return hsv(0.64, 0.52, 0.50 + vary), hsv(0.05 + vary / 2, 0.40, 0.93), rgb(0.78, 0.52, 0.52)
    if kind == "fog":
        return _grey(0.74 + vary, 0.01), _grey(0.80 + vary), _grey(0.78 + vary)
    base = 0.62 if kind == "overcast" else 0.52
    return _grey(base + 2 * vary, 0.02), _grey(base + 0.18 + vary, 0.01), _grey(base + 0.24 + vary)


def develop(image: np.ndarray, depth: np.ndarray, weather: Weather, seed: int) -> np.ndarray:
    """The photograph, uint8 (H, W, 3), of the drawing `image` (3, H, W): fog by depth, rain, exposure, vignette, noise."""
    share = np.float32(weather.fog) * depth / (depth + np.float32(weather.fog_half_m))
    share *= depth < np.float32(FAR)  # the sky has its own colours
    image = image + (weather.horizon[..., None] * np.float32(0.96) - image) * share
    grey = (image[0] + image[1] + image[2]) / 3
    image = grey + (image - grey) * np.float32(weather.saturation)
    image *= weather.exposure[..., None] * _vignette(*depth.shape)
    if weather.rain:
        image = _rain(image, seed)
    dust = raw_bytes(seed, 2 * image.size).reshape(2, *image.shape).astype(np.int16)
    image += (dust[0] + dust[1] - np.int16(255)) * np.float32(weather.grain / 104)  # 104: standard deviation of the sum
    image = np.minimum(np.maximum(image, 0), 1) * np.float32(255) + np.float32(0.5)
    return np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))


def _vignette(height: int, width: int) -> np.ndarray:
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)
    return 1 - np.float32(0.09) * (x * x + y * y)


def _rain(image: np.ndarray, seed: int) -> np.ndarray:
    """Slanting streaks: noise stretched along the falling drops."""
    height, width = image.shape[1:]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    unit = np.float32(240 / height)
    along, across = (y + x * np.float32(0.2)) * unit, (x - y * np.float32(0.2)) * unit
    drops = noise(noise_table(1, 1), across + seed % 251, along / 14 + np.floor(across) * 7)
    streak = np.clip(drops - np.float32(0.93), 0, 1) * np.float32(3.0)
    return image + (np.float32(0.9) - image) * streak
