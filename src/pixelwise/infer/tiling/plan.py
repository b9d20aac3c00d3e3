"""How an image of a given size is predicted: in one pass, exactly in stripes or tiles, or blended.

Exact ways come first. Which one is possible, the network decides; how large its pieces are, the memory.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.tiling.base import Scorer
from pixelwise.infer.tiling.blend import BlendedTiles
from pixelwise.infer.tiling.ensemble import Ensemble, EnsembleModule, Member, member_of, on_sample
from pixelwise.infer.tiling.halo import HaloTiles
from pixelwise.infer.tiling.options import Tiling
from pixelwise.infer.tiling.stripes import BUDGET_BYTES, Stripes
from pixelwise.infer.tiling.whole import WholeImage
from pixelwise.infer.tta import Transform, Transformed, transforms_of
from pixelwise.ops.cost import PassMemory
from pixelwise.ops.receptive_field import ReceptiveField, receptive_field
from pixelwise.ops.spatial_dropout import with_spatial_dropout
from pixelwise.ops.streaming import NotWindowed

Note = Callable[[str], None]
WINDOW_PX = 1024  # of blended tiles, unless the memory or the user wants others
ENSEMBLE_TILE_PX = 1024


def choose_scorer(
    predictor: Predictor, height: int, width: int, tiling: Tiling, note: Note = lambda message: None
) -> Scorer:
    """What predicts images of `height` x `width` px with this network as the user wishes.

    Args:
        predictor: the network.
        height: H of the image.
        width: W of the image.
        tiling: the user's wishes.
        note: told what the user should know (why tiles are blended, that memory ran out).

    Raises:
        UsageError: the network does not allow what was asked for.
        PixelwiseError: no piece is small enough for the memory.
    """
    return _Chooser(predictor, height, width, tiling, note).choose()


class _Chooser:
    def __init__(self, predictor: Predictor, height: int, width: int, tiling: Tiling, note: Note) -> None:
        self.predictor, self.height, self.width, self.tiling, self.note = predictor, height, width, tiling, note
        self.budget = tiling.memory_bytes or default_budget(predictor.device)
        self.channels, self.classes = predictor.card.in_channels, predictor.labels.num_classes

    def choose(self) -> Scorer:
        if self.tiling.tta or self.tiling.samples > 1:
            return self._averaged()
        if self.tiling.blend:
            return self._blended(self._run(self.predictor.model))
        if self.tiling.tile_px is None and not self.tiling.tolerance:
            memory = pass_memory(self.predictor)
            if memory is not None and memory(1, self.height, self.width) <= self.budget:
                return WholeImage(self.predictor.network, memory, height=self.height, width=self.width)
        return self._in_parts(self.predictor.model)

    def _in_parts(self, model: nn.Module) -> Scorer:
        """Exact stripes; for networks that cannot be followed exact tiles; for those without an end blended tiles."""
        self._refuse_batch_statistics()
        if self.tiling.tolerance:
            return self._tiles(model, self._field(model))
        try:
            return self._stripes(model, self.height, self.width)
        except NotWindowed as error:
            field = self._field(model)
            if field.bounded:
                self.note(f"{error} Exact tiles with a halo are used.")
                return self._tiles(model, field)
            self.note(
                f"{self.predictor.card.model} looks at the whole image ({error}) Tiles are blended, so the labels depend on "
                "their size."
            )
            return self._blended(self._run(model))

    def _refuse_batch_statistics(self) -> None:
        if self.predictor.batch_statistics:
            raise UsageError(
                f"batch statistics: {self.width} x {self.height} px do not fit into memory at once, and batch norm by the "
                "statistics of parts depends on the parts. Give more --memory, or leave batch statistics out."
            )

    def _stripes(self, model: nn.Module, height: int, width: int, tile_px: int | None = None) -> Stripes:
        return Stripes(
            model,
            height,
            width,
            in_channels=self.channels,
            budget_bytes=self.budget,
            tile_px=tile_px or self.tiling.tile_px,
            autocast=self._autocast,
            compute_bytes=2 if self.predictor.precision == "bf16" else 4,
            device=self.predictor.device,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.predictor.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.predictor.device.type, dtype=torch.bfloat16)

    def _run(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network on windows (N, C, h, w) -> (N, K, h, w) float32."""
        if model is self.predictor.model:
            return self.predictor.network

        @torch.inference_mode()
        def run(x: Tensor) -> Tensor:
            with self._autocast():
                return model(x.contiguous(memory_format=torch.channels_last)).float()

        return run

    def _field(self, model: nn.Module) -> ReceptiveField:
        known = self.predictor.receptive_fields
        if id(model) not in known:
            known[id(model)] = receptive_field(model, in_channels=self.channels)
        return known[id(model)]

    def _tiles(self, model: nn.Module, field: ReceptiveField) -> HaloTiles:
        memory = pass_memory(self.predictor)
        if memory is None:
            raise UsageError(
                f"{self.predictor.card.model}: its memory cannot be foretold, so no tiles can be chosen. Use --blend."
            )
        return HaloTiles(
            self._run(model),
            field,
            memory,
            in_channels=self.channels,
            num_classes=self.classes,
            height=self.height,
            width=self.width,
            tile_px=self.tiling.tile_px,
            budget_bytes=self.budget,
            note=self.note,
        )

    def _blended(self, run: Callable[[Tensor], Tensor], classes: int | None = None) -> BlendedTiles:
        raise NotImplementedError

    def _averaged(self) -> Scorer:
        raise NotImplementedError


def default_budget(device: torch.device) -> int:
    """What maps may take unless the user says: 1 GiB on a CPU, half of what is free on a GPU."""
    if device.type != "cuda":
        return BUDGET_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2


def pass_memory(predictor: Predictor) -> PassMemory | None:
    """What a pass takes; None for networks that ask for the values of tensors."""
    if predictor.memory_of_a_pass is None:
        try:
            found = PassMemory.of(predictor.network, predictor.card.in_channels, predictor.device)
        except RuntimeError:
            found = PassMemory(math.inf)
        predictor.memory_of_a_pass = found
    return None if math.isinf(predictor.memory_of_a_pass.per_px) else predictor.memory_of_a_pass


__all__ = [
    "Ensemble",
    "EnsembleModule",
    "Member",
    "PixelwiseError",
    "Transform",
    "Transformed",
    "choose_scorer",
    "member_of",
    "on_sample",
    "transforms_of",
    "with_spatial_dropout",
]  # fmt: skip
