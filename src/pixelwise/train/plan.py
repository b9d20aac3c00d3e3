"""Everything a run will do, resolved before it starts: data, network, crop, batch, device, steps, time and memory."""

import copy
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from pixelwise.data.check import Inspection
from pixelwise.data.pairs import Pair
from pixelwise.data.scan import worker_count
from pixelwise.data.separation import where_objects_come_from
from pixelwise.infer.devices import resolve_device
from pixelwise.infer.estimates import peak_memory_bytes
from pixelwise.machine import is_out_of_memory, memory_room
from pixelwise.models.registry import count_parameters
from pixelwise.train.config import RunConfig
from pixelwise.train.network import CROP_STEP_PX, Start, warm_side, window_px
from pixelwise.train.probe import choose_workers, probe_steps
from pixelwise.train.timing import CROPS_S, SHARE, time_crops, time_steps

CROPS, WINDOWS = 8, 128  # in a step, unless the user says otherwise
LARGEST_CROP_PX = 352
LARGEST_TRIAL_PX, SMALLEST_TRIAL_PX = 1024, 64  # side of the image whose validation is timed
READING = 1.5  # a validated image takes so many times as long as the network alone
WORKER_BYTES = 512 << 20  # what a process that prepares crops may take, with its batches
TRAINING_BYTES = 192 << 20  # what a training takes beside its steps: images, averaged weights, what is imported late
AHEAD = 4  # batches that each of them prepares
SLOWER = 1.3  # steps that take so many times what was planned are told
SLOW = 0.7  # less than this share of the planned steps is told
VALIDATION_SHARE = 0.08  # of a time budget; more would be taken from learning


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was resolved; `plan.json` of a run folder."""

    data: dict[str, Any]  # root, layout, images per split, image sizes
    classes: tuple[str, ...]  # names
    model: str  # the network's name
    config: dict[str, Any]  # keyword arguments that rebuild it
    parameters: int  # trainable numbers
    pretrained: str | None  # what was loaded and what did not fit, or None
    mean: tuple[float, ...]  # per channel, unit scale; the network sees (image - mean) / std
    std: tuple[float, ...]  # as `mean`
    crop_px: int  # side of the training crops
    batch_size: int  # crops in a step, per device
    precision: str  # bf16 or float32
    device: str  # cpu, cuda, …
    workers: int  # processes that prepare crops
    steps_per_epoch: int  # steps that see as many crops as there are training images
    steps: int  # the budget in steps; expected where the budget is a time
    validate_every_steps: int  # between validations; 0 without validation images
    step_s: float  # measured seconds of one step
    validation_s: float  # expected seconds of one validation
    expected_s: float  # of the whole run
    memory_bytes: int | None  # largest memory of the process so far, the trial steps in each precision included
    warm_px: int = 0  # side of the crops in the first half of the budget; 0: as later
    inputs: str = "crops"  # what a step draws: crops, or windows around single pixels
    separation: str = ""  # where the objects of the separation weights come from, if those are used
    stage: str = ""  # which of several, in words
    notes: tuple[str, ...] = ()  # what else the user should know
    reasons: tuple[str, ...] = ()  # why this precision, batch size and number of workers: a line for each


def choose_crop_px(sizes: dict[str, int]) -> int:
    """The largest multiple of 32 px that fits the shorter side of the median image, at most 352 and at least 32."""
    shorter = [min(map(int, size.split("x"))) for size, count in sizes.items() for _ in range(count)]
    fitting = int(statistics.median(shorter)) // CROP_STEP_PX * CROP_STEP_PX
    return max(CROP_STEP_PX, min(LARGEST_CROP_PX, fitting))


def make_plan(config: RunConfig, inspection: Inspection, start: Start, *, stage: str = "") -> Plan:
    """Resolve what is open; precision, batch and time by trial steps on a copy of the network (nothing is learnt)."""
    folder, model = inspection.folder, start.model
    device = resolve_device(config.device)
    window = window_px(model)
    crop_px = window or config.crop_px or choose_crop_px(inspection.sizes)
    batch = config.batch_size or (WINDOWS if window else CROPS)
    val = len(inspection.samples("val"))
    # An epoch draws one crop of each image, or as many windows as would cover it.
    per_image = max(1, round(_average_pixels(inspection) / window**2)) if window else 1
    draws = len(epoch_pairs(inspection, crop_px)) * per_image

    def length_s(batch: int, step_s: float) -> float:
        steps = _steps(config, math.ceil(draws / (batch * config.devices)), 0.0, step_s)
        return min(steps * step_s, 60 * (config.max_minutes or math.inf))

    probe = probe_steps(config, start, (batch, inspection.channels, crop_px), device, length_s)
    batch, precision, step_s = probe.batch_size, probe.precision, probe.step_s
    per_epoch = math.ceil(draws / (batch * config.devices))
    val_images = min(val, config.max_val_images or val)
    validation_s = val_images * _image_s(model, inspection, device, precision)
    warm_px, warm_s = 0 if window else warm_side(config, crop_px), step_s
    if warm_px:
        warm_shape = (batch, inspection.channels, warm_px)
        warm_s = time_steps(config, model, warm_shape, device, (precision,), lambda _step_s: 0.0)[precision][-1]
    steps = _steps(config, per_epoch, validation_s, 2 / (1 / step_s + 1 / warm_s))
    workers = default_workers(device.type) if config.workers is None else config.workers
    every = _validate_every(config, per_epoch, step_s, validation_s) if val else 0
    expected_s = steps * (step_s + warm_s) / 2 + (steps // every if every else 0) * validation_s
    if config.minutes:
        expected_s = config.minutes * 60
    return Plan(
        data=_described(inspection),
        classes=folder.labels.names,
        model=config.model,
        config=start.kwargs,
        parameters=count_parameters(model),
        pretrained=start.loaded,
        mean=start.mean,
        std=start.std,
        crop_px=crop_px,
        batch_size=batch,
        precision=precision,
        device=str(device),
        workers=workers,
        steps_per_epoch=per_epoch,
        steps=int(steps),
        validate_every_steps=every,
        step_s=step_s,
        validation_s=validation_s,
        expected_s=min(expected_s, 60 * (config.minutes or config.max_minutes or math.inf)),
        memory_bytes=peak_memory_bytes(device),
        warm_px=warm_px,
        inputs="crops" if window is None else "windows",
        separation=where_objects_come_from(folder.split("train")) if config.separation else "",
        stage=stage,
        notes=probe.notes,
        reasons=(*probe.reasons, f"workers {workers}: {'by default' if config.workers is None else 'given'}"),
    )


def _described(inspection: Inspection) -> dict[str, Any]:
    """The data of a plan."""
    folder = inspection.folder
    return {
        "root": str(folder.root),
        "layout": folder.layout,
        "images": {name: len(folder.split(name)) for name in folder.splits},
        "sizes": dict(list(inspection.sizes.items())[:8]),
        "channels": inspection.channels,
        "fingerprint": inspection.fingerprint,
    }


def epoch_pairs(inspection: Inspection, crop_px: int) -> list[Pair]:
    """What an epoch draws from: each training sample once; a plane that is read by windows, once for each crop in it."""
    large, pairs = inspection.places(), []
    for pair in inspection.samples("train"):
        places = large.get((pair.mask, pair.plane or 0))
        pairs += [pair] * (max(1, round(places.height * places.width / crop_px**2)) if places else 1)
    return pairs


def _validate_every(config: RunConfig, per_epoch: int, step_s: float, validation_s: float) -> int:
    """Steps between validations: an epoch, or under a time budget as many epochs as keep them to their share of it."""
    epochs = config.validate_every or 1
    if config.minutes and config.validate_every is None:
        epochs = max(1, math.ceil(validation_s / (VALIDATION_SHARE * per_epoch * step_s)))
    return max(1, round(epochs * per_epoch))


def _steps(config: RunConfig, per_epoch: int, validation_s: float, step_s: float) -> float:
    """The steps of the budget, by those of an epoch and the seconds of a validation and of a step."""
    kind, amount = config.budget
    return {
        "steps": amount,
        "epochs": amount * per_epoch,
        "minutes": max(1, (amount * 60 - validation_s) * (1 - VALIDATION_SHARE) / step_s),
    }[kind]


def _image_s(model: nn.Module, inspection: Inspection, device: torch.device, precision: str) -> float:
    """Seconds to read, label and score one image: measured on the most frequent size, scaled to the average one."""
    sides = [int(side) for side in next(iter(inspection.sizes)).split("x")]
    trial = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last).eval()
    most = LARGEST_TRIAL_PX
    while True:
        width, height = (min(side, most) for side in sides)
        try:
            seconds = _pass_s(trial, (1, inspection.channels, height, width), device, precision)
            return READING * seconds * _average_pixels(inspection) / (width * height)
        except (RuntimeError, MemoryError) as error:
            if most <= SMALLEST_TRIAL_PX or not is_out_of_memory(error):
                raise
        most //= 2  # the validation itself goes by pieces where memory is short


def _pass_s(trial: nn.Module, shape: tuple[int, int, int, int], device: torch.device, precision: str) -> float:
    image = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        trial(image).argmax(1).cpu()  # which waits for it
        started = time.perf_counter()
        trial(image).argmax(1).cpu()
        return time.perf_counter() - started


def _average_pixels(inspection: Inspection) -> float:
    """Of an image."""
    pixels = sum(count * math.prod(map(int, size.split("x"))) for size, count in inspection.sizes.items())
    return pixels / sum(inspection.sizes.values())


def default_workers(device_type: str) -> int:
    """Processes to prepare crops: one where the CPU computes the network too, up to eight beside a GPU.

    They take at most half of the memory that is free.
    """
    return min(most_workers(device_type), 1 if device_type == "cpu" else 8)


def most_workers(device_type: str) -> int:
    """As many processes as may prepare crops: beside a GPU eight, beside a network on the CPU two, fewer on few cores."""
    cores, room = worker_count(), memory_room()
    wished = min(2 * (cores > 1), cores) if device_type == "cpu" else min(8, max(1, cores - 1))
    return wished if room is None else max(0, min(wished, room.bytes // (2 * WORKER_BYTES)))


def worker_bytes(config: RunConfig, channels: int, crop_px: int) -> int:
    """Memory of the processes that prepare crops, and of the batches that they have ready, before the batch is known."""
    workers = most_workers(resolve_device(config.device).type) if config.workers is None else config.workers
    crop_bytes = crop_px**2 * (4 * channels + 1)
    return workers * (WORKER_BYTES // 2 + AHEAD * (config.batch_size or CROPS) * crop_bytes) * config.devices


def with_workers(config: RunConfig, plan: Plan, dataset: Dataset[Any], images: int) -> Plan:
    """The plan with as many processes to prepare crops as the cost of a crop of `dataset` asks for.

    Nothing is timed where the user has chosen, or for a training that is too short to gain by it: batches are the same
    whoever prepares them.
    """
    device_type = torch.device(plan.device).type
    most = most_workers(device_type)
    if config.workers is not None or not most or SHARE * plan.expected_s < CROPS_S:
        return plan
    cores = max(1, worker_count() // config.devices) if device_type == "cpu" else None
    try:
        batch_s = plan.batch_size * time_crops(dataset, images)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return plan  # the training itself will say what to do
    workers, reason = choose_workers(batch_s, plan.step_s, cores=cores, most=most)
    return replace(plan, workers=workers, reasons=(*plan.reasons[:-1], reason))
