"""NumPy's .npy files of any size, window by window; files that hold Python objects are refused."""

import tokenize
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.blocks import Bytes, FileView, Opener, StoredArray, local_opener
from pixelwise.formats.local import Identity, readable
from pixelwise.formats.readers import silence

_MAGIC = b"\x93NUMPY"
_STRIP_BYTES = 2**16
_MAX_HEADER_BYTES = 10_000


def is_npy(head: bytes, name: str) -> bool:
    """Whether a file that begins with `head` is one of NumPy's.

    Example:
        >>> is_npy(b"\\x93NUMPY\\x01\\x00", "a.npy")
        True
    """
    return head.startswith(_MAGIC)


def open_npy(location: str, opener: Opener | None = None, *, identity: Identity | None = None) -> "NpySource":
    """Open an array (H, W), (H, W, C) or (planes, H, W, C); only its header is read.

    Args:
        location: path, or the name of what `opener` opens.
        opener: opens the file anew at each call, for reading, seekable; None opens the path.
        identity: how to tell whether it changed; needed with `opener`.

    Raises:
        DataError: the file is missing, truncated, or holds something else than images of numbers.
        UsageError: an opener without an identity.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = str(Path(tempfile.mkdtemp()) / "a.npy")
        >>> np.save(path, np.arange(12).reshape(3, 4))
        >>> with open_npy(path) as source:
        ...     source.read(1, 2, 2, 2)[:, :, 0].tolist()
        [[6, 7], [10, 11]]
    """
    if opener is None:
        identity = Identity.local(location)
    elif identity is None:
        raise UsageError(f"{location}: whoever opens it must also say how to tell whether it changed (identity).")
    with readable(location):
        file = Bytes(opener or local_opener(location))
        try:
            return NpySource(location, file, cast(Identity, identity))
        except BaseException:
            file.close()
            raise


class NpySource(Source):
    """An array in a file; made by `open_npy`. Nothing of it is kept in memory."""

    def __init__(self, location: str, file: Bytes, identity: Identity) -> None:
        self._file, self._identity = file, identity
        shape, self._fortran, dtype, offset = _header(file)
        stored = shape[::-1] if self._fortran else shape
        self._array = StoredArray(file, offset, stored, dtype)
        if self._array.end > file.size:
            raise DataError(f"it says it has {self._array.end:,} bytes, but {file.size:,} are there; it is truncated.")
        self._shape = shape
        planes, height, width, channels = _as_stack(shape)
        row = width * channels * dtype.itemsize
        self.info = SourceInfo(
            location=location,
            format="npy",
            height=height,
            width=width,
            channels=channels,
            dtype="uint8" if dtype.kind == "b" else dtype.newbyteorder("=").name,
            planes=planes,
            block_px=(height if self._fortran else max(1, min(height, _STRIP_BYTES // row)), width),
        )

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        where = f"rows {top}..{top + height}, columns {left}..{left + width}"
        with readable(self.info.location, where):
            box = [(top, top + height), (left, left + width)]
            if len(self._shape) == 4:
                box.insert(0, (plane, plane + 1))
            if len(self._shape) > 2:
                box.append((0, self.info.channels))
            array = self._array.read(box[::-1]).T if self._fortran else self._array.read(box)
            array = array.reshape(height, width, self.info.channels)
            if array.dtype.kind == "b":
                array = array.astype(np.uint8) * np.uint8(255)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = int((~np.isfinite(array)).sum())
                raise DataError(f"{bad:,} numbers in {where} are NaN or infinite. Replace them.")
        return np.ascontiguousarray(array)

    def fingerprint(self) -> str:
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        self._identity.check()

    def close(self) -> None:
        self._file.close()


def _header(file: Bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether columns come first, number type, and where the numbers start."""
    view = cast(BinaryIO, FileView(file))
    version = np.lib.format.read_magic(view)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"it is of version {version[0]}.{version[1]} of the format, which is for tables, not images.")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        with silence():  # headers of Python 2 make numpy warn
            shape, fortran, dtype = read(view, max_header_size=_MAX_HEADER_BYTES)
    except tokenize.TokenError as error:  # from numpy's second try, for Python 2
        raise DataError("its header is damaged.") from error
    if dtype.hasobject:
        raise DataError("it holds Python objects, which are not read, for they could run programs. Save numbers.")
    if dtype.kind not in "buif":
        raise DataError(f"its numbers are of type {dtype}; whole numbers and floats can be used.")
    if len(shape) not in (2, 3, 4):
        raise DataError(f"its shape is {shape}; (H, W), (H, W, C) and (planes, H, W, C) can be read.")
    if min(shape) < 1:
        raise DataError(f"its shape is {shape}; it has no pixels.")
    return shape, fortran, dtype, view.tell()


def _as_stack(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Planes, rows, columns, channels."""
    if len(shape) == 2:
        return 1, shape[0], shape[1], 1
    if len(shape) == 3:
        return 1, *shape
    return shape[0], shape[1], shape[2], shape[3]
