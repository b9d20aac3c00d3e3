"""Opening images of any format in this process: for the decoding child, and for URLs of this process's own memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.formats import remote
from pixelwise.formats.base import Opener, Source
from pixelwise.formats.local import HEAD_BYTES, Identity, Stamp, is_dicom_head, local_path, readable, shown
from pixelwise.formats.registry import FORMATS, format_of, named_format, open_as, reads_parts
from pixelwise.formats.urls import NoSuchObject, is_web


def open_in_process(location: str | Path, *, format: str | None = None, **options: Any) -> Source:
    """As `open_source`, in this process whatever the format: for the child, and for files that are trusted."""
    name = str(location)
    given = {key: value for key, value in options.items() if value is not None}
    forced = None if format is None else named_format(format)
    path = local_path(name)
    if path is None:
        return _open_remote(name, forced, given)
    if forced is None and os.path.isdir(path):  # noqa: PTH112  (also of names that no file can have)
        forced = _folder_format(Path(path))
    elif forced is None:
        Stamp.of(path)
        with readable(path), Path(path).open("rb") as file:
            forced = format_of(file.read(HEAD_BYTES), path, level=given.get("level"))
    return open_as(forced, path, given)


def _folder_format(path: Path) -> str:
    from pixelwise.formats.zarr.store import DOCUMENTS

    if any((path / document).is_file() for document in DOCUMENTS):
        return "zarr"
    try:
        for item in path.iterdir():
            if item.is_file() and not item.name.startswith("."):
                with item.open("rb") as file:
                    if is_dicom_head(file.read(HEAD_BYTES)):
                        return "dicom"
    except OSError as error:
        raise DataError(f"{path}: the folder cannot be read ({error.strerror or error}).") from error
    raise DataError(f"{path}: is a folder, but neither a Zarr (no zarr.json, .zarray or .zgroup) nor a DICOM series.")


def _open_remote(url: str, forced: str | None, options: dict[str, Any]) -> Source:
    """Open by ranges where the format can be and the server sends them, else as a copy on this machine."""
    if forced == "zarr" or (forced is None and shown(url).rstrip("/").lower().endswith(FORMATS["zarr"].suffixes)):
        return open_as("zarr", url, options)
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
    if forced is None:
        # what an opened file reads is kept for whoever reads on
        head = opener().read(HEAD_BYTES) if opener else remote.read_range(url, 0, min(HEAD_BYTES, stamp.size))
        forced = format_of(head, shown(url), opener, options.get("level"))
    if forced == "zarr" and opener is not None:
        return open_as("zarr", url, options)
    identity = Identity(fingerprint=lambda: remote.fingerprint(url, stamp), check=lambda: stamp.check(url))
    if opener is not None and reads_parts(forced):
        return open_as(forced, shown(url), options, opener=opener, identity=identity)
    return _CopiedSource(url, stamp, identity, lambda path: open_as(forced, path, options))


def _open_remote_folder(url: str, forced: str | None, options: dict[str, Any]) -> Source | None:
    """A Zarr, read by ranges, or a DICOM series, of which all files are copied; None if it is neither."""
    from pixelwise.formats.zarr.store import is_zarr_folder

    if is_zarr_folder(url):
        return open_as("zarr", url, options)
    if is_web(url):
        return None
    base, stamps = url.rstrip("/"), remote.list_folder(url)
    is_series = any(remote.read_range(f"{base}/{name}", 128, 132) == b"DICM" for name in list(stamps)[:3])
    if not is_series and (forced != "dicom" or not stamps):
        return None

    def content(found: Any) -> list[Any]:
        return [(name, remote.fingerprint(f"{base}/{name}", stamp)) for name, stamp in found.items()]

    identity = Identity.of_files(lambda: remote.list_folder(url), content, shown(url), "series")
    return _CopiedSource(url, stamps, identity, lambda path: open_as("dicom", path, options))


class _CopiedSource(Source):
    """An image behind a URL that is read from a copy on this machine, which is deleted when it is closed."""

    def __init__(self, url: str, stamps: Any, identity: Identity, open_copy: Callable[[str], Source]) -> None:
        self._name, self.identity = shown(url), identity
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

    def close(self) -> None:
        self._source.close()
        self._copy.close()
