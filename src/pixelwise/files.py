"""Writing files so that a name never holds half of its content, whatever is killed when."""

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pixelwise.errors import DataError, PixelwiseError

ZARR_DOCUMENTS = ("zarr.json", ".zarray", ".zgroup")
"""A folder with one of these is a Zarr."""

MAX_YAML_BYTES = 16 << 20
MAX_JSON_BYTES = 256 << 20
_MAX_YAML_VALUES, _MAX_YAML_DEPTH, _MAX_YAML_TEXT = 100_000, 50, 10_000
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is many times faster
_LEFTOVER = re.compile(r"\..+\.(?P<home>[0-9a-f]{6})-(?P<pid>[0-9a-f]+)-[0-9a-z_]{8}\.(part(\..*)?|old)", re.DOTALL)
_DAY_S = 24 * 60 * 60


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; its content takes the final name when the block ends without an error.

    The content reaches the disk before the rename does, so a power cut leaves the old file or the new one. The temporary
    name keeps the suffix of `path`, because writers such as Pillow choose the format by it.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_path(target) as part:
        ...     _ = part.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = hidden_name(path, f"part{path.suffix}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        _allow_as_others(part)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(part):
            error.filename = str(path)  # the name that the user knows
        raise


def hidden_name(path: Path, end: str) -> Path:
    """A new hidden name beside `path`, which tells the process that it belongs to: see `remove_leftovers`."""
    return path.with_name(f".{short_name(path.name, 100)}.{_home()}-{os.getpid():x}-{secrets.token_hex(4)}.{end}")


def make_temporary_folder(parent: Path | None = None) -> Path:
    """A new folder of this user's alone, in that of temporary files or another; its name is as those of `hidden_name`."""
    if parent is None:
        with suppress(OSError):  # a folder that may be written but not listed
            remove_leftovers(Path(tempfile.gettempdir()), foreign=False)
    return Path(tempfile.mkdtemp(".part", f".pixelwise.{_home()}-{os.getpid():x}-", parent))


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """As `make_temporary_folder`; it is removed when the block ends."""
    folder = make_temporary_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def short_name(name: str, most_bytes: int) -> str:
    """A name in at most so many bytes, since file systems allow 255; a longer one is cut, and a hash tells it from others.

    Example:
        >>> short_name("scan.tif", 40), short_name("x" * 300, 20)
        ('scan.tif', 'xxxxxxxxxxx-0d4e2ca9')
    """
    if len(os.fsencode(name)) <= most_bytes:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    while len(os.fsencode(name)) > most_bytes - len(digest) - 1:
        name = name[:-1]
    return f"{name}-{digest}"


def remove_leftovers(*folders: Path, foreign: bool = True) -> None:
    """Remove what processes that were killed have left half written in these folders; what lives is left alone.

    Whether a process of another machine or container still writes cannot be known; its files go when they are a day old,
    or not at all without `foreign`, where files may be in use for days.
    """
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            match = _LEFTOVER.fullmatch(path.name)
            if match is None or _may_be_written(path, match["home"], int(match["pid"], 16), foreign):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):  # another call was faster
                    path.unlink()


def _may_be_written(path: Path, home: str, pid: int, foreign: bool) -> bool:
    with suppress(OSError):
        if home != _home() or os.name != "posix":
            return not foreign or time.time() - path.lstat().st_mtime < _DAY_S
        if pid == os.getpid():
            return True
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True


@lru_cache(maxsize=1)
def _home() -> str:
    """Six hex digits for the place where process numbers mean something: this machine since its start, this container."""
    told = [platform.node()]
    with suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        told.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("".join(told).encode()).hexdigest()[:6]


def _allow_as_others(path: Path) -> None:
    """Let others read a file as the user's umask says, whatever the library thought that wrote it (safetensors: nobody)."""
    with suppress(OSError):  # not every file system has permissions
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)  # the only other way to ask; for a moment other threads are more careful than they need be
    os.umask(mask)
    return mask


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """As `atomic_path`; whatever the system refuses is a `PixelwiseError` that names the file, see `cannot_write`."""
    try:
        with atomic_path(path) as part:
            yield part
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends without an error; for Zarr.

    An older folder steps aside for the moment of the rename and is deleted then. Whatever is killed when, `path` is the
    old folder, the new one, or missing; never a mixture.

    Raises:
        PixelwiseError: the name belongs to something that is no Zarr.
    """
    if os.path.lexists(path) and not any((path / name).is_file() for name in ZARR_DOCUMENTS):
        raise PixelwiseError(f"{path}: exists and is no Zarr, so it is kept. Choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = (hidden_name(path, end) for end in ("part", "old"))
    try:
        part.mkdir()
        yield part
        _flush(part)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            path.rename(old)
        try:
            part.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        for rest in (part, old):
            shutil.rmtree(rest, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Wait until the disk has all files, so that a power cut cannot leave empty ones under the final name."""

    def flush(item: Path) -> None:
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    with ThreadPoolExecutor(8, thread_name_prefix="pixelwise-flush") as pool:  # the disk sees many waits as one
        for _ in pool.map(flush, (item for item in folder.rglob("*") if item.is_file())):
            pass


def cannot_write(path: str | Path, error: OSError, more: str = "") -> PixelwiseError:
    """The error to raise instead of one of the system.

    Example:
        >>> print(cannot_write("a.tif", OSError(errno.ENOSPC, "No space left on device")))
        a.tif: cannot be written (No space left on device). Free some space or choose another folder.
        >>> print(cannot_write("a.tif", OSError(errno.EROFS, "Read-only file system"), "what is finished is kept"))
        a.tif: cannot be written (Read-only file system). Choose another folder; what is finished is kept.
    """
    if error.errno == errno.ENAMETOOLONG:
        return DataError(
            f"{path}: its name is too long for this disk, which takes 255 bytes at most. Give the image a shorter name."
        )
    advice = "Free some space or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Choose"
    return PixelwiseError(
        f"{path}: cannot be written ({error.strerror or error}). {advice} another folder{'; ' * bool(more)}{more}."
    )


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_path(path) as part:
        part.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Write `content` to `path` atomically, as UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN is written as null so that any JSON reader accepts the file."""
    write_text(path, json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, unreadable, larger than 256 MB or not JSON.
    """
    try:
        return json.loads(read_regular(Path(path), MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file; it may come from anywhere, so it has limits that no honest file meets, see `parse_yaml`.

    Raises:
        DataError: the file is missing, unreadable, no regular file, larger than 16 MB or not YAML.
    """
    try:
        return parse_yaml(read_regular(Path(path), MAX_YAML_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date such as 2001-99-99
        raise DataError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:200]}).") from error


def parse_yaml(text: str) -> Any:
    """Plain values from YAML without aliases, of at most 100,000 values; more would take minutes and gigabytes.

    Raises:
        ValueError: it is beyond the limits, or a value is impossible.
        yaml.YAMLError: it is not YAML.

    Example:
        >>> parse_yaml("a: [&x 1, *x]")
        Traceback (most recent call last):
            ...
        ValueError: line 1 holds the alias *x; aliases are not read, write the value itself
    """
    values = depth = 0
    for event in yaml.parse(text, Loader=_YAML_LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"line {line} holds the alias *{event.anchor}; aliases are not read, write the value itself"
            )
        opens = isinstance(event, yaml.CollectionStartEvent)
        depth += opens - isinstance(event, yaml.CollectionEndEvent)
        values += opens or isinstance(event, yaml.ScalarEvent)
        if depth > _MAX_YAML_DEPTH or values > _MAX_YAML_VALUES:
            raise ValueError(
                f"at most {_MAX_YAML_VALUES:,} values and {_MAX_YAML_DEPTH} levels are read; see line {line}"
            )
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_YAML_TEXT:
            raise ValueError(
                f"line {line} holds a value of {len(event.value):,} characters, at most {_MAX_YAML_TEXT:,}"
            )
    return yaml.load(text, Loader=_YAML_LOADER)


def read_regular(path: Path, most_bytes: int | None = None) -> bytes:
    """The content of a file from outside; a pipe or a device would never end, so they are not opened.

    Raises:
        ValueError: it is no regular file, or is larger than `most_bytes`.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise ValueError(f"it has {status.st_size:,} bytes; at most {most_bytes:,} are read")
    with path.open("rb") as file:
        return file.read(-1 if most_bytes is None else most_bytes)


def read_ends(path: Path, most_bytes: int) -> bytes:
    """The first and the last bytes of a regular file, so many of each; all of a smaller one."""
    size = path.stat().st_size
    if size <= 2 * most_bytes:
        return read_regular(path, 2 * most_bytes)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        head = file.read(most_bytes)
        file.seek(size - most_bytes)
        return head + file.read(most_bytes)


def without_nan(value: Any) -> Any:
    """A copy of nested values with None for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
