"""Where the chunks of a Zarr lie (a folder, a ZIP archive, a URL), and which of its arrays are opened by zarr-python.

Numbers in known codecs only: nothing that a chunk holds is run. Metadata that make no sense and chunks that grow without
bounds end in the decoding process, which has little memory and little time.
"""

import asyncio
import hashlib
import os
import stat
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pixelwise.errors import DataError
from pixelwise.files import ZARR_DOCUMENTS, extra
from pixelwise.formats import remote
from pixelwise.formats.local import WHOLE_BYTES, Identity
from pixelwise.formats.local import fingerprint as file_fingerprint
from pixelwise.formats.raster import silence
from pixelwise.formats.remote import NoSuchObject, RemoteStamp, bounded, read_range, shown

DOCUMENTS = (*ZARR_DOCUMENTS, ".zattrs")

_CODECS = (
    "bytes", "transpose", "crc32c", "sharding_indexed", "blosc", "zstd", "gzip", "zlib", "lz4", "bz2", "lzma",
    "delta", "shuffle", "fixedscaleoffset", "quantize", "bitround", "packbits", "astype",
)  # fmt: skip
_MAX_SIDE = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """An open store of zarr-python.

    Attributes:
        name: path or URL, as it may be shown.
        store: of zarr-python, read only.
        top: the path in it at which the Zarr begins.
        identity: tells of the array or group at a path whether it changed.
        close: lets go of the files.
    """

    name: str
    store: Any
    identity: Callable[[str], Identity]
    top: str = ""
    close: Callable[[], None] = lambda: None


def open_place(location: str) -> Place:
    """The store at a path or URL."""
    storage = extra("zarr.storage", "zarr", "Zarr")
    path = remote.local_path(location) if remote.is_url(location) else location
    if path is not None and Path(path).is_dir():
        root = Path(path)
        return Place(
            name=path,
            store=storage.LocalStore(root, read_only=True),
            identity=lambda prefix: _local_identity(root, prefix),
        )
    if path is not None:
        identity = Identity.local(path)  # says what is wrong with the name
        if not zipfile.is_zipfile(path):
            raise DataError("this is neither a Zarr folder nor a ZIP archive of one.")
        with zipfile.ZipFile(path) as archive:
            top = _top(archive)
        store = storage.ZipStore(Path(path), mode="r")
        return Place(name=path, store=store, top=top, identity=lambda prefix: identity, close=store.close)
    if not shown(location).lower().endswith(".zip"):
        return Place(
            name=shown(location),
            store=storage.FsspecStore(_objects(location), read_only=True, path="", allowed_exceptions=(NoSuchObject,)),
            identity=lambda prefix: _remote_identity(location, prefix),
        )
    stamp = RemoteStamp.of(location)
    file = remote.opener(location, stamp)()
    system = extra("fsspec.implementations.zip", "remote", "URLs").ZipFileSystem(fo=file)
    wrapper = extra("fsspec.implementations.asyn_wrapper", "remote", "URLs").AsyncFileSystemWrapper
    of_archive = Identity(lambda: remote.fingerprint(location, stamp), lambda: stamp.check(location))
    return Place(
        name=shown(location),
        store=storage.FsspecStore(wrapper(system, asynchronous=True), read_only=True, path=""),
        top=_top(system.zip),
        identity=lambda prefix: of_archive,
        close=file.close,
    )


def is_zarr_folder(url: str) -> bool:
    """Whether the documents of a Zarr lie at a URL."""
    base, mark, query = url.partition("?")
    for name in DOCUMENTS:
        with suppress(NoSuchObject):
            read_range(f"{base.rstrip('/')}/{name}{mark}{query}", 0, 1)
            return True
    return False


def open_node(place: Place, path: str) -> Any:
    """The array or group of zarr-python at a path."""
    zarr = extra("zarr", "zarr", "Zarr")
    try:
        with silence():
            node = zarr.open(store=place.store, path=f"{place.top}/{path}".strip("/"), mode="r", use_consolidated=False)
    except FileNotFoundError:
        raise DataError("there is no Zarr array or group (no zarr.json, .zarray or .zgroup).") from None
    if not isinstance(node, zarr.Array):
        return node
    if node.dtype.kind not in "biuf" or node.dtype.itemsize > 8:
        raise DataError(f"its numbers are of type {str(node.dtype)[:60]!r}; whole numbers and floats can be used.")
    if not node.shape or min(node.shape) < 1 or max(node.shape) > _MAX_SIDE:
        raise DataError(f"its shape is {node.shape}; each side should be from 1 to {_MAX_SIDE:,}.")
    metadata = node.metadata
    if metadata.zarr_format == 2:
        _check_codecs(
            [item.get_config() for item in (metadata.compressor, *(metadata.filters or ())) if item is not None]
        )
        if getattr(metadata.compressor, "codec_id", "") == "blosc":
            metadata = replace(metadata, compressor=_blosc_types()[0]())
    else:
        _check_codecs(metadata.to_dict()["codecs"])
        metadata = replace(metadata, codecs=tuple(map(_checked, metadata.codecs)))
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=node.store_path))


def _check_codecs(codecs: Iterable[Any]) -> None:
    """Refuse every codec that is not known to turn numbers into numbers."""
    for codec in codecs:
        name = str(codec.get("name") or codec.get("id"))
        if name.removeprefix("numcodecs.") not in _CODECS:
            raise DataError(f"its codec {name[:60]!r} is not supported; possible are {', '.join(_CODECS)}.")
        inner = codec.get("configuration") or {}
        _check_codecs((*inner.get("codecs", ()), *inner.get("index_codecs", ())))


@cache
def _blosc_types() -> tuple[Any, Any]:
    """The codecs of Zarr 2 and 3 for Blosc, which by itself fills the rest of a truncated chunk with whatever it finds."""
    import numcodecs
    from zarr.codecs import BloscCodec

    def check(data: Any) -> None:
        view = memoryview(data).cast("B")
        if len(view) < max(packed := int.from_bytes(view[12:16], "little"), 16):
            raise DataError(f"a chunk is truncated: {len(view):,} of {packed:,} bytes are there.")

    class CheckedBlosc2(numcodecs.Blosc):
        def decode(self, buf: Any, out: Any = None) -> Any:
            check(buf)
            return super().decode(buf, out)

    class CheckedBlosc3(BloscCodec):
        async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
            check(chunk_bytes.as_buffer_like())
            return await super()._decode_single(chunk_bytes, chunk_spec)

    return CheckedBlosc2, CheckedBlosc3


def _checked(codec: Any) -> Any:
    """A codec of Zarr 3, with Blosc replaced by the one that checks."""
    if codec.to_dict()["name"] in ("blosc", "numcodecs.blosc"):
        return _blosc_types()[1]()
    return replace(codec, codecs=tuple(map(_checked, codec.codecs))) if hasattr(codec, "index_codecs") else codec


def _top(archive: zipfile.ZipFile) -> str:
    """The one folder in which everything in an archive lies, "" where there is none."""
    names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    return tops.pop() if len(tops) == 1 and not any(name in DOCUMENTS for name in names) else ""


def _objects(location: str) -> Any:
    """The file system of fsspec that reads below a URL, each object by `read_range`, with a query that the URL has."""
    base, mark, query = location.partition("?")

    class Objects(extra("fsspec.asyn", "remote", "URLs").AsyncFileSystem):  # type: ignore[misc]
        cachable = False

        async def _cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
            return await asyncio.to_thread(read_range, f"{base.rstrip('/')}/{path}{mark}{query}", start, end)

    return Objects(asynchronous=True)


def _local_identity(root: Path, prefix: str) -> Identity:
    """Of all files below a folder, and the documents of the root."""

    def files() -> dict[str, os.stat_result]:
        paths = [Path(parent, name) for parent, _, names in os.walk(root / prefix) for name in names]
        found = {}
        for path in sorted({*paths, *(root / name for name in DOCUMENTS if (root / name).is_file())}):
            found[path.relative_to(root).as_posix()] = status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would block whoever reads it
                raise DataError(f"its part {path.name} is not a regular file.")
        return found

    def fingerprint() -> str:
        found = files()
        small = sum(status.st_size for status in found.values()) <= WHOLE_BYTES
        contents = [file_fingerprint(root / name) if small else status.st_mtime_ns for name, status in found.items()]
        return _digest((name, found[name].st_size, content) for name, content in zip(found, contents, strict=True))

    def state() -> list[Any]:
        return [(name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in files().items()]

    return _identity(state, fingerprint)


def _remote_identity(location: str, prefix: str) -> Identity:
    """Of all objects below a folder; of web servers, which list none, of the documents alone."""
    base, mark, query = location.partition("?")

    def stamps() -> dict[str, RemoteStamp]:
        found = {}
        if not remote.is_web(location):
            system, root = remote.filesystem(f"{base.rstrip('/')}/{prefix}".rstrip("/") + mark + query)
            with remote.remote_errors(shown(location)):
                entries = sorted(system.find(root, detail=True, **bounded(system)).items())
            found = {
                str(path)[len(root) :].lstrip("/"): RemoteStamp.from_info(info, location) for path, info in entries
            }
        for key in dict.fromkeys(f"{place}/{name}".lstrip("/") for place in ("", prefix) for name in DOCUMENTS):
            with suppress(NoSuchObject):
                found[f"/{key}"] = RemoteStamp.of(f"{base.rstrip('/')}/{key}{mark}{query}")
        return found

    def fingerprint() -> str:
        return _digest((name, stamp.size, stamp.content or stamp.other) for name, stamp in stamps().items())

    return _identity(stamps, fingerprint)


def _identity(state: Callable[[], Any], fingerprint: Callable[[], str]) -> Identity:
    before = state()

    def check() -> None:
        if state() != before:
            raise DataError("the array changed while it was read. Run again when nothing writes to it.")

    return Identity(fingerprint, check)


def _digest(entries: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry}\n".encode(errors="replace"))
    return digest.hexdigest()
