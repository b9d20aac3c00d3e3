"""Parts of files behind URLs, and files made of such parts: only what is read is fetched, and kept for a while."""

import io
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

from pixelwise.errors import DataError
from pixelwise.formats.protocols import REQUEST_S, filesystem, is_passing, protocol_of, remote_errors, shown

BLOCK_BYTES = 2**19
CACHED_BLOCKS = 64
"""Of each file so many blocks stay in memory: 32 MiB, which holds the tiles along a row of a large scene."""

_TRIES = 3
_WHOLE_ONLY = "the server cannot send parts of it. Download it first."


def read_range(location: str, start: int, stop: int) -> bytes:
    """The bytes start..stop of an object; fewer where it ends before.

    Raises:
        DataError: there is no such object, no permission, no network, or the server sends whole objects only.

    Example:
        >>> system, name = filesystem("memory://ranges/a.bin")
        >>> system.pipe(name, b"0123456789")
        >>> read_range("memory://ranges/a.bin", 2, 5)
        b'234'
    """
    if stop <= start:
        return b""
    system, name = filesystem(location)
    with remote_errors(shown(location)):
        if protocol_of(location) in ("http", "https"):
            return patiently(lambda: _web_range(system, name, start, stop, shown(location)))
        data = patiently(lambda: system.cat_file(name, start=start, end=stop, **bounded(system)))
    if len(data) > stop - start:
        raise DataError(f"{shown(location)}: the server sent more than was asked for. Download the file first.")
    return bytes(data)


def read_tail(location: str, count: int) -> bytes:
    """The last `count` bytes of an object, without asking for its size before.

    Raises:
        DataError: as `read_range`.

    Example:
        >>> system, name = filesystem("memory://ranges/b.bin")
        >>> system.pipe(name, b"0123456789")
        >>> read_tail("memory://ranges/b.bin", 2)
        b'89'
    """
    system, name = filesystem(location)
    with remote_errors(shown(location)):
        data = patiently(lambda: system.cat_file(name, start=-count, **bounded(system)))
    return bytes(data[-count:])


class Blocks:
    """The blocks of one object that were read last, for all threads."""

    def __init__(self, location: str, size: int) -> None:
        self.location, self.size = location, size
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes start..stop, which lie inside the object."""
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        with self._lock:
            have = {index: self._kept[index] for index in range(first, last + 1) if index in self._kept}
            for index in have:
                self._kept.move_to_end(index)
        for low, high in _gaps(have, first, last):
            data = self._fetch(low * BLOCK_BYTES, min(high * BLOCK_BYTES, self.size))
            parts = {index: data[(index - low) * BLOCK_BYTES :][:BLOCK_BYTES] for index in range(low, high)}
            have |= parts
            with self._lock:
                for index in list(parts)[-CACHED_BLOCKS:]:
                    self._kept[index] = parts[index]
                while len(self._kept) > CACHED_BLOCKS:
                    self._kept.popitem(last=False)
        joined = b"".join(have[index] for index in range(first, last + 1))
        return joined[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def _fetch(self, start: int, stop: int) -> bytes:
        data = read_range(self.location, start, stop)
        if len(data) != stop - start:
            ends = start + len(data)
            raise DataError(f"{shown(self.location)}: the object changed while it was read: it ends at byte {ends:,}.")
        return data


def _gaps(have: Collection[int], first: int, last: int) -> list[tuple[int, int]]:
    """The runs (from, to) of numbers first..last that are missing."""
    runs: list[tuple[int, int]] = []
    for index in range(first, last + 1):
        if index in have:
            continue
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


class RangeFile(io.RawIOBase):
    """A file of which only the parts that are read are fetched."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self._blocks, self._at = blocks, 0
        self.name, self.mode = shown(blocks.location), "rb"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._blocks.size}[whence]
        if base + offset < 0:
            raise ValueError("the position lies before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        if self.closed:
            raise ValueError("the file is closed")
        left = max(self._blocks.size - self._at, 0)
        count = left if size is None or size < 0 else min(size, left)
        data = self._blocks.read(self._at, self._at + count) if count else b""
        self._at += count
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


def _web_range(system: Any, name: str, start: int, stop: int, label: str) -> bytes:
    """A part of a file on a web server; one that sends whole files in answer is stopped after what was asked for."""
    with system.open(name, "rb", block_size=1, cache_type="none", size=stop) as file:
        try:
            file.seek(start)
            return bytes(file.read(stop - start))
        except ValueError:
            raise DataError(f"{label}: {_WHOLE_ONLY}") from None


def bounded(system: Any) -> dict[str, float]:
    """The argument that ends a request of an asynchronous file system after a while."""
    return {"timeout": REQUEST_S} if getattr(system, "async_impl", False) else {}


def patiently(work: Callable[[], Any]) -> Any:
    """Do it again, a little later, where a line broke or a server is busy."""
    for attempt in range(_TRIES - 1):
        try:
            return work()
        except (OSError, ValueError, RuntimeError) as error:
            if not is_passing(error):
                raise
        time.sleep(0.3 * 4**attempt)
    return work()
