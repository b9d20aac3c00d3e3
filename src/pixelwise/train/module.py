"""The Lightning module: a network, a loss, an optimiser, a schedule. It does not know which network it holds."""

import math
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pixelwise.data.check import Inspection
from pixelwise.data.photometric import network_input
from pixelwise.errors import PixelwiseError
from pixelwise.losses import class_weights
from pixelwise.losses.pixel import IGNORE
from pixelwise.machine import keep_freed_memory
from pixelwise.ops.training import prepare_for_training
from pixelwise.train.config import RunConfig
from pixelwise.train.network import frozen_parts, training_loss, window_px
from pixelwise.train.order import seed_of
from pixelwise.train.plan import Plan
from pixelwise.train.selection import Progress

CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.Linear)  # what has a bias that is no norm's


class SegmentationModule(pl.LightningModule):
    """Trains `model` on batches of `make_loader`: images, changes of colours, labels (N, H, W)[, weights (N, H, W)]."""

    weight: Tensor | None

    def __init__(self, model: nn.Module, config: RunConfig, plan: Plan, weight: Tensor | None) -> None:
        super().__init__()
        self.config, self.plan, self.progress = config, plan, Progress()
        # The last validation is part of the time that was asked for.
        minutes = config.minutes or config.max_minutes
        self.seconds = max(1.0, minutes * 60 - plan.validation_s) if minutes else None
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        average = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True) if config.ema else None
        self._beside = (average,)  # no submodule: what is trained on several devices must get a gradient
        prepare_for_training(self.model)
        self.register_buffer("weight", weight, persistent=False)

    @property
    def average(self) -> AveragedModel | None:
        """The averaged weights, if they are averaged."""
        return self._beside[0]

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and saved: the averaged one, if weights are averaged."""
        return self.model if self.average is None else self.average.module

    def on_fit_start(self) -> None:
        if self.average is not None:
            self.average.to(self.device)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, ...]:
        return tuple(torch.as_tensor(item) for item in batch)  # arrays, where shared memory is small

    def training_step(self, batch: tuple[Tensor, ...], _index: int) -> Tensor:
        images, changes, labels, *maps = batch
        x = network_input(images, changes)  # (N, C, H, W)
        if not self.config.channels_last:
            x = x.contiguous()
        return training_loss(
            self.model,
            x,
            labels,
            dice=self.config.dice,
            share=self._share(labels) if self.config.devices > 1 else 1.0,
            weight=None if maps else self.weight,
            pixel_weight=self._class_weight(labels) + maps[0] if maps else None,
            label_smoothing=self.config.label_smoothing,
            reduction=self.config.reduction,
        )

    def _share(self, labels: Tensor) -> Tensor | float:
        """What this process's loss must be multiplied by, for DDP averages gradients: so they become those of all crops.

        A mean is over the labelled pixels of all processes, of which each may have another number.
        """
        world = self.trainer.world_size
        if self.config.reduction == "sum":
            return float(world)
        count = (labels != IGNORE).sum()
        total = count.clone()
        torch.distributed.all_reduce(total)
        return world * count / total.clamp(min=1)

    def _class_weight(self, labels: Tensor) -> Tensor | float:
        """w_c of each pixel (N, H, W); U-Net adds the weights of gaps to it (arXiv:1505.04597, equation 2)."""
        if self.weight is None:
            return 1.0
        return self.weight[labels.long().clamp(max=len(self.weight) - 1)]  # void has no loss, whatever it weighs

    def on_train_batch_start(self, _batch: Any, _index: int) -> None:
        keep_freed_memory(True)
        for part in frozen_parts(self.model, self.config.freeze):
            part.eval()  # Lightning and validations put the network as a whole into training mode
        # The draws of a step (dropout, …) depend on the seed and the step alone, so that a resumed run repeats them.
        torch.manual_seed(seed_of(self.config.seed, "step", self.global_step, self.global_rank))
        factor = self.lr_factor()
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["peak_lr"] * factor

    def spent(self) -> float:
        """The share in [0, 1] of the budget that is behind us: of the steps or of the seconds, whichever is larger."""
        by_steps = 0.0 if self.config.minutes else self.global_step / self.plan.steps
        by_time = 0.0 if self.seconds is None else self.progress.elapsed_s / self.seconds
        return min(1.0, max(by_steps, by_time))

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and self.progress.elapsed_s >= self.seconds

    def lr_factor(self) -> float:
        """The learning rate of the coming step over its peak."""
        return lr_factor(self.config, self.spent(), self.global_step / self.plan.steps_per_epoch)

    def after_step(self, loss: Tensor) -> None:
        """What belongs to a step after the optimiser's part; not a hook, since Lightning runs callbacks before those."""
        if self.average is not None:
            self.average.update_parameters(self.model)
        # On a GPU looking at the loss waits for the step, so there only every tenth is looked at.
        if (self.global_step % 10 == 0 or loss.device.type == "cpu") and not bool(torch.isfinite(loss)):
            raise self.diverged(f"the loss is {loss.item()}")

    def diverged(self, what: str) -> PixelwiseError:
        """The error that says what to do where training has diverged, and what is there."""
        config, best = self.config, self.progress.best_step
        ways = [f"lower the learning rate (--set lr={config.lr / 10:.2g})"]
        ways += ["clip gradients (--set clip=1)"] if not 0 < config.clip_norm <= 1 else []
        ways += ["use --set precision=float32"] if self.plan.precision != "float32" else []
        kept = (
            f"The weights of step {best} are kept" if best >= 0 else "No weights were kept, since none were validated"
        )
        return PixelwiseError(
            f"{what} at step {self.global_step}: training has diverged, and would again with --resume. Start anew with "
            f"another --out: {', or '.join(ways)}. {kept}."
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = asdict(self.progress)
        if self.average is not None:
            checkpoint["state_dict"] |= {f"average.{key}": item for key, item in self.average.state_dict().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        values, state = checkpoint["progress"], checkpoint["state_dict"]
        names = [name for name in state if name.startswith("average.")]
        averaged = {name.removeprefix("average."): state.pop(name) for name in names}
        if self.average is not None:
            self.average.load_state_dict(averaged)
        self.progress = Progress(**{"peak": values["best_miou"]} | values)  # earlier versions chose by mIoU

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, count: Any) -> None:
        """Exponential average; short at first, so that it does not drag the random start along."""
        decay = min(self.config.ema, (1 + int(count)) / (10 + int(count)))
        for old, new in zip(averaged, current, strict=True):
            if old.is_floating_point():
                old.lerp_(new.to(old.dtype), 1 - decay)
            else:
                old.copy_(new)


def lr_factor(config: RunConfig, progress: float, epoch: float = 0.0) -> float:
    """The learning rate over its peak: a rise over `warmup`, then what the schedule says.

    `poly` rises linearly, then falls as (1 - p) ** power (DeepLab, arXiv:1606.00915); `onecycle` rises and falls as a half
    cosine (Smith and Topin, arXiv:1708.07120); both reach zero with the budget. `constant` stays (FCN, SegNet).
    `exponential` is multiplied by `decay` after every `decay_epochs` (FC-DenseNet: 0.995 an epoch).
    """
    schedule, warmup = config.schedule, config.warmup
    if progress < warmup:
        rise = progress / warmup
        # A time budget starts at exactly 0 s: a first step without any learning rate would be wasted.
        return max(0.01, (1 - math.cos(math.pi * rise)) / 2 if schedule == "onecycle" else rise)
    if schedule == "constant":
        return 1.0
    if schedule == "exponential":
        return config.decay ** math.floor(epoch / config.decay_epochs + 1e-9)  # 0.3 / 0.1 is a little less than 3
    fall = (progress - warmup) / max(1e-12, 1 - warmup)
    return (1 - fall) ** config.poly_power if schedule == "poly" else (1 + math.cos(math.pi * fall)) / 2


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimiser of a run; each group of parameters knows its `peak_lr`, which the schedule scales.

    The rate of what lies in the network's `encoder` is multiplied by `encoder_lr`, that of the biases of convolutions by
    `bias_lr`. Weights of more than one dimension are decayed: by AdamW on their own, by the others as a term l2 / 2 |w|^2 of
    the loss, as torch does it.
    """
    biases = {id(module.bias) for module in model.modules() if isinstance(module, CONVOLUTIONS)}
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_bias = id(parameter) in biases and config.bias_lr != 1
            groups.setdefault((name.startswith("encoder."), parameter.ndim > 1, is_bias), []).append(parameter)
    rows = []
    for (is_encoder, is_weight, is_bias), parameters in groups.items():
        peak = config.lr * (config.encoder_lr if is_encoder else 1.0) * (config.bias_lr if is_bias else 1.0)
        # Norms and biases are not pulled towards zero: they scale, they do not select.
        decay = config.weight_decay if is_weight else 0.0
        rows.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    if config.optimizer == "sgd":
        return torch.optim.SGD(rows, lr=config.lr, momentum=config.momentum)
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
    return kinds[config.optimizer](rows)


def loss_weights(config: RunConfig, inspection: Inspection, model: nn.Module) -> Tensor | None:
    """The weight of each class in the loss, or None for all alike."""
    if config.class_weights == "none":
        return None
    stats = inspection.splits["train"]
    pixels, image_pixels = stats.pixels, stats.image_pixels
    if window_px(model) is not None:  # windows are drawn evenly by class: a scheme finds nothing to balance
        pixels = image_pixels = tuple(int(count > 0) for count in pixels)
    return class_weights(config.class_weights, pixels, image_pixels)
