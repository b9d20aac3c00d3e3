"""A look into every mask of a folder: which values it holds. Remembered, since proposing and checking both need it."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from pixelwise.data.labels import Value, value_counts
from pixelwise.errors import DataError
from pixelwise.formats.raster import Palette, printable
from pixelwise.formats.readers import read_mask_file

MAX_VALUES = 4096

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class MaskScan:
    """What one mask holds: `counts` in pixels per value, `digest` of the decoded pixels, `format` of the file."""

    width: int
    height: int
    kind: Literal["index", "rgb"]
    counts: Mapping[Value, int]
    palette: Palette | None
    digest: str
    format: str


def scan_mask(path: Path) -> MaskScan:
    """Read a mask and count its values; asked again about an unchanged file, it answers from memory.

    Raises:
        DataError: as `read_mask`, or the mask holds so many values that they cannot be classes.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return _scan(path, 0, 0)  # which raises the reader's own message
    return _scan(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=50_000)
def _scan(path: Path, _mtime_ns: int, _size: int) -> MaskScan:
    raw, raster = read_mask_file(path)
    counts = value_counts(raw)
    if len(counts) > MAX_VALUES:
        raise DataError(
            f"{printable(path)}: holds {len(counts):,} different values; it looks like a photograph, not a mask of classes."
        )
    return MaskScan(
        width=raw.shape[1],
        height=raw.shape[0],
        kind="rgb" if raw.ndim == 3 else "index",
        counts=counts,
        palette=raster.palette,
        digest=pixel_digest(raw),
        format=raster.format,
    )


def pixel_digest(array: np.ndarray) -> str:
    """SHA-256 of the decoded pixels with their shape and type: equal for one image in two lossless formats."""
    digest = hashlib.sha256(f"{array.shape} {array.dtype.name}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def in_threads(
    work: Callable[[T], R], items: Sequence[T], on_progress: Callable[[int, int], None] | None = None
) -> list[R]:
    """The results of `work` in the order of `items`; decoding leaves Python's lock, so threads do help.

    `on_progress(done, total)` is called in this thread as results come in.
    """
    results = []
    with ThreadPoolExecutor(max_workers=worker_count()) as pool:
        for result in pool.map(work, items):
            results.append(result)
            if on_progress is not None:
                on_progress(len(results), len(items))
    return results


def worker_count() -> int:
    """How many cores this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)
