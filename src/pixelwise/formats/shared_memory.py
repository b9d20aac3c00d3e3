"""Memory that this process and its decoding child share: pixels cross without passing through a pipe."""

import mmap
import os
import tempfile
import threading
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_MAPS = 256  # each takes a file handle
_KEPT_BYTES = 64 << 20  # free memory that is kept for the next windows


class SharedMemory:
    """A file in memory that both processes can reach: the child writes pixels into it, this process maps them."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("pixelwise")
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.fd)
        self._end = 0
        self._free: dict[int, list[tuple[int, mmap.mmap]]] = defaultdict(list)
        self._kept = self._taken = 0
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, NDArray[Any]] | None:
        """Where the child shall write, and the array that will have its pixels; None where it cannot grow (ulimit -f)."""
        size = max(1 << 16, 1 << (int(np.prod(shape)) * dtype.itemsize - 1).bit_length())
        with self._lock:
            if self._free[size]:
                offset, view = self._free[size].pop()
                self._kept -= size if size <= _KEPT_BYTES else 0
            else:
                try:
                    os.truncate(self.fd, self._end + size)
                except OSError:
                    return None
                offset, self._end = self._end, self._end + size
                view = mmap.mmap(self.fd, size, offset=offset)
            self._taken += 1
        array: NDArray[Any] = np.ndarray(shape, dtype, buffer=view)
        weakref.finalize(array, self._give_back, size, offset, view)
        return offset, array

    def leave(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array itself, or a copy if so many are in use that the file handles of their maps become scarce."""
        return array if self._taken <= _MOST_MAPS else array.copy()

    def _give_back(self, size: int, offset: int, view: mmap.mmap) -> None:
        with self._lock:
            self._taken -= 1
            if (size > _KEPT_BYTES or self._kept + size > _KEPT_BYTES) and hasattr(mmap, "MADV_REMOVE"):
                view.madvise(mmap.MADV_REMOVE)
            if size <= _KEPT_BYTES:
                self._kept += size
            self._free[size].append((offset, view))
