"""What a run folder holds beside the weights: the options, the plan, and how far it is; written first, read on resuming."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from pixelwise.data.check import Inspection
from pixelwise.errors import DataError, UsageError
from pixelwise.files import read_json, write_json, write_text
from pixelwise.infer.bundle import CARD_NAME
from pixelwise.train.config import RunConfig, make_config, read_config
from pixelwise.train.plan import Plan
from pixelwise.train.start import cpu_name

CONFIG_NAME, PLAN_NAME, STATE_NAME = "config.yaml", "plan.json", "environment.json"


def settle_config(out: Path, config: RunConfig | None, resume: bool) -> RunConfig:
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


def is_finished(out: Path) -> bool:
    """Whether a run has come to its end."""
    return (out / STATE_NAME).is_file() and bool(read_state(out).get("finished"))


def read_plan(out: Path, inspection: Inspection) -> Plan:
    """The plan of a run that goes on: when it validates must not depend on how busy the machine is today."""
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
    write_json(out / PLAN_NAME, plan.to_dict())
    write_json(out / "data.json", inspection.to_dict())
    write_json(out / STATE_NAME, state)
    write_config(out, config)
    return state
