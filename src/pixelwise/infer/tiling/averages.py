"""Several passes averaged: transformed images (test-time augmentation), or samples of dropout; one in memory at a time.

The mean of the probabilities decides, and the mean of the entropies of the passes tells how sure each of them is by
itself: the entropy of the mean less this mean is the mutual information of class and pass. Flips and quarter turns only
move pixels, so they are undone exactly. Scales resample twice, the image and the scores.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from pixelwise.infer.options import Tiling
from pixelwise.infer.tiling import Read, Region, Scorer, Scores
from pixelwise.ops.dropout import set_sample, with_spatial_dropout
from pixelwise.ops.resize import upsample_to

Strategy = TypeVar("Strategy", bound=Scorer)
Member = Callable[[Read, Region], Tensor]
"""(read, region) -> scores of the region by one of the passes, (K, height, width)."""

_CHUNK = 1 << 20  # scores at a time, so that what is needed beside the mean stays small
_BUFFERS = 4  # of that size


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Something done to images (N, C, H, W) before the network, and undone to its scores (N, K, H', W').

    First rows and columns are exchanged, then mirrored, then the image is resized; undoing takes the reverse order.
    """

    transpose: bool = False
    flip_rows: bool = False  # upside down
    flip_columns: bool = False  # left to right
    scale: float = 1.0  # of the sides; bilinear, pixel areas aligned, without a blur before it shrinks

    def apply(self, image: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W'), H' and W' at least 1."""
        image = self._flipped(image.transpose(-2, -1) if self.transpose else image)
        height, width = image.shape[-2:]
        if self.scale == 1:
            return image
        return upsample_to(image, (max(1, int(height * self.scale + 0.5)), max(1, int(width * self.scale + 0.5))))

    def undo(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, K, H', W') -> (N, K, H, W), where `size` = (H, W) is that of the image given to `apply`."""
        scores = self._flipped(upsample_to(scores, self.turned(size)))
        return scores.transpose(-2, -1) if self.transpose else scores

    def turned(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of the turned image, before it is scaled."""
        return size[::-1] if self.transpose else size

    def place(self, region: Region, size: tuple[int, int]) -> Region:
        """Where a region of an image of `size` = (H, W) lies in the transformed image; flips and turns only."""
        if self.transpose:
            region = Region(region.left, region.top, region.width, region.height)
        return self._mirrored(region, self.turned(size))

    def reader(self, read: Read, size: tuple[int, int]) -> Read:
        """Reads windows of the transformed image, where `read` reads those of the image of `size`; flips and turns only."""

        def transformed(*window: int) -> Tensor:
            found = self._mirrored(Region(*window), self.turned(size))
            if self.transpose:
                found = Region(found.left, found.top, found.width, found.height)
            return self.apply(read(*found))

        return transformed

    def _mirrored(self, region: Region, size: tuple[int, int]) -> Region:
        top = size[0] - region.bottom if self.flip_rows else region.top
        left = size[1] - region.right if self.flip_columns else region.left
        return region._replace(top=top, left=left)

    def _flipped(self, maps: Tensor) -> Tensor:
        axes = [axis for axis, flipped in ((-2, self.flip_rows), (-1, self.flip_columns)) if flipped]
        return maps.flip(axes) if axes else maps


_FLIPS = tuple(Transform(flip_rows=rows, flip_columns=columns) for rows in (False, True) for columns in (False, True))
TRANSFORMS: dict[str, tuple[Transform, ...]] = {
    "flips": _FLIPS,
    "d4": _FLIPS + tuple(replace(item, transpose=True) for item in _FLIPS),  # four turns, each also mirrored
    "scales": (Transform(scale=0.75), Transform(), Transform(scale=1.25)),
}


class Transformed(nn.Module):
    """A network that sees the transformed image and answers for the image as it is; logits stay logits.

    The weights are those of `model` itself. Its code has no branch on values, so torch.export and make_fx capture it
    at a fixed size as flips, transpositions and bilinear resizing around the network.
    """

    def __init__(self, model: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.model, self.transform = model, transform
        self.train(model.training)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        return self.transform.undo(self.model(self.transform.apply(image)), (height, width))  # (N, K, H, W)


class Average:
    """The mean probability and the mean entropy of passes that come one by one, in float32."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._entropy = torch.empty(0)

    def add(self, scores: Tensor) -> None:
        """Take the scores (…, K, h, w) of the next pass."""
        self.count += 1
        if self.count == 1:
            self._mean = torch.zeros_like(scores, dtype=torch.float32)
            self._entropy = torch.zeros_like(self._mean.select(-3, 0))
        step = max(1, _CHUNK * scores.shape[-2] // max(1, scores.numel()))
        for top in range(0, scores.shape[-2], step):
            rows = slice(top, top + step)
            probability = scores[..., rows, :].float().softmax(dim=-3)
            entropy = torch.special.entr(probability).sum(dim=-3)
            self._mean[..., rows, :].lerp_(probability, 1 / self.count)
            self._entropy[..., rows, :].lerp_(entropy, 1 / self.count)

    def result(self) -> tuple[Tensor, Tensor]:
        """The logarithm of the mean probability (…, K, h, w), finite, and the mean entropy (…, h, w) in nats.

        The softmax of the first is the mean probability again. The average is used up by this.
        """
        tiny = torch.finfo(torch.float32).tiny
        return self._mean.clamp_(min=tiny).log_(), self._entropy.clamp_(min=0)


def average_bytes(num_classes: int, height: int, width: int) -> int:
    """What an `Average` takes beside the scores of the pass."""
    return 4 * (num_classes + 1) * height * width + 4 * _BUFFERS * _CHUNK


class Ensemble(Scorer):
    """Scores an image tile by tile, on a grid that begins at its top left; each tile by all members in turn.

    Members give the same scores for a pixel whatever the region is, and take `memory_bytes` for a tile, these included.
    """

    is_kept = True

    def __init__(
        self,
        members: Sequence[Member],
        *,
        num_classes: int,
        tile_px: int,
        way: str = "averaged passes",
        cost: float = math.nan,
        memory_bytes: int = 0,
    ) -> None:
        self.members, self.tile_px = tuple(members), tile_px
        self.way, self.cost = way, cost
        self.memory_bytes = memory_bytes + average_bytes(num_classes, tile_px, tile_px)

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """The logarithm of the mean probability and the mean entropy, tile by tile."""
        for tile in tiles(region, self.tile_px):
            average = Average()
            for member in self.members:
                average.add(member(read, tile))
            yield Scores(tile, *average.result())


def tiles(region: Region, tile_px: int) -> Iterator[Region]:
    """The parts of a region that lie in each tile of a grid that begins at the image's top left."""
    for top in range(region.top // tile_px * tile_px, region.bottom, tile_px):
        for left in range(region.left // tile_px * tile_px, region.right, tile_px):
            yield Region(top, left, tile_px, tile_px).overlap(region)


def averaged(members: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """The same average as one function, for scorers that only take whole windows.

    It maps (N, C, h, w) to (N, K + 1, h, w): the logarithm of the mean probability, then the mean entropy.
    """

    @torch.no_grad()
    def run(image: Tensor) -> Tensor:
        average = Average()
        for member in members:
            average.add(member(image))
        values, spread = average.result()
        return torch.cat([values, spread.unsqueeze(-3)], dim=-3)  # (N, K + 1, h, w)

    return run


class WithSpread(Scorer):
    """A scorer of `averaged` passes, whose last map, also blended, is the mean entropy of the passes."""

    def __init__(self, scorer: Scorer, way: str, passes: float = 1.0) -> None:
        self.scorer, self.way = scorer, f"{way}, {scorer.way}"
        self.cost, self.memory_bytes = scorer.cost * passes, scorer.memory_bytes
        self.is_kept = scorer.is_whole

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """As `Scorer.score`, with the spread."""
        for part in self.scorer.score(read, region):
            yield Scores(part.region, part.values[:-1], part.values[-1])


@dataclass(frozen=True)
class Passes:
    """The passes of test-time augmentation, or the samples of dropout."""

    model: nn.Module  # what all of them run; with samples, one whose dropout belongs to the place
    transforms: tuple[Transform, ...]  # one for each pass of an augmentation
    samples: int  # passes with dropout

    @classmethod
    def of(cls, model: nn.Module, tiling: Tiling) -> "Passes":
        """What the user wants of a network."""
        if tiling.tta:
            return cls(model, TRANSFORMS[tiling.tta], 1)
        return cls(with_spatial_dropout(model, tiling.seed), (), tiling.samples)

    @property
    def way(self) -> str:
        """In words, for the user."""
        if self.transforms:
            return f"{len(self.transforms)} passes averaged"
        return f"{self.samples} samples of dropout averaged"

    @property
    def growth(self) -> float:
        """Area of the largest transformed image over that of the image."""
        return max((item.scale**2 for item in self.transforms), default=1.0)

    @property
    def cost(self) -> float:
        """Multiply-adds of all passes over the whole image, over those of one pass."""
        return sum(item.scale**2 for item in self.transforms) if self.transforms else float(self.samples)

    def together(self, run: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        """All of them as one function, for scorers that only take whole windows."""
        if self.transforms:
            return averaged([run(Transformed(self.model, item)) for item in self.transforms])
        passes = run(self.model)
        return averaged([on_sample(self.model, sample, passes) for sample in range(self.samples)])

    def members(
        self, build: Callable[[nn.Module, int, int], Strategy], height: int, width: int
    ) -> tuple[list[Member], list[Strategy]]:
        """Each pass by itself on any region of the image, and what scores them, one for each network and size.

        `build` makes of a network, a height and a width what scores images of that size.
        """
        scorers: dict[tuple[int, int, float], Strategy] = {}
        members: list[Member] = []
        for item in self.transforms or (Transform(),):
            size = item.turned((height, width))
            key = (*size, item.scale)
            if key not in scorers:
                scorers[key] = build(self.model if item.scale == 1 else Transformed(self.model, item), *size)
            moves = item if item.scale == 1 else Transform()  # a scale lies in the network of the scorer
            members.append(partial(scored, scorers[key], moves, (height, width)))
        if not self.transforms:
            members = [on_sample(self.model, sample, members[0]) for sample in range(self.samples)]
        return members, list(scorers.values())


def scored(scorer: Scorer, transform: Transform, size: tuple[int, int], read: Read, region: Region) -> Tensor:
    """The scores of a region of an image of `size`, from a pass over the mirrored or turned image, brought back."""
    place, whole = transform.place(region, size), torch.empty(0)
    for part in scorer.score(transform.reader(read, size), place):
        if part.region == place:
            whole = part.values
            break
        if not whole.numel():
            whole = part.values.new_empty((part.values.shape[0], place.height, place.width))
        whole[:, *part.region.within(place)] = part.values
    return transform.undo(whole[None], region[2:])[0]


def on_sample(model: nn.Module, sample: int, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run`, with the dropout of a network from `with_spatial_dropout` set to a sample before each call."""

    def member(*args: object) -> Tensor:
        set_sample(model, sample)
        return run(*args)

    return member
