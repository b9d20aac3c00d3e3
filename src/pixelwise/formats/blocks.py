"""Parts of files for several threads at once: bytes at an offset, boxes of stored arrays, and the blocks read last."""

import io
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

Opener = Callable[[], BinaryIO]
"""Opens the same file anew, for reading, seekable."""

_GAP_BYTES = 64 * 2**10  # to read so much in vain is cheaper than to ask twice


def local_opener(path: str | Path) -> Opener:
    """Opens a file on a local disk, without a buffer of its own."""
    return lambda: cast(BinaryIO, Path(path).open("rb", buffering=0))


class Bytes:
    """A file of which any number of threads read parts; each has a handle of its own while it reads.

    Nothing is mapped into memory, so what was read once does not count as memory of the process.

    Args:
        opener: opens the file; called again when all handles are in use.

    Attributes:
        size: of the file, in bytes.

    Example:
        >>> import io
        >>> Bytes(lambda: io.BytesIO(b"0123456789")).read(2, 3)
        b'234'
    """

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._idle: list[BinaryIO] = []
        self._lock = threading.Lock()
        self._closed = False
        handle = opener()
        self.size = handle.seek(0, 2)
        self._idle.append(handle)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`.

        Raises:
            EOFError: they lie behind the end of the file.
            OSError: the file cannot be read.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise EOFError(f"{size:,} bytes from {offset:,} on should be there, but the file has {self.size:,}")
        with self._lock:
            if self._closed:
                raise OSError("the file was closed")
            handle = self._idle.pop() if self._idle else None
        handle = handle or self._opener()
        try:
            handle.seek(offset)
            return _read_all(handle, size)
        finally:
            with self._lock:
                if self._closed:
                    handle.close()
                else:
                    self._idle.append(handle)

    def close(self) -> None:
        """Close all handles; reading goes on in no thread afterwards."""
        with self._lock:
            self._closed = True
            for handle in self._idle:
                handle.close()
            self._idle.clear()


def _read_all(handle: BinaryIO, size: int) -> bytes:
    content = handle.read(size)
    if len(content) == size:
        return content
    parts, missing = [content], size - len(content)
    while missing and (content := handle.read(missing)):
        parts.append(content)
        missing -= len(content)
    if missing:
        raise EOFError(f"the file ended {missing:,} bytes early")
    return b"".join(parts)


class FileView(io.RawIOBase):
    """`Bytes` as a file with a position, for libraries that want one."""

    def __init__(self, file: Bytes) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._file.size)[whence]
        if self._position < 0:
            raise OSError("a place before the start of the file")
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._file.size - self._position), 0)
        if count:
            view[:count] = self._file.read(self._position, count)
            self._position += count
        return count


class StoredArray:
    """An array in C order that lies uncompressed in a file; boxes of it are read.

    Args:
        file: the file.
        offset: of its first number, in bytes.
        shape: lengths of its axes.
        dtype: of its numbers, with their byte order.

    Example:
        >>> import io
        >>> content = np.arange(12, dtype=np.uint8).tobytes()
        >>> array = StoredArray(Bytes(lambda: io.BytesIO(content)), 0, (3, 4), np.dtype("uint8"))
        >>> array.read([(1, 3), (2, 4)]).tolist()
        [[6, 7], [10, 11]]
    """

    def __init__(self, file: Bytes, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self._file, self._offset = file, offset
        self._strides = tuple(math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape)))

    @property
    def end(self) -> int:
        """The offset behind its last number, in bytes."""
        return self._offset + math.prod(self.shape) * self.dtype.itemsize

    def read(self, box: list[tuple[int, int]]) -> NDArray[Any]:
        """The numbers from start to stop along each axis, in the byte order of the machine.

        Raises:
            EOFError: the file is too short.
            OSError: the file cannot be read.
        """
        lengths = tuple(stop - start for start, stop in box)
        first = self._offset + sum(start * step for (start, _), step in zip(box, self._strides, strict=True))
        result = np.empty(lengths, dtype=self.dtype.newbyteorder("="))
        if result.size:
            self._fill(result, first, 0)
        return result

    def _fill(self, result: NDArray[Any], first: int, axis: int) -> None:
        """Read in one piece what lies close together, and otherwise one index of the next axis after the other."""
        span = sum((n - 1) * step for n, step in zip(result.shape, self._strides[axis:], strict=True))
        span += self.dtype.itemsize
        if span <= max(2 * result.nbytes, _GAP_BYTES) and (span == result.nbytes or span <= 2**26):
            content = self._file.read(first, span)
            result[...] = np.ndarray(result.shape, self.dtype, content, strides=self._strides[axis:])
            return
        for index in range(result.shape[0]):
            self._fill(result[index], first + index * self._strides[axis], axis + 1)
