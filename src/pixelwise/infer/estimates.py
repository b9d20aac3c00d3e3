"""Bytes: what this process holds, what is free, and how they are told."""

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.formats.base import Source
from pixelwise.infer.options import JobOptions, Tiling
from pixelwise.infer.overlay import OVERLAY_PX
from pixelwise.infer.prefetch import kept_bytes
from pixelwise.infer.store import MOST_BYTES
from pixelwise.infer.tiling import Scorer
from pixelwise.machine import allowed_cores, memory_room, processors, within_room
from pixelwise.ops.streaming.memory import resident_bytes

PROCESS_BYTES = 2 << 30
"""What a process may take in all on a CPU, unless the user says otherwise."""

_SPARE = 0.05  # of that, for what is not foreseen
_LEAST_FOR_MAPS, _MOST_FOR_MAPS = 512 << 20, 1 << 30
_OVERLAY_BYTES_PER_PX = 32  # measured; the picture is mixed in float32
_STACK_BYTES = 8 << 20  # of a thread
_CLEAN_UP_BYTES = 200 << 20  # measured on noise


def memory_now() -> int:
    """Bytes that this process holds at present; on systems that do not tell, the most it has held."""
    try:
        return resident_bytes()
    except (OSError, ValueError, IndexError):
        return peak_memory_bytes(torch.device("cpu")) or 0


def peak_memory_bytes(device: torch.device) -> int | None:
    """The largest memory so far: of the GPU's allocator, else of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def within_memory(device: torch.device, share: float = 1.0, beside: int = 0) -> AbstractContextManager[None]:
    """Where the CPU computes, taking more memory than there is becomes an error; see `within_room`."""
    stacks = 2 * torch.get_num_threads() * _STACK_BYTES  # torch has threads for the passes forward and for those back
    return within_room(share, beside, stacks) if device.type == "cpu" else nullcontext()


def heed_quota() -> None:
    """Take torch's threads back to the processors that a container's quota allows; more would wait for each other.

    Only where their number is torch's own, one for each processor or core of the machine: what the user chose, by
    `torch.set_num_threads` or OMP_NUM_THREADS, stays.
    """
    own, allowed = allowed_cores(), processors()
    chosen = any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if allowed < own and not chosen and torch.get_num_threads() in (own, own // 2):
        torch.set_num_threads(allowed)


def pipeline_bytes(source: Source, *, in_one_window: bool = False) -> int:
    """What decoded pixels and finished results take at most while the network works."""
    info = source.info
    pixels = kept_bytes(info, info.height) if in_one_window else kept_bytes(info)
    return pixels + int(getattr(source, "cache_bytes", 0)) + MOST_BYTES


def finishing_bytes(source: Source, options: JobOptions) -> int:
    """What the outputs that are made of finished labels take at most, without the outlines of polygons."""
    info = source.info
    longest = max(info.height, info.width)
    picture = info.height * info.width / max(1, -(-longest // OVERLAY_PX)) ** 2
    overlay = int(_OVERLAY_BYTES_PER_PX * picture) if options.overlay else 0
    return max(overlay, MOST_BYTES) + (_CLEAN_UP_BYTES if options.min_area_px > 1 else 0)


def statement(source: Source, options: JobOptions, scorer: Scorer, device: torch.device) -> str:
    """What the user should know before the start: the way, its cost, and what the process takes at most, in words."""
    now = memory_now()
    own = now + pipeline_bytes(source, in_one_window=scorer.is_whole)
    afterwards = now + finishing_bytes(source, options)
    if device.type == "cpu":
        text = f"{gibibytes(max(own + scorer.memory_bytes, afterwards))} of memory"
    else:
        memory = gibibytes(scorer.memory_bytes)
        text = f"{memory} of the device's memory and {gibibytes(max(own, afterwards))} of the machine's"
    if scorer.disk_bytes:
        text += f" and {gibibytes(scorer.disk_bytes)} on the disk of {scorer.scratch}"
    text += ", and more for the outlines of many regions" * options.geojson
    return f"{scorer.way}, {scorer.cost:.2f}x the multiply-adds of one pass, at most {text}"


def more_than_wished(name: str, wish: Tiling, scorer: Scorer) -> str:
    """What to tell where no piece is small enough for the memory that the user allows; nothing if one is."""
    if wish.memory_bytes is None or scorer.memory_bytes <= wish.memory_bytes:
        return ""
    needed, allowed = gibibytes(scorer.memory_bytes), gibibytes(wish.memory_bytes)
    if wish.tile_px is None:
        least = f"{name}: {scorer.way} are the least that the network can do with"
        return f"{least}, and take {needed} rather than the {allowed} of --memory."
    raise UsageError(
        f"{name}: {scorer.way} of --tile {wish.tile_px} take {needed}, but --memory allows {allowed}. Give a smaller "
        "--tile, more --memory, or leave --tile out: then a size is chosen that fits."
    )


def room_for_maps(source: Source) -> int:
    """What the network's maps may take: the process stays below `PROCESS_BYTES`, and below what it may use in a container.

    512 MiB at least where that is free, 1 GiB at most.
    """
    free, beside = memory_room(), pipeline_bytes(source)
    room = int(PROCESS_BYTES * (1 - _SPARE)) - memory_now() - beside
    wished = min(max(room, _LEAST_FOR_MAPS), _MOST_FOR_MAPS)
    return wished if free is None else max(1, min(wished, int(free.bytes * (1 - _SPARE)) - beside))


def gibibytes(count: int) -> str:
    """A number of bytes for the eye."""
    if count >= 0.1 * 2**30:
        return f"{count / 2**30:.1f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:.{count < 10 * 2**20:d}f} MiB"
    return f"{count / 2**10:.0f} KiB" if count >= 2**10 else f"{count} bytes"


def free_bytes(folder: Path) -> tuple[int, Path]:
    """The room on the disk on which `folder` is or will be, and the part of its path that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free, folder


def refuse_without_room(name: str, folder: Path, missing: int, outputs: int) -> None:
    """Raise `PixelwiseError` if the disk of `folder` has no room for so many bytes while a job runs, and for its outputs."""
    free, folder = free_bytes(folder)
    if missing + outputs > free:
        needed, running, results = gibibytes(missing + outputs), gibibytes(missing), gibibytes(outputs)
        raise PixelwiseError(
            f"{name}: needs up to {needed} on the disk of {folder} ({running} while it runs, {results} for the results), "
            f"but {gibibytes(free)} are free. Free some space, or choose another --out folder."
        )
