"""Finished files and folders to their URL, so that the final name never holds half of them; and small records there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import ZARR_DOCUMENTS, atomic_folder, atomic_path, cannot_write, write_bytes
from pixelwise.formats.remote.objects import RemoteStamp, read_range
from pixelwise.formats.remote.urls import (
    NoSuchObject,
    bounded,
    filesystem,
    is_url,
    local_path,
    protocol_of,
    remote_errors,
    shown,
)

MAX_RECORD_BYTES = 2**20
"""Records larger than this are none of ours."""

_UPLOADS = 8  # at a time


def publish(local: Path, url: str) -> None:
    """Put a finished file, or the folder of a Zarr, at its final place.

    An object store shows an object when all of it has arrived; a local file is copied beside its place and renamed. Of a
    folder the metadata of its root, without which it is no Zarr, come last; those of an older one are deleted first.
    """
    with _writing(url) as path:
        if path is None:
            _put_folder(local, url) if local.is_dir() else _put_file(local, url)
        elif local.is_dir():
            with atomic_folder(path) as part:
                shutil.copytree(local, part, dirs_exist_ok=True)
        else:
            with atomic_path(path) as part:
                shutil.copyfile(local, part)


def check_writable(url: str) -> None:
    """Raise `UsageError` if nothing can be written below a URL, which is known without asking."""
    if is_url(url) and protocol_of(url) in ("http", "https", "hf"):
        choice = "Name a local folder, or a place in an object store (s3://, gs://, az://)."
        raise UsageError(f"{shown(url)}: results cannot be written there. {choice}")


def exists(url: str) -> bool:
    """Whether a file, or the folder of a Zarr, has this name."""
    path = _local(url)
    if path is not None:
        return path.exists()
    system, name = filesystem(url)
    with remote_errors(shown(url)):
        return bool(system.exists(name, **bounded(system)))


def read_small(url: str, limit: int = MAX_RECORD_BYTES) -> bytes | None:
    """The content of a record; None if there is none, or it is larger than `limit` bytes."""
    path = _local(url)
    try:
        size = RemoteStamp.of(url).size if path is None else path.stat().st_size
        if size > limit:
            return None
        return read_range(url, 0, size) if path is None else path.read_bytes()
    except (NoSuchObject, FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def write_small(url: str, content: bytes) -> None:
    """Write a record, as a whole or not at all."""
    with _writing(url) as path:
        if path is not None:
            return write_bytes(path, content)
        system, name = filesystem(url)
        system.pipe_file(name, content, **bounded(system))


def _local(url: str) -> Path | None:
    path = local_path(url) if is_url(url) else url
    return None if path is None else Path(path)


@contextmanager
def _writing(url: str) -> Iterator[Path | None]:
    """The path behind a name, None for a URL; errors say that writing failed."""
    path = _local(url)
    if path is not None:
        try:
            yield path
        except OSError as error:
            raise cannot_write(path, error) from error
        return
    check_writable(url)
    try:
        with remote_errors(shown(url)):
            yield None
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
