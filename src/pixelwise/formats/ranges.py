"""Files of which parts are read, from any number of threads, and windows of the arrays that lie in them."""

import io
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.base import Opener
from pixelwise.formats.local import Identity, readable

_BAND_BYTES = 16 * 2**20
_GAP_BYTES = 2**13  # reading so much takes as long as another read


@contextmanager
def opening(location: str, opener: Opener | None, identity: Identity | None) -> "Iterator[Handles]":
    """A file by its path or by what opens it; closed again, with a `DataError` that names it, if opening fails."""
    if opener is None:
        identity = Identity.local(location)
    elif identity is None:
        raise UsageError(f"{location}: whoever opens it must also say how to tell whether it changed (identity).")
    with readable(location):
        opener = opener or cast(Opener, partial(Path(location).open, "rb", buffering=0))
        file = Handles(opener, PurePath(location).name or "file", identity)
        try:
            if not file.size:
                raise DataError("the file is empty (0 bytes).")
            yield file
        except BaseException:
            file.close()
            raise


class Handles:
    """A file that several threads read, each by a handle of its own; `buffered` is for libraries that read headers."""

    def __init__(self, opener: Opener, name: str, identity: Identity) -> None:
        self._opener, self.name, self.identity = opener, name, identity
        self._idle: list[BinaryIO] = []
        self.buffered = io.BufferedReader(cast(io.RawIOBase, opener()))
        self.size: int = self.buffered.seek(0, 2)
        self.buffered.seek(0)
        self.close = weakref.finalize(self, _close, self.buffered, self._idle)  # also for those who forget it

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """So many bytes from a place on."""
        if offset + size > self.size:
            raise DataError(f"its pixels reach up to byte {offset + size:,}, but the file has {self.size:,}.")
        content = np.empty(size, np.uint8)
        handle = self._take()
        try:
            _read_into(content.data, handle, offset)
        finally:
            self._idle.append(handle)
        return content

    def window(
        self, offset: int, dtype: np.dtype[Any], shape: Sequence[int], box: Sequence[tuple[int, int]]
    ) -> NDArray[Any]:
        """A box of an array that begins at a place; see `read_box`."""
        handle = self._take()
        try:
            return read_box(handle, offset, dtype, shape, box)
        finally:
            self._idle.append(handle)

    def _take(self) -> BinaryIO:
        """A handle that no other thread uses, until it is put back among the idle ones."""
        if self.buffered.closed:
            raise DataError("the image is closed.")
        try:
            return self._idle.pop()
        except IndexError:
            return self._opener()


def _close(buffered: BinaryIO, idle: list[BinaryIO]) -> None:
    """Close all handles that nobody uses."""
    buffered.close()
    while idle:
        idle.pop().close()


def read_box(
    file: BinaryIO, offset: int, dtype: np.dtype[Any], shape: Sequence[int], box: Sequence[tuple[int, int]]
) -> NDArray[Any]:
    """A box (start and stop along each axis) of an array that lies in a file in C order, from `offset` on.

    Short gaps are read along, because few long reads are faster than many short ones.
    """
    lengths = [stop - start for start, stop in box]
    step, wanted = math.prod(shape[1:]) * dtype.itemsize, math.prod(lengths[1:]) * dtype.itemsize
    level, outer = 0, []  # along the axes before `level` neighbours are read one by one
    while step - wanted > _GAP_BYTES:
        outer.append(range(box[level][0] * step, box[level][1] * step, step))
        level += 1
        step, wanted = step // shape[level], wanted // lengths[level]
    (start, stop), crop = box[level], (slice(None), *(slice(*ends) for ends in box[level + 1 :]))
    count = max(1, _BAND_BYTES // step)
    if lengths[level] <= count or step == wanted:
        count = lengths[level]
        if math.prod(lengths[:level]) == 1:
            first = offset + sum(steps[0] for steps in outer) + start * step
            lines = np.empty((count, *shape[level + 1 :]), dtype)
            _read_into(lines.reshape(-1).view(np.uint8).data, file, first)
            return lines[(*[None] * level, *crop)]
    found = np.empty(lengths, dtype)
    starts = (offset + sum(places) + start * step for places in itertools.product(*outer))
    if step == wanted:
        size, view = step * count, found.reshape(-1).view(np.uint8).data
        for at, first in zip(range(0, found.nbytes, size), starts, strict=True):
            _read_into(view[at : at + size], file, first)
        return found
    lines = np.empty((count, *shape[level + 1 :]), dtype)
    for target, first in zip(found.reshape(-1, *lengths[level:]), starts, strict=True):
        for row in range(0, stop - start, count):
            read = lines[: stop - start - row]
            _read_into(read.reshape(-1).view(np.uint8).data, file, first + row * step)
            target[row : row + count] = read[crop]
    return found


def _read_into(view: memoryview, file: BinaryIO, position: int) -> None:
    file.seek(position)
    while (size := file.readinto(view)) < len(view):  # type: ignore[attr-defined]
        if not size:
            raise DataError("the file ends before its numbers do; it was shortened while it was read.")
        view = view[size:]
