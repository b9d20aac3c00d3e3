"""Strategies to score an image region by region: in one pass, exactly in stripes or tiles, or blended."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixelwise.ops.cost import PassMemory, Run

BUDGET_BYTES = 2**30
"""What the network's maps may take on a CPU, unless the user says otherwise."""

Read = Callable[[int, int, int, int], Tensor]
"""(top, left, height, width) -> the network's input there, float32 (C, height, width), normalised, on its device."""


class Region(NamedTuple):
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

    def overlap(self, other: "Region") -> "Region":
        """What both have in common; an empty region where that is nothing."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        height, width = min(self.bottom, other.bottom) - top, min(self.right, other.right) - left
        return Region(top, left, height, width) if height > 0 and width > 0 else Region(0, 0, 0, 0)

    def within(self, outer: "Region") -> tuple[slice, slice]:
        """Its rows and columns in an array of the pixels of `outer`."""
        top, left = self.top - outer.top, self.left - outer.left
        return slice(top, top + self.height), slice(left, left + self.width)


@dataclass(frozen=True)
class Scores:
    """The scores of a region: float32 (K, height, width) on the device; softmax over K gives the probabilities.

    `spread` is the mean entropy of the passes (height, width), in nats, where several were averaged; else None.
    """

    region: Region
    values: Tensor
    spread: Tensor | None = None


class Scorer(ABC):
    """A strategy: a network made ready for images of one size (H, W).

    Attributes:
        way: in words, for the user, such as "whole image" or "stripes of 64 rows".
        cost: multiply-adds for the whole image, over those of one pass.
        memory_bytes: the most it takes at any time, beside the weights.
        is_whole: whether each pass is one over the whole image, however small the region.
        is_kept: whether it took long to make, and serves other images of the size.
        disk_bytes: what it takes on the disk of the folder `scratch`.
        beside_bytes: what else may grow in this process meanwhile, which is not taken from `memory_bytes`.
    """

    way: str
    cost: float
    memory_bytes: int
    is_whole: bool = False
    is_kept: bool = False
    disk_bytes: int = 0
    scratch: Any = None
    beside_bytes: int = 0

    @abstractmethod
    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """The scores of a region of the image (or all of it), each pixel once, in windows of the strategy's choice.

        `region` changes what is computed, never the result: every window equals that of any other region.
        """


class WholeImage(Scorer):
    """The scores of the whole image from one pass, which takes `memory`; of a region, cut from those."""

    way = "whole image"
    cost = 1.0
    is_whole = True

    def __init__(self, run: Run, memory: PassMemory, *, height: int, width: int) -> None:
        self.run, self.whole = run, Region(0, 0, height, width)
        self.memory_bytes = memory(1, height, width)

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """As `Scorer.score`: one window, the region itself."""
        image = read(*self.whole).float()[None].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            logits = self.run(image)[0].float()  # (K, H, W)
        yield Scores(region, logits[:, *region.within(self.whole)])
