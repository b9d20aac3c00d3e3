"""What a user may ask of a prediction: how it is computed, what comes out, how inputs are read."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from pixelwise.errors import UsageError
from pixelwise.formats.base import MAPS

Blend = Literal["gaussian", "cosine", "uniform"]
TTA = Literal["flips", "d4", "scales"]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How large images are predicted; what is None is chosen from the network, the image and the memory.

    Attributes:
        tile_px: side of the tiles (with `blend`: of the windows).
        blend: weight of the windows' pixels where windows overlap; also for networks that allow exact tiles.
        overlap: share of a window that the next one repeats, 0 to 0.9 (blended tiles).
        tolerance: the halo is cropped where the measured influence of a pixel falls below this share (0: never).
        memory_bytes: limit of what prediction takes beside the weights.
        scratch: an existing folder for a spill file, where memory is short (on CPUs); None: no spill file.
        tta: average over transformed images.
        samples: passes with dropout to average; 1 is none.
        seed: dropout seed.

    Raises:
        UsageError: a value that is not allowed, or two that exclude each other.
    """

    tile_px: int | None = None
    blend: Blend | None = None
    overlap: float = 0.25
    tolerance: float = 0.0
    memory_bytes: int | None = None
    scratch: str | None = None
    tta: TTA | None = None
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for key, allowed in (("blend", get_args(Blend)), ("tta", get_args(TTA))):
            if getattr(self, key) not in (None, *allowed):
                raise UsageError(f"{key} is one of {', '.join(allowed)}, not {getattr(self, key)!r}.")
        if self.tile_px is not None and self.tile_px < 1:
            raise UsageError(f"tile must be at least 1 px, not {self.tile_px}.")
        if not 0 <= self.overlap <= 0.9:
            raise UsageError(f"overlap must be a share from 0 to 0.9, not {self.overlap}.")
        if not 0 <= self.tolerance < 1:
            raise UsageError(f"tolerance must be a share from 0 to less than 1, not {self.tolerance}.")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise UsageError(f"memory must be a positive number of bytes, not {self.memory_bytes}.")
        if self.samples < 1:
            raise UsageError(f"samples must be at least 1, not {self.samples}.")
        if self.tta and self.samples > 1:
            raise UsageError("tta and samples cannot be combined; choose one.")
        if self.tolerance and (self.tta or self.samples > 1):
            raise UsageError(
                "tolerance cannot be combined with tta or samples, which stream tiles without a halo to crop."
            )
        if self.blend and self.tolerance:
            raise UsageError("tolerance belongs to exact tiles and blend to overlapping windows; choose one.")


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The options of one call; the defaults ask for labels alone, in the format of each input.

    Attributes:
        tiling: how large images are cut, and which passes are averaged.
        maps: which maps of `MAPS` are written beside the labels.
        thresholds: (class name, probability) pairs; `Decision` says what they do.
        min_area_px: connected areas of fewer pixels take the label of their surroundings; 0 keeps all.
        format: of the outputs, such as "png" or "cog"; None is that of each input.
        geojson: also write polygons.
        coco: also write COCO's run lengths.
        overlay: also write the colours over the image.
        probabilities: also write the probabilities of all classes.
        reading: how inputs are opened: level of a slide, series, axis of a volume, intensity window.

    Raises:
        UsageError: a value that is not allowed, or two that exclude each other.
    """

    tiling: Tiling = field(default_factory=Tiling)
    maps: tuple[str, ...] = ()
    thresholds: tuple[tuple[str, float], ...] = ()
    min_area_px: int = 0
    format: str | None = None
    geojson: bool = False
    coco: bool = False
    overlay: bool = False
    probabilities: bool = False
    reading: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.maps if name not in MAPS]
        if unknown:
            raise UsageError(f"there is no map {unknown[0]!r}; there are {', '.join(MAPS)}.")
        if "mutual_information" in self.maps and self.tiling.samples < 2 and self.tiling.tta is None:
            raise UsageError(
                "mutual information compares several passes; ask for some by samples (--samples 20) or tta (--tta d4)."
            )
        for name, share in self.thresholds:
            if not 0 < share <= 1:
                raise UsageError(f"the threshold of {name} is a probability above 0 and at most 1, not {share}.")
        names = [name for name, _ in self.thresholds]
        if len(set(names)) < len(names):
            raise UsageError("a class has two thresholds; give one for each.")
        if self.min_area_px < 0:
            raise UsageError(f"the smallest area must be 0 px or more, not {self.min_area_px}.")

    def changes(self) -> dict[str, Any]:
        """What makes the labels other ones than by default, as values that JSON can hold.

        Tile size, memory and disk are not part of it where tiles are exact, for then they change nothing.
        """
        tiling, plain = asdict(self.tiling), asdict(Tiling())
        if not self.tiling.blend and not self.tiling.tolerance:
            tiling |= {"tile_px": None, "overlap": plain["overlap"]}
        if self.tiling.samples == 1:
            tiling |= {"seed": plain["seed"]}
        tiling |= {"memory_bytes": None, "scratch": None}
        changed = {key: value for key, value in tiling.items() if value != plain[key]}
        if self.thresholds:
            changed["thresholds"] = dict(sorted(self.thresholds))
        if self.min_area_px:
            changed["min_area_px"] = self.min_area_px
        if self.reading:
            changed["reading"] = dict(self.reading)
        return changed
