"""What a run folder holds beside the weights: options, plan, `metrics.csv` and checkpoints; written so that a run resumes.

Checkpoints hold no pickle: Lightning hands over one nested dictionary; its tensors go into a safetensors file and its
structure, as JSON, into that file's header. A kill at any moment leaves the last good one.
"""

import csv
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixelwise.data.check import Inspection
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import atomic_path, read_json, write_json, write_text
from pixelwise.infer.bundle import CARD_NAME, WEIGHTS_NAME
from pixelwise.machine import cpu_name
from pixelwise.train.config import MAX_WORKERS, RunConfig, make_config, read_config
from pixelwise.train.plan import Plan

CONFIG_NAME, DATA_NAME, PLAN_NAME, STATE_NAME = "config.yaml", "data.json", "plan.json", "environment.json"
LAST_NAME = "last.safetensors"
OF_MACHINE = {"workers", "devices"}  # options that a run may go on with anew: the crops of a step stay the same
COLUMNS = (
    "step", "epoch", "elapsed_s", "lr", "train_loss", "images_per_s", "wait", "val_miou", "val_global_accuracy",
)  # fmt: skip


def settle_config(out: Path, config: RunConfig | None, resume: bool) -> RunConfig:
    """The run's own options on resuming, else the given ones; refuses to mix two runs in one folder.

    On resuming only what changes no result may be given anew.
    """
    stored = out / CONFIG_NAME
    if not resume:
        if any((out / name).exists() for name in (CONFIG_NAME, CARD_NAME, WEIGHTS_NAME)):
            raise UsageError(f"{out} holds a run already. Continue it with --resume, or choose another --out.")
        return config or RunConfig()
    if not stored.is_file():
        raise UsageError(f"--resume: {out} holds no {CONFIG_NAME}, so there is no run to continue. Leave --resume out.")
    previous = make_config(read_config(stored))
    given = config.model_fields_set if config else set()
    if other := [key for key in sorted(given - OF_MACHINE) if getattr(config, key) != getattr(previous, key)]:
        rows = ", ".join(f"{key}={getattr(config, key)!r} (the run: {getattr(previous, key)!r})" for key in other)
        raise UsageError(f"--resume continues {out} with its own options, but was given {rows}. Leave them out.")
    changes = {key: getattr(config, key) for key in given & OF_MACHINE}
    if changes.get("devices", previous.devices) != previous.devices:
        changes |= _over_devices(out, previous, changes["devices"])
    return make_config(previous.model_dump() | changes)


def _over_devices(out: Path, previous: RunConfig, devices: int) -> dict[str, Any]:
    """The options with which a run goes on over another number of devices: the crops of a step stay, in all."""
    if previous.stages:
        raise UsageError(
            f"devices={devices}: a run in stages goes on with the devices={previous.devices} that it began with. Leave it "
            "out."
        )
    batch = previous.batch_size
    if (out / PLAN_NAME).is_file():  # what was left open is decided there
        plan = read_json(out / PLAN_NAME)
        batch = plan.get("batch_size") if isinstance(plan, dict) else None
        if type(batch) is not int or batch < 1:
            raise DataError(f"{out / PLAN_NAME}: names no batch_size. Start a new run.")
    crops = (batch or 0) * previous.devices
    if crops % devices:
        fitting = [count for count in range(1, min(crops, MAX_WORKERS) + 1) if crops % count == 0]
        raise UsageError(
            f"devices={devices}: a step of this run takes {crops} crops, which are not shared out evenly. Choose one of "
            f"{', '.join(map(str, fitting))}."
        )
    # Batch norm over the devices together is that of one device, and would be refused there.
    alone = {"sync_batch_norm": False} if devices == 1 else {}
    return alone | ({"batch_size": crops // devices} if crops else {})


def recorded_devices(out: Path) -> int:
    """On how many devices a run was begun."""
    return make_config(read_config(out / CONFIG_NAME)).devices


def is_finished(out: Path) -> bool:
    """Whether a run has come to its end."""
    return (out / STATE_NAME).is_file() and bool(read_state(out).get("finished"))


def read_plan(out: Path, inspection: Inspection) -> Plan:
    """The plan of a run that goes on: when it validates must not depend on how busy the machine is today."""
    values = read_json(out / PLAN_NAME)
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, dict) or data.get("fingerprint") != inspection.fingerprint:
        raise DataError(
            f"{inspection.folder.root}: the data are not those that {out} was trained on (another fingerprint). Continue "
            "with the same files, or start a new run."
        )
    stored = read_json(out / DATA_NAME)
    labels = stored.get("labels") if isinstance(stored, dict) else None
    if labels != inspection.folder.labels.to_dict():
        raise DataError(
            f"{inspection.folder.root}: mask values mean other classes than those that {out} was trained on. Give the same "
            "--classes and --ignore as then, or start a new run."
        )
    try:
        frozen: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
        return Plan(**frozen)
    except TypeError as error:
        raise DataError(f"{out / PLAN_NAME}: is not a plan of this version ({error}). Start a new run.") from error


def recorded_choices(out: Path) -> dict[str, Any]:
    """What the data of a run were opened with: keywords of `open_data`, those that were given."""
    stored = read_json(out / DATA_NAME) if (out / DATA_NAME).is_file() else {}
    known = stored if isinstance(stored, dict) else {}
    return {key: known[key] for key in ("group_by", "masks", "region") if isinstance(known.get(key), str)}


def read_state(out: Path) -> dict[str, Any]:
    """What `environment.json` says; a finished run has marked itself there."""
    state = read_json(out / STATE_NAME)
    if not isinstance(state, dict):
        raise DataError(f"{out / STATE_NAME}: must hold a mapping, not a {type(state).__name__}. Start a new run.")
    return state


def write_config(out: Path, config: RunConfig) -> None:
    """The options of a run."""
    write_text(out / CONFIG_NAME, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def write_start(
    out: Path, config: RunConfig, plan: Plan, inspection: Inspection, command: Sequence[str]
) -> dict[str, Any]:
    """Write what is known before the first step; returns the state, to be completed at the end."""
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
    write_json(out / PLAN_NAME, asdict(plan))
    write_json(out / DATA_NAME, inspection.to_dict())
    write_json(out / STATE_NAME, state)
    write_config(out, config)
    return state


def command_line() -> list[str]:
    """What was typed, word by word."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


class History:
    """Appends rows to a CSV file; rows after `first_step`, of a part of the run that is done again, are dropped first."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path, self.first_step = path, first_step
        self._keep(lambda row: bool(first_step) and int(row["step"]) <= first_step)

    def _keep(self, is_kept: Callable[[dict[str, str]], bool]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in read_history(self.path) if is_kept(row))
        write_text(self.path, text.getvalue())

    def add(self, **row: Any) -> None:
        """One row; numbers are rounded to six digits."""
        if "val_miou" in row and row["step"] == self.first_step:  # it may have been killed just after it was written
            self._keep(lambda old: int(old["step"]) < self.first_step or not old["val_miou"])
        values = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n").writerow(values)


def read_history(path: Path) -> list[dict[str, str]]:
    """The rows of a `metrics.csv`; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a number that was cut off would pass for a shorter one
    rows = [row for row in csv.DictReader(io.StringIO(whole)) if None not in row and None not in row.values()]
    return [row for row in rows if str(row.get("step", "")).isdigit()]


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as safetensors, atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        tensors: dict[str, Tensor] = {}
        structure = json.dumps(_pack(checkpoint, tensors))
        try:
            with atomic_path(path) as part:
                save_file(tensors, part, metadata={"checkpoint": structure})
        except (OSError, SafetensorError) as error:
            raise PixelwiseError(
                f"{path}: the checkpoint cannot be written ({error}). The previous one is untouched: make room on the disk "
                "and go on with --resume."
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path, *, with_tensors: bool = True) -> dict[str, Any]:
    """The nested dictionary of a checkpoint, its tensors on the CPU, or their names in the file alone."""
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})["checkpoint"])
            state = _unpack(structure, file.get_tensor if with_tensors else str)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        return state
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: is not a checkpoint that can be read ({error}).") from error


def checkpoint_step(path: Path) -> int:
    """The optimiser steps done when the checkpoint was written; 0 where there is none."""
    if not path.is_file():
        return 0
    step = read_checkpoint(path, with_tensors=False).get("global_step")
    if not isinstance(step, int):
        raise DataError(f"{path}: is not a checkpoint of a training run (it names no step).")
    return step


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON that names the tensors; dictionaries keep the type of their keys, tuples stay tuples."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):  # a named tuple would come back as another type
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r}")


def _unpack(value: Any, tensor: Any) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *rest = value.items()
    if kind == "tensor" and not rest:
        return tensor(content)
    if kind == "dict":
        return {_unpack(key, tensor): _unpack(item, tensor) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensor) for item in content]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"unknown part {kind!r}")
