"""The child process that decodes files (`python -m pixelwise.formats.worker`), and what passes between it and its parent.

It opens files by `open_in_process` and answers requests, several at once, until its standard input ends. Its
memory is limited (RLIMIT_AS, where the system has it). Pixels go into memory that both share, everything else is JSON: the
parent (`decoding`) never executes anything that comes from here. It never imports torch.
"""

import base64
import contextlib
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import threading
import traceback
import weakref
from collections import defaultdict, deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats.base import Source

OUT_OF_MEMORY = "MemoryError"
ERRORS: dict[str, type[PixelwiseError]] = {kind.__name__: kind for kind in (DataError, UsageError, PixelwiseError)}
_THREADS = 16  # requests that are worked on at once
_HEAD = struct.Struct("<I")
_MOST_MAPS = 256  # each takes a file handle
_KEPT_BYTES = 64 << 20  # free memory that is kept for the next windows


def packed(value: Any) -> Any:
    """A value as JSON can hold it; `unpacked` gives it back with its types."""
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"array": content, "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, Mapping):
        return {"dict": {key: packed(item) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__ if type(value) is list else "tuple": [packed(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    return value.item() if isinstance(value, np.generic) else value


def unpacked(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        content = base64.b64decode(value["array"])
        return np.frombuffer(content, dtype=np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    if "dict" in value:
        return {key: unpacked(item) for key, item in value["dict"].items()}
    if "bytes" in value:
        return base64.b64decode(value["bytes"])
    items = [unpacked(item) for item in next(iter(value.values()))]
    return tuple(items) if "tuple" in value else items


def send(file: FileIO, message: Mapping[str, Any]) -> None:
    content = json.dumps(message).encode()
    rest = memoryview(_HEAD.pack(len(content)) + content)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def receive(file: FileIO) -> dict[str, Any] | None:
    """The next message; None at the end of the file."""
    head = _exactly(file, _HEAD.size)
    content = None if head is None else _exactly(file, _HEAD.unpack(head)[0])
    return None if content is None else json.loads(content)


def _exactly(file: FileIO, size: int) -> bytes | None:
    found = b""
    while len(found) < size:
        if not (more := file.read(size - len(found))):
            return None
        found += more
    return found


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
        self._returned: deque[tuple[int, int, mmap.mmap]] = deque()  # not free yet
        self._kept = self._taken = 0
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, NDArray[Any]] | None:
        """Where the child shall write, and the array that will have its pixels; None where it cannot grow (ulimit -f)."""
        size = max(1 << 16, 1 << (int(np.prod(shape)) * dtype.itemsize - 1).bit_length())
        with self._lock:
            self._take_back()
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
        """The garbage collector may call this while this thread holds the lock."""
        self._returned.append((size, offset, view))
        if self._lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        while self._returned:
            size, offset, view = self._returned.popleft()
            self._taken -= 1
            if (size > _KEPT_BYTES or self._kept + size > _KEPT_BYTES) and hasattr(mmap, "MADV_REMOVE"):
                view.madvise(mmap.MADV_REMOVE)
            if size <= _KEPT_BYTES:
                self._kept += size
            self._free[size].append((offset, view))


def _limit(memory_bytes: int) -> None:
    """Allow so much memory beyond what is taken now; no core dumps."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux: the limit is not enforced there either
        taken = 1 << 30
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = taken + memory_bytes + (_THREADS << 23)  # and the stacks of the threads
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))


class _Server:
    """The child's side: sources by number, and what is asked of them."""

    def __init__(self, memory_fd: int) -> None:
        self._memory_fd = memory_fd
        self._sources: dict[int, Source] = {}
        self._last = 0
        self._lock = threading.Lock()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What one request gives."""
        do = request["do"]
        if do == "open":
            return self._open(request)
        source = self._sources[request["handle"]]
        if do in ("read", "valid"):
            return self._pixels(getattr(source, do)(*request["window"]), request)
        if do == "fingerprint":
            return {"value": source.fingerprint()}
        if do == "check":
            source.check_unchanged()
        elif do == "close":
            with self._lock:
                del self._sources[request["handle"]]
            source.close()
        return {}

    def name_of(self, request: dict[str, Any]) -> str:
        """The path or URL of the source of a request."""
        source = self._sources.get(request["handle"])
        return "" if source is None else source.info.location

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        from pixelwise.formats.in_process import open_in_process

        source = open_in_process(request["location"], format=request["format"], **unpacked(request["options"]))
        with self._lock:
            self._last += 1
            handle = self._last
            self._sources[handle] = source
        has_valid = source.valid(0, 0, 1, 1) is not None
        info, metadata = packed(asdict(source.info)), packed(source.metadata)
        return {"handle": handle, "info": info, "metadata": metadata, "has_valid": has_valid}

    def _pixels(self, found: NDArray[Any], request: dict[str, Any]) -> dict[str, Any]:
        if "offset" not in request:
            return {"pixels": packed(found)}
        shape, dtype = tuple(request["shape"]), np.dtype(request["dtype"])
        if found.shape != shape or found.dtype != dtype:
            told = f"its header says {shape} of {dtype}, but its pixels are {found.shape} of {found.dtype}"
            raise DataError(f"{self.name_of(request)}: {told}. The file is damaged.")
        rest = np.ascontiguousarray(found).data.cast("B")
        offset = request["offset"]
        while rest:
            written = os.pwrite(self._memory_fd, rest, offset)
            rest, offset = rest[written:], offset + written
        return {}


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out below an error, however often it was put into other words."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def _answered(server: _Server, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return server.answer(request)
    except PixelwiseError as error:
        kind = next((name for name, known in ERRORS.items() if isinstance(error, known)), "DataError")
        if _is_out_of_memory(error):
            return {"error": OUT_OF_MEMORY, "message": ""}
        return {"error": kind, "message": str(error)}
    except MemoryError:
        return {"error": OUT_OF_MEMORY, "message": ""}
    except Exception as error:  # noqa: BLE001  (a library's, or ours: it must reach the process that asks)
        from pixelwise.formats.local import in_words

        name = request.get("location") or server.name_of(request)
        return {
            "error": "DataError",
            "message": f"{name}: the file is damaged or truncated ({in_words(error)}).",
            "trace": traceback.format_exc(),
        }


def main(memory_fd: int, memory_bytes: int, folder: str) -> None:
    """Serve requests from standard input until it ends.

    Args:
        memory_fd: of the file in shared memory; -1 if there is none.
        memory_bytes: that may be taken beyond what the imports take.
        folder: of temporary files; it is removed at the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides when to stop
    requests, answers = FileIO(os.dup(0), "r"), FileIO(os.dup(1), "w")
    silent = os.open(os.devnull, os.O_RDWR)
    os.dup2(silent, 0)
    os.dup2(silent, 1)  # whatever libraries print must not get between the answers

    server, lock = _Server(memory_fd), threading.Lock()
    _limit(memory_bytes)
    pool = ThreadPoolExecutor(_THREADS)

    def serve(request: dict[str, Any]) -> None:
        answer = _answered(server, request) | {"number": request["number"]}
        with lock:
            send(answers, answer)

    send(answers, {"number": 0})  # ready
    while (request := receive(requests)) is not None:
        pool.submit(serve, request)
    shutil.rmtree(folder, ignore_errors=True)  # the parent does it too, unless it was killed
    os._exit(0)  # also if a thread still decodes


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
