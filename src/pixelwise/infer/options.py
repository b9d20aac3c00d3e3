"""What a user may ask of a prediction, as one value: how it is computed, what comes out, how inputs are read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pixelwise.errors import UsageError
from pixelwise.formats.sinks import MAPS
from pixelwise.infer.tiling.options import Tiling


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The wishes for one call; the defaults ask for labels alone, in the format of each input.

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

    Example:
        >>> JobOptions(maps=("entropy",), min_area_px=50).changes()
        {'min_area_px': 50}
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

    @property
    def is_plain(self) -> bool:
        """Whether one pass over the whole image gives all that is wanted."""
        plain = JobOptions(format=self.format, overlay=self.overlay, probabilities=self.probabilities)
        return self == plain

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

    def to_dict(self) -> dict[str, Any]:
        """All of it, as values that JSON can hold."""
        return asdict(self) | {"thresholds": dict(self.thresholds), "reading": dict(self.reading)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "JobOptions":
        """What `to_dict` gave."""
        pairs = {key: tuple(values[key].items()) for key in ("thresholds", "reading")}
        return cls(**{**values, **pairs, "tiling": Tiling(**values["tiling"]), "maps": tuple(values["maps"])})
