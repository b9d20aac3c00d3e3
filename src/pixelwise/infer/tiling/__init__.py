"""Strategies to score an image region by region: in one pass, exactly in stripes or tiles, or blended; and which is taken.

Exact ways come first. Which one is possible, the network decides; how large its pieces are, the memory. The modules of
strategies are imported when an image needs them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.ops.cost import PassMemory, Run

if TYPE_CHECKING:
    from pixelwise.infer.options import Tiling
    from pixelwise.infer.predictor import Predictor
    from pixelwise.infer.tiling.averages import Passes
    from pixelwise.infer.tiling.stripes import Stripes

Note = Callable[[str], None]
BUDGET_BYTES = 2**30
"""What the network's maps may take on a CPU, unless the user says otherwise."""

WINDOW_PX = 1024  # of blended tiles, unless the memory or the user wants others
KEPT_SCORERS = 4  # images of a folder often have the same few sizes
LEAST_WINDOW_PX = 64  # nothing is halved below it
ENSEMBLE_TILE_PX = 4096  # of averaged passes, at most; larger ones cost less and take more

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


def choose_scorer(
    network: "Predictor", height: int, width: int, tiling: "Tiling", note: Note = lambda message: None
) -> Scorer:
    """What predicts images of `height` x `width` px with this network as the user wants."""
    known, key = network.scorers, (height, width, tiling)
    if key not in known:
        scorer = _Chooser(network, height, width, tiling, note).choose()
        if not scorer.is_kept:  # it is made at once, and remembers what memory allowed
            return scorer
        if len(known) == KEPT_SCORERS:
            known.pop(next(iter(known)))
        known[key] = scorer
    return known[key]


class _Chooser:
    def __init__(self, network: "Predictor", height: int, width: int, tiling: "Tiling", note: Note) -> None:
        self.network, self.height, self.width, self.tiling, self.note = network, height, width, tiling, note
        self.budget = tiling.memory_bytes or default_budget(network.device)
        self.channels, self.classes = network.in_channels, network.labels.num_classes

    def choose(self) -> Scorer:
        from pixelwise.ops.streaming import NotWindowed

        network = self.network
        if self.tiling.tta or self.tiling.samples > 1:
            return self._averaged()
        if self.tiling.blend:
            return self._blended(network.scores, network.pass_memory, self.classes)
        if self.tiling.tolerance:
            return self._tiles()
        if self.tiling.tile_px is None and network.pass_memory(1, self.height, self.width) <= self.budget:
            return WholeImage(network.scores, network.pass_memory, height=self.height, width=self.width)
        try:
            return self._stripes(network.acceleration.model, self.height, self.width, self.tiling.scratch)
        except NotWindowed as error:
            if network.receptive_field.bounded:
                self.note(f"{error} Exact tiles with a halo are used.")
                return self._tiles()
            self.note(
                f"{network.card.model} looks at the whole image ({error}) Tiles are blended, so the labels depend on "
                "their size."
            )
            return self._blended(network.scores, network.pass_memory, self.classes)

    def _stripes(self, model: nn.Module, height: int, width: int, scratch: str | None = None) -> "Stripes":
        from pixelwise.infer.tiling.stripes import Stripes

        return Stripes(
            model, height, width, in_channels=self.channels, budget_bytes=self.budget, tile_px=self.tiling.tile_px,
            autocast=self.network.autocast, compute_bytes=2 if self.network.precision == "bf16" else 4,
            device=self.network.device, scratch=Path(scratch) if scratch else None,
        )  # fmt: skip

    def _tiles(self) -> Scorer:
        """Exact tiles, or those with the halo that the tolerance allows, measured once for each network."""
        from pixelwise.infer.tiling.halo import HaloTiles
        from pixelwise.infer.tiling.influence import cut_radius

        network, tolerance, known = self.network, self.tiling.tolerance, self.network.cut_radii
        if tolerance and tolerance not in known:
            known[tolerance] = cut_radius(
                network.model, network.receptive_field, tolerance, in_channels=self.channels, device=network.device,
                memory=network.pass_memory, budget_bytes=self.budget,
            )  # fmt: skip
        return HaloTiles(
            network.scores, network.receptive_field, network.pass_memory, in_channels=self.channels,
            num_classes=self.classes, height=self.height, width=self.width, tile_px=self.tiling.tile_px,
            radius_px=known.get(tolerance), budget_bytes=self.budget,
        )  # fmt: skip

    def _run(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """A network made of this one on windows (N, C, h, w) -> (N, K, h, w) float32."""
        return partial(self.network.scores, model=model)

    def _blended(self, run: Callable[[Tensor], Tensor], memory: PassMemory, maps: int) -> Scorer:
        """Windows as large as wished or usual, or half, a quarter ... of it, where the memory has no room for more."""
        from pixelwise.infer.tiling.blend import BlendedTiles

        window = self.tiling.tile_px or WINDOW_PX
        while True:
            tiles = BlendedTiles(
                run, memory, in_channels=self.channels, num_classes=maps, height=self.height, width=self.width,
                window_px=window, overlap=self.tiling.overlap, weights=self.tiling.blend or "gaussian",
                budget_bytes=self.budget,
            )  # fmt: skip
            if self.tiling.tile_px or tiles.memory_bytes <= self.budget or window <= LEAST_WINDOW_PX:
                return tiles
            window //= 2

    def _averaged(self) -> Scorer:
        """Passes over the whole image, over tiles that stream through the network, or over blended windows."""
        from pixelwise.infer.tiling.averages import Passes, WithSpread, average_bytes
        from pixelwise.ops.streaming import NotWindowed

        if self.tiling.samples > 1 and self.network.acceleration.kind == "int8":
            raise UsageError(
                "samples: ranges for 8 bits were found without dropout, which makes numbers larger. Use accelerate auto."
            )
        passes, once = Passes.of(self.network.acceleration.model, self.tiling), self.network.pass_memory
        memory = PassMemory(once.per_px * passes.growth, once.per_side * passes.growth**0.5, once.fixed)
        if not self.tiling.blend and self.tiling.tile_px is None:
            whole = WholeImage(passes.together(self._run), memory, height=self.height, width=self.width)
            whole.memory_bytes += average_bytes(self.classes, self.height, self.width)
            if whole.memory_bytes <= self.budget:
                return WithSpread(whole, passes.way, passes.cost)
        if not self.tiling.blend:
            try:
                return self._streamed(passes)
            except NotWindowed as error:
                self.note(f"{error} Tiles are blended, so the labels depend on their size.")
        memory = replace(memory, per_px=memory.per_px + 8 * (self.classes + 1))  # the mean, and the sum so far
        tiles = self._blended(passes.together(self._run), memory, self.classes + 1)
        return WithSpread(tiles, passes.way, passes.cost)

    def _streamed(self, passes: "Passes") -> Scorer:
        """Tiles, each streamed through the network by all passes in turn; as large as the memory allows."""
        from pixelwise.infer.tiling.averages import Ensemble, average_bytes

        members, scorers = passes.members(self._stripes, self.height, self.width)

        def most_bytes(tile_px: int) -> int:
            return max(scorer.tile_bytes(tile_px) for scorer in scorers)

        tile = self.tiling.tile_px or ENSEMBLE_TILE_PX
        while not self.tiling.tile_px and tile > LEAST_WINDOW_PX:
            if most_bytes(tile) + average_bytes(self.classes, tile, tile) <= self.budget:
                break
            tile //= 2
        is_whole = tile >= max(self.height, self.width)
        return Ensemble(
            members, num_classes=self.classes, tile_px=tile, memory_bytes=most_bytes(tile),
            way=f"{passes.way}, " + ("whole image" if is_whole else f"tiles of {tile} px"),
            cost=sum(scorer.tile_cost(tile) for scorer in scorers) / len(scorers) * passes.cost,
        )  # fmt: skip


def default_budget(device: torch.device) -> int:
    """What maps may take unless the user says: 1 GiB on a CPU, half of what is free on a GPU."""
    if device.type != "cuda":
        return BUDGET_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2
