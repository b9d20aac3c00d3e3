"""How an image of a given size is predicted: in one pass, exactly in stripes or tiles, or blended.

Exact ways come first. Which one is possible, the network decides; how large its pieces are, the memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.infer.network import Network, Scorer, WholeImage
from pixelwise.infer.options import Tiling
from pixelwise.infer.tiling.blend import BlendedTiles
from pixelwise.infer.tiling.ensemble import Ensemble, Member, average_bytes
from pixelwise.infer.tiling.halo import HaloTiles, Radius
from pixelwise.infer.tiling.influence import cut_radius
from pixelwise.infer.tiling.passes import Passes, WithSpread
from pixelwise.infer.tiling.stripes import BUDGET_BYTES, Stripes
from pixelwise.ops.cost import PassMemory
from pixelwise.ops.receptive_field import ReceptiveField, receptive_field
from pixelwise.ops.streaming import NotWindowed

Note = Callable[[str], None]
WINDOW_PX = 1024  # of blended tiles, unless the memory or the user wants others
KEPT_SCORERS = 4  # images of a folder often have the same few sizes
LEAST_WINDOW_PX = 64  # nothing is halved below it
ENSEMBLE_TILE_PX = 4096  # of averaged passes, at most; larger ones cost less and take more


def choose_scorer(
    network: Network, height: int, width: int, tiling: Tiling, note: Note = lambda message: None
) -> Scorer:
    """What predicts images of `height` x `width` px with this network as the user wants."""
    known, key = network.scorers, (height, width, tiling)
    if key not in known:
        scorer = _Chooser(network, height, width, tiling, note).choose()
        if not isinstance(scorer, Stripes | Ensemble):  # the others are made at once, and remember what memory allowed
            return scorer
        if len(known) == KEPT_SCORERS:
            known.pop(next(iter(known)))
        known[key] = scorer
    return known[key]


class _Chooser:
    def __init__(self, network: Network, height: int, width: int, tiling: Tiling, note: Note) -> None:
        self.network, self.height, self.width, self.tiling, self.note = network, height, width, tiling, note
        self.budget = tiling.memory_bytes or default_budget(network.device)
        self.channels, self.classes = network.card.in_channels, network.labels.num_classes

    def choose(self) -> Scorer:
        if self.tiling.tta or self.tiling.samples > 1:
            return self._averaged()
        if self.tiling.blend:
            return self._blended(self._run(self.network.model), self.network.pass_memory(), self.classes)
        if self.tiling.tile_px is None and not self.tiling.tolerance:
            memory = self.network.pass_memory()
            if memory(1, self.height, self.width) <= self.budget:
                return WholeImage(self.network.scores, memory, height=self.height, width=self.width)
        return self._in_parts(self.network.model)

    def _in_parts(self, model: nn.Module) -> Scorer:
        """Exact stripes; for networks that cannot be followed exact tiles; for those without an end blended tiles."""
        self._refuse_batch_statistics()
        if self.tiling.tolerance:
            return self._tiles(model, self._field(model))
        try:
            return self._stripes(model, self.height, self.width, self.tiling.scratch)
        except NotWindowed as error:
            field = self._field(model)
            if field.bounded:
                self.note(f"{error} Exact tiles with a halo are used.")
                return self._tiles(model, field)
            self.note(
                f"{self.network.card.model} looks at the whole image ({error}) Tiles are blended, so the labels depend on "
                "their size."
            )
            return self._blended(self._run(model), self.network.pass_memory(), self.classes)

    def _refuse_batch_statistics(self) -> None:
        if self.network.batch_statistics:
            raise UsageError(
                f"batch statistics: {self.width} x {self.height} px would be computed in parts (they do not fit into memory "
                "at once, or tiles were asked for), and the statistics of parts depend on the parts. Give more --memory "
                "and no --tile, or leave batch statistics out."
            )

    def _stripes(self, model: nn.Module, height: int, width: int, scratch: str | None = None) -> Stripes:
        return Stripes(
            model,
            height,
            width,
            in_channels=self.channels,
            budget_bytes=self.budget,
            tile_px=self.tiling.tile_px,
            autocast=self._autocast,
            compute_bytes=2 if self.network.precision == "bf16" else 4,
            device=self.network.device,
            scratch=Path(scratch) if scratch else None,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.network.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.network.device.type, dtype=torch.bfloat16)

    def _run(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network on windows (N, C, h, w) -> (N, K, h, w) float32."""
        if model is self.network.model:
            return self.network.scores

        @torch.inference_mode()
        def run(x: Tensor) -> Tensor:
            with self._autocast():
                return model(x.contiguous(memory_format=torch.channels_last)).float()

        return run

    def _field(self, model: nn.Module) -> ReceptiveField:
        known = self.network.receptive_fields
        if id(model) not in known:
            known[id(model)] = receptive_field(model, in_channels=self.channels)
        return known[id(model)]

    def _tiles(self, model: nn.Module, field: ReceptiveField) -> HaloTiles:
        return HaloTiles(
            self._run(model),
            field,
            self.network.pass_memory(),
            in_channels=self.channels,
            num_classes=self.classes,
            height=self.height,
            width=self.width,
            tile_px=self.tiling.tile_px,
            radius_px=self._cut_radius(model, field) if self.tiling.tolerance else None,
            budget_bytes=self.budget,
        )

    def _cut_radius(self, model: nn.Module, field: ReceptiveField) -> Radius:
        """The halo that the tolerance allows, measured once for each network."""
        key, known = (id(model), self.tiling.tolerance), self.network.cut_radii
        if key not in known:
            memory = self.network.pass_memory()
            known[key] = cut_radius(
                model,
                field,
                self.tiling.tolerance,
                in_channels=self.channels,
                device=self.network.device,
                memory=memory,
                budget_bytes=self.budget,
            )
        return known[key]

    def _blended(self, run: Callable[[Tensor], Tensor], memory: PassMemory, maps: int) -> BlendedTiles:
        """Windows as large as wished or usual, or half, a quarter ... of it, where the memory has no room for more."""
        window = self.tiling.tile_px or WINDOW_PX
        while True:
            tiles = BlendedTiles(
                run,
                memory,
                in_channels=self.channels,
                num_classes=maps,
                height=self.height,
                width=self.width,
                window_px=window,
                overlap=self.tiling.overlap,
                weights=self.tiling.blend or "gaussian",
                budget_bytes=self.budget,
            )
            if self.tiling.tile_px or tiles.memory_bytes <= self.budget or window <= LEAST_WINDOW_PX:
                return tiles
            window //= 2

    def _averaged(self) -> Scorer:
        """Passes over the whole image, over tiles that stream through the network, or over blended windows."""
        passes = Passes.of(self.network.model, self.tiling)
        once = self.network.pass_memory()
        memory = PassMemory(once.per_px * passes.growth, once.per_side * passes.growth**0.5, once.fixed)
        if not self.tiling.blend and self.tiling.tile_px is None:
            most = max(self.height, self.width)
            needed = memory(1, self.height, self.width) + average_bytes(self.classes, self.height, self.width)
            if needed <= self.budget:
                members, _ = passes.members(self._whole, self.height, self.width)
                return self._ensemble(passes, members, most, passes.cost, memory(1, self.height, self.width))
        self._refuse_batch_statistics()
        if not self.tiling.blend:
            try:
                return self._streamed(passes)
            except NotWindowed as error:
                self.note(f"{error} Tiles are blended, so the labels depend on their size.")
        memory = replace(memory, per_px=memory.per_px + 8 * (self.classes + 1))  # the mean, and the sum so far
        tiles = self._blended(passes.module(self._run), memory, self.classes + 1)
        return WithSpread(tiles, passes.way, passes.cost)

    def _whole(self, model: nn.Module, height: int, width: int) -> WholeImage:
        return WholeImage(self._run(model), self.network.pass_memory(), height=height, width=width)

    def _streamed(self, passes: Passes) -> Ensemble:
        """Tiles, each streamed through the network by all passes in turn; as large as the memory allows."""
        scorers: list[Stripes] = []

        def build(model: nn.Module, height: int, width: int) -> Stripes:
            scorers.append(self._stripes(model, height, width))
            return scorers[-1]

        members, _ = passes.members(build, self.height, self.width)
        tile = self.tiling.tile_px or ENSEMBLE_TILE_PX
        while not self.tiling.tile_px and tile > LEAST_WINDOW_PX:
            if (
                max(scorer.tile_bytes(tile) for scorer in scorers) + average_bytes(self.classes, tile, tile)
                <= self.budget
            ):
                break
            tile //= 2
        cost = sum(scorer.tile_cost(tile) for scorer in scorers) / len(scorers) * passes.cost
        return self._ensemble(passes, members, tile, cost, max(scorer.tile_bytes(tile) for scorer in scorers))

    def _ensemble(self, passes: Passes, members: list[Member], tile_px: int, cost: float, memory: int) -> Ensemble:
        parts = f"{passes.way}, " + (
            "whole image" if tile_px >= max(self.height, self.width) else f"tiles of {tile_px} px"
        )
        return Ensemble(members, num_classes=self.classes, tile_px=tile_px, way=parts, cost=cost, memory_bytes=memory)


def default_budget(device: torch.device) -> int:
    """What maps may take unless the user says: 1 GiB on a CPU, half of what is free on a GPU."""
    if device.type != "cuda":
        return BUDGET_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2
