"""The files of a Zarr array wherever they lie: in a folder, in a ZIP archive, or below a URL. All of them only read."""

import hashlib
import lzma
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from pixelwise.errors import DataError
from pixelwise.formats.local import WHOLE_BYTES, Stamp
from pixelwise.formats.local import fingerprint as file_fingerprint
from pixelwise.formats.local import readable as readable_file
from pixelwise.formats.protocols import (
    NoSuchObject,
    filesystem,
    is_url,
    local_path,
    protocol_of,
    remote_errors,
    shown,
)
from pixelwise.formats.ranges import bounded, read_range, read_tail
from pixelwise.formats.remote import RemoteStamp, opener
from pixelwise.formats.remote import fingerprint as remote_fingerprint

DOCUMENTS = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
_WEB_SAMPLES = 64


@contextmanager
def readable(name: str, where: str = "") -> Iterator[None]:
    """Turn whatever reading a Zarr raises into one `DataError` that names it and the part that was read."""
    with readable_file(name, where):
        try:
            yield
        except (lzma.LZMAError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:  # relatives of no other error
            raise ValueError(str(error)) from error


class Folder(Protocol):
    """Named pieces of bytes. Names are relative, with slashes, and were checked before.

    Attributes:
        name: path or URL, as it may be shown.
    """

    name: str

    def read(self, key: str, start: int, stop: int) -> bytes | None:
        """The bytes start..stop of a piece, fewer where it ends before; None if there is no such piece."""
        ...

    def tail(self, key: str, count: int) -> bytes | None:
        """The last bytes of a piece; None if there is no such piece."""
        ...

    def state(self, prefix: str) -> str:
        """Text that changes when a piece below `prefix`, or a document of the root, is changed, added or removed."""
        ...

    def fingerprint(self, prefix: str) -> str:
        """Hexadecimal SHA-256 that changes when the content below `prefix` does."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


def open_folder(location: str) -> Folder:
    """The pieces at a path or URL.

    Raises:
        DataError: there is nothing, or it is neither a folder nor a ZIP archive.
    """
    if is_url(location) and local_path(location) is None:
        if not shown(location).lower().endswith(".zip"):
            return _RemoteFolder(location)
        with readable(shown(location)):
            return _Archive(location, opener(location)())
    path = Path(local_path(location) or location if is_url(location) else location)
    if path.is_dir():
        return _LocalFolder(path)
    Stamp.of(path)  # says what is wrong with the name
    with readable(str(path)):
        if not zipfile.is_zipfile(path):
            raise DataError("this is neither a Zarr folder nor a ZIP archive of one.")
        return _Archive(str(path), path.open("rb"))


class _LocalFolder:
    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    def read(self, key: str, start: int, stop: int) -> bytes | None:
        with _regular(self.root / key) as file:
            if file is None:
                return None
            file.seek(start)
            return file.read(stop - start)

    def tail(self, key: str, count: int) -> bytes | None:
        with _regular(self.root / key) as file:
            if file is None:
                return None
            file.seek(max(os.fstat(file.fileno()).st_size - count, 0))
            return file.read(count)

    def _files(self, prefix: str) -> list[tuple[str, os.stat_result]]:
        found = {}
        for parent, folders, names in os.walk(self.root / prefix):
            folders.sort()
            for name in names:
                path = Path(parent, name)
                found[path.relative_to(self.root).as_posix()] = path.stat()
        for name in DOCUMENTS:
            if (self.root / name).is_file():
                found[name] = (self.root / name).stat()
        return sorted(found.items())

    def state(self, prefix: str) -> str:
        digest = hashlib.sha256()
        for name, status in self._files(prefix):
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\n".encode(errors="replace"))
        return digest.hexdigest()

    def fingerprint(self, prefix: str) -> str:
        files = self._files(prefix)
        small = sum(status.st_size for _, status in files) <= WHOLE_BYTES
        digest = hashlib.sha256()
        for name, status in files:
            last = file_fingerprint(self.root / name) if small else status.st_mtime_ns
            digest.update(f"{name}\0{status.st_size}\0{last}\n".encode(errors="replace"))
        return digest.hexdigest()

    def close(self) -> None:
        pass


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO | None]:
    """A file opened for reading, None if there is none; pipes and devices, which could block for ever, are refused."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise DataError(f"its part {path.name} is not a regular file.")
        yield file


class _Archive:
    def __init__(self, location: str, file: BinaryIO) -> None:
        self.name = shown(location)
        self._location, self._file = location, file
        self._is_remote = is_url(location)
        try:
            self._zip = zipfile.ZipFile(file)
        except BaseException:
            file.close()
            raise
        names = self._zip.namelist()
        tops = {name.partition("/")[0] for name in names}
        whole = any(name in DOCUMENTS for name in names)
        self._top = f"{tops.pop()}/" if not whole and len(tops) == 1 else ""

    def read(self, key: str, start: int, stop: int) -> bytes | None:
        try:
            info = self._zip.getinfo(self._top + key)
        except KeyError:
            return None
        with self._zip.open(info) as piece:
            if start:
                piece.seek(start)
            return piece.read(stop - start)

    def tail(self, key: str, count: int) -> bytes | None:
        try:
            size = self._zip.getinfo(self._top + key).file_size
        except KeyError:
            return None
        return self.read(key, max(size - count, 0), size)

    def state(self, prefix: str) -> str:
        return str(RemoteStamp.of(self._location) if self._is_remote else Stamp.of(self._location))

    def fingerprint(self, prefix: str) -> str:
        return remote_fingerprint(self._location) if self._is_remote else file_fingerprint(self._location)

    def close(self) -> None:
        self._zip.close()
        self._file.close()


class _RemoteFolder:
    def __init__(self, location: str) -> None:
        path, mark, query = location.partition("?")
        self._path, self._query = path.rstrip("/"), mark + query
        self.name = shown(location)
        self._lists = protocol_of(location) not in ("http", "https")

    def _url(self, key: str) -> str:
        return f"{self._path}/{key}{self._query}" if key else self._path + self._query

    def read(self, key: str, start: int, stop: int) -> bytes | None:
        try:
            return read_range(self._url(key), start, stop)
        except NoSuchObject:
            return None

    def tail(self, key: str, count: int) -> bytes | None:
        try:
            return read_tail(self._url(key), count)
        except NoSuchObject:
            return None

    def _stamps(self, prefix: str) -> Iterator[tuple[str, RemoteStamp]]:
        if self._lists:
            system, root = filesystem(self._url(prefix))
            with remote_errors(self.name):
                found = system.find(root, detail=True, **bounded(system))
            for path, info in sorted(found.items()):
                yield str(path)[len(root) :].lstrip("/"), RemoteStamp.from_info(info, self.name)
        for key in DOCUMENTS:
            for full in dict.fromkeys((key, f"{prefix}/{key}".lstrip("/"))):
                try:
                    yield full, RemoteStamp.of(self._url(full))
                except NoSuchObject:
                    continue

    def state(self, prefix: str) -> str:
        digest = hashlib.sha256()
        for key, stamp in self._stamps(prefix):
            digest.update(f"{key}\0{stamp}\n".encode(errors="replace"))
        return digest.hexdigest()

    def fingerprint(self, prefix: str) -> str:
        digest = hashlib.sha256()
        for key, stamp in self._stamps(prefix):
            tags = stamp.content or stamp.other
            digest.update(f"{key}\0{stamp.size}\0{tags}\n".encode(errors="replace"))
        return digest.hexdigest()

    def close(self) -> None:
        pass
