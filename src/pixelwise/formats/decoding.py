"""Images that are opened and decoded in a child process, so that no file can harm the program that asks for it.

The child (`worker`) is started once and reused. Whatever happens in it, a memory error, a hang or a crash of a C library,
becomes one `DataError` that names the file; the requests of other files that were in flight are repeated.

    PIXELWISE_DECODER_MEMORY   bytes that the child may take beyond what its imports take; default 2 GiB
    PIXELWISE_DECODER_SECONDS  deadline of a request; default 300
"""

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from io import FileIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.files import make_temporary_folder
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.local import changed
from pixelwise.formats.worker import ERRORS, OUT_OF_MEMORY, SharedMemory, packed, receive, send, unpacked

MEMORY_BYTES = 2 << 30
DEADLINE_S = 300.0
_TRIES = 2  # of a child that works on one request at a time, before a file is blamed for its end
_REMOTE_PATIENCE = 12  # requests to servers have time limits of their own
_END_S = 5  # that the system may take to tell why a child ended
_START_S = 60  # that a child on a busy machine may take before its first deadline begins


class _Died(Exception):
    """The child ended during a request, or ran out of memory."""


def _setting(name: str, default: float) -> float:
    text = os.environ.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UsageError(f"the environment variable {name} must be a number above 0, not {text!r}.")
    return value


class _Child:
    """A running child process, its requests and their answers."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.deadline_s = _setting("PIXELWISE_DECODER_SECONDS", DEADLINE_S)
        memory = int(_setting("PIXELWISE_DECODER_MEMORY", MEMORY_BYTES))
        self.memory = SharedMemory() if os.name == "posix" else None
        self._folder = str(make_temporary_folder())  # of its temporary files, which it may leave behind
        given = (str(self.memory.fd if self.memory else -1), str(memory), self._folder)
        self._process = subprocess.Popen(
            # -P: nothing is imported from the folder that the user happens to be in
            [sys.executable, "-P", "-m", "pixelwise.formats.worker", *given],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(self.memory.fd,) if self.memory else (),
            env=self._environment(),
        )
        self._to, self._from = cast(FileIO, self._process.stdin), cast(FileIO, self._process.stdout)
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._number = 0
        self._forgotten: deque[int] = deque()  # sources that the child shall close
        self._lock = threading.Lock()
        self.is_alive, self._reason = True, "its decoder ended"
        self._is_ready = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True, name="pixelwise-decoder")
        self._listener.start()

    def _environment(self) -> dict[str, str]:
        """Packages are found in the order in which this process does, and libraries start no threads of their own."""
        paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).resolve().parents[2])]
        one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        own = {"PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "2", "TMPDIR": self._folder}
        return {**os.environ, **one, **own}

    def request(self, message: Mapping[str, Any], *, patience: float = 1) -> dict[str, Any]:
        """The answer of the child; `patience` times the deadline is waited for it.

        Raises:
            _Died: the child ended, or memory ran out.
            TimeoutError: there is no answer within the deadline; the child is ended.
            PixelwiseError: what the child says is wrong.
        """
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            self._number += 1
            number = self._number
            try:
                self._send_forgotten()
                is_sent = self.is_alive
                if is_sent:
                    send(self._to, {**message, "number": number})
                    self._waiting[number] = future
            except OSError:
                is_sent = False
        if not is_sent:
            self._listener.join(_END_S)  # which learns why it ended
            raise _Died(self._reason)
        self._is_ready.wait(_START_S)
        try:
            answer = future.result(self.deadline_s * patience)
        except TimeoutError:
            self.end()
            raise
        if (kind := answer.get("error")) is None:
            return answer
        if kind == OUT_OF_MEMORY:
            raise _Died(OUT_OF_MEMORY)
        told = ERRORS.get(kind, DataError)(answer["message"])
        if answer.get("trace"):
            told.add_note(answer["trace"])
        raise told

    def forget(self, handle: int) -> None:
        """Close a source; nobody waits for it. The garbage collector may call this while this thread holds the lock."""
        self._forgotten.append(handle)
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError, ValueError):
                    self._send_forgotten()
            finally:
                self._lock.release()

    def _send_forgotten(self) -> None:
        while self.is_alive and self._forgotten:
            send(self._to, {"do": "close", "handle": self._forgotten.popleft(), "number": 0})

    def end(self, wait_s: float = 0) -> None:
        """End the process; requests that wait for it fail. At most `wait_s` seconds are waited for that."""
        with contextlib.suppress(OSError):
            self._process.kill()
        if wait_s:
            self._listener.join(wait_s)

    def abandon(self) -> None:
        """In a process that was forked: let go of the pipes, so that the child ends with the process that started it."""
        self.is_alive = False
        self._process.returncode = 0  # it is no child of this process
        self._close()

    def _close(self) -> None:
        for file in (self._to, self._from):
            with contextlib.suppress(OSError):
                file.close()

    def _listen(self) -> None:
        try:
            while (answer := receive(self._from)) is not None:
                self._is_ready.set()
                with self._lock:
                    future = self._waiting.pop(answer.get("number", 0), None)
                if future is not None:
                    future.set_result(answer)
        except (OSError, ValueError):
            pass
        with self._lock:
            self.is_alive = False
            waiting, self._waiting = self._waiting, {}
        self._is_ready.set()
        self.end()
        code = self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._reason = _reason(code)
        for future in waiting.values():
            future.set_exception(_Died(self._reason))
        self._close()


def _reason(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"its decoder was ended by {signal.Signals(-code).name}"
    return f"its decoder ended with exit code {code}"


_lock = threading.Lock()
_alone = threading.Lock()
_shared: _Child | None = None  # works on whatever is asked for
_second: _Child | None = None  # started when the first one died; works on one request at a time


def start() -> _Child:
    """The child that all sources share; it is started if there is none, without waiting for it."""
    global _shared
    with _lock:
        if _shared is None or not _shared.is_alive:
            _shared = _Child()
        return _shared


def stop() -> None:
    """End the children; the next request starts another."""
    global _shared, _second
    with _lock:
        for child in (_shared, _second):
            if child is not None:
                child.end(wait_s=5)
        _shared = _second = None


def _after_fork() -> None:
    global _shared, _second, _lock, _alone
    for child in (_shared, _second):
        if child is not None:
            child.abandon()
    _shared, _second, _lock, _alone = None, None, threading.Lock(), threading.Lock()


atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class WorkerSource(Source):
    """An image that is open in the child process.

    Args:
        location: path or URL.
        format: a name of `FORMATS` that is forced, or None.
        options: of the format.
        is_remote: it is a URL. It may take longer to open, for it may be copied, and if the environment has changed, which
            has the credentials of servers, another child is started first.

    Raises:
        DataError: the file is missing, damaged, or decoding it needs too much memory or time.
        UsageError: an option that the format does not have.
    """

    def __init__(
        self, location: str, format: str | None, options: Mapping[str, Any], *, is_remote: bool = False
    ) -> None:
        self._asked = {"do": "open", "location": location, "format": format, "options": packed(options)}
        self._name = location
        self._handles: dict[_Child, tuple[int, Callable[[], None]]] = {}
        self._reopen = threading.Lock()
        self._fingerprint = ""
        self._patience = _REMOTE_PATIENCE if is_remote else 1
        if is_remote and _shared is not None and _shared.environment != dict(os.environ):
            stop()
        answer = self._call(lambda child: self._opened(child)[1])
        self.info = SourceInfo(**unpacked(answer["info"]))
        self.metadata = unpacked(answer["metadata"])
        self._name = self.info.location
        self._has_valid = bool(answer["has_valid"])

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window; it lies in shared memory."""
        shape, dtype = (height, width, self.info.channels), np.dtype(self.info.dtype)
        return self._window("read", shape, dtype, (top, left, height, width, plane))

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where the window holds data."""
        if not self._has_valid:
            return None
        return self._window("valid", (height, width), np.dtype(bool), (top, left, height, width, plane))

    def fingerprint(self) -> str:
        """That of the file, computed once."""
        if not self._fingerprint:
            self._fingerprint = str(self._ask({"do": "fingerprint"})["value"])
        return self._fingerprint

    def check_unchanged(self) -> None:
        """Raise `DataError` if the file has changed."""
        self._ask({"do": "check"})

    def close(self) -> None:
        """Close it in the child."""
        for _, forget in self._handles.values():
            forget()
        self._handles = {}

    def _window(self, do: str, shape: tuple[int, ...], dtype: np.dtype[Any], window: tuple[int, ...]) -> NDArray[Any]:
        def ask(child: _Child) -> NDArray[Any]:
            handle = self._opened(child)[0]
            request = {"do": do, "handle": handle, "window": window}
            place = None if child.memory is None else child.memory.take(shape, dtype)
            if child.memory is None or place is None:
                return np.asarray(unpacked(child.request(request)["pixels"]), dtype).reshape(shape)
            offset, array = place
            child.request({**request, "offset": offset, "shape": shape, "dtype": dtype.str})
            return child.memory.leave(array)

        return self._call(ask)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._call(lambda child: child.request({**message, "handle": self._opened(child)[0]}))

    def _opened(self, child: _Child) -> tuple[int, dict[str, Any]]:
        """The number of this source in a child, where it is opened if it is not yet."""
        with self._reopen:
            if child in self._handles:
                return self._handles[child][0], {}
            answer = child.request(self._asked, patience=self._patience)
            if hasattr(self, "info"):
                self._compare(child, answer)
            handle = int(answer["handle"])
            self._handles = {known: value for known, value in self._handles.items() if known.is_alive}
            self._handles[child] = (handle, weakref.finalize(self, child.forget, handle))
            return handle, answer

    def _compare(self, child: _Child, answer: dict[str, Any]) -> None:
        """After the child was replaced the file must still be the same."""
        same = SourceInfo(**unpacked(answer["info"])) == self.info
        if same and self._fingerprint:
            same = child.request({"do": "fingerprint", "handle": answer["handle"]})["value"] == self._fingerprint
        if not same:
            raise changed(self._name, "file")

    def _call(self, ask: Callable[[_Child], Any]) -> Any:
        """Ask the shared child; if it dies, ask one that works on nothing else, so that the guilty file is known."""
        try:
            try:
                return ask(start())
            except _Died:
                with _alone:
                    return self._call_alone(ask)
        except TimeoutError as error:
            raise DataError(
                f"{self._name}: decoding takes too long. If the file is sound, allow more seconds by the environment "
                f"variable PIXELWISE_DECODER_SECONDS (now {_setting('PIXELWISE_DECODER_SECONDS', DEADLINE_S):g})."
            ) from error

    def _call_alone(self, ask: Callable[[_Child], Any]) -> Any:
        global _second
        reason = ""
        for _ in range(_TRIES):
            if _second is None or not _second.is_alive:
                _second = _Child()
            try:
                return ask(_second)
            except _Died as error:
                reason = str(error)
                if reason == OUT_OF_MEMORY:
                    break
        memory = int(_setting("PIXELWISE_DECODER_MEMORY", MEMORY_BYTES))
        what = f"takes more than {memory:,} bytes of memory" if reason == OUT_OF_MEMORY else f"fails: {reason}"
        raise DataError(
            f"{self._name}: the file is damaged or too large: decoding it {what}. If it is sound, allow more memory by the "
            "environment variable PIXELWISE_DECODER_MEMORY (bytes)."
        )
