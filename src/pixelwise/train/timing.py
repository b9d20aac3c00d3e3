"""Times of training steps and of crops on this machine; those of steps are kept in the user's cache folder for later runs.

They are kept by machine and network, one small file each; a file that is damaged, or of something else, counts as none.
"""

import copy
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from pixelwise.errors import DataError
from pixelwise.files import read_json, write_json
from pixelwise.machine import cache_folder, cpu_name, is_out_of_memory, keep_freed_memory, processors
from pixelwise.ops.training import prepare_for_training
from pixelwise.train.config import RunConfig
from pixelwise.train.network import Start, frozen_parts, training_loss, window_px

PROBE_S, SHARE = 20.0, 0.1  # a probe takes at most so long, and at most so much of the training that it is for
LEAST, MOST = 5, 15  # timed steps
COMPARED = 30  # precisions are compared where a tenth of the training is as long as so many steps
STALE = 1.3  # kept times that are so many times what is measured now are of a busier hour
MARGIN, FEW_MARGIN = 0.05, 0.25  # how much faster the second choice must be: by many steps, by fewer than `LEAST`
STEADY = 0.02  # a median whose standard error is a smaller share of it is known
CROPS_S, CROPS_TIMED = 2.0, 32  # what timing crops takes at most
Seconds = dict[str, list[float]]  # of steps, by precision
Length = Callable[[int, float], float]  # seconds of the training, by batch size and seconds of a step


def faster(found: Seconds) -> str:
    """The first precision, unless another is faster by more than chance and `MARGIN`.

    Example:
        >>> faster({"bf16": [1.0, 1.1, 1.0, 1.0, 1.2], "float32": [0.98, 1.0, 0.97, 1.3, 1.0]})
        'bf16'
        >>> faster({"bf16": [1.0, 1.1, 1.0, 1.0, 1.2], "float32": [0.5, 0.6, 0.5, 0.5, 0.6]})
        'float32'
    """
    first, *others = found
    for other in others:
        ratios = [its / firsts for firsts, its in zip(found[first], found[other], strict=False)]  # side by side in time
        margin = MARGIN if len(ratios) >= LEAST else FEW_MARGIN
        if statistics.median(ratios) + max(margin, 2 * standard_error(ratios)) < 1:
            return other
    return first


def standard_error(values: list[float]) -> float:
    """Of the median, by the median absolute deviation as if the values were normal; 0 of a single one."""
    centre = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - centre) for value in values)
    return 1.2533 * deviation / math.sqrt(len(values))


def measured(
    config: RunConfig,
    start: Start,
    shape: tuple[int, int, int],
    device: torch.device,
    precisions: tuple[str, ...],
    length: Length,
) -> tuple[Seconds, str]:
    """Times of steps, and where they come from: kept ones if there are any, for which two steps are tried nevertheless.

    Those find out whether there is the memory, which is another every day, and whether the kept times are of a busy hour.
    """
    key = _key(config, start, shape, device, precisions)
    kept = recall(key)
    if kept is not None:
        precision = faster(kept)
        now = time_steps(config, start.model, shape, device, (precision,), lambda _step_s: 0.0)[precision][-1]
        if statistics.median(kept[precision]) < STALE * now:
            return kept, "timed before a former run"

    def allowed_s(step_s: float) -> float:
        return min(PROBE_S, SHARE * length(shape[0], step_s))

    found = time_steps(config, start.model, shape, device, precisions, allowed_s)
    times = found[precisions[0]]
    is_short = len(found) == 1 and len(times) < LEAST and allowed_s(times[0]) < PROBE_S
    if is_short or len(found) < len(precisions):
        return found, "timed now"  # a longer training, or one with more memory, should look again
    failure = remember(key, found)
    return found, f"timed now; not kept, since {failure}" if failure else "timed now"


def time_steps(
    config: RunConfig,
    model: nn.Module,
    shape: tuple[int, int, int],
    device: torch.device,
    precisions: tuple[str, ...],
    allowed_s: Callable[[float], float],
) -> Seconds:
    """Seconds of training steps on random crops (N, C, side), on a copy of `model`, which itself is left alone.

    The precisions take turns, so that what else the machine does weighs on all of them, until their medians are steady or
    the time is spent; two steps of the first precision are always done, and the first one of each is not counted. Of
    others there is nothing in the result where memory does not suffice, or the time for a comparison worth its name.

    Args:
        config: of the training.
        model: the network.
        shape: (N, C, side) of a batch.
        device: that computes.
        precisions: "bf16", "float32" or both, the one to prefer first.
        allowed_s: seconds that may be spent, by those of one step.
    """
    keep_freed_memory(True)  # as in the training
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return _taking_turns(_Trial(config, model, shape, device), precisions, allowed_s)
    finally:
        keep_freed_memory(False)


def _taking_turns(trial: "_Trial", precisions: tuple[str, ...], allowed_s: Callable[[float], float]) -> Seconds:
    began = time.perf_counter()
    first, *others = precisions
    cold = trial.step(first)
    found = {first: [cold if cold > PROBE_S / 2 else trial.step(first)]}
    most = allowed_s(found[first][0])
    # By the number of steps, not by a clock: the same command must not compare them today and not tomorrow.
    is_worth_it = most >= min(PROBE_S, COMPARED * found[first][0])
    for other in others if is_worth_it else ():
        if time.perf_counter() - began + 4 * found[first][0] > PROBE_S:  # a first step, and one that is counted
            continue
        try:
            trial.step(other)
            found[other] = [trial.step(other)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    while len(found[first]) < MOST and not _is_steady(found):
        limit = most if len(found) == 1 or len(found[first]) >= LEAST else PROBE_S
        if time.perf_counter() - began + sum(times[-1] for times in found.values()) > limit:
            break
        for name, times in found.items():
            times.append(trial.step(name))
    return found


def _is_steady(found: Seconds) -> bool:
    return all(
        len(times) >= LEAST and standard_error(times) < STEADY * statistics.median(times) for times in found.values()
    )


class _Trial:
    """Steps on a copy of a network, with random crops and a learning rate of zero."""

    def __init__(self, config: RunConfig, model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> None:
        self.device, batch, (channels, side) = device, shape[0], shape[1:]
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = copy.deepcopy(model).to(device).train()
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        prepare_for_training(self.model)
        for part in frozen_parts(self.model, config.freeze):
            part.eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.clip, self.dice = config.clip_norm, config.dice
        self.image = torch.randn(batch, channels, side, side, device=device)
        labelled = (side, side) if window_px(model) is None else (1, 1)
        self.labels = torch.zeros((batch, *labelled), dtype=torch.uint8, device=device)

    def step(self, precision: str) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            image = self.image.contiguous(memory_format=self.layout)
            loss = training_loss(self.model, image, self.labels, dice=self.dice)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def time_crops(dataset: Dataset[Any], images: int) -> float:
    """Seconds of one core that a crop takes on average; `dataset` gives them by (index of the image, position)."""
    threads, taken = torch.get_num_threads(), list[float]()
    torch.set_num_threads(1)  # as in a process that prepares crops
    try:
        while len(taken) <= CROPS_TIMED and sum(taken) < CROPS_S:
            started, number = time.perf_counter(), len(taken)
            dataset[number * images // (CROPS_TIMED + 1), number]
            taken.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return statistics.fmean(taken[1:] or taken)  # the first one loads what is imported late


# -- what is kept for later runs ----------------------------------------------------------------------------------------


def _key(
    config: RunConfig, start: Start, shape: tuple[int, int, int], device: torch.device, precisions: tuple[str, ...]
) -> dict[str, Any]:
    """What the time of a step depends on."""
    model = json.dumps(
        [config.model, start.kwargs, config.channels_last, config.clip_norm > 0, config.dice > 0], sort_keys=True
    )
    return {
        "version": 1,  # of this file's steps
        "cpu": cpu_name(),
        "processors": processors(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "network": hashlib.sha256(model.encode()).hexdigest(),
        "learnt": sum(item.numel() for item in start.model.parameters() if item.requires_grad),
        "crops": list(shape),
        "precisions": list(precisions),
    }


def _name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json"


def recall(key: dict[str, Any]) -> Seconds | None:
    """The times that were kept, or None; a file that is damaged, or not what `remember` writes, counts as none."""
    try:
        stored = read_json(cache_folder() / "probe" / _name(key))
    except (OSError, DataError):
        return None
    if not isinstance(stored, dict) or stored.get("key") != key or not isinstance(stored.get("seconds"), dict):
        return None
    found = {name: stored["seconds"].get(name) for name in key["precisions"] if name in stored["seconds"]}
    is_whole = bool(found) and next(iter(found)) == key["precisions"][0] and len(found) == len(stored["seconds"])
    return found if is_whole and all(map(_are_times, found.values())) else None


def _are_times(values: Any) -> bool:
    return (
        isinstance(values, list)
        and 0 < len(values) <= MOST
        and all(type(value) in (int, float) and 0 < value < 1e6 for value in values)
    )


def remember(key: dict[str, Any], found: Seconds) -> str:
    """Keep times for later runs; why that was not possible, or nothing. No run fails for want of a cache."""
    try:
        write_json(cache_folder() / "probe" / _name(key), {"key": key, "seconds": found})
    except OSError as error:
        return f"the cache folder cannot be written ({error.strerror or error})"
    return ""
