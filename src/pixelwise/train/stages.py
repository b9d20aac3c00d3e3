"""Training in stages: each network starts from the weights of the one before, as FCN-8s does from FCN-16s from FCN-32s."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixelwise.data.check import Inspection
from pixelwise.errors import UsageError
from pixelwise.models import create_model, model_info
from pixelwise.models.pretrained import load_network
from pixelwise.train.config import RunConfig
from pixelwise.train.inputs import check_options
from pixelwise.train.start import network_config

STAGES_NAME = "stages"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of several, or the only one."""

    config: RunConfig  # what it is trained with
    recorded: RunConfig  # what its folder says it is trained with; the last one's folder names the options of all
    folder: Path  # its run folder
    words: str = ""  # which one it is and what it leaves out; nothing for the only one


def plan_stages(config: RunConfig, out: Path) -> tuple[Stage, ...]:
    """The trainings that `config` asks for, in order; the last one is that of `config.model` in `out`.

    Each of the others has the same budget and options, but for options that its network does not know.
    """
    if not config.stages:
        return (Stage(config=config, recorded=config, folder=out),)
    made: list[Stage] = []
    for index, name in enumerate(config.stages):
        known = {item.name for item in fields(model_info(name).config)}
        left_out = [key for key in config.options if key not in known]
        changes = {
            "model": name,
            "options": {key: value for key, value in config.options.items() if key in known},
            "stages": (),
            "stage_lr": 1.0,
        }
        folder = out / STAGES_NAME / f"{index + 1}-{name}"
        own = config.model_copy(update=changes | _start_of(config, index, made))
        words = f"{index + 1} of {len(config.stages) + 1}: {name}, in {folder}"
        words += f"; left out, since it has no such option: {', '.join(left_out)}" if left_out else ""
        made.append(Stage(config=own, recorded=own, folder=folder, words=words))
    total = len(made) + 1
    last = config.model_copy(update=_start_of(config, len(made), made))
    words = f"{total} of {total}: {config.model}, in {out}"
    return (*made, Stage(config=last, recorded=config, folder=out, words=words))


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


def _start_of(config: RunConfig, index: int, made: list[Stage]) -> dict[str, Any]:
    """Weights to start from, and the learning rate."""
    rate = {"lr": config.lr * config.stage_lr**index}
    return rate | ({"init": str(made[-1].folder), "pretrained": None} if made else {})
