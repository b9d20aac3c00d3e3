"""What happens after every step: log, validate, keep the best weights, checkpoint, stop. In this order, in one place."""

import errno
import logging
import math
import platform
import signal
import statistics
import threading
import time
import warnings
from collections import deque
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
from lightning.pytorch.plugins.environments import LightningEnvironment

from pixelwise.data.check import Inspection
from pixelwise.data.layouts import DataFolder
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.evaluate import Evaluation, evaluate
from pixelwise.infer.options import OverflowingScores
from pixelwise.infer.predictor import Predictor
from pixelwise.machine import keep_freed_memory
from pixelwise.train.config import RunConfig
from pixelwise.train.folder import COLUMNS, CONFIG_NAME, LAST_NAME, History, SafeCheckpointIO
from pixelwise.train.module import SegmentationModule
from pixelwise.train.plan import Plan
from pixelwise.train.selection import Choice, keep

LOG_EVERY = 10  # steps
RECENT = 20  # steps by which the pace is known
Report = Callable[[dict[str, Any]], None]


class TrainingLoop(pl.Callback):
    """Logs, validates, keeps the best weights and writes checkpoints between the steps of a run."""

    def __init__(
        self, module: SegmentationModule, plan: Plan, inspection: Inspection, run: Path, first_step: int, report: Report
    ) -> None:
        self.module, self.plan, self.inspection, self.run, self.report = module, plan, inspection, run, report
        self.card = _card(plan, inspection)
        self.first_step = first_step
        self.interrupted: str | None = None  # the signal that ends the run early, once all processes know of it
        self._asked = 0  # the signal that asks this process to end
        self.is_validating = False
        self._saved_at = self._resumed_at = time.monotonic()
        self.is_begun = False
        self._before_s = 0.0
        self._saved = (-1, -1)  # the step of the last checkpoint, and of the validation that it knows of
        self._losses: list[Any] = []
        self._window = (0, 0.0, 0.0)  # the step, elapsed and waited seconds of the last log line
        self._steps_s: deque[float] = deque(
            maxlen=RECENT
        )  # seconds of the last steps, the wait for their crops included
        self._step_from: float | None = None  # when the step that runs began to wait for its crops
        self._validation_s = plan.validation_s  # as the last one took
        self._begun: tuple[float, float] | None = None  # elapsed and waited seconds after the first step
        self._waited_s = 0.0

    # -- the course of a run ------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, progress, self.is_begun = trainer.global_step, self.module.progress, True
        if trainer.is_global_zero:
            self.history = History(self.run / "metrics.csv", first_step=self.first_step)
        self._before_s, self._resumed_at = progress.elapsed_s, time.monotonic()
        self._window = (step, progress.elapsed_s, 0.0)
        if step and self._is_due(step) and progress.validated_step != step:
            self._validate(trainer)  # the run was killed between a step and its validation
        trainer.should_stop = self._is_over(step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, _batch: Any, _index: int
    ) -> None:
        module, step, loss = self.module, trainer.global_step, outputs["loss"].detach()
        module.after_step(loss)
        (module.progress.elapsed_s,) = self._agreed(trainer, self._elapsed())
        if self._step_from is not None:
            self._steps_s.append(time.monotonic() - self._step_from)
        self._losses.append(loss)
        loader: Any = trainer.train_dataloader
        self._waited_s = loader.waited_s
        self._begun = self._begun or (module.progress.elapsed_s, self._waited_s)  # without the start of the workers
        self._log(trainer)
        is_late = time.monotonic() - self._saved_at >= 60 * module.config.checkpoint_minutes
        asked, is_time = self._agreed(trainer, self._asked, is_late)
        self.interrupted = signal.Signals(int(asked)).name if asked else None
        if not asked and self._is_due(step):
            self.checkpoint(trainer)  # a validation may be long: nothing is lost if it is killed
            self._validate(trainer)
            is_time = True  # the weights that are kept and what is known of them must agree
        trainer.should_stop = bool(asked) or self._is_over(step)
        if trainer.should_stop or is_time:
            self.checkpoint(trainer)
        self._step_from = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        keep_freed_memory(False)
        if not self.interrupted:
            self.checkpoint(trainer)
            if self.module.progress.validated_step != trainer.global_step:
                self._validate(trainer)
                self.checkpoint(trainer)

    # -- its parts ----------------------------------------------------------------------------------------------------

    def checkpoint(self, trainer: pl.Trainer) -> None:
        """Write all that is needed to go on from here, unless it is written already."""
        state = (trainer.global_step, self.module.progress.validated_step)
        if state != self._saved:
            if trainer.is_global_zero and not (self.run / CONFIG_NAME).exists():  # a new folder could not go on
                raise FileNotFoundError(errno.ENOENT, "the run folder is gone", str(self.run))
            trainer.save_checkpoint(self.run / "checkpoints" / LAST_NAME)
            self._saved = state
        self._saved_at = time.monotonic()

    def _is_over(self, step: int) -> bool:
        """Whether the budget is spent, or validations have not become better for too long."""
        module = self.module
        if module.config.patience and module.progress.stale >= module.config.patience:
            return True
        return module.is_late or (not module.config.minutes and step >= self.plan.steps)

    def _agreed(self, trainer: pl.Trainer, *values: float, mean: bool = False) -> list[float]:
        """The largest of each value over all processes: they must stop, save and change the learning rate together.

        With `mean` their means: those of the processes' losses are the loss of all crops.
        """
        if trainer.world_size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.module.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.SUM if mean else torch.distributed.ReduceOp.MAX)
        return [value / trainer.world_size if mean else value for value in shared.tolist()]

    def _is_due(self, step: int) -> bool:
        return bool(self.plan.validate_every_steps) and step % self.plan.validate_every_steps == 0

    def _validate(self, trainer: pl.Trainer) -> None:
        """Score the network on the val split and keep its weights if they are the ones to keep."""
        module, progress, step, began = self.module, self.module.progress, trainer.global_step, time.monotonic()
        evaluation = self._evaluate() if trainer.is_global_zero and self.plan.validate_every_steps else None
        if evaluation is None:  # nothing can choose without validation images
            found = (math.nan, math.nan, Choice(math.nan, can_choose=False), self._elapsed())
        else:
            trained, scores = self.inspection.splits["train"].pixels, evaluation.scores
            choice = Choice.of(evaluation.matrix, scores.iou, trained, evaluation.names)
            found = (scores.miou, evaluation.headline.value, choice, self._elapsed())
        miou, headline, choice, progress.elapsed_s = trainer.strategy.broadcast(found)
        is_kept = keep(progress, choice, step, miou, headline)
        self._validation_s = time.monotonic() - began
        if not trainer.is_global_zero:
            return
        if is_kept:
            chosen = {"chosen": choice.note} if choice.note else {}
            scored = {"val": evaluation.scores.to_dict()} if evaluation else {}
            save_bundle(self.run, module.evaluated, replace(self.card, scores=scored | chosen | {"step": step}))
        if evaluation is not None:
            self._record(trainer, "val", miou=miou, global_accuracy=evaluation.scores.global_accuracy)
            event = {"miou": miou, "best_miou": progress.best_miou, "best": progress.best_headline, "note": choice.note}
            self.report({"validated": step, "headline": evaluation.headline} | event)

    def _evaluate(self) -> Evaluation:
        module = self.module
        was_training, self.is_validating = module.evaluated.training, True
        keep_freed_memory(False)  # the room for large images is looked at
        predictor = Predictor(module.evaluated, self.card, device=module.device, precision=self.plan.precision)
        try:
            evaluation = evaluate(predictor, self._val_folder(), split="val", check=False, note=None)
        except OverflowingScores as error:
            raise module.diverged("the network's scores overflow") from error
        module.evaluated.train(was_training)
        self.is_validating = False
        return evaluation

    def _val_folder(self) -> DataFolder:
        pairs, most = self.inspection.samples("val"), self.module.config.max_val_images
        if most is not None and most < len(pairs):
            pairs = tuple(pairs[index * len(pairs) // most] for index in range(most))
        return replace(self.inspection.folder, pairs=pairs)

    def _log(self, trainer: pl.Trainer) -> None:
        step, elapsed = trainer.global_step, self.module.progress.elapsed_s
        done, since, waited = step - self._window[0], elapsed - self._window[1], self._waited_s - self._window[2]
        state = {"step": step, "spent": self.module.spent(), "elapsed_s": elapsed, "loss": self._losses[-1]}
        self.report(state | self._outlook(step))
        if step % LOG_EVERY or not done:
            return
        (loss,) = self._agreed(trainer, sum(float(value) for value in self._losses) / len(self._losses), mean=True)
        self._losses.clear()
        self._window = (step, elapsed, self._waited_s)
        images_per_s = done * self.plan.batch_size * trainer.world_size / max(since, 1e-9)
        if trainer.is_global_zero:
            lr = self.module.config.lr * self.module.lr_factor()
            self._record(trainer, "train", loss=loss, lr=lr, images_per_s=images_per_s, wait=waited / max(since, 1e-9))
            self.report({"images_per_s": images_per_s, "mean_loss": loss})

    def _outlook(self, step: int) -> dict[str, float | None]:
        """How many steps there will be and how long they take, by the pace of the last ones, whatever the plan said.

        On the CPU that pace is their median; a GPU is looked at every tenth step only, so there it is their mean.
        """
        plan, module = self.plan, self.module
        recent_s = None
        if plan.warm_px and module.spent() < 0.5:  # steps on small crops tell little of the others
            left_s = (1 - module.spent()) * plan.expected_s
            planned: dict[str, float | None] = {"planned_steps": plan.steps, "planned_step_s": plan.step_s}
            return planned | {"expected_steps": plan.steps, "left_s": left_s, "step_s": None}
        if len(self._steps_s) == RECENT:
            recent_s = (statistics.median if plan.device == "cpu" else statistics.fmean)(self._steps_s)
        every, step_s = plan.validate_every_steps, recent_s or plan.step_s
        pace_s = step_s + (self._validation_s / every if every else 0.0)  # with its part of the validations
        left_s = math.inf if module.seconds is None else max(0.0, module.seconds - module.progress.elapsed_s)
        steps = left_s / pace_s
        if not module.config.minutes:
            steps = min(steps, max(0, plan.steps - step))
        return {
            "planned_steps": plan.steps,
            "expected_steps": step + round(steps),
            "left_s": min(left_s, steps * pace_s),
            "planned_step_s": plan.step_s,
            "step_s": recent_s,
        }

    def _record(self, trainer: pl.Trainer, what: str, **values: float) -> None:
        """A row of `metrics.csv`, and for TensorBoard a point of each curve."""
        step, module = trainer.global_step, self.module
        row: dict[str, float] = {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            "elapsed_s": module.progress.elapsed_s,
            "lr": module.config.lr * module.lr_factor(),
        }
        self.history.add(**row | {key if key in COLUMNS else f"{what}_{key}": item for key, item in values.items()})
        if trainer.logger is not None:
            trainer.logger.log_metrics({f"{what}/{key}": value for key, value in values.items()}, step)

    @property
    def wait(self) -> float:
        """The share in [0, 1] of the time from the first step on in which the network waited for crops."""
        began_s, waited_s = self._begun or (0.0, 0.0)
        return (self._waited_s - waited_s) / max(self.module.progress.elapsed_s - began_s, 1e-9)

    def _elapsed(self) -> float:
        return self._before_s + time.monotonic() - self._resumed_at

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Ask for an end after this step; asked twice, at once."""
        if self._asked:
            raise KeyboardInterrupt
        self._asked = number


def _card(plan: Plan, inspection: Inspection) -> ModelCard:
    """What the saved network is, but for its scores."""
    folder = inspection.folder
    return ModelCard(
        model=plan.model,
        config=plan.config,
        labels=folder.labels,
        mean=plan.mean,
        std=plan.std,
        data={**plan.data, "root": Path(plan.data["root"]).name, **folder.choices},
        versions={
            "pixelwise": metadata.version("pixelwise"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        reading=dict(inspection.reading),
        numbers=inspection.numbers,
    )


def takes_tensorboard(out: Path) -> bool:
    """Whether TensorBoard can write into a folder: the bytes of its name must be text."""
    return str(out) == str(out).encode("utf-8", "replace").decode()


def make_trainer(config: RunConfig, plan: Plan, loop: TrainingLoop, out: Path) -> pl.Trainer:
    """Lightning's trainer, without what the loop does itself."""
    index = torch.device(plan.device).index
    with quiet():
        trainer = pl.Trainer(
            accelerator="cpu" if plan.device == "cpu" else "auto",
            devices=config.devices if index is None else [index],
            strategy="ddp" if config.devices > 1 else "auto",
            precision="bf16-mixed" if plan.precision == "bf16" else "32-true",
            max_epochs=-1,
            max_steps=-1,  # the loop ends it: Lightning would not even start a run that has done all its steps
            gradient_clip_val=config.clip_norm or None,
            callbacks=[loop],
            plugins=[SafeCheckpointIO(), *([LightningEnvironment()] if config.devices > 1 else [])],
            sync_batchnorm=config.sync_batch_norm,
            logger=TensorBoardLogger(out, name="tensorboard", version="") if takes_tensorboard(out) else False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    # Lightning's own handler of SIGTERM talks to the other processes in the middle of their steps, which locks all of them.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's hints about options that are set on purpose are not for the user of pixelwise.

    Nor is what TensorBoard's thread prints when it cannot write: the loop gets that error with its next row.
    """
    hook = threading.excepthook
    threading.excepthook = lambda found: None if issubclass(found.exc_type, OSError) else hook(found)
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
        threading.excepthook = hook
