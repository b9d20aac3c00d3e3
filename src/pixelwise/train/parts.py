"""What a run is made of: the task, the conductor, the trainer and the stream of training data."""

import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from pixelwise.data.check import Inspection
from pixelwise.infer.bundle import ModelCard
from pixelwise.losses import class_weights
from pixelwise.train.checkpoints import SafeCheckpointIO
from pixelwise.train.conductor import Conductor, Report
from pixelwise.train.config import RunConfig
from pixelwise.train.history import History
from pixelwise.train.inputs import input_transform, window_px
from pixelwise.train.plan import Plan, image_area
from pixelwise.train.schedule import Budget
from pixelwise.train.separation import separate
from pixelwise.train.stream import BatchStream, CropSet, fits_in_cache, make_loader
from pixelwise.train.task import SegmentationTask


def loss_weights(config: RunConfig, inspection: Inspection, model: nn.Module) -> Tensor | None:
    """The weight of each class in the loss, or None for all alike.

    Raises:
        UsageError: the given weights are not one per class.
    """
    if config.class_weights == "none":
        return None
    stats = inspection.splits["train"]
    pixels, image_pixels = stats.pixels, stats.image_pixels
    if window_px(model) is not None:  # windows are drawn evenly by class: a scheme finds nothing to balance
        pixels = image_pixels = tuple(int(count > 0) for count in pixels)
    return class_weights(config.class_weights, pixels, image_pixels)


def make_task(config: RunConfig, plan: Plan, model: nn.Module, weight: Tensor | None) -> SegmentationTask:
    """The task with its budget."""
    if config.minutes:
        # The last validation is part of the time that was asked for.
        budget = Budget(seconds=max(1.0, config.minutes * 60 - plan.validation_s), steps_per_epoch=plan.steps_per_epoch)
    else:
        budget = Budget(steps=plan.steps, steps_per_epoch=plan.steps_per_epoch)
    return SegmentationTask(model, config, budget, mean=plan.mean, std=plan.std, weight=weight)


def make_conductor(plan: Plan, inspection: Inspection, out: Path, first_step: int, report: Report) -> Conductor:
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
    )
    history = History(out / "metrics.csv", first_step=first_step)
    return Conductor(folder, plan, card, out, history, report)


def make_trainer(config: RunConfig, plan: Plan, conductor: Conductor, out: Path) -> pl.Trainer:
    """Lightning's trainer, without what the conductor does."""
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


def make_dataset(config: RunConfig, plan: Plan, inspection: Inspection, model: nn.Module) -> CropSet:
    """What the steps draw from; the images are read here if they fit into memory."""
    folder = inspection.folder
    pairs = folder.split("train")
    is_uint8 = set(inspection.dtypes) == {"uint8"}
    transform = input_transform(config, model, crop_px=plan.crop_px, fill=plan.mean, is_uint8=is_uint8)
    pixels = sum(count * image_area(size) for size, count in inspection.sizes.items())
    share = len(pairs) / max(1, sum(inspection.sizes.values()))
    bytes_of_pixel = inspection.channels * (1 if is_uint8 else 4) + 1 + (4 if config.separation else 0)
    cache = fits_in_cache(int(pixels * share * bytes_of_pixel))
    weigh = None
    if config.separation:
        weigh = partial(separate, w0=config.separation, sigma_px=config.separation_sigma_px)
    return CropSet(pairs, folder.labels, inspection.channels, transform, config.seed, cache, weigh)


def make_stream(config: RunConfig, plan: Plan, dataset: CropSet, first_step: int) -> Any:
    """The loader of endless batches, entered at `first_step`."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    stream = BatchStream(
        len(dataset),
        batch_size=plan.batch_size,
        seed=config.seed,
        first_step=first_step,
        rank=rank,
        world=config.devices,
    )
    return make_loader(dataset, stream, workers=plan.workers, pin_memory=plan.device.startswith("cuda"))


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
