"""Opening images: plain pictures in this process, all else in the decoding child, and what lies behind URLs."""

import hashlib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats.base import Source
from pixelwise.formats.local import Identity, Stamp, readable
from pixelwise.formats.registry import FORMATS, HEAD_BYTES, format_of, function_of, named_format, picture_format
from pixelwise.formats.remote import NoSuchObject, is_url, local_path, protocol_of, shown

_HINTS = ("channels", "allow_no_affine")  # allowed for all formats: these help where a file leaves something open
_GIVEN = ("location", "opener", "identity")


def open_source(location: str | Path, *, format: str | None = None, **options: Any) -> Source:
    """Open an image of any format; only its header is read.

    Plain pictures are decoded in this process, within Pillow's limits; all others in a child process (`decoding`).

    Args:
        location: a path, or the URL of a file or Zarr folder.
        format: its format, if the content should not decide: a name of `FORMATS`.
        options: what the format offers, for example `axis` (NIfTI), `level` (slides, OME-Zarr), `series` (DICOM, OME-Zarr),
            `intensity` (NIfTI, DICOM) or `axes` (Zarr); None is as good as absent. `channels`, how many the network takes,
            and `allow_no_affine` (NIfTI) help where a file leaves something open and are welcome to all.

    Raises:
        DataError: the file is missing, damaged, or of no known format.
        UsageError: the format has no such option, or its package is not installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.npy"
        >>> np.save(path, np.zeros((4, 5, 3), dtype=np.uint8))
        >>> with open_source(path) as source:
        ...     source.info.format, source.info.height, source.info.width
        ('npy', 4, 5)
    """
    name = str(location)
    given = {key: value for key, value in options.items() if value is not None}
    path = local_path(name) if is_url(name) else name
    if path is None and protocol_of(name) == "memory":
        return open_in_process(location, format=format, **given)  # the memory is that of this process
    if path is not None and format is None:
        head = _first_bytes(path)
        if key := picture_format(head):
            return _open(key, path, given)
        if not head and not os.path.isdir(path):  # noqa: PTH112  (also of names that no file can have)
            Stamp.of(path)  # what is not there, or no file, needs no child to find out
    from pixelwise.formats.decoding import WorkerSource

    return WorkerSource(name, format, given, is_remote=path is None)


def _first_bytes(path: str) -> bytes:
    """Enough of a file to know a picture; none of a folder, a pipe or what is not there."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            return os.read(handle, 12)
        finally:
            os.close(handle)
    except (OSError, ValueError):
        return b""


def open_in_process(location: str | Path, *, format: str | None = None, **options: Any) -> Source:
    """As `open_source`, in this process whatever the format: for the child, and for files that are trusted."""
    name = str(location)
    given = {key: value for key, value in options.items() if value is not None}
    forced = None if format is None else named_format(format)
    if is_url(name):
        path = local_path(name)
        if path is None:
            return _open_remote(name, forced, given)
        name = path
    return _open_local(name, forced, given)


def _open_local(name: str, forced: str | None, options: dict[str, Any]) -> Source:
    path = Path(name)
    if os.path.isdir(path):  # noqa: PTH112  (also of names that no file can have)
        return _open(forced or _folder_format(path), name, options)
    if forced is None:
        stamp = Stamp.of(path)
        with readable(path), path.open("rb") as file:
            head = file.read(min(HEAD_BYTES, stamp.size))
        forced = format_of(head, name, level=options.get("level"))
    return _open(forced, name, options)


def _folder_format(path: Path) -> str:
    from pixelwise.formats.zarr import DOCUMENTS

    if any((path / document).is_file() for document in DOCUMENTS):
        return "zarr"
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_file() and not entry.name.startswith(".") and _is_dicom(Path(entry.path)):
                    return "dicom"
    except OSError as error:
        raise DataError(f"{path}: the folder cannot be read ({error.strerror or error}).") from error
    raise DataError(f"{path}: is a folder, but neither a Zarr (no zarr.json, .zarray or .zgroup) nor a DICOM series.")


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _open(key: str, location: str, options: dict[str, Any], **given: Any) -> Source:
    """Open by the function of a format, after a look whether it has such options."""
    function = function_of(key, "opens")
    offered = [name for name in _parameters(key) if name not in _GIVEN]
    for name in options:
        if name not in offered and name not in _HINTS:
            has = [option for option in offered if option not in (*_HINTS, "labels")]
            choice = f"it has {', '.join(has)}" if has else "it has no options"
            raise UsageError(f"{shown(location)}: its format ({key}) has no option {name}; {choice}.")
    try:
        source: Source = function(
            location, **{name: value for name, value in options.items() if name in offered}, **given
        )
    except UsageError as error:  # a package is missing, or an option is wrong: which image needs it?
        if shown(location) in str(error):
            raise
        raise UsageError(f"{shown(location)}: {error}") from error
    return source


@cache
def _parameters(key: str) -> tuple[str, ...]:
    """Of the function that opens a format."""
    return tuple(inspect.signature(function_of(key, "opens")).parameters)


def _open_remote(url: str, forced: str | None, options: dict[str, Any]) -> Source:
    """Open by parts where the format can be, else as a copy on this machine."""
    from pixelwise.formats import remote

    lower = shown(url).rstrip("/").lower()
    if forced == "zarr" or (forced is None and lower.endswith(FORMATS["zarr"].suffixes)):
        return _open("zarr", url, options)
    try:
        stamp = remote.RemoteStamp.of(url)
    except DataError as error:
        if isinstance(error, NoSuchObject) or "is a folder" in str(error):
            source = _open_remote_folder(url, forced, options)
            if source is not None:
                return source
        raise
    parts = remote.sends_ranges(url, stamp)
    opener = remote.opener(url, stamp) if parts else None
    if forced is None:
        if opener is not None:
            with opener() as file:  # what it reads is kept for whoever reads on
                head = file.read(HEAD_BYTES)
        else:
            head = remote.read_range(url, 0, min(HEAD_BYTES, stamp.size))
        forced = format_of(head, url, opener, options.get("level"))
    if forced == "zarr" and parts:
        return _open("zarr", url, options)
    identity = Identity(fingerprint=lambda: remote.fingerprint(url, stamp), check=lambda: stamp.check(url))
    if opener is not None and "opener" in _parameters(forced):
        return _open(forced, shown(url), options, opener=opener, identity=identity)
    return _localised(forced, url, remote.localise(url, stamp=stamp), options, identity)


def _open_remote_folder(url: str, forced: str | None, options: dict[str, Any]) -> Source | None:
    """A Zarr, read by parts, or a DICOM series, of which all files are copied; None if it is neither."""
    from pixelwise.formats import remote
    from pixelwise.formats.zarr import is_zarr_folder

    if is_zarr_folder(url):
        return _open("zarr", url, options)
    if remote.protocol_of(url) in ("http", "https"):
        return None
    stamps = remote.list_folder(url)
    is_series = any(remote.read_range(f"{url.rstrip('/')}/{name}", 128, 132) == b"DICM" for name in list(stamps)[:3])
    if not is_series and (forced != "dicom" or not stamps):
        return None

    def check() -> None:
        if remote.list_folder(url) != stamps:
            raise DataError(f"{shown(url)}: the series changed while it was read. Run again when nothing writes to it.")

    def fingerprint() -> str:
        parts = (remote.fingerprint(f"{url.rstrip('/')}/{name}", stamp) for name, stamp in stamps.items())
        return hashlib.sha256(repr(list(zip(stamps, parts, strict=True))).encode()).hexdigest()

    identity = Identity(fingerprint=fingerprint, check=check)
    return _localised("dicom", url, remote.localise_folder(url, stamps), options, identity)


def _localised(key: str, url: str, copy: Any, options: dict[str, Any], identity: Any) -> Source:
    try:
        with _renamed(str(copy.path), shown(url)):
            return LocalisedSource(_open(key, str(copy.path), options), copy, shown(url), identity)
    except BaseException:
        copy.close()
        raise


class LocalisedSource(Source):
    """An image behind a URL that is read from a copy on this machine, which is deleted when it is closed."""

    def __init__(self, source: Source, copy: Any, name: str, identity: Any) -> None:
        self._source, self._copy, self._name, self._identity = source, copy, name, identity
        self.info = replace(source.info, location=name)
        self.metadata = source.metadata

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window, from the copy."""
        with _renamed(str(self._copy.path), self._name):
            return self._source.read(top, left, height, width, plane)

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where the window holds data, from the copy."""
        with _renamed(str(self._copy.path), self._name):
            return self._source.valid(top, left, height, width, plane)

    def fingerprint(self) -> str:
        """That of the object behind the URL."""
        return str(self._identity.fingerprint())

    def check_unchanged(self) -> None:
        """Raise `DataError` if the object behind the URL has changed."""
        self._identity.check()

    def close(self) -> None:
        """Delete the copy."""
        self._source.close()
        self._copy.close()


@contextmanager
def _renamed(path: str, name: str) -> Iterator[None]:
    """Errors name the URL, not the copy of it."""
    try:
        yield
    except PixelwiseError as error:
        raise type(error)(str(error).replace(path, name)) from error
