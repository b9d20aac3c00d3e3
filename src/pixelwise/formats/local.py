"""Files on a local disk: what they hold in short, whether they changed, and one error for whatever is wrong with them."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.formats.raster import DECODE_ERRORS, in_words, printable

WHOLE_BYTES = 256 * 2**20
"""Files up to this size are hashed as a whole; of larger ones samples are."""

_SAMPLES, _SAMPLE_BYTES = 64, 64 * 2**10


def changed(name: str, what: str, why: str = "") -> DataError:
    """The error to raise where something is no longer what it was when it was opened."""
    reason = f" ({why})" if why else ""
    return DataError(f"{name}: the {what} changed while it was read{reason}. Run again when nothing writes to it.")


def size_change(before: int, now: int) -> str:
    """How a size changed, "" if it did not."""
    return "" if before == now else f"{before:,} bytes before, {now:,} now"


@dataclass(frozen=True)
class Stamp:
    """What the file system says about a file; it differs when the file was changed or replaced."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> Self:
        """The stamp of a file; a `DataError` if there is none, or only a folder, a pipe or a device of this name."""
        name = printable(path)
        try:
            status = Path(path).stat()
        except FileNotFoundError as error:
            raise DataError(f"{name}: there is no such file.") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{name}: the file cannot be opened ({reason}).") from error
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise DataError(f"{name}: this is {kind}.")
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    def check(self, path: str | Path) -> None:
        """Raise `DataError` if the file is no longer the one this stamp was taken of."""
        now = type(self).of(path)
        if now != self:
            other = "its time of change differs" if now.inode == self.inode else "another file took its place"
            raise changed(printable(path), "file", size_change(self.size, now.size) or other)


@dataclass(frozen=True)
class Identity:
    """How to tell whether a file, wherever it lies, is still the same."""

    fingerprint: Callable[[], str]  # hexadecimal text that changes when the content does
    check: Callable[[], None]  # raises `DataError` if the file has changed since this was made

    @classmethod
    def local(cls, path: str | Path) -> Self:
        """Of a file on a local disk, as it is now."""
        stamp = Stamp.of(path)
        return cls(fingerprint=lambda: fingerprint(path), check=lambda: stamp.check(path))

    @classmethod
    def of_files(
        cls,
        stamps: Callable[[], Mapping[str, Any]],
        content: Callable[[Mapping[str, Any]], object],
        name: str,
        what: str,
    ) -> Self:
        """Of all files of a folder, of which `stamps` gives the present stamps, and `content` what the fingerprint is of."""
        before = stamps()

        def check() -> None:
            if stamps() != before:
                raise changed(name, what)

        return cls(lambda: hashlib.sha256(repr(content(stamps())).encode()).hexdigest(), check)


def fingerprint(path: str | Path) -> str:
    """Hexadecimal SHA-256 that changes when the content does.

    Up to 256 MiB all bytes count. Of larger files the size, the time of the last change and 64 evenly spread samples of
    64 KiB do, so that a scene of a terabyte is known in a moment.
    """
    stamp = Stamp.of(path)
    with readable(path), Path(path).open("rb") as file:
        if stamp.size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        return sampled(f"{stamp.size} {stamp.mtime_ns}", stamp.size, read)


def sampled(about: str, size: int, read: Callable[[int, int], bytes]) -> str:
    """The SHA-256 of a text and of 64 samples of 64 KiB, which `read` gives from start to stop."""
    digest = hashlib.sha256(about.encode())
    for index in range(_SAMPLES):
        start = (size - _SAMPLE_BYTES) * index // (_SAMPLES - 1)
        digest.update(read(start, start + _SAMPLE_BYTES))
    return digest.hexdigest()


@contextmanager
def readable(name: str | os.PathLike[str], where: str = "") -> Iterator[None]:
    """Turn whatever decoders raise on a bad file into one `DataError` that names it and `where` (such as "rows 0..512").

    A `DataError` raised inside gets the name in front, unless it has it already.
    """
    shown = printable(os.fspath(name))
    try:
        yield
    except DataError as error:
        if str(error).startswith(f"{shown}: "):
            raise
        raise DataError(f"{shown}: {error}") from error
    except PixelwiseError:
        raise
    except MemoryError as error:
        raise DataError(f"{shown}: there is not enough memory to decode it. Choose smaller tiles.") from error
    except DECODE_ERRORS as error:
        raise DataError(
            f"{shown}: the file is damaged or truncated ({where + ': ' if where else ''}{in_words(error)})."
        ) from error
