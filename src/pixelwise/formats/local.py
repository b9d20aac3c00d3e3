"""Names of files, paths or URLs; whether a local file changed, and one error for whatever is wrong with it.

Only plain URLs of the table `PROTOCOLS` are followed, each by the file system of its own protocol. Nothing else is: a chain
(`zip::`, `simplecache::`) or a manifest (`reference::`) could make one name mean any file of this machine.
"""

import hashlib
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from pixelwise.errors import DataError, PixelwiseError, UsageError

HEAD_BYTES = 4096
"""How much of a file tells its format."""

WHOLE_BYTES = 256 * 2**20
"""Files up to this size are hashed as a whole; of larger ones samples are."""

_SAMPLES, _SAMPLE_BYTES = 64, 64 * 2**10

PROTOCOLS = {  # the module of the file system, and the package that pip installs beside the extra, if any
    "s3": ("s3fs", ""), "s3a": ("s3fs", ""), "gs": ("gcsfs", "gcsfs"), "gcs": ("gcsfs", "gcsfs"),
    "az": ("adlfs", "adlfs"), "abfs": ("adlfs", "adlfs"), "abfss": ("adlfs", "adlfs"),
    "hf": ("huggingface_hub", ""), "http": ("aiohttp", ""), "https": ("aiohttp", ""), "memory": ("fsspec", ""),
}  # fmt: skip
"""Every protocol that is followed, besides `file`, which is a local path."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

_OF_PROGRAMS = (
    TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, NotImplementedError, RecursionError,
)  # fmt: skip
"""Errors whose words are about a decoder's code, not about the file."""


def is_url(location: object) -> bool:
    """Whether a name is a URL, not a path; "C:/scans/a.tif" is a path."""
    text = str(location)
    return bool(_SCHEME.match(text)) or ("::" in text and "://" in text)


def shown(location: object) -> str:
    """A URL without its user, password and query, which may be secrets; a path as it is."""
    text = str(location)
    if not is_url(text):
        return text
    match = _SCHEME.match(text)
    head, rest = ("", text) if match is None else (match[0], text[match.end() :])
    host, slash, path = re.split("[?#]" if head.lower().startswith("http") else "[?]", rest)[0].partition("/")
    return head + host.rpartition("@")[2] + slash + path


def protocol_of(location: str) -> str:
    """The protocol of a URL, "file" among them."""
    bare = re.sub(r"^([A-Za-z+.-]+://(?:[^/]*@)?)\[[0-9A-Fa-f:.]+\]", r"\1host", location)  # of IPv6, as [::1]
    if "::" in bare.split("?")[0]:
        raise UsageError(f"{shown(location)}: chained URLs are not followed. Name the file itself.")
    match = _SCHEME.match(location)
    name = match[1].lower() if match else ""
    if name in ("file", "local"):
        return "file"
    if name not in PROTOCOLS:
        known = ", ".join(f"{key}://" for key in ("file", *PROTOCOLS))
        raise UsageError(f"{shown(location)}: URLs of this kind are not followed. Possible are {known}.")
    return name


def local_path(location: str) -> str | None:
    """The path that a name or a `file://` URL means; None for every other URL."""
    if not is_url(location):
        return location
    if protocol_of(location) != "file":
        return None
    rest = location.partition("://")[2].removeprefix("localhost")
    if not rest.startswith("/"):
        raise UsageError(f"{shown(location)}: write file:/// and a full path, or the path alone.")
    return unquote(rest)


def is_dicom_head(head: bytes) -> bool:
    """Whether a file that begins with `head` is DICOM: 128 bytes and DICM, or, in old exports, elements from the start.

    Of the latter two are looked at, of group 2 or 8 in little endian, as PS3.5 (7.1) writes them.
    """
    if head[128:132] == b"DICM":
        return True
    place, last = 0, -1
    for _ in range(2):
        group, number = (int.from_bytes(head[at : at + 2], "little") for at in (place, place + 2))
        kind, is_long = head[place + 4 : place + 6], head[place + 4 : place + 6] in (b"OB", b"UN", b"SQ", b"UT")
        if group not in (2, 8) or (group << 16 | number) <= last or len(head) < place + 12:
            return False
        last = group << 16 | number
        if kind.isalpha() and kind.isupper():  # explicit VR
            at, size = (place + 8, 4) if is_long else (place + 6, 2)
        else:
            at, size = place + 4, 4
        length = int.from_bytes(head[at : at + size], "little")
        if length % 2 or length > 1024:
            return False
        place = at + size + length
    return True


def in_words(error: BaseException) -> str:
    """Why a file could not be decoded, for somebody who does not know the decoder: one line of at most 200 letters."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, struct.error):
        return "it ends too early, or what its headers say makes no sense"
    if isinstance(error, EOFError) and not text:
        return "it ends too early"
    if isinstance(error, _OF_PROGRAMS) or not text or "<class " in text or " object at 0x" in text or "ast." in text:
        return "what its headers say makes no sense"
    return text


def printable(path: str | Path) -> str:
    """A path as text that any terminal and JSON take, also where the bytes of its name are no text."""
    return str(path).encode("utf-8", "backslashreplace").decode()


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
        try:
            status = os.stat(path)  # noqa: PTH116  (this is on the way of every small picture)
        except FileNotFoundError as error:
            raise DataError(f"{printable(path)}: there is no such file.") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{printable(path)}: the file cannot be opened ({reason}).") from error
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise DataError(f"{printable(path)}: this is {kind}.")
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
        return cls.of_stamps({path: Stamp.of(path)})

    @classmethod
    def of_stamps(cls, stamps: Mapping[Any, Stamp]) -> Self:
        """Of one or several local files, as they were when the stamps were taken; their order counts."""

        def content() -> str:
            found = [fingerprint(path) for path in stamps]
            return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

        def check() -> None:
            for path, stamp in stamps.items():
                stamp.check(path)

        return cls(content, check)

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
    except (PixelwiseError, Warning):
        raise
    except MemoryError as error:
        raise DataError(f"{shown}: there is not enough memory to decode it. Choose smaller tiles.") from error
    except Exception as error:
        raise DataError(
            f"{shown}: the file is damaged or truncated ({where + ': ' if where else ''}{in_words(error)})."
        ) from error


# `warnings.catch_warnings` swaps state of the whole process, so only one thread may be inside it. Mostly headers
# are read there, and DICOM frames decoded, one at a time; other decoding runs beside it in any number of threads.
_header_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a worker must not be forked while another thread holds the lock
    os.register_at_fork(
        before=_header_lock.acquire, after_in_parent=_header_lock.release, after_in_child=_header_lock.release
    )


@contextmanager
def silence() -> Iterator[None]:
    """Keep warnings of libraries away from the terminal; only one thread at a time is inside, so be quick."""
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
