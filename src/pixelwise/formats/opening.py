"""Opening images: plain pictures in this process, all else in the decoding child, and what lies behind URLs."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import remote
from pixelwise.formats.base import Opener, Source
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
    path = local_path(name) if is_url(name) else name
    if path is None:
        return _open_remote(name, forced, given)
    if forced is None and os.path.isdir(path):  # noqa: PTH112  (also of names that no file can have)
        forced = _folder_format(Path(path))
    elif forced is None:
        Stamp.of(path)
        with readable(path), Path(path).open("rb") as file:
            forced = format_of(file.read(HEAD_BYTES), path, level=given.get("level"))
    return _open(forced, path, given)


def _folder_format(path: Path) -> str:
    from pixelwise.formats.zarr import DOCUMENTS

    if any((path / document).is_file() for document in DOCUMENTS):
        return "zarr"
    try:
        for item in path.iterdir():
            if item.is_file() and not item.name.startswith("."):
                with item.open("rb") as file:
                    if file.read(132)[128:] == b"DICM":
                        return "dicom"
    except OSError as error:
        raise DataError(f"{path}: the folder cannot be read ({error.strerror or error}).") from error
    raise DataError(f"{path}: is a folder, but neither a Zarr (no zarr.json, .zarray or .zgroup) nor a DICOM series.")


def _open(key: str, location: str, options: dict[str, Any], **given: Any) -> Source:
    """Open by the function of a format, after a look whether it has such options."""
    function = function_of(key, "opens")
    offered = [name for name in _parameters(key) if name not in _GIVEN]
    for name in options:
        if name not in offered and name not in _HINTS:
            has = [option for option in offered if option not in (*_HINTS, "labels")]
            choice = f"it has {', '.join(has)}" if has else "it has no options"
            raise UsageError(f"{shown(location)}: its format ({key}) has no option {name}; {choice}.")
    given |= {name: value for name, value in options.items() if name in offered}
    try:
        source: Source = function(location, **given)
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
    """Open by ranges where the format can be and the server sends them, else as a copy on this machine."""
    if forced == "zarr" or (forced is None and shown(url).rstrip("/").lower().endswith(FORMATS["zarr"].suffixes)):
        return _open("zarr", url, options)
    try:
        stamp = remote.RemoteStamp.of(url)
    except DataError as error:
        is_folder = isinstance(error, NoSuchObject) or "is a folder" in str(error)
        if not is_folder or (source := _open_remote_folder(url, forced, options)) is None:
            raise
        return source
    opener: Opener | None = None
    with suppress(DataError):
        opener = remote.opener(url, stamp)
    if forced is None and opener is not None:
        with opener() as file:  # what it reads is kept for whoever reads on
            forced = format_of(file.read(HEAD_BYTES), shown(url), opener, options.get("level"))
    elif forced is None:
        head = remote.read_range(url, 0, min(HEAD_BYTES, stamp.size))
        forced = format_of(head, shown(url), None, options.get("level"))
    if forced == "zarr" and opener is not None:
        return _open("zarr", url, options)
    identity = Identity(fingerprint=lambda: remote.fingerprint(url, stamp), check=lambda: stamp.check(url))
    if opener is not None and "opener" in _parameters(forced):
        return _open(forced, shown(url), options, opener=opener, identity=identity)
    return _CopiedSource(url, stamp, identity, lambda path: _open(forced, path, options))


def _open_remote_folder(url: str, forced: str | None, options: dict[str, Any]) -> Source | None:
    """A Zarr, read by ranges, or a DICOM series, of which all files are copied; None if it is neither."""
    from pixelwise.formats.zarr import is_zarr_folder

    if is_zarr_folder(url):
        return _open("zarr", url, options)
    if remote.is_web(url):
        return None
    base, stamps = url.rstrip("/"), remote.list_folder(url)
    is_series = any(remote.read_range(f"{base}/{name}", 128, 132) == b"DICM" for name in list(stamps)[:3])
    if not is_series and (forced != "dicom" or not stamps):
        return None

    def content(found: Any) -> list[Any]:
        return [(name, remote.fingerprint(f"{base}/{name}", stamp)) for name, stamp in found.items()]

    identity = Identity.of_files(lambda: remote.list_folder(url), content, shown(url), "series")
    return _CopiedSource(url, stamps, identity, lambda path: _open("dicom", path, options))


class _CopiedSource(Source):
    """An image behind a URL that is read from a copy on this machine, which is deleted when it is closed."""

    def __init__(self, url: str, stamps: Any, identity: Identity, open_copy: Callable[[str], Source]) -> None:
        self._name, self._identity = shown(url), identity
        self._copy = remote.localise(url, stamps)
        try:
            with self._renamed():
                self._source = open_copy(str(self._copy.path))
        except BaseException:
            self._copy.close()
            raise
        self.info, self.metadata = replace(self._source.info, location=self._name), self._source.metadata

    @contextmanager
    def _renamed(self) -> Iterator[None]:
        """Errors name the URL, not the copy of it."""
        try:
            yield
        except PixelwiseError as error:
            raise type(error)(str(error).replace(str(self._copy.path), self._name)) from error

    def read(self, *window: int, **plane: int) -> NDArray[Any]:
        with self._renamed():
            return self._source.read(*window, **plane)

    def valid(self, *window: int, **plane: int) -> NDArray[np.bool_] | None:
        with self._renamed():
            return self._source.valid(*window, **plane)

    def fingerprint(self) -> str:
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        self._identity.check()

    def close(self) -> None:
        self._source.close()
        self._copy.close()
