"""A file for the rows that wait for long: deep networks on wide images keep more of them than the memory holds."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixelwise.errors import PixelwiseError
from pixelwise.ops.streaming.allocator import order_of_axes, rounded


@dataclass(frozen=True)
class Spilled:
    """Where rows lie in the file, and what they are: `order` is that of their axes, largest stride first."""

    offset: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SpillFile:
    """Puts tensors of the CPU into a nameless file in `folder` and gives them back; `size` is its length in bytes.

    The file goes when it is closed or the process ends. What the disk refuses is a PixelwiseError.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as the spill file
        except OSError as error:
            raise PixelwiseError(f"{folder}: rows that wait cannot be stored there ({error.strerror}).") from error
        self.size = 0
        self._free: dict[int, list[int]] = {}  # offsets, by size

    def __enter__(self) -> "SpillFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, rows: Tensor) -> Spilled:
        """Store a copy."""
        order = order_of_axes(rows)
        item = Spilled(self._place(rounded(rows.nbytes)), tuple(rows.shape), order, rows.dtype)
        self._write(item.offset, rows.permute(order))
        return item

    def take(self, item: Spilled) -> Tensor:
        """What was put, in memory of its own; its place is given to others."""
        rows = self._read(item)
        self.give_back(item)
        return rows

    def give_back(self, item: Spilled) -> None:
        """Forget it."""
        self._free.setdefault(rounded(item.count), []).append(item.offset)

    def _place(self, size: int) -> int:
        if free := self._free.get(size):
            return free.pop()
        self.size += size
        return self.size - size

    def _write(self, offset: int, rows: Tensor) -> None:
        rest = rows.contiguous().flatten().view(torch.uint8).numpy().data
        try:
            self._file.seek(offset)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise PixelwiseError(
                f"{self._folder}: no room for rows of maps that wait on this disk ({error.strerror}). Free some space, or "
                "allow more memory."
            ) from error

    def _read(self, item: Spilled) -> Tensor:
        data = torch.empty(item.count, dtype=torch.uint8)
        rest, got = data.numpy().data, 1
        try:
            self._file.seek(item.offset)
            while rest and got:
                got = self._file.readinto(rest)
                rest = rest[got:]
        except OSError as error:
            raise PixelwiseError(
                f"{self._folder}: rows that wait on this disk cannot be read ({error.strerror})."
            ) from error
        if rest:
            raise PixelwiseError(f"{self._folder}: the file of rows that wait on this disk has become shorter.")
        rows = data.view(item.dtype).view([item.shape[axis] for axis in item.order])
        return rows.permute([item.order.index(axis) for axis in range(len(item.order))])


class EmptySpillFile(SpillFile):
    """Counts what would be stored, of tensors without content."""

    def __init__(self) -> None:
        self.size = 0
        self._free = {}

    def _write(self, offset: int, rows: Tensor) -> None:
        pass

    def _read(self, item: Spilled) -> Tensor:
        return torch.empty(item.shape, dtype=item.dtype, device="meta")
