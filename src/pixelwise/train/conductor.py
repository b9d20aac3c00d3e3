"""What happens after every step: log, validate, keep the best weights, checkpoint, stop. In this order, in one place."""

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from pixelwise.data.layouts import DataFolder
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.evaluate import Evaluation, evaluate
from pixelwise.infer.predictor import Predictor
from pixelwise.train.checkpoints import LAST_NAME
from pixelwise.train.history import History
from pixelwise.train.plan import Plan
from pixelwise.train.task import SegmentationTask

LOG_EVERY = 10  # steps
Report = Callable[[dict[str, Any]], None]


class Conductor(pl.Callback):
    """Runs the affairs of a training run between its steps.

    Args:
        folder: the data; its val split is validated on, without resizing.
        plan: when to validate, on what.
        card: what is written beside the best weights.
        run: the run folder.
        history: the log.
        report: called after each step with what a progress bar shows.
    """

    def __init__(
        self, folder: DataFolder, plan: Plan, card: ModelCard, run: Path, history: History, report: Report
    ) -> None:
        self.folder, self.plan, self.card = folder, plan, card
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
        task = _task(pl_module)
        self._before_s, self._resumed_at = task.progress.elapsed_s, time.monotonic()
        self._window = (trainer.global_step, task.progress.elapsed_s)
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: its owner handles signals
                break
        if (
            trainer.global_step
            and self._is_due(trainer.global_step)
            and task.progress.validated_step != trainer.global_step
        ):
            self._validate(trainer, task)  # the run was killed between a step and its validation

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, _batch: Any, _index: int
    ) -> None:
        task, step = _task(pl_module), trainer.global_step
        loss = outputs["loss"].detach()
        task.after_step(loss)
        task.progress.elapsed_s = self._elapsed()
        self._losses.append(loss)
        self._log(trainer, task)
        if self.interrupted:
            trainer.should_stop = True
        elif self._is_due(step):
            self.checkpoint(trainer)  # a validation may be long: nothing is lost if it is killed
            self._validate(trainer, task)
            if task.config.patience and task.progress.stale >= task.config.patience:
                trainer.should_stop = True
        seconds = task.budget.seconds
        if seconds is not None and self._elapsed() >= seconds:
            trainer.should_stop = True
        is_time = time.monotonic() - self._saved_at >= 60 * task.config.checkpoint_minutes
        if trainer.should_stop or is_time:
            self.checkpoint(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = _task(pl_module)
        if not self.interrupted:
            if task.progress.validated_step != trainer.global_step:
                self._validate(trainer, task)
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

    def _validate(self, trainer: pl.Trainer, task: SegmentationTask) -> None:
        """Score the network on the val split and keep it if it is the best so far."""
        progress, step = task.progress, trainer.global_step
        miou = accuracy = float("nan")
        if trainer.is_global_zero and self.plan.validate_every_steps:
            was_training = task.evaluated.training
            predictor = Predictor(task.evaluated, self.card, device=task.device, precision=self.plan.precision)
            self.last = evaluate(predictor, self._val_folder(task), split="val")
            task.evaluated.train(was_training)
            miou, accuracy = self.last.scores.miou, self.last.scores.global_accuracy
        miou = trainer.strategy.broadcast(miou)
        progress.validated_step, progress.elapsed_s = step, self._elapsed()
        # Without validation images the newest weights are the ones to keep.
        if miou > progress.best_miou or miou != miou or progress.best_step < 0:
            progress.best_miou, progress.best_step, progress.stale = (miou if miou == miou else -1.0), step, 0
            self._save_best(trainer, task)
        else:
            progress.stale += 1
        if trainer.is_global_zero and miou == miou:
            self.history.add(**self._row(trainer, task), val_miou=miou, val_global_accuracy=accuracy)
            if trainer.logger is not None:
                trainer.logger.log_metrics({"val/miou": miou, "val/global_accuracy": accuracy}, step)
            self.report({"validated": step, "miou": miou, "best_miou": progress.best_miou})

    def _val_folder(self, task: SegmentationTask) -> DataFolder:
        pairs, most = self.folder.split("val"), task.config.max_val_images
        if most is not None and most < len(pairs):
            pairs = tuple(pairs[index * len(pairs) // most] for index in range(most))
        return replace(self.folder, pairs=pairs)

    def _save_best(self, trainer: pl.Trainer, task: SegmentationTask) -> None:
        if trainer.is_global_zero:
            scores = {"val": self.last.scores.to_dict()} if self.last else {}
            save_bundle(self.run, task.evaluated, replace(self.card, scores=scores | {"step": trainer.global_step}))

    def _log(self, trainer: pl.Trainer, task: SegmentationTask) -> None:
        step, elapsed = trainer.global_step, task.progress.elapsed_s
        done, since = step - self._window[0], elapsed - self._window[1]
        images = self.plan.batch_size * trainer.world_size
        spent = task.budget.progress(step=step, elapsed_s=elapsed)
        self.report({"step": step, "spent": spent, "elapsed_s": elapsed, "loss": self._losses[-1]})
        if step % LOG_EVERY or not done:
            return
        loss = sum(float(value) for value in self._losses) / len(self._losses)
        self._losses.clear()
        self._window = (step, elapsed)
        row = self._row(trainer, task) | {"train_loss": loss, "images_per_s": done * images / max(since, 1e-9)}
        if trainer.is_global_zero:
            self.history.add(**row)
            if trainer.logger is not None:
                trainer.logger.log_metrics(
                    {"train/loss": loss, "train/lr": row["lr"], "train/images_per_s": row["images_per_s"]}, step
                )
            self.report({"images_per_s": row["images_per_s"], "mean_loss": loss})

    def _row(self, trainer: pl.Trainer, task: SegmentationTask) -> dict[str, Any]:
        step = trainer.global_step
        lr = task.config.lr * task.lr_factor()
        return {"step": step, "epoch": step / self.plan.steps_per_epoch, "elapsed_s": task.progress.elapsed_s, "lr": lr}

    def _elapsed(self) -> float:
        return self._before_s + time.monotonic() - self._resumed_at

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.interrupted:  # asked twice: now
            raise KeyboardInterrupt
        self.interrupted = signal.Signals(number).name


def _task(module: pl.LightningModule) -> SegmentationTask:
    if not isinstance(module, SegmentationTask):
        raise TypeError(f"the conductor conducts a SegmentationTask, not a {type(module).__name__}")
    return module
