"""What a user may ask of a prediction: how it is computed and what comes out; and how scores become labels and maps."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixelwise.data.labels import IGNORE_INDEX, LabelSpec
from pixelwise.errors import PixelwiseError, UsageError, brief
from pixelwise.formats.base import LABELS, MAPS
from pixelwise.infer.tiling import Scores
from pixelwise.models.registry import suggestion


class OverflowingScores(PixelwiseError):
    """A network's scores are not finite."""


Blend = Literal["gaussian", "cosine", "uniform"]
TTA = Literal["flips", "d4", "scales"]

_CHUNK = 1 << 19  # scores at a time: they stay in the cache, and the memory for the maps does not grow with the window
_MANY_CLASSES = 64  # from here on the usual maximum is the faster one


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
        for name, value, is_allowed, rule in (
            (
                "tile",
                self.tile_px,
                self.tile_px is None or 1 <= self.tile_px <= 10**6,
                "at least 1 px and at most 1,000,000",
            ),
            ("overlap", self.overlap, 0 <= self.overlap <= 0.9, "a share from 0 to 0.9"),
            ("tolerance", self.tolerance, 0 <= self.tolerance < 1, "a share from 0 to less than 1"),
            (
                "memory",
                self.memory_bytes,
                self.memory_bytes is None or 1 <= self.memory_bytes <= 2**60,
                "a number of bytes above 0, at most 1 EiB",
            ),
            ("samples", self.samples, 1 <= self.samples <= 10_000, "at least 1 and at most 10,000"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0 to less than 2**63"),
        ):
            if not is_allowed:
                raise UsageError(f"{name} must be {rule}, not {brief(value)}.")
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
        background: polygons also of the class that is called background.
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
    background: bool = False
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
        if self.background and not self.geojson:
            raise UsageError("background is about polygons; ask for them (--geojson), or leave it out.")
        if not 0 <= self.min_area_px <= 10**12:
            raise UsageError(f"the smallest area must be 0 px or more, at most 10**12, not {brief(self.min_area_px)}.")

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
        if self.geojson and self.background:
            changed["background"] = True
        if self.reading:
            changed["reading"] = dict(self.reading)
        return changed


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How the scores of a pixel become its label, and which maps are made beside it.

    Without thresholds a pixel gets the class with the highest score. A class with a threshold p is given where its
    probability is at least p, and nowhere else. Of several such classes, the one whose probability is the largest
    multiple of its threshold is given (the first, if equal); where there is none, the most probable of the classes
    without a threshold. Where all classes have one and none reaches its own, the most probable is given nevertheless:
    every pixel has a label. Pixels without data get 255, and NaN in the maps.

    The maps are float32: "entropy" of the probabilities in nats, 0 to log K; "mutual_information" of class and pass, the
    part of the entropy on which the averaged passes disagree, in nats, 0 to log K; "max_probability", 1/K to 1.

    Attributes:
        num_classes: K.
        thresholds: probability by class index, above 0 and at most 1.
        maps: which maps are made.
        precision: in which the network computed, for error messages.
    """

    num_classes: int
    thresholds: Mapping[int, float] = field(default_factory=dict)
    maps: tuple[str, ...] = ()
    precision: str = "float32"

    @classmethod
    def of(cls, spec: LabelSpec, options: JobOptions, precision: str) -> "Decision":
        """The decision for classes and options."""
        thresholds = {}
        for name, share in options.thresholds:
            if name not in spec.names:
                listed = ", ".join(spec.names[:20]) + (", …" if len(spec.names) > 20 else "")
                hint = suggestion(name, spec.names)
                raise UsageError(f"threshold: there is no class {name!r}.{hint} The classes: {listed}.")
            thresholds[spec.names.index(name)] = share
        return cls(num_classes=len(spec.names), thresholds=thresholds, maps=tuple(options.maps), precision=precision)

    def __call__(self, scores: Scores, valid: NDArray[np.bool_] | None = None) -> dict[str, NDArray[Any]]:
        """Labels and maps of a window, by name, each (height, width)."""
        classes, height, width = scores.values.shape
        arrays: dict[str, NDArray[Any]] = {LABELS: np.empty((height, width), dtype=np.uint8)}
        arrays |= {name: np.empty((height, width), dtype=np.float32) for name in self.maps}
        step = max(1, _CHUNK // max(1, classes * width))
        for rows in (slice(top, top + step) for top in range(0, height, step)):
            spread = None if scores.spread is None else scores.spread[rows]
            part = self._decide(scores.values[:, rows].float(), spread, None if valid is None else valid[rows])
            for name, array in arrays.items():
                array[rows] = part[name].cpu().numpy()
        if valid is not None and not valid.all():
            for name, array in arrays.items():
                array[~valid] = IGNORE_INDEX if name == LABELS else np.nan
        return arrays

    def _decide(self, values: Tensor, spread: Tensor | None, valid: NDArray[np.bool_] | None) -> dict[str, Tensor]:
        best, labels = largest(values)  # (h, w)
        fine = torch.isfinite(best)
        if not bool(fine.all()) and (valid is None or not fine.cpu().numpy()[valid].all()):
            raise OverflowingScores(
                f"the network's scores overflow ({self.precision}). Check the values of the image, or use precision "
                "float32."
            )
        maps = {}
        if self.thresholds or self.maps:
            probabilities = values.softmax(dim=0)  # (K, h, w)
            labels = self._above_thresholds(labels, values, probabilities) if self.thresholds else labels
            maps = {name: self._map(name, probabilities, spread) for name in self.maps}
        return {LABELS: labels.to(torch.uint8)} | maps

    def _above_thresholds(self, labels: Tensor, values: Tensor, probabilities: Tensor) -> Tensor:
        free = [index for index in range(self.num_classes) if index not in self.thresholds]
        if free:
            labels = torch.tensor(free, device=labels.device)[values[free].argmax(dim=0)]
        largest = torch.zeros_like(probabilities[0])  # multiple of the threshold so far, (h, w)
        for index, share in sorted(self.thresholds.items()):
            multiple = probabilities[index] / share
            is_better = (probabilities[index] >= share) & (multiple > largest)
            labels = torch.where(is_better, index, labels)
            largest = torch.where(is_better, multiple, largest)
        return labels

    def _map(self, name: str, probabilities: Tensor, spread: Tensor | None) -> Tensor:
        if name == "max_probability":
            return probabilities.amax(dim=0)
        entropy = torch.special.entr(probabilities).sum(dim=0).clamp_(min=0)
        if name == "entropy" or spread is None:
            return entropy
        return (entropy - spread.float()).clamp_(min=0)  # rounding can put it just below 0


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of K scores (K, h, w) and the first class that has it, each (h, w); that is no class where one is NaN.

    On a CPU a maximum that also tells where it was runs on single numbers; maxima and comparisons run on vectors.
    """
    classes = len(values)
    if values.device.type != "cpu" or values.stride(2) != 1 or classes >= _MANY_CLASSES:
        return values.max(dim=0)
    best = values.amax(dim=0)
    ranks = torch.arange(classes, 0, -1, dtype=torch.uint8).reshape(-1, 1, 1)
    return best, classes - ((values == best).view(torch.uint8) * ranks).amax(dim=0)
