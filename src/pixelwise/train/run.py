"""`train`: from a data folder and a configuration to a run folder; in stages, each network starts from the one before."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from pixelwise.data.check import Inspection, inspect_data
from pixelwise.data.layouts import DataFolder, open_data
from pixelwise.errors import DataError, UsageError
from pixelwise.files import remove_leftovers, write_json
from pixelwise.infer.devices import resolve_device
from pixelwise.infer.estimates import within_memory
from pixelwise.machine import is_out_of_memory, processors
from pixelwise.models import create_model, model_info
from pixelwise.models.pretrained import load_network
from pixelwise.train.config import RunConfig
from pixelwise.train.folder import (
    DATA_NAME,
    LAST_NAME,
    STATE_NAME,
    checkpoint_step,
    is_finished,
    read_plan,
    read_state,
    recorded_choices,
    recorded_devices,
    settle_config,
    write_config,
    write_start,
)
from pixelwise.train.job import Job, Material, run_job
from pixelwise.train.loop import Report, takes_tensorboard
from pixelwise.train.network import Start, check_options, network_config, start_network, window_px
from pixelwise.train.plan import SLOW, TRAINING_BYTES, Plan, choose_crop_px, make_plan, with_workers, worker_bytes
from pixelwise.train.probe import free_words

STAGES_NAME = "stages"
OnPlan = Callable[[Plan, Inspection], None]


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
        is_short: the time was up when much less than the planned steps were done, on a busy machine for example.
        wait: share in [0, 1] of the time in which the network waited for crops.
    """

    folder: Path
    plan: Plan
    best_miou: float | None
    steps: int
    seconds: float
    interrupted: str | None = None
    is_short: bool = False
    wait: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of several, or the only one."""

    config: RunConfig  # what it is trained with
    recorded: RunConfig  # what its folder says it is trained with; the last one's folder names the options of all
    folder: Path  # its run folder
    words: str = ""  # which one it is and what it leaves out; nothing for the only one


def train(
    data: str | Path | DataFolder,
    config: RunConfig | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    command: Sequence[str] = (),
    on_plan: OnPlan = lambda _plan, _inspection: None,
    report: Report = lambda _event: None,
) -> Run:
    """Train a network, or several in stages (`config.stages`), each from the weights of the one before.

    The data are checked first, and every fatal problem is reported at once, before anything is written. The run folder holds
    `model.safetensors` and `model.json` (the best weights so far, usable at any time), `config.yaml`, `plan.json`,
    `data.json`, `environment.json`, `metrics.csv`, TensorBoard logs and the checkpoint; earlier stages have run folders of
    their own in `stages/`.

    Args:
        data: a folder, or what `open_data` made of it.
        config: the options; None means the defaults, or with `resume` those of the run.
        out: the run folder.
        resume: go on from the checkpoint in `out`; with a budget in steps or epochs the weights become, on the CPU, bit for
            bit those of a run that was never interrupted.
        command: what the user typed, for the record.
        on_plan: called with the plan before training starts, in each stage.
        report: called with dictionaries of progress.

    Raises:
        DataError: the data cannot be trained on.
        UsageError: options that do not fit each other, the network or the run that is resumed.
        PixelwiseError: the disk is full, memory ran out, or training diverged; the last checkpoint is kept.

    Example:
        >>> train("no/such/folder", RunConfig(steps=1), out="runs/example")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: no/such/folder: there is no such folder. Give a folder of images and masks, ...
    """
    out = Path(out)
    config = settle_config(out, config, resume)
    if config.devices > 1 and "LOCAL_RANK" in os.environ:
        raise UsageError(
            "devices: pixelwise starts the processes of a training itself. Call it once, without torchrun."
        )
    if not (resume and is_finished(out)):
        check_processes(config, resume)
    chosen = recorded_choices(out) if resume else {}
    folder = data if isinstance(data, DataFolder) else open_data(data, **chosen)
    inspection = inspect_data(folder, reading=config.reading)
    inspection.raise_if_fatal()
    if not folder.split("train"):
        raise DataError(f"{folder.root}: holds no training images. Give it a train split.")
    *before, last = plan_stages(config, out)
    if before:
        check_stages((*before, last), inspection)
    for stage in before:
        if resume and is_finished(stage.folder):
            read_plan(stage.folder, inspection)  # refuses other data
            continue
        run = _train_stage(stage, inspection, (out, config), resume, command, on_plan, report)
        if run.interrupted:
            return run
    return _train_stage(last, inspection, (out, config), resume, command, on_plan, report)


def check_processes(config: RunConfig, resume: bool) -> None:
    """Refuse more processes than this machine can do anything with; a thousand would bring it down."""
    here = processors()
    is_cuda = resolve_device(config.device).type == "cuda"
    devices, workers = (torch.cuda.device_count() if is_cuda else max(4, here)), max(16, 4 * here)
    for name, given, most in (("devices", config.devices, devices), ("workers", config.workers or 0, workers)):
        if given > most:
            what = f"{devices} GPUs" if is_cuda and name == "devices" else f"{here} processors for this process"
            advice = f"Choose at most {most}, or leave it out."
            if resume:
                advice = (
                    f"Give --set workers={most}." if name == "workers" else "Go on with it on a machine that has more."
                )
            raise UsageError(f"{name}={given}: this machine has {what}. {advice}")


def plan_stages(config: RunConfig, out: Path) -> tuple[Stage, ...]:
    """The trainings that `config` asks for, in order; the last one is that of `config.model` in `out`.

    Each of the others has the same budget and options, but for options that its network does not know.
    """
    made: list[Stage] = []
    total = len(config.stages) + 1
    for number, name in enumerate((*config.stages, config.model), start=1):
        changes: dict[str, Any] = {"lr": config.lr * config.stage_lr ** (number - 1)}
        changes |= {"init": str(made[-1].folder), "pretrained": None} if made else {}
        folder, left_out = out, list[str]()
        if number < total:
            known = {item.name for item in fields(model_info(name).config)}
            left_out = [key for key in config.options if key not in known]
            own = {key: value for key, value in config.options.items() if key in known}
            changes |= {"model": name, "options": own, "stages": (), "stage_lr": 1.0}
            folder = out / STAGES_NAME / f"{number}-{name}"
        changed = config.model_copy(update=changes)
        words = f"{number} of {total}: {name}, in {folder}" if total > 1 else ""
        words += f"; left out, since it has no such option: {', '.join(left_out)}" if left_out else ""
        made.append(Stage(config=changed, recorded=changed if number < total else config, folder=folder, words=words))
    return tuple(made)


def check_stages(stages: tuple[Stage, ...], inspection: Inspection) -> None:
    """Find out before the first stage whether the later ones can be built and start from those before them."""
    before: nn.Module | None = None
    for stage in stages:
        kwargs = network_config(stage.config, inspection)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = create_model(stage.config.model, **kwargs)
        check_options(stage.config, model)
        if before is not None:
            try:
                load_network(model, before, "the stage before")
            except UsageError as error:
                raise UsageError(
                    f"--stages: {stage.config.model} cannot start from the stage before it: {error}"
                ) from error
        before = model


def _train_stage(
    stage: Stage,
    inspection: Inspection,
    whole: tuple[Path, RunConfig],
    resume: bool,
    command: Sequence[str],
    on_plan: OnPlan,
    report: Report,
) -> Run:
    """Train one network; `whole` is the folder and the options of all stages together."""
    config, out = stage.config, stage.folder
    remove_leftovers(out, out / "checkpoints")
    checkpoint = out / "checkpoints" / LAST_NAME
    first_step = checkpoint_step(checkpoint) if resume else 0
    pl.seed_everything(config.seed, verbose=False)
    start = start_network(config, inspection, is_resumed=bool(first_step))
    crop_px = window_px(start.model) or config.crop_px or choose_crop_px(inspection.sizes)
    beside = TRAINING_BYTES + worker_bytes(config, inspection.channels, crop_px)
    with within_memory(resolve_device(config.device), 1 / config.devices, beside):
        plan = read_plan(out, inspection) if first_step else _new_plan(stage, inspection, start)
    if first_step:
        plan = _going_on(plan, config, recorded_devices(out))
    if not takes_tensorboard(out) and not first_step:
        plan = replace(
            plan, notes=(*plan.notes, "no TensorBoard logs, since the name of the run folder is no valid text")
        )
    state = read_state(out) if first_step else {}
    if state.get("finished"):
        on_plan(plan, inspection)
        known = {key: state.get(key, False) for key in ("best_miou", "seconds", "is_short", "wait")}
        return Run(folder=out, plan=plan, steps=first_step, **known)
    job = Job(config=config, plan=plan, inspection=inspection, folder=out, first_step=first_step)
    material = Material.of(job, start.model)
    if not first_step:  # a run that goes on keeps what it began with
        plan = with_workers(config, plan, material.dataset, len(material.dataset))
        job = replace(job, plan=plan)
        material.dataset.close()  # what was opened to be timed
    on_plan(plan, inspection)
    if not state:
        write_json(whole[0] / DATA_NAME, inspection.to_dict())  # so that --resume finds how the data were opened
        write_config(*whole)  # and the options of all stages
        state = write_start(out, stage.recorded, plan, inspection, command)
    done = run_job(job, material, report)
    outcome: dict[str, Any] = {"best_miou": done.best_miou, "steps": done.steps, "seconds": done.seconds}
    outcome |= {"is_short": done.is_late and done.steps < SLOW * plan.steps, "wait": done.wait}
    write_json(out / STATE_NAME, state | {"finished": done.interrupted is None} | outcome)
    return Run(folder=out, plan=plan, interrupted=done.interrupted, **outcome)


def _going_on(plan: Plan, config: RunConfig, devices: int) -> Plan:
    """The plan of a run that goes on, with as many processes and devices as it is to have now; it had `devices`."""
    if config.workers is not None:
        plan = replace(plan, workers=config.workers)
    if config.devices == devices:
        return plan
    batch = plan.batch_size * devices // config.devices  # `settle_config` has seen to it that this is a whole number
    note = (
        f"devices={config.devices}, and {devices} before: a step still takes {plan.batch_size * devices} crops, {batch} on "
        "each device, and the images come in the same order; batch norm, dropout and dice go by the crops of each device."
    )
    return replace(plan, batch_size=batch, notes=(*plan.notes, note))


def _new_plan(stage: Stage, inspection: Inspection, start: Start) -> Plan:
    """A plan whose trial steps say in words what does not work."""
    config = stage.config
    crop_px, batch = config.crop_px or "auto", config.batch_size or "auto"
    free = free_words(resolve_device(config.device))  # later the error holds what did not fit
    try:
        return make_plan(config, inspection, start, stage=stage.words)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UsageError(
                f"one training step with batch_size={batch} and crop_px={crop_px} does not fit into memory"
                f"{free}. Use a smaller --set batch_size=… or --set crop_px=…, or a "
                "smaller network."
            ) from error
        raise
    except ValueError as error:  # torch's batch norm, and nothing of ours: a UsageError is passed on as it is
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            f"batch_size={batch} with crop_px={crop_px} leaves batch norm one value per channel at the coarsest stride. Use "
            "a larger --set batch_size or --set crop_px."
        ) from error
