"""Printing that never ends the work: a reader that went away, a closed or full output, letters it cannot encode."""

import codecs
import errno
import io
import os
import select
import sys
from typing import TextIO, cast

_SPELT = {"■": "#", "±": "+-", "…": "...", "─": "-"}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Letters that an encoding lacks, such as those of names in an ASCII log, or bytes of a name that are no text."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_SPELT.get(one) or one.encode("ascii", "backslashreplace").decode() for one in letters), error.end


codecs.register_error("pixelwise-spell", _spell)


class _Descriptor(io.FileIO):
    """A file descriptor; when nothing can be written to it any more, the rest is dropped."""

    error: OSError | None = None

    def write(self, content: "bytes | memoryview") -> int:  # type: ignore[override]
        if self.error is None:
            try:
                while (written := super().write(content)) is None:  # not blocking, and its reader is slow
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.error = error
        return len(content)


class Streams:
    """Stands in for stdout and stderr of this process; a program that prints elsewhere (a notebook) keeps its own."""

    def __init__(self) -> None:
        if (
            os.name == "posix"
        ):  # what is closed would become the number of the next file, and lines of libraries end there
            while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
                pass
            os.close(number)
        self._before: dict[str, TextIO | None] = {}
        self._descriptors: dict[str, _Descriptor] = {}
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream: TextIO | None = getattr(sys, name)
            if stream is not getattr(sys, f"__{name}__") or os.name != "posix":
                continue
            if stream is not None:
                stream.flush()
            self._before[name], self._descriptors[name] = stream, _Descriptor(number, "w", closefd=False)
            buffered = io.BufferedWriter(cast(io.RawIOBase, self._descriptors[name]))
            text = io.TextIOWrapper(
                buffered,
                encoding=getattr(stream, "encoding", None) or "utf-8",
                errors="pixelwise-spell",
                line_buffering=getattr(stream, "line_buffering", False),
            )
            setattr(sys, name, text)
        self._hook = sys.unraisablehook
        if (
            self._before
        ):  # what a destructor of a library stumbles over, after the error that is told, is no news to a user
            sys.unraisablehook = lambda _found: None

    def close(self) -> str:
        """Give the streams back; why not all of stdout was written, "" if it was, or if its reader had seen enough."""
        sys.unraisablehook = self._hook
        for name, stream in self._before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
        error = self._descriptors["stdout"].error if "stdout" in self._descriptors else None
        return "" if error is None or error.errno == errno.EPIPE else error.strerror or str(error)
