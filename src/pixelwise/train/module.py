"""The Lightning module: a network, a loss, an optimiser. It does not know which network it holds."""

from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pixelwise.data.check import Inspection
from pixelwise.errors import PixelwiseError
from pixelwise.losses import class_weights, cross_entropy, dice_loss
from pixelwise.ops.depthwise import speed_up_depthwise
from pixelwise.train.config import RunConfig
from pixelwise.train.inputs import training_logits, window_px
from pixelwise.train.optimizer import make_optimizer
from pixelwise.train.plan import Plan
from pixelwise.train.schedule import Budget, lr_factor
from pixelwise.train.stream import seed_of


@dataclass
class Progress:
    """What a run must remember beside its weights; part of every checkpoint."""

    elapsed_s: float = 0.0  # seconds of training, over all parts of an interrupted run
    validated_step: int = -1  # the step of the last validation, -1 before the first
    best_miou: float = -1.0  # over all validations, -1 before the first
    best_step: int = -1  # its step
    stale: int = 0  # validations since then


class SegmentationModule(pl.LightningModule):
    """Trains `model` on batches (image (N, C, H, W) in unit scale, labels (N, H, W)[, pixel weights (N, H, W)])."""

    mean: Tensor
    std: Tensor
    weight: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        budget: Budget,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        weight: Tensor | None,
    ) -> None:
        super().__init__()
        self.config, self.budget, self.progress = config, budget, Progress()
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True) if config.ema else None
        speed_up_depthwise(self.model)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("weight", weight, persistent=False)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and saved: the averaged one, if weights are averaged."""
        return self.model if self.average is None else self.average.module

    def training_step(self, batch: tuple[Tensor, ...], _index: int) -> Tensor:
        image, labels, *maps = batch
        x = (image - self.mean) / self.std
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        logits = training_logits(self.model, x)  # (N, K, H, W)
        pixel_weight = self._class_weight(labels) + maps[0] if maps else None
        loss = cross_entropy(
            logits,
            labels,
            weight=None if maps else self.weight,
            pixel_weight=pixel_weight,
            label_smoothing=self.config.label_smoothing,
            reduction=self.config.reduction,
        )
        if self.config.dice:
            loss = loss + self.config.dice * dice_loss(logits, labels)
        return loss

    def _class_weight(self, labels: Tensor) -> Tensor | float:
        """w_c of each pixel (N, H, W); U-Net adds the weights of gaps to it (arXiv:1505.04597, equation 2)."""
        if self.weight is None:
            return 1.0
        return self.weight[labels.long().clamp(max=len(self.weight) - 1)]  # void has no loss, whatever it weighs

    def on_train_batch_start(self, _batch: Any, _index: int) -> None:
        # The draws of a step (dropout, …) depend on the seed and the step alone, so that a resumed run repeats them.
        torch.manual_seed(seed_of(self.config.seed, "step", self.global_step, self.global_rank))
        factor = self.lr_factor()
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["peak_lr"] * factor

    def lr_factor(self) -> float:
        """The learning rate of the coming step over its peak."""
        spent = self.budget.progress(step=self.global_step, elapsed_s=self.progress.elapsed_s)
        config = self.config
        return lr_factor(
            spent,
            schedule=config.schedule,
            warmup=config.warmup,
            power=config.poly_power,
            epoch=self.global_step / self.budget.steps_per_epoch,
            decay=config.decay,
            decay_epochs=config.decay_epochs,
        )

    def after_step(self, loss: Tensor) -> None:
        """What belongs to a step after the optimiser's part; not a hook, since Lightning runs callbacks before those."""
        if self.average is not None:
            self.average.update_parameters(self.model)
        # On a GPU looking at the loss waits for the step, so there only every tenth is looked at.
        if (self.global_step % 10 == 0 or loss.device.type == "cpu") and not bool(torch.isfinite(loss)):
            raise PixelwiseError(
                f"the loss is {loss.item()} at step {self.global_step}: training has diverged. Lower the learning rate "
                "(--set lr=3e-4), clip gradients (--set clip=1), or use --set precision=float32. The best weights so far "
                "are kept."
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = asdict(self.progress)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.progress = Progress(**checkpoint["progress"])

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, count: Any) -> None:
        """Exponential average; short at first, so that it does not drag the random start along."""
        decay = min(self.config.ema, (1 + int(count)) / (10 + int(count)))
        for old, new in zip(averaged, current, strict=True):
            if old.is_floating_point():
                old.lerp_(new.to(old.dtype), 1 - decay)
            else:
                old.copy_(new)


def loss_weights(config: RunConfig, inspection: Inspection, model: nn.Module) -> Tensor | None:
    """The weight of each class in the loss, or None for all alike."""
    if config.class_weights == "none":
        return None
    stats = inspection.splits["train"]
    pixels, image_pixels = stats.pixels, stats.image_pixels
    if window_px(model) is not None:  # windows are drawn evenly by class: a scheme finds nothing to balance
        pixels = image_pixels = tuple(int(count > 0) for count in pixels)
    return class_weights(config.class_weights, pixels, image_pixels)


def make_module(config: RunConfig, plan: Plan, model: nn.Module, weight: Tensor | None) -> SegmentationModule:
    """The module with its budget."""
    if config.minutes:
        # The last validation is part of the time that was asked for.
        budget = Budget(seconds=max(1.0, config.minutes * 60 - plan.validation_s), steps_per_epoch=plan.steps_per_epoch)
    else:
        budget = Budget(steps=plan.steps, steps_per_epoch=plan.steps_per_epoch)
    return SegmentationModule(model, config, budget, mean=plan.mean, std=plan.std, weight=weight)
