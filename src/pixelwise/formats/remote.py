"""Objects behind URLs: their tags, parts of them as files, copies, lists of images; and results put there.

A finished file or folder is put at its URL so that the final name never holds half of it.
"""

import hashlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self, cast

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.extras import extra
from pixelwise.files import ZARR_DOCUMENTS, make_temporary_folder, remove_leftovers
from pixelwise.formats.base import Opener
from pixelwise.formats.local import changed, protocol_of, sampled, shown, size_change
from pixelwise.formats.urls import UNSIZED_BYTES, NoSuchObject, bounded, filesystem, is_web, patiently, remote_errors

BLOCK_BYTES = 2**19
CACHED_BLOCKS = 64
"""Of each file so many blocks stay in memory: 32 MiB, which holds the tiles along a row of a large scene."""

_UNCACHED_BYTES = 8 * BLOCK_BYTES  # reads of this size are one request
_MAX_ENTRIES = 20_000
_MAX_RECORD_BYTES = 2**20
_UPLOADS = 8  # at a time
_WHOLE_BYTES = 16 * 2**20
_WHOLE_ONLY = "the server cannot send parts of it. Download it first."
_CONTENT_TAGS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "crc32c", "blob_id", "content_md5")
_OTHER_TAGS = (
    "VersionId", "generation", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip


@dataclass(frozen=True)
class RemoteStamp:
    """What a server says about an object; it differs when the object was changed or replaced."""

    size: int
    content: tuple[str, ...] = ()  # tags that follow the content (ETag, MD5), if the server gives any
    other: tuple[str, ...] = ()  # its version, and the time of its last change
    ranges: bool = True  # can be asked for

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
            raise DataError(
                f"{shown(location)}: this is a folder, not an object. End it with / to mean all images in it."
            )
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
            raise changed(shown(location), "object", size_change(self.size, now.size) or "its tag differs")


def fingerprint(location: str, stamp: RemoteStamp) -> str:
    """Hexadecimal SHA-256 that changes when the content does, mostly without reading it.

    The size and the server's tags of the content count (ETag, MD5). Where there are none, small objects are read; of
    those over 16 MiB 64 evenly spread samples of 64 KiB and the time of the last change count.
    """
    if stamp.content:
        return hashlib.sha256(f"{stamp.size} {stamp.content}".encode()).hexdigest()
    if stamp.size <= _WHOLE_BYTES:
        return hashlib.sha256(read_range(location, 0, stamp.size)).hexdigest()
    return sampled(f"{stamp.size} {stamp.other}", stamp.size, lambda start, stop: read_range(location, start, stop))


def read_range(location: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes start..stop of an object, fewer where it ends before; all of it, or from a negative start its last ones."""
    if start is not None and start == stop:
        return b""
    system, name = filesystem(location)

    limit = bounded(system, UNSIZED_BYTES if start is None or stop is None else stop - start)

    def read() -> bytes:
        if start is None or stop is None or not is_web(location):
            return bytes(system.cat_file(name, start=start, end=stop, **limit))
        with system.open(name, "rb", block_size=1, cache_type="none", size=stop) as file:  # no more than is asked for
            try:
                return bytes(sync(system.loop, file.async_fetch_range, start, stop, **limit))
            except ValueError:
                raise DataError(f"{shown(location)}: {_WHOLE_ONLY}") from None

    sync = extra("fsspec.asyn", "remote", "").sync

    with remote_errors(shown(location)):
        data: bytes = patiently(read)
    if start is not None and stop is not None and len(data) > stop - start:
        raise DataError(f"{shown(location)}: {_WHOLE_ONLY}")
    return data[start:] if start is not None and start < 0 else data  # servers without ranges answer with the whole


def opener(location: str, stamp: RemoteStamp) -> Opener:
    """A function that gives a new seekable file of the object at each call; a `DataError` if the server sends no ranges.

    The files of one opener share a cache of the blocks read last, so that each thread may have its own file. Reading
    raises `DataError` where the server fails; it never gives less than is there.
    """
    asks = is_web(location) and stamp.size > BLOCK_BYTES  # web servers do not say it, so one byte is asked for
    if not stamp.ranges or (asks and len(read_range(location, stamp.size - 1, stamp.size)) != 1):
        raise DataError(f"{shown(location)}: {_WHOLE_ONLY}")

    def fetch(start: int, stop: int) -> bytes:
        data = read_range(location, start, min(stop, stamp.size))
        if len(data) != min(stop, stamp.size) - start:
            raise changed(shown(location), "object", f"it ends at byte {start + len(data):,}")
        return data

    fsspec = extra("fsspec.spec", "remote", f"{protocol_of(location)}://")
    blocks = extra("fsspec.caching", "remote", "").BlockCache(BLOCK_BYTES, fetch, stamp.size, CACHED_BLOCKS)

    class RemoteFile(fsspec.AbstractBufferedFile):  # type: ignore[name-defined]
        loc: int

        def read(self, length: int = -1) -> bytes:
            stop = stamp.size if length < 0 else min(self.loc + length, stamp.size)
            if stop - self.loc < _UNCACHED_BYTES:
                return bytes(super().read(length))
            self.loc, start = stop, self.loc
            return fetch(start, stop)

    def open_file() -> BinaryIO:
        file = RemoteFile(None, shown(location), block_size=BLOCK_BYTES, cache_type="none", size=stamp.size)
        file.cache = blocks
        return cast(BinaryIO, file)

    return open_file


class LocalCopy:
    """A private copy on this machine, gone when it is closed or forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.close = weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)


def localise(
    location: str, stamps: RemoteStamp | Mapping[str, RemoteStamp], folder: str | Path | None = None
) -> LocalCopy:
    """Copy an object, or those of a folder as `list_folder` gives them, to a new temporary folder on this machine."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(shown(location)).name)[-100:].lstrip(".") or "file"
    if isinstance(stamps, Mapping):
        objects = {item: (f"{location.rstrip('/')}/{item}", stamp) for item, stamp in stamps.items()}
    else:
        objects = {"": (location, stamps)}
    chosen, size = Path(folder or tempfile.gettempdir()), sum(stamp.size for _, stamp in objects.values())
    with suppress(OSError):  # it may be written but not listed
        remove_leftovers(chosen, foreign=False)
    try:
        free = shutil.disk_usage(chosen).free
        if size > free * 0.95:
            raise DataError(
                f"{shown(location)}: takes {size:,} bytes on this machine, but {chosen} has {free:,} free. "
                "Free some space, or set TMPDIR to a larger disk."
            )
        copy = LocalCopy(make_temporary_folder(chosen) / name)
    except OSError as error:
        raise DataError(f"{shown(location)}: cannot be copied to {chosen} ({error.strerror or error}).") from None
    try:
        for item, (url, stamp) in objects.items():
            path, (system, key) = copy.path / item, filesystem(url)
            path.parent.mkdir(exist_ok=True)
            with remote_errors(shown(url)):
                patiently(partial(_copy, system, key, path, stamp.size, url))
            if (came := path.stat().st_size) != stamp.size:
                raise DataError(f"{shown(url)}: {came:,} bytes came, though the server said {stamp.size:,}. Run again.")
    except BaseException:
        copy.close()
        raise
    return copy


def _copy(system: Any, key: str, path: Path, size: int, url: str) -> None:
    told = {"callback": _no_more_than(size, shown(url))} if is_web(url) else {}
    system.get_file(key, str(path), **told, **bounded(system, size))


def _no_more_than(size: int, name: str) -> Any:
    """Ends a copy of which more arrives than the server said, before that fills the disk."""

    class Counted(extra("fsspec.callbacks", "remote", "").Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > size:
                raise DataError(
                    f"{name}: more than the {size:,} bytes came that the server said. It cannot be trusted."
                )

    return Counted()


def list_folder(location: str) -> dict[str, RemoteStamp]:
    """The objects right in a folder, by name, without hidden ones and those whose names no file can have."""
    system, root = filesystem(location)
    with remote_errors(shown(location)):
        entries = system.ls(root, detail=True, **bounded(system, UNSIZED_BYTES))
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
        matches = sorted(system.glob(name, **bounded(system, UNSIZED_BYTES))) if is_glob else [name]
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
        images = [folder for folder in folders if folder.lower().endswith(".zarr")]
        folders[:] = [folder for folder in folders if folder not in images and not folder.startswith(".")]
        images += [file for file in files if file.lower().endswith(suffixes)]
        yield from (f"{parent}/{image}" for image in images if not image.startswith("."))


def publish(local: Path, url: str) -> None:
    """Put a finished file, or the folder of a Zarr, at its URL.

    An object store shows an object when all of it has arrived. Of a folder the metadata of its root, without which it is
    no Zarr, come last; those of an older one are deleted first.
    """
    with _writing(url):
        _put_folder(local, url) if local.is_dir() else _put_file(local, url)


def check_writable(url: str) -> None:
    """Raise `UsageError` if nothing can be written below a URL, which is known without asking."""
    if protocol_of(url) in ("http", "https", "hf"):
        choice = "Name a local folder, or a place in an object store (s3://, gs://, az://)."
        raise UsageError(f"{shown(url)}: results cannot be written there. {choice}")


def exists(url: str) -> bool:
    """Whether an object, or the folder of a Zarr, has this name."""
    system, name = filesystem(url)
    with remote_errors(shown(url)):
        return bool(system.exists(name, **bounded(system)))


def read_small(url: str, limit: int = _MAX_RECORD_BYTES) -> bytes | None:
    """The content of a record; None if there is none, or it is larger than `limit` bytes."""
    try:
        size = RemoteStamp.of(url).size
        return read_range(url, 0, size) if size <= limit else None
    except NoSuchObject:
        return None


def write_small(url: str, content: bytes) -> None:
    """Write a record, as a whole or not at all."""
    with _writing(url):
        system, name = filesystem(url)
        system.pipe_file(name, content, **bounded(system))


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """Errors say that writing failed."""
    check_writable(url)
    try:
        with remote_errors(shown(url)):
            yield
    except NoSuchObject as error:
        raise PixelwiseError(f"{shown(url)}: cannot be written: there is no such bucket or folder.") from error


def _put_file(local: Path, url: str) -> None:
    system, name = filesystem(url)
    size = local.stat().st_size
    system.put_file(str(local), name)  # a large one in parts, which become one object at the end
    stored = RemoteStamp.of(url).size
    if stored != size:
        raise DataError(f"{shown(url)}: holds {stored:,} bytes after {size:,} were sent. Run again.")


def _put_folder(local: Path, url: str) -> None:
    system, root = filesystem(url.rstrip("/"))
    names = {item.relative_to(local).as_posix() for item in local.rglob("*") if item.is_file()}
    known = {str(name)[len(root) :].lstrip("/") for name in system.find(root)} if system.exists(root) else set()
    documents = (".zattrs", *ZARR_DOCUMENTS)
    for name in reversed(documents):
        if name in known:
            system.rm_file(f"{root}/{name}")
    first = sorted(names.difference(documents))
    system.put([str(local / name) for name in first], [f"{root}/{name}" for name in first], batch_size=_UPLOADS)
    if stale := known.difference(names, documents):
        system.rm([f"{root}/{name}" for name in sorted(stale)])
    for name in documents:
        if name in names:
            system.put_file(str(local / name), f"{root}/{name}")
