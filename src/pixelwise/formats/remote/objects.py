"""Objects behind URLs: their tags, parts of them as files, copies for formats that need those, and lists of images."""

import hashlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self, cast

from pixelwise.errors import DataError, UsageError
from pixelwise.files import extra
from pixelwise.formats.base import Opener
from pixelwise.formats.remote.urls import bounded, filesystem, is_web, patiently, protocol_of, remote_errors, shown

BLOCK_BYTES = 2**19
CACHED_BLOCKS = 64
"""Of each file so many blocks stay in memory: 32 MiB, which holds the tiles along a row of a large scene."""

_UNCACHED_BYTES = 8 * BLOCK_BYTES  # reads of this size are one request
_MAX_ENTRIES = 20_000
_WHOLE_ONLY = "the server cannot send parts of it. Download it first."
_SAMPLES, _SAMPLE_BYTES, _WHOLE_BYTES = 64, 64 * 2**10, 16 * 2**20
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
    """

    size: int
    content: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    ranges: bool = True

    @classmethod
    def of(cls, location: str) -> Self:
        """The stamp of an object."""
        system, name = filesystem(location)
        with remote_errors(shown(location)):
            return cls.from_info(patiently(lambda: system.info(name, **bounded(system))), location)

    @classmethod
    def from_info(cls, info: dict[str, Any], location: str) -> Self:
        """The stamp that one entry of a listing stands for."""
        if info.get("type") == "directory":
            raise DataError(f"{shown(location)}: this is a folder, not an object.")
        size = info.get("size")
        if not isinstance(size, int) or size < 0:
            raise DataError(f"{shown(location)}: the server does not say how large it is. Download it first.")
        content, other = (
            tuple(str(info[key]) for key in keys if info.get(key)) for keys in (_CONTENT_TAGS, _OTHER_TAGS)
        )
        return cls(size, content, other, info.get("partial") is not False)

    def check(self, location: str) -> None:
        """Raise `DataError` if the object is no longer the one this stamp was taken of."""
        now = type(self).of(location)
        if now != self:
            what = f"{self.size:,} bytes before, {now.size:,} now" if now.size != self.size else "its tag differs"
            raise DataError(
                f"{shown(location)}: the object changed while it was read ({what}). Run again when nothing writes to it."
            )


def fingerprint(location: str, stamp: RemoteStamp | None = None) -> str:
    """Hexadecimal SHA-256 that changes when the content does, mostly without reading it.

    The size and the server's tags of the content count (ETag, MD5). Where there are none, small objects are read; of
    those over 16 MiB 64 evenly spread samples of 64 KiB and the time of the last change count.
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


def read_range(location: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes start..stop of an object, fewer where it ends before; all of it, or from a negative start its last ones."""
    if start is not None and start == stop:
        return b""
    system, name = filesystem(location)

    def read() -> bytes:
        if start is None or stop is None or not is_web(location):
            return bytes(system.cat_file(name, start=start, end=stop, **bounded(system)))
        with system.open(name, "rb", block_size=1, cache_type="none", size=stop) as file:  # no more than is asked for
            try:
                file.seek(start)
                return bytes(file.read(stop - start))
            except ValueError:
                raise DataError(f"{shown(location)}: {_WHOLE_ONLY}") from None

    with remote_errors(shown(location)):
        data: bytes = patiently(read)
    if start is not None and stop is not None and len(data) > stop - start:
        raise DataError(f"{shown(location)}: {_WHOLE_ONLY}")
    return data[start:] if start is not None and start < 0 else data  # servers without ranges answer with the whole


def sends_ranges(location: str, stamp: RemoteStamp) -> bool:
    """Whether parts of an object can be asked for; of web servers one byte is asked for to find out."""
    if not stamp.ranges or not is_web(location) or stamp.size <= BLOCK_BYTES:
        return stamp.ranges
    try:
        return len(read_range(location, stamp.size - 1, stamp.size)) == 1
    except DataError:
        return False


def opener(location: str, stamp: RemoteStamp | None = None) -> Opener:
    """A function that gives a new seekable file of the object at each call.

    The files of one opener share a cache of the blocks read last, so that each thread may have its own file. Reading
    raises `DataError` where the server fails; it never gives less than is there.
    """
    known = stamp or RemoteStamp.of(location)
    if not sends_ranges(location, known):
        raise DataError(f"{shown(location)}: {_WHOLE_ONLY}")

    def fetch(start: int, stop: int) -> bytes:
        data = read_range(location, start, min(stop, known.size))
        if len(data) != min(stop, known.size) - start:
            ends = start + len(data)
            raise DataError(f"{shown(location)}: the object changed while it was read: it ends at byte {ends:,}.")
        return data

    fsspec = extra("fsspec.spec", "remote", f"{protocol_of(location)}://")
    blocks = extra("fsspec.caching", "remote", "").BlockCache(BLOCK_BYTES, fetch, known.size, CACHED_BLOCKS)

    class RemoteFile(fsspec.AbstractBufferedFile):  # type: ignore[name-defined]
        loc: int

        def read(self, length: int = -1) -> bytes:
            stop = known.size if length < 0 else min(self.loc + length, known.size)
            if stop - self.loc < _UNCACHED_BYTES:
                return bytes(super().read(length))
            self.loc, start = stop, self.loc
            return fetch(start, stop)

    def open_file() -> BinaryIO:
        file = RemoteFile(None, shown(location), block_size=BLOCK_BYTES, cache_type="none", size=known.size)
        file.cache = blocks
        return cast(BinaryIO, file)

    return open_file


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
    """
    stamp = stamp or RemoteStamp.of(location)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(shown(location)).name)[-100:].lstrip(".") or "file"
    return _copied(location, folder, name, {"": (location, stamp)})


def localise_folder(location: str, stamps: Mapping[str, RemoteStamp], folder: str | Path | None = None) -> LocalCopy:
    """Copy the objects of a folder, as `list_folder` gives them, to a private folder on this machine."""
    base = location.rstrip("/")
    return _copied(location, folder, "series", {name: (f"{base}/{name}", stamp) for name, stamp in stamps.items()})


def _copied(location: str, folder: Any, top: str, objects: Mapping[str, tuple[str, RemoteStamp]]) -> LocalCopy:
    """Copy objects to TOP or TOP/name of a new temporary folder."""
    chosen, size = Path(folder or tempfile.gettempdir()), sum(stamp.size for _, stamp in objects.values())
    try:
        free = shutil.disk_usage(chosen).free
        if size > free * 0.95:
            raise DataError(
                f"{shown(location)}: takes {size:,} bytes on this machine, but {chosen} has {free:,} free. "
                "Free some space, or set TMPDIR to a larger disk."
            )
        copy = LocalCopy(Path(tempfile.mkdtemp(prefix="pixelwise-", dir=chosen)) / top)
    except OSError as error:
        raise DataError(f"{shown(location)}: cannot be copied to {chosen} ({error.strerror or error}).") from None
    try:
        for name, (url, stamp) in objects.items():
            path = copy.path / name
            path.parent.mkdir(exist_ok=True)
            _download(url, stamp, path)
    except BaseException:
        copy.close()
        raise
    return copy


def _download(location: str, stamp: RemoteStamp, path: Path) -> None:
    system, name = filesystem(location)
    with remote_errors(shown(location)):
        patiently(lambda: system.get_file(name, str(path)))
    size = path.stat().st_size
    if size != stamp.size:
        raise DataError(f"{shown(location)}: {size:,} bytes came, though the server said {stamp.size:,}. Run again.")


def list_folder(location: str) -> dict[str, RemoteStamp]:
    """The objects right in a folder, by name, without hidden ones and those whose names no file can have."""
    system, root = filesystem(location)
    with remote_errors(shown(location)):
        entries = system.ls(root, detail=True, **bounded(system))
    if len(entries) > _MAX_ENTRIES:
        raise DataError(f"{shown(location)}: holds {len(entries):,} objects; at most {_MAX_ENTRIES:,} make a series.")
    named = {PurePosixPath(str(entry["name"])).name: entry for entry in entries if entry.get("type") == "file"}
    return {
        name: RemoteStamp.from_info(entry, location)
        for name, entry in sorted(named.items())
        if re.fullmatch(r"[A-Za-z0-9_ ,;()+=-][A-Za-z0-9._ ,;()+=-]{0,199}", name)
    }


def list_images(location: str, suffixes: Collection[str]) -> list[str]:
    """The images of a folder or a glob (`s3://scans/2024/*.tif`) of an object store, as URLs, sorted.

    Folders are read with all their sub-folders. A Zarr folder is one image. Hidden names (`.part`) are left out.
    """
    if is_web(location):
        raise UsageError(f"{shown(location)}: web servers do not list their folders. Name the images one by one.")
    system, name = filesystem(location)
    wanted = tuple(suffix.lower() for suffix in suffixes)
    is_glob = bool(set(name) & set("*?["))
    with remote_errors(shown(location)):
        matches = sorted(system.glob(name, **bounded(system))) if is_glob else [name]
        found = {item for match in matches for item in _images_below(system, str(match), wanted)}
    if not matches or (not found and not is_glob and not system.exists(name)):
        raise DataError(f"{shown(location)}: there is no such folder, or nothing in it matches.")
    return [f"{protocol_of(location)}://{item.lstrip('/')}" for item in sorted(found)]


def _images_below(system: Any, name: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """The images at and below a name of an object store; folders that are images are not looked into."""
    if name.lower().endswith(".zarr") or (name.lower().endswith(suffixes) and system.isfile(name)):
        yield name
        return
    for parent, folders, files in system.walk(name, topdown=True):
        for folder in list(folders):
            is_image = folder.lower().endswith(".zarr")
            if folder.startswith(".") or is_image:
                folders.pop(folder) if isinstance(folders, dict) else folders.remove(folder)
            if is_image and not folder.startswith("."):
                yield f"{parent}/{folder}"
        for item in files:
            if item and not item.startswith(".") and item.lower().endswith(suffixes):
                yield f"{parent}/{item}"
