"""Files behind URLs: read in ranges, known by their tags, copied to this machine only where a format needs that."""

import hashlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self, cast

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.protocols import filesystem, is_url, local_path, protocol_of, remote_errors, shown
from pixelwise.formats.ranges import BLOCK_BYTES, Blocks, RangeFile, bounded, patiently, read_range

__all__ = [
    "LocalCopy", "RemoteStamp", "fingerprint", "is_url", "list_folder",
    "list_images", "local_path", "localise", "localise_folder", "open_remote",
    "opener", "read_range", "sends_ranges", "shown",
]  # fmt: skip

_MAX_ENTRIES = 20_000
_COPY_BYTES = 16 * 2**20
_SAMPLE_BYTES = 64 * 2**10
_SAMPLES = 64
_WHOLE_BYTES = 16 * 2**20
_CONTENT_TAGS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "crc32c", "blob_id", "content_md5")
_OTHER_TAGS = (
    "VersionId", "generation", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip


@dataclass(frozen=True)
class RemoteStamp:
    """What a server says about an object; it differs when the object was changed or replaced.

    Attributes:
        size: bytes.
        content: tags that follow the content (ETag, MD5), as far as the server gives any.
        other: its version, and the time of its last change.
        ranges: whether parts of it can be asked for.

    Example:
        >>> system, name = filesystem("memory://stamped/a.bin")
        >>> system.pipe(name, b"old")
        >>> stamp = RemoteStamp.of("memory://stamped/a.bin")
        >>> stamp.size
        3
        >>> system.pipe(name, b"longer")
        >>> stamp.check("memory://stamped/a.bin")
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: memory://stamped/a.bin: the object changed while it was read (3 bytes before, 6 now). \
Run again when nothing writes to it.
    """

    size: int
    content: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    ranges: bool = True

    @classmethod
    def of(cls, location: str) -> Self:
        """The stamp of an object.

        Raises:
            DataError: there is no such object, it is a folder, the server does not answer or does not say the size.
        """
        system, name = filesystem(location)
        with remote_errors(shown(location)):
            info = patiently(lambda: system.info(name, **bounded(system)))
            return cls.from_info(info, location)

    @classmethod
    def from_info(cls, info: dict[str, Any], location: str) -> Self:
        """The stamp that one entry of a listing stands for."""
        if info.get("type") == "directory":
            raise DataError(f"{shown(location)}: this is a folder, not an object.")
        size = info.get("size")
        if not isinstance(size, int) or size < 0:
            raise DataError(f"{shown(location)}: the server does not say how large it is. Download it first.")
        content = tuple(str(info[key]) for key in _CONTENT_TAGS if info.get(key))
        other = tuple(str(info[key]) for key in _OTHER_TAGS if info.get(key))
        return cls(size, content, other, info.get("partial") is not False)

    def check(self, location: str) -> None:
        """Raise `DataError` if the object is no longer the one this stamp was taken of."""
        now = type(self).of(location)
        if now == self:
            return
        what = f"{self.size:,} bytes before, {now.size:,} now" if now.size != self.size else "its tag differs"
        raise DataError(
            f"{shown(location)}: the object changed while it was read ({what}). Run again when nothing writes to it."
        )


def fingerprint(location: str, stamp: RemoteStamp | None = None) -> str:
    """Hexadecimal SHA-256 that changes when the content does, mostly without reading it.

    The size and the server's tags of the content count (ETag, MD5). Where there are none, small objects are read; of
    those over 16 MiB 64 evenly spread samples of 64 KiB and the time of the last change count.

    Raises:
        DataError: the object is missing or cannot be read.

    Example:
        >>> system, name = filesystem("memory://known/a.bin")
        >>> system.pipe(name, b"abc")
        >>> fingerprint("memory://known/a.bin")[:8]
        'ba7816bf'
    """
    stamp = stamp or RemoteStamp.of(location)
    if stamp.content:
        return hashlib.sha256(f"{stamp.size} {stamp.content}".encode()).hexdigest()
    if stamp.size <= _WHOLE_BYTES:
        return hashlib.sha256(read_range(location, 0, stamp.size)).hexdigest()
    digest = hashlib.sha256(f"{stamp.size} {stamp.other}".encode())
    for index in range(_SAMPLES):
        start = (stamp.size - _SAMPLE_BYTES) * index // (_SAMPLES - 1)
        digest.update(read_range(location, start, start + _SAMPLE_BYTES))
    return digest.hexdigest()


def opener(location: str, stamp: RemoteStamp | None = None) -> Callable[[], BinaryIO]:
    """A function that gives a new seekable file of the object at each call.

    The files of one opener share a cache of the blocks read last, so that each thread may have its own file. Reading
    raises `DataError` where the server fails; it never gives less than is there.

    Raises:
        DataError: there is no such object, or the server cannot send parts of it.

    Example:
        >>> system, name = filesystem("memory://opened/a.bin")
        >>> system.pipe(name, b"0123456789")
        >>> file = opener("memory://opened/a.bin")()
        >>> file.seek(7), file.read()
        (7, b'789')
    """
    stamp = stamp or RemoteStamp.of(location)
    if not sends_ranges(location, stamp):
        raise DataError(f"{shown(location)}: the server cannot send parts of it. Download it first.")
    blocks = Blocks(location, stamp.size)
    return lambda: cast(BinaryIO, RangeFile(blocks))


def sends_ranges(location: str, stamp: RemoteStamp) -> bool:
    """Whether parts of an object can be asked for; of web servers one byte is asked for to find out."""
    if not stamp.ranges or protocol_of(location) not in ("http", "https") or stamp.size <= BLOCK_BYTES:
        return stamp.ranges
    try:
        return len(read_range(location, stamp.size - 1, stamp.size)) == 1
    except DataError:
        return False


def open_remote(location: str) -> BinaryIO:
    """One seekable file of the object; see `opener`."""
    return opener(location)()


class LocalCopy:
    """A private copy of an object on this machine, gone when it is closed or forgotten.

    Attributes:
        path: the copy; its name ends as that of the object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._remove = weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)

    def close(self) -> None:
        """Delete the copy."""
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def localise(location: str, folder: str | Path | None = None, stamp: RemoteStamp | None = None) -> LocalCopy:
    """Copy an object to this machine, for formats that cannot be read from a stream.

    Args:
        location: the URL.
        folder: where; by default the system's folder for temporary files.
        stamp: the object's, if it is known.

    Raises:
        DataError: the object is missing or cannot be read, or the disk has no room for it.

    Example:
        >>> system, name = filesystem("memory://copied/a.nii.gz")
        >>> system.pipe(name, b"0123456789")
        >>> with localise("memory://copied/a.nii.gz") as copy:
        ...     copy.path.name, copy.path.read_bytes()
        ('a.nii.gz', b'0123456789')
        >>> copy.path.exists()
        False
    """
    stamp = stamp or RemoteStamp.of(location)
    folder = _with_room(location, stamp.size, folder)
    try:
        copy = LocalCopy(Path(tempfile.mkdtemp(prefix="pixelwise-", dir=folder)) / _plain_name(location))
        try:
            with copy.path.open("xb") as file:
                _download(location, stamp, file)
        except BaseException:
            copy.close()
            raise
    except OSError as error:
        raise DataError(f"{shown(location)}: cannot be copied to {folder} ({error.strerror or error}).") from None
    return copy


def localise_folder(location: str, stamps: Mapping[str, RemoteStamp], folder: str | Path | None = None) -> LocalCopy:
    """Copy the objects of a folder, as `list_folder` gives them, to a private folder on this machine.

    Raises:
        DataError: an object is missing or cannot be read, or the disk has no room for all.

    Example:
        >>> system, name = filesystem("memory://series/1.dcm")
        >>> system.pipe(name, b"0123456789")
        >>> with localise_folder("memory://series", list_folder("memory://series")) as copy:
        ...     [item.name for item in copy.path.iterdir()]
        ['1.dcm']
    """
    folder = _with_room(location, sum(stamp.size for stamp in stamps.values()), folder)
    copy = LocalCopy(Path(tempfile.mkdtemp(prefix="pixelwise-", dir=folder)) / "series")
    try:
        copy.path.mkdir()
        for name, stamp in stamps.items():
            with (copy.path / name).open("xb") as file:
                _download(f"{location.rstrip('/')}/{name}", stamp, file)
    except OSError as error:
        copy.close()
        raise DataError(f"{shown(location)}: cannot be copied to {folder} ({error.strerror or error}).") from None
    except BaseException:
        copy.close()
        raise
    return copy


def list_folder(location: str) -> dict[str, RemoteStamp]:
    """The objects right in a folder, by name, without hidden ones and those whose names no file can have.

    Raises:
        DataError: there is no such folder, or it holds more than 20,000 objects.

    Example:
        >>> system, name = filesystem("memory://listed/1.dcm")
        >>> system.pipe(name, b"0123456789")
        >>> list_folder("memory://listed")["1.dcm"].size
        10
    """
    system, root = filesystem(location)
    with remote_errors(shown(location)):
        entries = system.ls(root, detail=True, **bounded(system))
        if len(entries) > _MAX_ENTRIES:
            raise DataError(
                f"{shown(location)}: holds {len(entries):,} objects; at most {_MAX_ENTRIES:,} make a series."
            )
        named = {PurePosixPath(str(entry["name"])).name: entry for entry in entries if entry.get("type") == "file"}
        return {
            name: RemoteStamp.from_info(entry, location)
            for name, entry in sorted(named.items())
            if re.fullmatch(r"[A-Za-z0-9_ ,;()+=-][A-Za-z0-9._ ,;()+=-]{0,199}", name)
        }


def list_images(location: str, suffixes: Collection[str]) -> list[str]:
    """The images of a folder or a glob (`s3://scans/2024/*.tif`) of an object store, as URLs, sorted.

    Folders are read with all their sub-folders. A Zarr folder is one image. Hidden names (`.part`) are left out.

    Args:
        location: the URL; `*`, `?` and `[` make it a glob.
        suffixes: what images end in, for example (".tif", ".zarr").

    Raises:
        DataError: there is no such folder, no permission, no network.
        UsageError: web servers (https://) do not list their folders.

    Example:
        >>> system, _ = filesystem("memory://scans")
        >>> for name in ("/scans/b.tif", "/scans/a/c.png", "/scans/d.zarr/zarr.json", "/scans/notes.txt"):
        ...     system.pipe(name, b"-")
        >>> list_images("memory://scans", (".tif", ".png", ".zarr"))
        ['memory://scans/a/c.png', 'memory://scans/b.tif', 'memory://scans/d.zarr']
    """
    protocol = protocol_of(location)
    if protocol in ("http", "https"):
        raise UsageError(f"{shown(location)}: web servers do not list their folders. Name the images one by one.")
    system, name = filesystem(location)
    wanted = tuple(suffix.lower() for suffix in suffixes)
    with remote_errors(shown(location)):
        is_glob = bool(set(name) & set("*?["))
        matches = sorted(system.glob(name, **bounded(system))) if is_glob else [name]
        found: set[str] = set()
        for match in matches:
            found.update(_walk(system, str(match), wanted))
    if not matches or (not found and not is_glob and not system.exists(name)):
        raise DataError(f"{shown(location)}: there is no such folder, or nothing in it matches.")
    return [f"{protocol}://{item.lstrip('/')}" for item in sorted(found)]


def _walk(system: Any, name: str, suffixes: tuple[str, ...]) -> list[str]:
    """The images at and below a name of an object store; folders that are images are not looked into."""
    if name.lower().endswith(".zarr") or (name.lower().endswith(suffixes) and system.isfile(name)):
        return [name]
    found = []
    for parent, folders, files in system.walk(name, topdown=True):
        for folder in sorted(folders):
            if folder.startswith(".") or folder.lower().endswith(".zarr"):
                folders.pop(folder) if isinstance(folders, dict) else folders.remove(folder)
            if not folder.startswith(".") and folder.lower().endswith(".zarr"):
                found.append(f"{parent}/{folder}")
        found += [f"{parent}/{item}" for item in files if item[:1] not in ("", ".") and item.lower().endswith(suffixes)]
    return found


def _with_room(location: str, size: int, folder: str | Path | None) -> Path:
    """The folder for copies, if it has room for so many bytes."""
    chosen = Path(folder or tempfile.gettempdir())
    try:
        free = shutil.disk_usage(chosen).free
    except OSError as error:
        raise DataError(f"{shown(location)}: cannot be copied to {chosen} ({error.strerror or error}).") from None
    if size > free * 0.95:
        raise DataError(
            f"{shown(location)}: takes {size:,} bytes on this machine, but {chosen} has {free:,} free. "
            "Free some space, or set TMPDIR to a larger disk."
        )
    return chosen


def _download(location: str, stamp: RemoteStamp, file: BinaryIO) -> None:
    if sends_ranges(location, stamp):
        for start in range(0, stamp.size, _COPY_BYTES):
            file.write(read_range(location, start, min(start + _COPY_BYTES, stamp.size)))
    else:
        system, name = filesystem(location)
        with remote_errors(shown(location)), system.open(name, "rb", block_size=0) as stream:
            while file.tell() <= stamp.size and (data := stream.read(BLOCK_BYTES)):
                file.write(data)
    if file.tell() != stamp.size:
        raise DataError(
            f"{shown(location)}: {file.tell():,} bytes came, though the server said {stamp.size:,}. Run again."
        )


def _plain_name(location: str) -> str:
    """The last part of a URL as a file name that is safe anywhere."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(shown(location)).name)[-100:].lstrip(".")
    return name or "file"
