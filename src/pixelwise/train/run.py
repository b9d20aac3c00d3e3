"""`train`: from a data folder and a configuration to a run folder."""

import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from pixelwise.data.check import Inspection, inspect_data
from pixelwise.data.layouts import DataFolder, open_data
from pixelwise.data.transforms import training_transform
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import read_json, write_json, write_text
from pixelwise.infer.bundle import CARD_NAME, ModelCard
from pixelwise.infer.devices import is_out_of_memory
from pixelwise.losses import class_weights
from pixelwise.models import create_model
from pixelwise.models.pretrained import load_pretrained
from pixelwise.train.checkpoints import LAST_NAME, SafeCheckpointIO, checkpoint_step
from pixelwise.train.conductor import Conductor, Report
from pixelwise.train.config import RunConfig, make_config, read_config
from pixelwise.train.environment import cpu_name
from pixelwise.train.history import History
from pixelwise.train.plan import Plan, image_area, make_plan, network_config
from pixelwise.train.schedule import Budget
from pixelwise.train.stream import BatchStream, CropSet, fits_in_cache, make_loader
from pixelwise.train.task import SegmentationTask

CONFIG_NAME, PLAN_NAME, STATE_NAME = "config.yaml", "plan.json", "environment.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished or interrupted training run.

    Attributes:
        folder: holds the weights, the log and the checkpoint.
        plan: what was planned.
        best_miou: on the validation images, in [0, 1]; None without any.
        steps: optimiser steps done.
        seconds: of training.
        interrupted: the signal that ended it early, or None.
    """

    folder: Path
    plan: Plan
    best_miou: float | None
    steps: int
    seconds: float
    interrupted: str | None = None


def train(
    data: str | Path | DataFolder,
    config: RunConfig | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    command: Sequence[str] = (),
    on_plan: Callable[[Plan, Inspection], None] = lambda _plan, _inspection: None,
    report: Report = lambda _event: None,
) -> Run:
    """Train a network.

    The data are checked first, and every fatal problem is reported at once, before anything is written. The run folder holds
    `model.safetensors` and `model.json` (the best weights so far, usable at any time), `config.yaml`, `plan.json`,
    `data.json`, `environment.json`, `metrics.csv`, TensorBoard logs and the checkpoint.

    Args:
        data: a folder, or what `open_data` made of it.
        config: the options; None means the defaults, or with `resume` those of the run.
        out: the run folder.
        resume: go on from the checkpoint in `out`; with a budget in steps or epochs the weights become, on the CPU, bit for
            bit those of a run that was never interrupted.
        command: what the user typed, for the record.
        on_plan: called with the plan before training starts.
        report: called with dictionaries of progress.

    Raises:
        DataError: the data cannot be trained on.
        UsageError: options that do not fit each other, the network or the run that is resumed.
        PixelwiseError: the disk is full, memory ran out, or training diverged; the last checkpoint is kept.

    Example:
        >>> train("no/such/folder", RunConfig(steps=1), out="runs/example")
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: no/such/folder: there is no such folder.
    """
    out = Path(out)
    checkpoint = out / "checkpoints" / LAST_NAME
    config = _settle_config(out, config, resume)
    folder = data if isinstance(data, DataFolder) else open_data(data)
    inspection = inspect_data(folder)
    inspection.raise_if_fatal()
    if not folder.split("train"):
        raise DataError(f"{folder.root}: holds no training images. Give it a train split.")
    first_step = checkpoint_step(checkpoint) if resume else 0
    pl.seed_everything(config.seed, verbose=False)
    model, kwargs, loaded = _make_network(config, inspection)
    plan = _settle_plan(out, config, inspection, model, kwargs, loaded, is_resumed=bool(first_step))
    on_plan(plan, inspection)
    state = _write_start(out, config, plan, inspection, command, first_step)
    if resume and state.get("finished"):
        return Run(folder=out, plan=plan, best_miou=state["best_miou"], steps=first_step, seconds=state["seconds"])
    task, conductor = _make_task(config, plan, inspection, model, out, first_step, report)
    trainer = _make_trainer(config, plan, conductor, out)
    loader = _make_loader(config, plan, inspection, first_step)
    with _as_readable_errors(plan, checkpoint), _quiet():
        trainer.fit(task, train_dataloaders=loader, ckpt_path=checkpoint if first_step else None)
    progress = task.progress
    best = progress.best_miou if progress.best_miou >= 0 else None
    if trainer.is_global_zero:
        outcome = {"finished": conductor.interrupted is None, "best_miou": best, "steps": trainer.global_step}
        write_json(out / STATE_NAME, state | outcome | {"seconds": progress.elapsed_s})
    return Run(
        folder=out,
        plan=plan,
        best_miou=best,
        steps=trainer.global_step,
        seconds=progress.elapsed_s,
        interrupted=conductor.interrupted,
    )


def _settle_config(out: Path, config: RunConfig | None, resume: bool) -> RunConfig:
    """The run's own options on resuming, else the given ones; refuses to mix two runs in one folder."""
    stored = out / CONFIG_NAME
    if not resume:
        if stored.exists() or (out / CARD_NAME).exists():
            raise UsageError(f"{out} holds a run already. Continue it with --resume, or choose another --out.")
        return config or RunConfig()
    if not stored.is_file():
        raise UsageError(f"--resume: {out} holds no {CONFIG_NAME}, so there is no run to continue. Leave --resume out.")
    previous = make_config(read_config(stored))
    if config is not None and config != previous:
        new, old = config.model_dump(), previous.model_dump()
        rows = ", ".join(f"{key}={new[key]!r} (the run: {old[key]!r})" for key in new if new[key] != old[key])
        raise UsageError(f"--resume continues {out} with its own options, but was given {rows}. Leave them out.")
    return previous


def _make_network(config: RunConfig, inspection: Inspection) -> tuple[nn.Module, dict[str, Any], str | None]:
    kwargs = network_config(config, inspection)
    model = create_model(config.model, **kwargs)
    if config.pretrained is None:
        return model, kwargs, None
    return model, kwargs, load_pretrained(model, config.pretrained).summary()


def _settle_plan(
    out: Path,
    config: RunConfig,
    inspection: Inspection,
    model: nn.Module,
    kwargs: dict[str, Any],
    loaded: str | None,
    *,
    is_resumed: bool,
) -> Plan:
    """A new plan, or on resuming the run's own: when it validates must not depend on how busy the machine is today."""
    if not is_resumed:
        try:
            return make_plan(config, inspection, model, kwargs, loaded)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise UsageError(
                    f"one training step with batch_size={config.batch_size} and crop_px={config.crop_px or 'auto'} does not "
                    "fit into memory. Use --set batch_size=2, or a smaller --set crop_px=256."
                ) from error
            raise
        except ValueError as error:  # torch's batch norm, and nothing of ours: a UsageError is not raised here
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"batch_size={config.batch_size} with crop_px={config.crop_px or 'auto'} leaves batch norm one value per "
                "channel at the coarsest stride. Use a larger --set batch_size or --set crop_px."
            ) from error
    values = read_json(out / PLAN_NAME)
    if _fingerprint(values) != inspection.fingerprint:
        raise DataError(
            f"{inspection.folder.root}: the data are not those that {out} was trained on (another fingerprint). Continue "
            "with the same files, or start a new run."
        )
    try:
        restored: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in values.items()
        }
        return Plan(**restored)
    except TypeError as error:
        raise DataError(f"{out / PLAN_NAME}: is not a plan of this version ({error}). Start a new run.") from error


def _fingerprint(plan: Any) -> str | None:
    data = plan.get("data") if isinstance(plan, dict) else None
    return data.get("fingerprint") if isinstance(data, dict) else None


def _write_start(
    out: Path, config: RunConfig, plan: Plan, inspection: Inspection, command: Sequence[str], first_step: int
) -> dict[str, Any]:
    """What is known before the first step; returns the state, which a finished run has marked as such."""
    if first_step:
        return dict(read_json(out / STATE_NAME))
    state = {
        "command": list(command),
        "pixelwise": metadata.version("pixelwise"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": plan.device,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "finished": False,
    }
    write_json(out / PLAN_NAME, plan.to_dict())
    write_json(out / "data.json", inspection.to_dict())
    write_json(out / STATE_NAME, state)
    write_text(out / CONFIG_NAME, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return state


def _make_task(
    config: RunConfig, plan: Plan, inspection: Inspection, model: nn.Module, out: Path, first_step: int, report: Report
) -> tuple[SegmentationTask, Conductor]:
    stats = inspection.splits["train"]
    weight = None
    if config.class_weights != "none":
        weight = class_weights(config.class_weights, stats.pixels, stats.image_pixels)
    if config.minutes:
        # The last validation is part of the time that was asked for.
        budget = Budget(seconds=max(1.0, config.minutes * 60 - plan.validation_s))
    else:
        budget = Budget(steps=plan.steps)
    task = SegmentationTask(model, config, budget, mean=plan.mean, std=plan.std, weight=weight)
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
    )
    history = History(out / "metrics.csv", first_step=first_step)
    return task, Conductor(folder, plan, card, out, history, report)


def _make_trainer(config: RunConfig, plan: Plan, conductor: Conductor, out: Path) -> pl.Trainer:
    index = torch.device(plan.device).index
    with _quiet():
        return pl.Trainer(
            accelerator="cpu" if plan.device == "cpu" else "auto",
            devices=config.devices if index is None else [index],
            strategy="ddp" if config.devices > 1 else "auto",
            precision="bf16-mixed" if plan.precision == "bf16" else "32-true",
            max_epochs=-1,
            max_steps=-1 if config.minutes else plan.steps,
            gradient_clip_val=config.clip or None,
            callbacks=[conductor],
            plugins=[SafeCheckpointIO()],
            logger=TensorBoardLogger(out, name="tensorboard", version=""),
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )


def _make_loader(config: RunConfig, plan: Plan, inspection: Inspection, first_step: int) -> Any:
    folder = inspection.folder
    pairs = folder.split("train")
    is_uint8 = set(inspection.dtypes) == {"uint8"}
    transform = training_transform(
        crop_px=plan.crop_px,
        scale=config.scale,
        focus=config.focus,
        flips=config.flips,
        photometric=config.photometric,
        fill=plan.mean,
        is_uint8=is_uint8,
    )
    pixels = sum(count * image_area(size) for size, count in inspection.sizes.items())
    share = len(pairs) / max(1, sum(inspection.sizes.values()))
    size = int(pixels * share * (inspection.channels * (1 if is_uint8 else 4) + 1))
    dataset = CropSet(pairs, folder.labels, inspection.channels, transform, config.seed, cache=fits_in_cache(size))
    rank = int(os.environ.get("LOCAL_RANK", 0))
    stream = BatchStream(
        len(pairs),
        batch_size=plan.batch_size,
        seed=config.seed,
        first_step=first_step,
        rank=rank,
        world=config.devices,
    )
    return make_loader(dataset, stream, workers=plan.workers, pin_memory=plan.device.startswith("cuda"))


@contextmanager
def _as_readable_errors(plan: Plan, checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        kept = f"The checkpoint {checkpoint} is kept." if checkpoint.exists() else "No checkpoint was written yet."
        raise PixelwiseError(
            f"memory ran out with batch_size={plan.batch_size} and crop_px={plan.crop_px}. Train with --set batch_size="
            f"{max(1, plan.batch_size // 2)}, a smaller crop_px, or a smaller network. {kept}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
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
