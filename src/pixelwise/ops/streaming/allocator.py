"""Memory of a process that streams: where rows wait, and how freed memory returns to the system.

Rows of a skip wait for many stripes. Were they to lie among the maps that come and go, what is freed between them would
be of no size that is asked for next, and the process would take two or three times what the maps do: `Allocator` keeps them
apart. Freed memory of one size is of no use for the next map, which is a little larger, so malloc asks the system for more.
It is fastest to let it, within a limit; beyond that `malloc_trim` returns all that is free (`MemoryLimit`).
"""

import ctypes
import math
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STATM = Path("/proc/self/statm")
_MARGIN = 0.05  # of the limit: how much is freed in vain before the next attempt
_ARENA_BYTES = 1 << 26  # more than malloc ever takes from its heap; what is not used of it takes no memory
_STEPS = 8  # sizes between one power of two and the next
_LEAST_BYTES = 1 << 9


class Allocator:
    """Gives and takes back tensors in system memory; what was given back is used again for the same size, rounded."""

    def __init__(self) -> None:
        self._arenas: dict[int, Tensor] = {}  # by the address of their storage
        self._room: tuple[Tensor, int] | None = None  # the last arena, and how much of it is given
        self._free: dict[int, list[Tensor]] = {}  # by size

    def copy(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A copy whose axes lie in memory in the same order, without gaps; and the place that it has."""
        place = self._place(rounded(rows.nbytes))
        order = order_of_axes(rows)
        copy = place[: rows.nbytes].view(rows.dtype).view([rows.shape[axis] for axis in order])
        copy = copy.permute([order.index(axis) for axis in range(rows.ndim)])
        return copy.copy_(rows), place

    def give_back(self, place: Tensor) -> None:
        """Take back the place of a copy, which must not be used any more."""
        self._free.setdefault(place.numel(), []).append(place)

    def holds(self, rows: Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        return rows.untyped_storage().data_ptr() in self._arenas

    def _place(self, size: int) -> Tensor:
        free = self._free.get(size)
        if free:
            return free.pop()
        arena, used = self._room or (None, 0)
        if arena is None or used + size > arena.numel():
            arena, used = torch.empty(max(size, _ARENA_BYTES), dtype=torch.uint8), 0
            self._arenas[arena.untyped_storage().data_ptr()] = arena
        self._room = (arena, used + size)
        return arena[used : used + size]


def order_of_axes(rows: Tensor) -> tuple[int, ...]:
    """The axes as they lie in memory, the one with the largest stride first."""
    return tuple(sorted(range(rows.ndim), key=rows.stride, reverse=True))


def rounded(size: int) -> int:
    """The next of the sizes that are kept apart: an eighth of a power of two, 512 bytes at least."""
    step = max(_LEAST_BYTES, 1 << max(0, math.ceil(math.log2(max(size, 1))) - 1) >> int(math.log2(_STEPS)))
    return -(-size // step) * step


def return_freed_memory() -> None:
    """Give back to the system what was freed but is kept by the C library for reuse; nothing happens where it cannot."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


class MemoryLimit:
    """Holds the growth of the process, from now on, to a number of bytes, as far as freed memory allows; on Linux only."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = resident_bytes() + limit_bytes if _malloc_trim() else 0
        self._margin = int(_MARGIN * limit_bytes)
        self._alarm = self._limit

    def hold(self) -> None:
        """Return what is free to the system if the process has grown beyond the limit."""
        if not self._limit or resident_bytes() <= self._alarm:
            return
        return_freed_memory()
        # What is in use cannot be returned, and trying takes time.
        self._alarm = max(self._limit, resident_bytes() + self._margin)


def resident_bytes() -> int:
    """Bytes of this process that lie in memory now; Linux only."""
    return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@cache
def _malloc_trim() -> Any:
    """The function of glibc; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
