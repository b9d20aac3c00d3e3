"""What the metadata of a Zarr array may say: numbers only, known codecs only, chunks of a size that fits the memory.

The documents are judged here before any library acts on them, and each chunk before it is decompressed: a few bytes can
claim to become terabytes.
"""

import bz2
import json
import lzma
import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np

from pixelwise.errors import DataError

MAX_CHUNK_BYTES = 2**30
MAX_SIDE = 2**31 - 1
_MAX_INDEX_BYTES = 64 * 2**20
_HARMLESS_BYTES = 512 * 2**20
_DEFLATE_RATIO = 1032
_PIECE = 2**20

_V2_TYPE = re.compile(r"[<>|][biuf][1248]")
_V3_TYPES = (
    "bool",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)
_COMPRESSORS = ("blosc", "zstd", "gzip", "zlib", "lz4", "bz2", "lzma")
_FILTERS = ("delta", "shuffle", "fixedscaleoffset", "quantize", "bitround", "packbits", "astype")


@dataclass(frozen=True, kw_only=True)
class ArrayPlan:
    """An array that can be read safely.

    Attributes:
        zarr_format: 2 or 3.
        shape: numbers along each axis, each at least 1.
        chunks: the same of what is decompressed at once.
        dtype: of the numbers, in native byte order.
        names: of the axes, if the file gives them.
        fill: the number that stands for chunks that are not stored.
        compressor: the codec that may blow up, "" for none.
        trailer: bytes of checksums behind each compressed chunk.
        shard: inner chunks in one stored object, 0 without sharding.
        index_at_end: where a shard keeps its index.
        index_bytes: the size of that index.
        document: the checked metadata, for zarr-python.
    """

    zarr_format: int
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    document: bytes
    names: tuple[str | None, ...] | None = None
    fill: Any = 0
    compressor: str = ""
    expands: int = 1
    trailer: int = 0
    shard: int = 0
    index_at_end: bool = True
    index_bytes: int = 0

    @property
    def chunk_bytes(self) -> int:
        """Of one decompressed chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """The most that one compressed chunk may take: incompressible numbers grow a little."""
        return self.expands * (self.chunk_bytes + self.chunk_bytes // 8) + 2**16

    def check_chunk(self, data: bytes | memoryview) -> None:
        """Refuse a compressed chunk that would become more than the metadata say.

        Raises:
            DataError: it would.
        """
        if len(data) > self.stored_bytes:
            raise DataError(f"a chunk takes {len(data):,} bytes, but holds {self.chunk_bytes:,} decompressed.")
        if self.compressor and len(data) > self.trailer:
            view = memoryview(data)[: len(data) - self.trailer]
            _check_claim(self.compressor, view, self.expands * self.chunk_bytes + 64)

    def check_shard(self, data: bytes) -> None:
        """The same for every chunk of a whole shard."""
        index = data[-self.index_bytes :] if self.index_at_end else data[: self.index_bytes]
        if len(index) < self.shard * 16:
            raise DataError("a shard is shorter than its index.")
        for offset, size in np.frombuffer(index[: self.shard * 16], "<u8").reshape(-1, 2).tolist():
            if offset == size == 2**64 - 1:
                continue
            if offset + size > len(data):
                raise DataError("the index of a shard points behind its end.")
            self.check_chunk(memoryview(data)[offset : offset + size])


def plan_v2(document: Any) -> ArrayPlan:
    """Judge a `.zarray`.

    Raises:
        DataError: it is damaged, or holds anything but numbers in chunks.

    Example:
        >>> plan = plan_v2({"zarr_format": 2, "shape": [9, 9], "chunks": [4, 4], "dtype": "<u2", "order": "C",
        ...                 "compressor": None, "filters": None, "fill_value": 0})
        >>> plan.chunk_bytes
        32
        >>> plan_v2({"zarr_format": 2, "shape": [9], "chunks": [9], "dtype": "|O", "filters": [{"id": "pickle"}]})
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: its numbers are of type '|O'; whole numbers and floats can be used.
    """
    if not isinstance(document, dict) or document.get("zarr_format") != 2:
        raise DataError(".zarray is no metadata of a Zarr array of version 2.")
    kind = document.get("dtype")
    if not isinstance(kind, str) or not _V2_TYPE.fullmatch(kind) or kind[1:] in ("f1", "b2", "b4", "b8"):
        raise DataError(f"its numbers are of type {str(kind)[:60]!r}; whole numbers and floats can be used.")
    dtype = np.dtype(kind).newbyteorder("=")
    shape, chunks = _sizes(document.get("shape"), "shape"), _sizes(document.get("chunks"), "chunks")
    compressor = document.get("compressor")
    filters = document.get("filters") or []
    if not isinstance(filters, list):
        raise DataError("its filters are no list.")
    for item in filters:
        _known(item, "id", _FILTERS, "filter")
    name = _known(compressor, "id", _COMPRESSORS, "compressor") if compressor is not None else ""
    wanted = (
        "zarr_format",
        "shape",
        "chunks",
        "dtype",
        "compressor",
        "fill_value",
        "order",
        "filters",
        "dimension_separator",
    )
    return _checked(
        ArrayPlan(
            zarr_format=2,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            fill=_number(document.get("fill_value")),
            compressor=name,
            expands=8 if filters else 1,
            document=json.dumps({key: document[key] for key in wanted if key in document}).encode(),
        )
    )


def plan_v3(document: Any) -> ArrayPlan:
    """Judge a `zarr.json` of an array.

    Raises:
        DataError: it is damaged, or holds anything but numbers in chunks.
    """
    if not isinstance(document, dict) or document.get("zarr_format") != 3 or document.get("node_type") != "array":
        raise DataError("zarr.json is no metadata of a Zarr array of version 3.")
    kind = document.get("data_type")
    if kind not in _V3_TYPES:
        raise DataError(f"its numbers are of type {str(kind)[:60]!r}; whole numbers and floats can be used.")
    if document.get("storage_transformers"):
        raise DataError("its storage transformers are not supported. Write it again without.")
    shape = _sizes(document.get("shape"), "shape")
    grid = _mapping(document.get("chunk_grid"), "chunk_grid")
    if grid.get("name") != "regular":
        raise DataError("its chunks are not of one size. Write it again with regular chunks.")
    outer = _sizes(_mapping(grid.get("configuration"), "chunk_grid").get("chunk_shape"), "chunk_shape")
    names = document.get("dimension_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str | None) for name in names)):
        raise DataError("the names of its dimensions are no list of text.")
    clean = {key: value for key, value in document.items() if key not in ("attributes", "consolidated_metadata")}
    return _checked(
        ArrayPlan(
            zarr_format=3,
            shape=shape,
            dtype=np.dtype(str(kind)),
            names=tuple(names) if names is not None and len(names) == len(shape) else None,
            fill=_number(document.get("fill_value")),
            document=json.dumps(clean).encode(),
            **_codecs_v3(document.get("codecs"), outer),
        )
    )


def _codecs_v3(codecs: Any, outer: tuple[int, ...]) -> dict[str, Any]:
    """What the codecs of an array, or those within its shards, mean for the chunks."""
    if not isinstance(codecs, list) or not codecs:
        raise DataError("its codecs are no list.")
    shards = [codec for codec in codecs if isinstance(codec, dict) and codec.get("name") == "sharding_indexed"]
    if not shards:
        return {"chunks": outer, **_chain(codecs)}
    if len(codecs) != 1:
        raise DataError("its shards are packed once more, so that no part can be read alone. Write it again.")
    config = _mapping(shards[0].get("configuration"), "sharding_indexed")
    inner = _sizes(config.get("chunk_shape"), "chunk_shape")
    if len(inner) != len(outer) or any(big % small for big, small in zip(outer, inner, strict=True)):
        raise DataError(f"its shards {outer} are no multiple of its chunks {inner}.")
    names = [
        _known(codec, "name", ("bytes", "crc32c"), "codec of the index") for codec in config.get("index_codecs") or []
    ]
    count = math.prod(big // small for big, small in zip(outer, inner, strict=True))
    location = config.get("index_location", "end")
    if location not in ("start", "end") or names[:1] != ["bytes"]:
        raise DataError("the index of its shards cannot be read.")
    size = 16 * count + 4 * (len(names) - 1)
    return {
        "chunks": inner,
        "shard": count,
        "index_at_end": location == "end",
        "index_bytes": size,
        **_chain(config.get("codecs")),
    }


def _chain(codecs: Any) -> dict[str, Any]:
    if not isinstance(codecs, list):
        raise DataError("its codecs are no list.")
    known = ("bytes", "transpose", "crc32c", *_COMPRESSORS, *_FILTERS)
    names = [_known(codec, "name", known, "codec") for codec in codecs]
    packers = [name for name in names if name in _COMPRESSORS]
    if len(packers) > 1:
        raise DataError(f"its chunks are compressed more than once ({', '.join(packers)}). Write it again.")
    after = names[names.index(packers[0]) + 1 :] if packers else []
    if any(name != "crc32c" for name in after):
        raise DataError(f"its codecs stand in an order that cannot be read ({', '.join(names)}).")
    return {
        "compressor": packers[0] if packers else "",
        "trailer": 4 * len(after),
        "expands": 8 if any(name in _FILTERS for name in names) else 1,
    }


def _checked(plan: ArrayPlan) -> ArrayPlan:
    if len(plan.chunks) != len(plan.shape):
        raise DataError(f"its chunks {plan.chunks} have not as many axes as its shape {plan.shape}.")
    if plan.chunk_bytes > MAX_CHUNK_BYTES:
        raise DataError(
            f"its chunks of {' x '.join(map(str, plan.chunks))} take {plan.chunk_bytes / 2**30:,.1f} GiB each; at most "
            f"{MAX_CHUNK_BYTES >> 30} GiB are read at once. Write it again in smaller chunks."
        )
    if plan.index_bytes > _MAX_INDEX_BYTES:
        raise DataError(f"each of its shards says it holds {plan.shard:,} chunks, which is too many.")
    return plan


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    plain = isinstance(value, list) and 1 <= len(value) <= 8
    if not plain or any(type(item) is not int or not 1 <= item <= MAX_SIDE for item in value):
        raise DataError(
            f"its {what} is {str(value)[:80]}; it should be a list of whole numbers from 1 to {MAX_SIDE:,}."
        )
    return tuple(value)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"its {what} is {str(value)[:60]!r}, not a mapping.")
    return value


def _known(item: Any, key: str, names: tuple[str, ...], what: str) -> str:
    """The name of a codec, if it is one that only turns numbers into numbers."""
    name = item.get(key) if isinstance(item, dict) else item
    plain = str(name).removeprefix("numcodecs.")
    if not isinstance(name, str) or plain not in names:
        raise DataError(f"its {what} {str(name)[:60]!r} is not supported; possible are {', '.join(names)}.")
    config = item if key == "id" else (item.get("configuration") or {}) if isinstance(item, dict) else {}
    for option in ("dtype", "astype", "encode_dtype", "decode_dtype"):
        kind = config.get(option) if isinstance(config, dict) else None
        if kind is not None and not (isinstance(kind, str) and (_V2_TYPE.fullmatch(kind) or kind in _V3_TYPES)):
            raise DataError(f"its {what} {name!r} makes numbers of type {str(kind)[:60]!r}, which cannot be used.")
    return plain


def _number(value: Any) -> Any:
    """A fill value: a number, NaN among them; None and whatever else is no number become 0."""
    if value in ("NaN", "nan"):
        return math.nan
    return value if isinstance(value, int | float) else 0


def _check_claim(compressor: str, data: memoryview, limit: int) -> None:
    claimed: int | None = None
    if compressor == "blosc" and len(data) >= 16:
        claimed, _, packed = struct.unpack_from("<III", data, 4)
        if packed > len(data):
            raise DataError(f"a chunk is truncated: {len(data):,} of {packed:,} bytes are there.")
    elif compressor == "lz4" and len(data) >= 4:
        claimed = struct.unpack_from("<I", data)[0]
    elif compressor == "zstd":
        claimed = _zstd_size(data)
        if claimed is None:
            imagecodecs.zstd_decode(bytes(data), out=limit)  # fails where more comes out
    elif compressor in ("gzip", "zlib", "bz2", "lzma"):
        claimed = _unpacked_size(compressor, data, limit)
    if claimed is not None and claimed > limit:
        raise DataError(f"a chunk of {len(data):,} bytes becomes more than the {limit:,} bytes that it may hold.")


def _zstd_size(data: memoryview) -> int | None:
    """The size that the header of a Zstandard frame states (RFC 8878, section 3.1.1.1); None if it does not."""
    if len(data) < 6 or bytes(data[:4]) != b"\x28\xb5\x2f\xfd":
        return None
    flags = data[4]
    single = flags >> 5 & 1
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    width = (1 if single else 0, 2, 4, 8)[flags >> 6]
    if not width or len(data) < at + width:
        return None
    return int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)


def _unpacked_size(compressor: str, data: memoryview, limit: int) -> int | None:
    """How much comes out, counted without keeping it, at least as far as the limit; None where it must be little."""
    if compressor in ("gzip", "zlib"):
        if len(data) * _DEFLATE_RATIO <= _HARMLESS_BYTES:
            return None
        inflate = zlib.decompressobj(47)
        size, left = 0, bytes(data)
        while size <= limit and left and not inflate.eof:
            size += len(inflate.decompress(left, _PIECE))
            left = inflate.unconsumed_tail
        return size
    unpack = bz2.BZ2Decompressor() if compressor == "bz2" else lzma.LZMADecompressor(memlimit=_HARMLESS_BYTES)
    size, piece = 0, bytes(data)
    while size <= limit and not unpack.eof:
        size += len(unpack.decompress(piece, _PIECE))
        piece = b""
        if unpack.needs_input:
            break
    return size
