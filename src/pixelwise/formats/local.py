"""Files on a local disk: what they hold in short, whether they changed, and one error for whatever is wrong with them."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.formats.raster import DECODE_ERRORS, in_words, printable

WHOLE_BYTES = 256 * 2**20
"""Files up to this size are hashed as a whole; of larger ones samples are."""

_SAMPLES = 64
_SAMPLE_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Stamp:
    """What the file system says about a file; it differs when the file was changed or replaced.

    Attributes:
        size: bytes.
        mtime_ns: time of the last change, in nanoseconds.
        inode: number of the file on its disk.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.bin"
        >>> _ = path.write_bytes(b"old")
        >>> stamp = Stamp.of(path)
        >>> stamp.check(path)
        >>> _ = path.write_bytes(b"longer")
        >>> stamp.check(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: ...a.bin: the file changed while it was read (3 bytes before, 6 now). Run again...
    """

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> Self:
        """The stamp of a file.

        Raises:
            DataError: there is no such file, or it is a folder, a pipe or a device, which must not even be opened.
        """
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
        if now == self:
            return
        if now.size != self.size:
            what = f"{self.size:,} bytes before, {now.size:,} now"
        else:
            what = "its time of change differs" if now.inode == self.inode else "another file took its place"
        raise DataError(
            f"{printable(path)}: the file changed while it was read ({what}). Run again when nothing writes to it."
        )


@dataclass(frozen=True)
class Identity:
    """How to tell whether a file, wherever it lies, is still the same.

    Attributes:
        fingerprint: gives hexadecimal text that changes when the content does.
        check: raises `DataError` if the file has changed since this was made.
    """

    fingerprint: Callable[[], str]
    check: Callable[[], None]

    @classmethod
    def local(cls, path: str | Path) -> Self:
        """Of a file on a local disk, as it is now.

        Raises:
            DataError: there is no such file.
        """
        stamp = Stamp.of(path)
        return cls(fingerprint=lambda: fingerprint(path), check=lambda: stamp.check(path))


def fingerprint(path: str | Path) -> str:
    """Hexadecimal SHA-256 that changes when the content does.

    Up to 256 MiB all bytes count. Of larger files the size, the time of the last change and 64 evenly spread samples of
    64 KiB do, so that a scene of a terabyte is known in a moment.

    Raises:
        DataError: the file is missing or cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.bin"
        >>> _ = path.write_bytes(b"abc")
        >>> fingerprint(path)[:8]
        'ba7816bf'
    """
    stamp = Stamp.of(path)
    with readable(path), Path(path).open("rb") as file:
        if stamp.size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return _of_samples(file, stamp)


def _of_samples(file: BinaryIO, stamp: Stamp) -> str:
    digest = hashlib.sha256(f"{stamp.size} {stamp.mtime_ns}".encode())
    for index in range(_SAMPLES):
        file.seek((stamp.size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@contextmanager
def readable(name: str | os.PathLike[str], where: str = "") -> Iterator[None]:
    """Turn whatever decoders raise on a bad file into one `DataError` that names it.

    A `DataError` raised inside gets the name in front, unless it has it already.

    Args:
        name: path or URL.
        where: the part that is read, for example "rows 0..512".

    Raises:
        DataError: something of `DECODE_ERRORS`, or another `DataError`, was raised inside.

    Example:
        >>> with readable("a.tif", "rows 0..9"):
        ...     raise ValueError("no tile")
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: a.tif: the file is damaged or truncated (rows 0..9: no tile).
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
