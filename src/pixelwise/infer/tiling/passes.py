"""Which passes an average is made of, and how each computes any part of the image."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from pixelwise.infer.network import Read, Region, Scorer, Scores
from pixelwise.infer.options import Tiling
from pixelwise.infer.tiling.ensemble import EnsembleModule, Member, member_of, on_sample, split_spread
from pixelwise.infer.tta import Transform, Transformed, transforms_of
from pixelwise.ops.dropout import with_spatial_dropout

Build = Callable[[nn.Module, int, int], Scorer]
"""(network, height, width) -> what scores images of that size with it."""


@dataclass(frozen=True)
class Passes:
    """The passes of test-time augmentation, or the samples of dropout.

    Attributes:
        model: what all of them run; with samples, one whose dropout belongs to the place.
        transforms: one for each pass of an augmentation.
        samples: how many passes with dropout.
    """

    model: nn.Module
    transforms: tuple[Transform, ...]
    samples: int

    @classmethod
    def of(cls, model: nn.Module, tiling: Tiling) -> "Passes":
        """What the user wants of a network."""
        if tiling.tta:
            return cls(model, transforms_of(tiling.tta), 1)
        return cls(with_spatial_dropout(model, tiling.seed), (), tiling.samples)

    def __len__(self) -> int:
        return len(self.transforms) or self.samples

    @property
    def way(self) -> str:
        """In words, for the user."""
        return f"{len(self)} passes averaged" if self.transforms else f"{self.samples} samples of dropout averaged"

    @property
    def growth(self) -> float:
        """Area of the largest transformed image over that of the image."""
        return max((item.scale**2 for item in self.transforms), default=1.0)

    @property
    def cost(self) -> float:
        """Multiply-adds of all passes over the whole image, over those of one pass."""
        return sum(item.scale**2 for item in self.transforms) if self.transforms else float(self.samples)

    def module(self, run: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> EnsembleModule:
        """All of them as one network, for those that only take whole windows."""
        if self.transforms:
            return EnsembleModule([run(Transformed(self.model, item)) for item in self.transforms])
        passes = run(self.model)
        return EnsembleModule([on_sample(self.model, sample, passes) for sample in range(self.samples)])

    def members(self, build: Build, height: int, width: int) -> tuple[list[Member], list[Scorer]]:
        """Each pass by itself on any region of the image, and what scores them (one for each network and size)."""
        scorers: dict[tuple[int, int, float], Scorer] = {}

        def scorer(transform: Transform) -> Scorer:
            size = (width, height) if transform.transpose else (height, width)
            key = (*size, transform.scale)
            if key not in scorers:
                model = self.model if transform.scale == 1 else Transformed(self.model, transform)
                scorers[key] = build(model, *size)
            return scorers[key]

        if self.transforms:
            members = [_turned(item, scorer(item), (height, width)) for item in self.transforms]
        else:
            passes = member_of(scorer(Transform()))
            members = [on_sample(self.model, sample, passes) for sample in range(self.samples)]
        return members, list(scorers.values())


def _turned(transform: Transform, scorer: Scorer, size: tuple[int, int]) -> Member:
    """A pass over the mirrored or turned image, its scores brought back; scales lie in the network of the scorer."""
    passes = member_of(scorer)
    if transform.scale != 1 or transform.is_identity:
        return passes

    def member(read: Read, region: Region) -> Tensor:
        values = passes(transform.reader(read, size), transform.place(region, size))
        return transform.undo(values[None], (region.height, region.width))[0]

    return member


class WithSpread(Scorer):
    """A scorer of an `EnsembleModule`, whose last map is the mean entropy of the passes."""

    def __init__(self, scorer: Scorer, way: str, passes: float = 1.0) -> None:
        self.scorer, self.way = scorer, f"{way}, {scorer.way}"
        self.cost, self.memory_bytes = scorer.cost * passes, scorer.memory_bytes

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """As `Scorer.score`, with the spread."""
        for part in self.scorer.score(read, region):
            yield Scores(part.region, *split_spread(part.values))
