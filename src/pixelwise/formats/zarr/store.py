"""Where the chunks of a Zarr lie (a folder, a ZIP archive, a URL), and which of its arrays are opened by zarr-python.

Numbers in known codecs only: nothing that a chunk holds is run. Metadata that make no sense and chunks that grow without
bounds end in the decoding process, which has little memory and little time.
"""

import asyncio
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pixelwise.errors import DataError
from pixelwise.extras import extra
from pixelwise.files import ZARR_DOCUMENTS
from pixelwise.formats import remote
from pixelwise.formats.local import WHOLE_BYTES, Identity, Stamp, fingerprint, local_path, shown, silence
from pixelwise.formats.remote import RemoteStamp, read_range
from pixelwise.formats.urls import UNSIZED_BYTES, NoSuchObject, bounded, filesystem, is_web, remote_errors

DOCUMENTS = (*ZARR_DOCUMENTS, ".zattrs")

_CODECS = (
    "bytes", "transpose", "crc32c", "sharding_indexed", "blosc", "zstd", "gzip", "zlib", "lz4", "bz2", "lzma",
    "delta", "shuffle", "fixedscaleoffset", "quantize", "bitround", "packbits", "astype",
)  # fmt: skip
_MAX_SIDE = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """An open store of zarr-python."""

    name: str  # path or URL, as it may be shown
    store: Any
    identity: Callable[[str], Identity]  # of the array or group at a path
    top: str = ""  # the path in the store at which the Zarr begins
    close: Callable[[], None] = lambda: None


def open_place(location: str) -> Place:
    """The store at a path or URL."""
    storage = extra("zarr.storage", "zarr", "Zarr")
    path = local_path(location)
    if path is not None and Path(path).is_dir():
        root = Path(path)
        store = storage.LocalStore(root, read_only=True)
        return Place(name=path, store=store, identity=lambda prefix: _local_identity(root, prefix))
    if path is not None:
        of_file = Identity.local(path)  # says what is wrong with the name
        if not zipfile.is_zipfile(path):
            raise DataError("this is neither a Zarr folder nor a ZIP archive of one.")
        with zipfile.ZipFile(path) as archive:
            top = _top(archive)
        store = storage.ZipStore(Path(path), mode="r")
        return Place(name=path, store=store, top=top, identity=lambda prefix: of_file, close=store.close)
    name = shown(location)
    if not name.lower().endswith(".zip"):
        store = storage.FsspecStore(_objects(location), read_only=True, path="", allowed_exceptions=(NoSuchObject,))
        return Place(name=name, store=store, identity=lambda prefix: _remote_identity(location, prefix))
    stamp = RemoteStamp.of(location)
    file = remote.opener(location, stamp)()
    system = extra("fsspec.implementations.zip", "remote", "URLs").ZipFileSystem(fo=file)
    wrapper = extra("fsspec.implementations.asyn_wrapper", "remote", "URLs").AsyncFileSystemWrapper
    store = storage.FsspecStore(wrapper(system, asynchronous=True), read_only=True, path="")
    of_archive = Identity(lambda: remote.fingerprint(location, stamp), lambda: stamp.check(location))
    return Place(name=name, store=store, top=_top(system.zip), identity=lambda prefix: of_archive, close=file.close)


def is_zarr_folder(url: str) -> bool:
    """Whether the documents of a Zarr lie at a URL."""
    for name in DOCUMENTS:
        with suppress(NoSuchObject):
            read_range(_below(url, name), 0, 1)
            return True
    return False


def open_node(place: Place, path: str) -> Any:
    """The array or group of zarr-python at a path."""
    zarr = extra("zarr", "zarr", "Zarr")
    _check_blosc()
    try:
        with silence():
            node = zarr.open(store=place.store, path=f"{place.top}/{path}".strip("/"), mode="r", use_consolidated=False)
    except FileNotFoundError:
        raise DataError("there is no Zarr array or group (no zarr.json, .zarray or .zgroup).") from None
    if not isinstance(node, zarr.Array):
        return node
    if not node.shape or min(node.shape) < 1 or max(node.shape) > _MAX_SIDE:
        raise DataError(f"its shape is {node.shape}; each side should be from 1 to {_MAX_SIDE:,}.")
    metadata = node.metadata
    if metadata.zarr_format == 3:
        _check_codecs(metadata.to_dict()["codecs"])
    else:
        _check_codecs(codec.get_config() for codec in (metadata.compressor, *(metadata.filters or ())) if codec)
    return node


def _check_codecs(codecs: Iterable[Mapping[str, Any]]) -> None:
    """Refuse every codec that is not known to turn numbers into numbers."""
    for codec in codecs:
        name = str(codec.get("name") or codec.get("id"))
        if name.removeprefix("numcodecs.") not in _CODECS:
            raise DataError(f"its codec {name[:60]!r} is not supported; possible are {', '.join(_CODECS)}.")
        inner = codec.get("configuration") or {}
        _check_codecs((*inner.get("codecs", ()), *inner.get("index_codecs", ())))


@cache
def _check_blosc() -> None:
    """Have Blosc compare the lengths, for it fills the rest of a truncated chunk with whatever it finds in memory."""
    blosc = extra("numcodecs", "zarr", "Zarr").Blosc
    decode = blosc.decode

    def checked(codec: Any, content: Any, out: Any = None) -> Any:
        view = memoryview(content).cast("B")
        if len(view) < max(packed := int.from_bytes(view[12:16], "little"), 16):
            raise DataError(f"a chunk is truncated: {len(view):,} of {packed:,} bytes are there.")
        return decode(codec, content, out)

    blosc.decode = checked


def _top(archive: zipfile.ZipFile) -> str:
    """The one folder in which everything in an archive lies, "" where there is none."""
    names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    return tops.pop() if len(tops) == 1 and not any(name in DOCUMENTS for name in names) else ""


def _below(url: str, path: str) -> str:
    """The URL of a path in a folder; a query (a signature) stays at the end."""
    base, mark, query = url.partition("?")
    return f"{base.rstrip('/')}/{path}".rstrip("/") + mark + query


def _objects(location: str) -> Any:
    """The file system of fsspec that reads below a URL, each object by `read_range`."""

    class Objects(extra("fsspec.asyn", "remote", "URLs").AsyncFileSystem):  # type: ignore[misc]
        cachable = False

        async def _cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
            return await asyncio.to_thread(read_range, _below(location, path), start, end)

    return Objects(asynchronous=True)


def _local_identity(root: Path, prefix: str) -> Identity:
    """Of all files below a folder, and the documents of the root; of large folders times count, not contents."""

    def stamps() -> dict[str, Stamp]:
        paths = {Path(parent, name) for parent, _, names in os.walk(root / prefix) for name in names}
        paths |= {root / name for name in DOCUMENTS if (root / name).is_file()}
        return {path.relative_to(root).as_posix(): Stamp.of(path) for path in sorted(paths)}

    def content(found: Mapping[str, Stamp]) -> list[Any]:
        is_small = sum(stamp.size for stamp in found.values()) <= WHOLE_BYTES
        return [
            (name, stamp.size, fingerprint(root / name) if is_small else stamp.mtime_ns)
            for name, stamp in found.items()
        ]

    return Identity.of_files(stamps, content, str(root), "array")


def _remote_identity(location: str, prefix: str) -> Identity:
    """Of all objects below a folder; of web servers, which list none, of the documents alone."""

    def stamps() -> dict[str, RemoteStamp]:
        found = {}
        if not is_web(location):
            system, root = filesystem(_below(location, prefix))
            with remote_errors(shown(location)):
                entries = sorted(system.find(root, detail=True, **bounded(system, UNSIZED_BYTES)).items())
            found = {
                str(path)[len(root) :].lstrip("/"): RemoteStamp.from_info(info, location) for path, info in entries
            }
        for key in dict.fromkeys(f"{place}/{name}" for place in ("", f"/{prefix}".rstrip("/")) for name in DOCUMENTS):
            with suppress(NoSuchObject):
                found[key] = RemoteStamp.of(_below(location, key.lstrip("/")))
        return found

    def content(found: Mapping[str, RemoteStamp]) -> list[Any]:
        return [(name, stamp.size, stamp.content or stamp.other) for name, stamp in found.items()]

    return Identity.of_files(stamps, content, shown(location), "array")
