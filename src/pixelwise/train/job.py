"""The training of one network, from its first or its next step to its last; on several devices by a process for each.

The process that was called is the first; it writes all files. It starts the others itself, with all that they need to know,
so neither a user's script nor a command line runs twice.
"""

import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, ModuleType

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pixelwise.data.check import Inspection
from pixelwise.errors import DataError, PixelwiseError
from pixelwise.machine import is_out_of_memory, keep_freed_memory, memory_room, refused, shared_memory_room
from pixelwise.train.config import RunConfig
from pixelwise.train.folder import CONFIG_NAME, LAST_NAME
from pixelwise.train.loop import Report, TrainingLoop, make_trainer, quiet
from pixelwise.train.module import SegmentationModule, loss_weights
from pixelwise.train.network import start_network
from pixelwise.train.plan import Plan
from pixelwise.train.probe import free_words
from pixelwise.train.stream import CropSet, make_dataset, make_stream

LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe", "Timed out waiting")
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that end a run early
FAREWELL_S = 10.0  # what processes that have failed get to end
TOLD = 2  # the exit code of a process that has said what is wrong


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process of a training knows."""

    config: RunConfig
    plan: Plan
    inspection: Inspection
    folder: Path  # the run folder
    first_step: int  # steps done before

    @property
    def checkpoint(self) -> Path:
        """What the training goes on from."""
        return self.folder / "checkpoints" / LAST_NAME


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training ended."""

    best_miou: float | None  # of the weights that are kept; None without validation images
    steps: int  # done in all
    seconds: float  # of training
    interrupted: str | None  # the signal that ended it early
    is_late: bool  # the time was up before the steps were done
    wait: float  # share of the time in which the network waited for crops


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a process trains with; made before anything is written, since options may not fit the data."""

    model: nn.Module
    weight: Tensor | None  # of each class in the loss
    dataset: CropSet

    @classmethod
    def of(cls, job: Job, model: nn.Module) -> "Material":
        """The material of a job, with the images in memory if they fit."""
        dataset = make_dataset(job.config, job.plan, job.inspection, model)
        return cls(model=model, weight=loss_weights(job.config, job.inspection, model), dataset=dataset)


def run_job(job: Job, material: Material, report: Report) -> Outcome:
    """Train, in this process and in one for each further device."""
    with _other_processes(job) as others:
        return _fit(job, material, report, others)


def _fit(job: Job, material: Material, report: Report, others: Sequence[BaseProcess] = ()) -> Outcome:
    config, plan = job.config, job.plan
    module = SegmentationModule(material.model, config, plan, material.weight)
    loop = TrainingLoop(module, plan, job.inspection, job.folder, job.first_step, report)
    with _as_readable_errors(job, loop, others), quiet(), _signals_to(loop.on_signal):
        if others:
            threading.Thread(target=_watch_the_start, args=(loop, others), daemon=True, name="pixelwise-start").start()
        loader = make_stream(config, plan, material.dataset, job.first_step, module.spent)
        trainer = make_trainer(config, plan, loop, job.folder)
        try:
            trainer.fit(module, train_dataloaders=loader, ckpt_path=job.checkpoint if job.first_step else None)
        finally:
            keep_freed_memory(False)  # as before, whatever ended the training
    progress = module.progress
    return Outcome(
        best_miou=progress.best_miou if progress.best_miou >= 0 else None,
        steps=trainer.global_step,
        seconds=progress.elapsed_s,
        interrupted=loop.interrupted,
        is_late=not loop.interrupted and module.is_late and trainer.global_step < plan.steps,
        wait=loop.wait,
    )


@contextmanager
def _signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """From the start on, for it is long before the first step; afterwards signals do what they did before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with suppress(ValueError):  # not the main thread: its owner handles signals
        for number in SIGNALS:
            signal.signal(number, handler)
    try:
        yield
    finally:
        with suppress(ValueError):  # not the main thread: nothing was changed
            for number, old in before.items():
                signal.signal(number, old)


@contextmanager
def _other_processes(job: Job) -> Iterator[Sequence[BaseProcess]]:
    """The processes of the further devices; Lightning finds them by the variables that torch's own launcher sets."""
    devices = job.config.devices
    if devices == 1:
        yield ()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(devices)}
    before = {name: os.environ.get(name) for name in (*known, "LOCAL_RANK")}
    os.environ |= known | {"LOCAL_RANK": "0"}
    others: list[BaseProcess] = []
    try:
        for rank in range(1, devices):
            others.append(_start_process(job, rank))
        yield others
    finally:  # they write nothing, so nobody waits for their goodbyes, which may take half a minute
        for other in others:
            other.kill()
            other.join()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


def _start_process(job: Job, rank: int) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_further, args=(job, rank))
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType(
        "__main__"
    )  # else a user's script would run in each process, from its first line
    with suppress(ValueError):  # not the main thread
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the others heed it once they train
    try:
        process.start()
    finally:
        sys.modules["__main__"] = script
        with suppress(ValueError, NameError):
            signal.signal(signal.SIGINT, handler)
    return process


def _end_with_the_first() -> None:
    """A first process that is killed must not leave this one behind, which might wait for it for half an hour."""
    first = multiprocessing.parent_process()
    if first is not None:
        first.join()
        os._exit(TOLD)


def _watch_the_start(loop: TrainingLoop, others: Sequence[BaseProcess]) -> None:
    """The first process would wait half an hour, deaf to signals, for one that ended before the training began."""
    multiprocessing.connection.wait([other.sentinel for other in others])
    if not loop.is_begun:
        told = _how_one_ended(others, "before the training began")
        sys.stderr.write(f"pixelwise: {told}. Nothing was trained; once that is mended, start again with --resume.\n")
        sys.stderr.flush()
        os._exit(2)


def _further(job: Job, rank: int) -> None:
    """What the process of a further device does."""
    os.environ["LOCAL_RANK"] = str(rank)
    threading.Thread(target=_end_with_the_first, daemon=True, name="pixelwise-first").start()
    pl.seed_everything(job.config.seed, verbose=False)
    try:
        start = start_network(job.config, job.inspection, is_resumed=bool(job.first_step))
        _fit(job, Material.of(job, start.model), lambda _event: None)
    except (PixelwiseError, MemoryError, RuntimeError, OSError) as error:
        if not any(word in str(error.__cause__) for word in LOST):
            told = error if isinstance(error, PixelwiseError) else refused(error) or error
            sys.stderr.write(f"pixelwise: device {rank}: {told}\n")
        os._exit(TOLD)  # the other processes are gone, so saying goodbye to them would take for ever


@contextmanager
def _as_readable_errors(job: Job, loop: TrainingLoop, others: Sequence[BaseProcess]) -> Iterator[None]:
    """What the machine, the disk or the data do in the middle of a training, as one paragraph that says what is kept."""
    try:
        yield
    except SystemExit as error:  # what Lightning makes of a second Ctrl-C
        raise KeyboardInterrupt from error
    except (PixelwiseError, SafetensorError, OSError, RuntimeError, MemoryError, EOFError) as error:
        # Where Lightning ends what it had not begun, that hides why.
        first = error.__context__ if "combined_loader" in str(error) and error.__context__ else error
        if isinstance(first, KeyboardInterrupt | SystemExit):
            raise KeyboardInterrupt from error
        what = _what_happened(first, job, loop, others)
        if what is None:
            raise
        kept = "No checkpoint was written yet." * ("renamed" not in what)
        if job.checkpoint.exists():
            kept = f"The checkpoint {job.checkpoint} is kept." + " Then go on with --resume." * ("--resume" not in what)
        raise (DataError if isinstance(first, DataError) else PixelwiseError)(f"{what} {kept}".strip()) from error


def _what_happened(error: BaseException, job: Job, loop: TrainingLoop, others: Sequence[BaseProcess]) -> str | None:
    """What went wrong and what to do, in words; None if that is not known, or is said already."""
    is_of_worker = "Original Traceback" in str(error)  # whose last line is the error itself
    plan, first = job.plan, (str(error).strip().splitlines() or [""])[-1 if is_of_worker else 0][:200]
    if isinstance(error, PixelwiseError) and not isinstance(error, DataError):
        return None
    if not (job.folder / CONFIG_NAME).exists():
        return (
            f"{job.folder}: the run folder was removed or renamed while it was trained into. If it was renamed, go on with "
            "--resume and its new name."
        )
    if isinstance(error, DataError):
        # A worker process adds where it was; the error itself comes last.
        told = str(error).rpartition(f"{type(error).__module__}.{type(error).__name__}: ")[2].strip()
        if is_out_of_memory(error):
            return told
        return f"{told} Training needs its images and masks as they were at its start: put them back."
    if "start new thread" in str(error):  # which may be for want of memory
        return refused(error)
    free = free_words(torch.device(plan.device))
    if is_out_of_memory(error) and loop.is_validating:
        return (
            f"memory ran out while the val images were scored{free}. Training itself fits; score fewer images with "
            "--set max_val_images=…, or give more memory and go on with --resume."
        )
    if is_out_of_memory(error):
        return (
            f"memory ran out with batch_size={plan.batch_size} and crop_px={plan.crop_px}{free}. Give it more and go on "
            f"with --resume, or train anew with --set batch_size={max(1, plan.batch_size // 2)}, a smaller crop_px, or a "
            "smaller network."
        )
    is_short = any(words in str(error) for words in ("DataLoader worker", "shared memory", "</torch_"))
    if is_short and "Too many open files" not in str(error):
        return (
            f"a process that prepares crops has ended ({first}). If memory was short{free} or shared memory "
            f"({shared_memory_room() or 'unknown'}), go on with --resume where there is more, or with --resume --set "
            "workers=0."
        )
    if job.config.devices > 1 and any(word in str(error) for word in LOST):
        return f"{_how_one_ended(others, str(error))}. Go on with --resume."
    return refused(type(error)(first) if is_of_worker else error)


def _how_one_ended(others: Sequence[BaseProcess], error: str) -> str:
    """Why the training on several devices cannot go on, in words."""
    for rank, other in enumerate(others, start=1):
        other.join(FAREWELL_S / len(others))
        code = other.exitcode
        if code == TOLD:
            return f"the process of device {rank} has ended, for the reason above"
        if code:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            short = f"; the system does that where memory is short ({memory_room()})" * (code == -signal.SIGKILL)
            return f"the process of device {rank} {how}{short}"
    return f"the process of another device has ended ({error.splitlines()[0][:200]})"
