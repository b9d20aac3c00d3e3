"""Memory for the rows that wait, apart from that of the passing maps.

Rows of a skip wait for many stripes. Were they to lie among the maps that come and go, what is freed between them would
be of no size that is asked for next, and the process would take two or three times what the maps do.
"""

import math

import torch
from torch import Tensor

_ARENA_BYTES = 1 << 26  # more than malloc ever takes from its heap; what is not used of it takes no memory
_STEPS = 8  # sizes between one power of two and the next
_LEAST_BYTES = 1 << 9


class Pool:
    """Gives and takes back tensors in system memory. Memory that was given back is given again for the same size, rounded.

    Example:
        >>> pool = Pool()
        >>> copy, place = pool.copy(torch.ones(1, 3, 4, 5))
        >>> tuple(copy.shape), pool.holds(copy), pool.holds(torch.ones(1))
        ((1, 3, 4, 5), True, False)
        >>> pool.give_back(place)
        >>> pool.copy(torch.zeros(1, 3, 4, 5))[0].data_ptr() == copy.data_ptr()
        True
    """

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
