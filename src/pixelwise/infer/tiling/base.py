"""What all ways to predict an image piece by piece share: a region is asked for, its scores come window by window."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Read = Callable[[int, int, int, int], Tensor]
"""(top, left, height, width) -> the network's input there, float32 (C, height, width), normalised, on its device."""


@dataclass(frozen=True)
class Region:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The row below the last."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The column right of the last."""
        return self.left + self.width


@dataclass(frozen=True)
class Scores:
    """The scores of a region: float32 (K, height, width) on the device; softmax over K gives the probabilities.

    `spread` is the mean entropy of the members (height, width), in nats, where several passes were averaged; else None.
    """

    region: Region
    values: Tensor
    spread: Tensor | None = None


class Scorer(Protocol):
    """A network made ready for images of one size (H, W).

    Attributes:
        way: in words, for the user, such as "whole image" or "stripes of 64 rows".
        cost: multiply-adds for the whole image, over those of one pass.
        memory_bytes: the most it takes at any time, beside the weights. Scorers that need the disk as well have
            `disk_bytes` and the folder `scratch`.
    """

    way: str
    cost: float
    memory_bytes: int

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """The scores of a part of the image (or all of it), each pixel once, in windows of the scorer's choice.

        `region` changes what is computed, never the result: every window equals that of any other region.
        """
        ...
