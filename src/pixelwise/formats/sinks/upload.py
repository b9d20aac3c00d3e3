"""Finished files and folders to their URL, so that the final name never holds half of them; and small records there."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import atomic_path, cannot_write, write_bytes
from pixelwise.formats.protocols import (
    NoSuchObject,
    filesystem,
    is_url,
    local_path,
    protocol_of,
    remote_errors,
    shown,
)
from pixelwise.formats.ranges import bounded, read_range
from pixelwise.formats.remote import RemoteStamp
from pixelwise.formats.sinks.ome_zarr import atomic_folder

MAX_RECORD_BYTES = 2**20
"""Records larger than this are none of ours."""

_READ_ONLY = ("http", "https", "hf")
_LAST = (".zattrs", "zarr.json", ".zarray", ".zgroup")  # what makes a folder a Zarr, in the order of upload
_BATCH_BYTES = 64 * 2**20
_BATCH_FILES = 200


def publish(local: Path, url: str) -> None:
    """Put a finished file, or the folder of a Zarr, at its final place.

    An object store shows an object when all of it has arrived; a local file is copied beside its place and renamed. Of a
    folder the metadata of its root, without which it is no Zarr, come last; those of an older one are deleted first.

    Args:
        local: the file or folder.
        url: its new name: s3://, gs://, az://, memory://, file://, or a path.

    Raises:
        PixelwiseError: it cannot be written: no permission, no network, no space.
        UsageError: nothing can be written there (https://, hf://).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels.png"
        >>> _ = path.write_bytes(b"png")
        >>> publish(path, "memory://published/labels.png")
        >>> read_small("memory://published/labels.png")
        b'png'
    """
    path = _local(url)
    if path is not None:
        with _disk_errors(path):
            _copy(local, path)
        return
    check_writable(url)
    with _writing(url):
        if local.is_dir():
            _put_folder(local, url.rstrip("/"))
        else:
            _put_file(local, url)


def check_writable(url: str) -> None:
    """Raise `UsageError` if nothing can be written below a URL, which is known without asking.

    Example:
        >>> check_writable("https://host/labels")
        Traceback (most recent call last):
            ...
        pixelwise.errors.UsageError: https://host/labels: results cannot be written there. Name a local folder, or a place \
in an object store (s3://, gs://, az://).
    """
    if is_url(url) and protocol_of(url) in _READ_ONLY:
        raise UsageError(
            f"{shown(url)}: results cannot be written there. Name a local folder, or a place in an object store "
            "(s3://, gs://, az://)."
        )


def exists(url: str) -> bool:
    """Whether a file, or the folder of a Zarr, has this name.

    Raises:
        DataError: the server cannot be asked.

    Example:
        >>> exists("memory://published/no.png")
        False
    """
    path = _local(url)
    if path is not None:
        return path.exists()
    system, name = filesystem(url)
    with remote_errors(shown(url)):
        return bool(system.exists(name, **bounded(system)))


def read_small(url: str, limit: int = MAX_RECORD_BYTES) -> bytes | None:
    """The content of a record; None if there is none, or it is larger than `limit` bytes.

    Raises:
        DataError: the server cannot be asked.

    Example:
        >>> read_small("memory://published/none.json") is None
        True
    """
    path = _local(url)
    if path is not None:
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
        return data if len(data) <= limit else None
    try:
        size = RemoteStamp.of(url).size
        return read_range(url, 0, size) if size <= limit else None
    except NoSuchObject:
        return None


def write_small(url: str, content: bytes) -> None:
    """Write a record, as a whole or not at all.

    Raises:
        PixelwiseError: it cannot be written.
        UsageError: nothing can be written there.

    Example:
        >>> write_small("memory://published/a.json", b"{}")
        >>> read_small("memory://published/a.json")
        b'{}'
    """
    path = _local(url)
    if path is not None:
        with _disk_errors(path):
            write_bytes(path, content)
        return
    check_writable(url)
    with _writing(url):
        system, name = filesystem(url)
        system.pipe_file(name, content, **bounded(system))


def _local(url: str) -> Path | None:
    if not is_url(url):
        return Path(url)
    path = local_path(url)
    return None if path is None else Path(path)


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """The words of reading mean a wrong name; those of writing should name the folder."""
    try:
        with remote_errors(shown(url)):
            yield
    except NoSuchObject as error:
        raise PixelwiseError(f"{shown(url)}: cannot be written: there is no such bucket or folder.") from error


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def _copy(local: Path, path: Path) -> None:
    if not local.is_dir():
        with atomic_path(path) as part:
            shutil.copyfile(local, part)
        return
    with atomic_folder(path) as part:
        shutil.copytree(local, part, dirs_exist_ok=True)


def _put_file(local: Path, url: str) -> None:
    system, name = filesystem(url)
    size = local.stat().st_size
    if size <= _BATCH_BYTES:
        system.pipe_file(name, local.read_bytes(), **bounded(system))
    else:  # in parts, which become one object at the end; without a limit of time, for it depends on the size
        system.put_file(str(local), name)
    stored = RemoteStamp.of(url).size
    if stored != size:
        raise DataError(f"{shown(url)}: holds {stored:,} bytes after {size:,} were sent. Run again.")


def _put_folder(local: Path, url: str) -> None:
    system, root = filesystem(url)
    files = {item.relative_to(local).as_posix(): item for item in sorted(local.rglob("*")) if item.is_file()}
    known = [str(name)[len(root) :].lstrip("/") for name in system.find(root)] if system.exists(root) else []
    for name in reversed(_LAST):
        if name in known:
            system.rm_file(f"{root}/{name}")
    first = [name for name in files if name not in _LAST]
    for batch in _batches(first, files):
        if isinstance(batch, str):
            _put_file(files[batch], f"{url}/{batch}")
        else:
            system.pipe({f"{root}/{name}": files[name].read_bytes() for name in batch})
    stale = [f"{root}/{name}" for name in known if name not in files and name not in _LAST]
    if stale:
        system.rm(stale)
    for name in _LAST:
        if name in files:
            system.pipe_file(f"{root}/{name}", files[name].read_bytes(), **bounded(system))


def _batches(names: Sequence[str], files: dict[str, Path]) -> Iterator[list[str] | str]:
    """Files to be sent together, few enough for the memory; one that is large alone, by its name."""
    batch: list[str] = []
    size = 0
    for name in names:
        own = files[name].stat().st_size
        if own > _BATCH_BYTES:
            yield name
            continue
        if batch and (size + own > _BATCH_BYTES or len(batch) == _BATCH_FILES):
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += own
    if batch:
        yield batch
