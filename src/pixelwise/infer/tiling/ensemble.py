"""Several passes averaged: transformed images, or samples of dropout; one pass in memory at a time.

The mean of the probabilities decides, and the mean of the entropies of the passes tells how sure each of them is by
itself: the entropy of the mean less this mean is the mutual information of class and pass.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.infer.network import Read, Region, Scorer, Scores
from pixelwise.ops.dropout import set_sample

Member = Callable[[Read, Region], Tensor]
"""(read, region) -> scores of the region by one of the passes, (K, height, width)."""

_CHUNK = 1 << 20  # scores at a time, so that what is needed beside the mean stays small
_BUFFERS = 4  # of that size


class Average:
    """The mean probability and the mean entropy of passes that come one by one, in float32."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._entropy: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        """Take the scores (…, K, h, w) of the next pass."""
        self.count += 1
        if self._mean is None or self._entropy is None:
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
        if self._mean is None or self._entropy is None:
            raise UsageError("an average needs at least one pass.")
        mean, entropy, self._mean, self._entropy = self._mean, self._entropy, None, None
        return mean.clamp_(min=torch.finfo(torch.float32).tiny).log_(), entropy.clamp_(min=0)


class Ensemble(Scorer):
    """Scores an image tile by tile; each tile by all members in turn.

    Args:
        members: the passes to average; each gives the same scores for a pixel whatever the region is.
        num_classes: K.
        tile_px: side of the tiles, whose grid begins at the top left of the image.
        way: in words, for the user.
        cost: multiply-adds of all members for the whole image, over those of one pass.
        memory_bytes: the most that a member takes for a tile, its scores included.

    Raises:
        UsageError: no members, or no tile.
    """

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
        if not members or tile_px < 1:
            raise UsageError(f"an average needs passes and tiles of at least 1 px, not {len(members)} and {tile_px}.")
        self.members, self.tile_px = tuple(members), tile_px
        self.way, self.cost = way, cost
        self.memory_bytes = memory_bytes + average_bytes(num_classes, tile_px, tile_px)

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """The logarithm of the mean probability and the mean entropy, tile by tile."""
        for tile in tiles(region, self.tile_px):
            average = Average()
            for member in self.members:
                average.add(member(read, tile))
            values, spread = average.result()
            yield Scores(tile, values, spread)


class EnsembleModule(nn.Module):
    """The same average as one network, for those that only take whole windows.

    Maps (N, C, h, w) to (N, K + 1, h, w): the logarithm of the mean probability, then the mean entropy.

    Args:
        members: networks, or functions of (N, C, h, w) such as `on_sample` makes.
    """

    def __init__(self, members: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        if not members:
            raise UsageError("an average needs at least one pass.")
        self.members = tuple(members)
        self.networks = nn.ModuleList(member for member in members if isinstance(member, nn.Module))

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        average = Average()
        for member in self.members:
            average.add(member(image))
        values, spread = average.result()
        return torch.cat([values, spread.unsqueeze(-3)], dim=-3)  # (N, K + 1, h, w)


def split_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """(…, K + 1, h, w) of an `EnsembleModule`, also blended, -> (…, K, h, w) and the mean entropy (…, h, w)."""
    return values[..., :-1, :, :], values[..., -1, :, :]


def member_of(scorer: Scorer) -> Member:
    """A member that asks a scorer for the region and joins its windows."""

    def member(read: Read, region: Region) -> Tensor:
        whole: Tensor | None = None
        for part in scorer.score(read, region):
            if part.region == region:
                return part.values
            if whole is None:
                whole = part.values.new_empty((part.values.shape[0], region.height, region.width))
            top, left = part.region.top - region.top, part.region.left - region.left
            whole[:, top : top + part.region.height, left : left + part.region.width] = part.values
        if whole is None:
            raise UsageError(f"there is nothing to score in {region}.")
        return whole

    return member


def on_sample(model: nn.Module, sample: int, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run`, with the dropout of a network from `with_spatial_dropout` set to a sample before each call."""

    def member(*args: object) -> Tensor:
        set_sample(model, sample)
        return run(*args)

    return member


def average_bytes(num_classes: int, height: int, width: int) -> int:
    """What an `Average` takes beside the scores of the pass."""
    return 4 * (num_classes + 1) * height * width + 4 * _BUFFERS * _CHUNK


def tiles(region: Region, tile_px: int) -> Iterator[Region]:
    """The parts of a region that lie in each tile of a grid that begins at the image's top left."""
    for top, bottom in _cuts(region.top, region.bottom, tile_px):
        for left, right in _cuts(region.left, region.right, tile_px):
            yield Region(top, left, bottom - top, right - left)


def _cuts(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        yield start, end
        start = end
