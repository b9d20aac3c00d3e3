"""What happens after every step: log, validate, keep the best weights, checkpoint, stop. In this order, in one place."""

import logging
import platform
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from pixelwise.data.check import Inspection
from pixelwise.data.layouts import DataFolder
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.evaluate import Evaluation, evaluate
from pixelwise.infer.predictor import Predictor
from pixelwise.train.checkpoints import LAST_NAME, SafeCheckpointIO
from pixelwise.train.config import RunConfig
from pixelwise.train.history import History
from pixelwise.train.module import SegmentationModule
from pixelwise.train.plan import Plan

LOG_EVERY = 10  # steps
Report = Callable[[dict[str, Any]], None]


class TrainingLoop(pl.Callback):
    """Logs, validates, keeps the best weights and writes checkpoints between the steps of a run."""

    def __init__(
        self, inspection: Inspection, plan: Plan, card: ModelCard, run: Path, history: History, report: Report
    ) -> None:
        self.inspection, self.plan, self.card = inspection, plan, card
        self.run, self.history, self.report = run, history, report
        self.interrupted: str | None = None
        self.last: Evaluation | None = None
        self._saved_at = self._resumed_at = time.monotonic()
        self._before_s = 0.0
        self._losses: list[Any] = []
        self._window = (0, 0.0)  # the step and elapsed time of the last log line
        self._handlers: dict[int, Any] = {}

    # -- the course of a run ------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _module(pl_module)
        self._before_s, self._resumed_at = module.progress.elapsed_s, time.monotonic()
        self._window = (trainer.global_step, module.progress.elapsed_s)
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: its owner handles signals
                break
        if (
            trainer.global_step
            and self._is_due(trainer.global_step)
            and module.progress.validated_step != trainer.global_step
        ):
            self._validate(trainer, module)  # the run was killed between a step and its validation

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, _batch: Any, _index: int
    ) -> None:
        module, step = _module(pl_module), trainer.global_step
        loss = outputs["loss"].detach()
        module.after_step(loss)
        module.progress.elapsed_s = self._elapsed()
        self._losses.append(loss)
        self._log(trainer, module)
        if self.interrupted:
            trainer.should_stop = True
        elif self._is_due(step):
            self.checkpoint(trainer)  # a validation may be long: nothing is lost if it is killed
            self._validate(trainer, module)
            if module.config.patience and module.progress.stale >= module.config.patience:
                trainer.should_stop = True
        seconds = module.budget.seconds
        if seconds is not None and self._elapsed() >= seconds:
            trainer.should_stop = True
        is_time = time.monotonic() - self._saved_at >= 60 * module.config.checkpoint_minutes
        if trainer.should_stop or is_time:
            self.checkpoint(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _module(pl_module)
        if not self.interrupted:
            if module.progress.validated_step != trainer.global_step:
                self._validate(trainer, module)
            self.checkpoint(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    # -- its parts ----------------------------------------------------------------------------------------------------

    def checkpoint(self, trainer: pl.Trainer) -> None:
        """Write all that is needed to go on from here."""
        trainer.save_checkpoint(self.run / "checkpoints" / LAST_NAME)
        self._saved_at = time.monotonic()

    def _is_due(self, step: int) -> bool:
        return bool(self.plan.validate_every_steps) and step % self.plan.validate_every_steps == 0

    def _validate(self, trainer: pl.Trainer, module: SegmentationModule) -> None:
        """Score the network on the val split and keep it if it is the best so far."""
        progress, step = module.progress, trainer.global_step
        miou = accuracy = float("nan")
        if trainer.is_global_zero and self.plan.validate_every_steps:
            was_training = module.evaluated.training
            predictor = Predictor(module.evaluated, self.card, device=module.device, precision=self.plan.precision)
            self.last = evaluate(predictor, self._val_folder(module), split="val")
            module.evaluated.train(was_training)
            miou, accuracy = self.last.scores.miou, self.last.scores.global_accuracy
        miou = trainer.strategy.broadcast(miou)
        progress.validated_step, progress.elapsed_s = step, self._elapsed()
        # Without validation images the newest weights are the ones to keep.
        if miou > progress.best_miou or miou != miou or progress.best_step < 0:
            progress.best_miou, progress.best_step, progress.stale = (miou if miou == miou else -1.0), step, 0
            self._save_best(trainer, module)
        else:
            progress.stale += 1
        if trainer.is_global_zero and miou == miou:
            self.history.add(**self._row(trainer, module), val_miou=miou, val_global_accuracy=accuracy)
            if trainer.logger is not None:
                trainer.logger.log_metrics({"val/miou": miou, "val/global_accuracy": accuracy}, step)
            self.report({"validated": step, "miou": miou, "best_miou": progress.best_miou})

    def _val_folder(self, module: SegmentationModule) -> DataFolder:
        pairs, most = self.inspection.samples("val"), module.config.max_val_images
        if most is not None and most < len(pairs):
            pairs = tuple(pairs[index * len(pairs) // most] for index in range(most))
        return replace(self.inspection.folder, pairs=pairs)

    def _save_best(self, trainer: pl.Trainer, module: SegmentationModule) -> None:
        if trainer.is_global_zero:
            scores = {"val": self.last.scores.to_dict()} if self.last else {}
            save_bundle(self.run, module.evaluated, replace(self.card, scores=scores | {"step": trainer.global_step}))

    def _log(self, trainer: pl.Trainer, module: SegmentationModule) -> None:
        step, elapsed = trainer.global_step, module.progress.elapsed_s
        done, since = step - self._window[0], elapsed - self._window[1]
        images = self.plan.batch_size * trainer.world_size
        spent = module.budget.progress(step=step, elapsed_s=elapsed)
        self.report({"step": step, "spent": spent, "elapsed_s": elapsed, "loss": self._losses[-1]})
        if step % LOG_EVERY or not done:
            return
        loss = sum(float(value) for value in self._losses) / len(self._losses)
        self._losses.clear()
        self._window = (step, elapsed)
        row = self._row(trainer, module) | {"train_loss": loss, "images_per_s": done * images / max(since, 1e-9)}
        if trainer.is_global_zero:
            self.history.add(**row)
            if trainer.logger is not None:
                trainer.logger.log_metrics(
                    {"train/loss": loss, "train/lr": row["lr"], "train/images_per_s": row["images_per_s"]}, step
                )
            self.report({"images_per_s": row["images_per_s"], "mean_loss": loss})

    def _row(self, trainer: pl.Trainer, module: SegmentationModule) -> dict[str, Any]:
        step = trainer.global_step
        lr = module.config.lr * module.lr_factor()
        return {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            "elapsed_s": module.progress.elapsed_s,
            "lr": lr,
        }

    def _elapsed(self) -> float:
        return self._before_s + time.monotonic() - self._resumed_at

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.interrupted:  # asked twice: now
            raise KeyboardInterrupt
        self.interrupted = signal.Signals(number).name


def _module(module: pl.LightningModule) -> SegmentationModule:
    if not isinstance(module, SegmentationModule):
        raise TypeError(f"the loop trains a SegmentationModule, not a {type(module).__name__}")
    return module


def make_loop(plan: Plan, inspection: Inspection, out: Path, first_step: int, report: Report) -> TrainingLoop:
    """What happens between the steps; the log begins here."""
    folder = inspection.folder
    card = ModelCard(
        model=plan.model,
        config=plan.config,
        labels=folder.labels,
        mean=plan.mean,
        std=plan.std,
        data={**plan.data, "root": Path(plan.data["root"]).name, "group_by": folder.group_by},
        versions={
            "pixelwise": metadata.version("pixelwise"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        reading=dict(inspection.reading),
    )
    history = History(out / "metrics.csv", first_step=first_step)
    return TrainingLoop(inspection, plan, card, out, history, report)


def make_trainer(config: RunConfig, plan: Plan, loop: TrainingLoop, out: Path) -> pl.Trainer:
    """Lightning's trainer, without what the loop does itself."""
    index = torch.device(plan.device).index
    with quiet():
        return pl.Trainer(
            accelerator="cpu" if plan.device == "cpu" else "auto",
            devices=config.devices if index is None else [index],
            strategy="ddp" if config.devices > 1 else "auto",
            precision="bf16-mixed" if plan.precision == "bf16" else "32-true",
            max_epochs=-1,
            max_steps=-1 if config.minutes else plan.steps,
            gradient_clip_val=config.clip_norm or None,
            callbacks=[loop],
            plugins=[SafeCheckpointIO()],
            logger=TensorBoardLogger(out, name="tensorboard", version=""),
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's hints about options that are set on purpose are not for the user of pixelwise."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            yield
    finally:
        logger.setLevel(level)
