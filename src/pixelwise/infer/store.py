"""The finished windows of a prediction, in memory for small images, else on the disk, so that a killed run resumes.

On the disk they lie in a hidden folder beside the output, whose name holds a key of network, input and options, so that
windows of other settings never mix. Each is one .npy file of one rectangle, followed by a checksum; damaged ones are
computed again.
"""

import io
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import PixelwiseError
from pixelwise.files import atomic_path, cannot_write
from pixelwise.infer.network import Region
from pixelwise.infer.regions import Add, Arrays, Joiner, touches, uncovered

_NAME = re.compile(r"([a-z_0-9]{1,40})-(\d{1,9})-(\d{1,9})-(\d{1,9})-(\d{1,9})-(\d{1,9})\.npy")
_FOOTER = b"PWPART"  # before the checksum, 4 bytes, little-endian
_CHUNK_BYTES = 1 << 20


class Store:
    """Takes the windows of a prediction in any order and knows which are missing; this one keeps them in memory.

    Args:
        height: rows of a plane.
        width: columns of a plane.
        planes: how many there are.
        kinds: what every window holds ("labels", maps), and its type of numbers.
    """

    is_on_disk = False

    def __init__(self, height: int, width: int, planes: int, kinds: Mapping[str, np.dtype[Any]]) -> None:
        self.height, self.width, self.planes, self.kinds = height, width, planes, dict(kinds)
        self._regions: list[list[Region]] = [[] for _ in range(planes)]
        self._arrays: dict[tuple[str, int], NDArray[Any]] = {}
        self._lock = threading.Lock()

    def missing(self, plane: int, region: Region | None = None) -> list[Region]:
        """The rectangles of a plane (or of a region of it) that are not there yet, from top to bottom."""
        with self._lock:
            if not self._regions[plane]:
                return [region or Region(0, 0, self.height, self.width)]
            return uncovered(region or Region(0, 0, self.height, self.width), self._regions[plane])

    @property
    def done_px(self) -> int:
        """Pixels of all planes that are there."""
        return sum(region.height * region.width for regions in self._regions for region in regions)

    @contextmanager
    def adding(self, plane: int) -> Iterator[Add]:
        """A function that takes windows of a plane; when the block ends, also by an error, they are in the store."""
        yield lambda region, arrays: self.add(plane, region, arrays)

    def add(self, plane: int, region: Region, arrays: Arrays) -> None:
        """Take one window of every kind."""
        for kind, dtype in self.kinds.items():
            values = arrays[kind].astype(dtype, copy=False)
            if values.shape[-2:] == (self.height, self.width):
                self._arrays[kind, plane] = values
                continue
            if (kind, plane) not in self._arrays:
                self._arrays[kind, plane] = np.empty((*values.shape[:-2], self.height, self.width), dtype=dtype)
            rows, columns = slice(region.top, region.bottom), slice(region.left, region.right)
            self._arrays[kind, plane][..., rows, columns] = values
        self._note(plane, region)

    def rows(self, kind: str, plane: int, top: int, bottom: int) -> NDArray[Any]:
        """Rows top..bottom of a plane, (bottom - top, W)."""
        return self._arrays[kind, plane][..., top:bottom, :]

    def remove(self) -> None:
        """Forget everything."""
        self._arrays.clear()

    def _note(self, plane: int, region: Region) -> None:
        with self._lock:
            self._regions[plane] = sorted({*self._regions[plane], region}, key=lambda item: (item.top, item.left))


class DiskStore(Store):
    """A store in a folder, which is made when the first window is written.

    Args:
        folder: where the files lie.
        height: rows of a plane.
        width: columns of a plane.
        planes: how many there are.
        kinds: what every window holds, and its type of numbers.
        only: a plane and a rectangle of it; files elsewhere are not looked at, which is faster. None is all.
    """

    is_on_disk = True

    def __init__(
        self,
        folder: str | Path,
        height: int,
        width: int,
        planes: int,
        kinds: Mapping[str, np.dtype[Any]],
        *,
        only: tuple[int, Region] | None = None,
    ) -> None:
        super().__init__(height, width, planes, {kind: dtype.newbyteorder("<") for kind, dtype in kinds.items()})
        self.folder, self._only = Path(folder), only
        self.scan()

    def scan(self) -> None:
        """Take in what lies in the folder, from this process or any other; what is damaged or foreign counts as missing.

        Every file is read once and its checksum compared.
        """
        known = {(plane, region) for plane, regions in enumerate(self._regions) for region in regions}
        found: dict[tuple[int, Region], set[str]] = {}
        for name in _names(self.folder):
            kind, plane, region = self._meaning(name)
            if not kind or region is None or (plane, region) in known or not touches(plane, region, self._only):
                continue
            if self._is_sound(self.folder / name, kind, region):
                found.setdefault((plane, region), set()).add(kind)
        for (plane, region), kinds in found.items():
            if kinds == set(self.kinds):
                self._note(plane, region)

    @contextmanager
    def adding(self, plane: int) -> Iterator[Add]:
        """As `Store.adding`; windows are joined and written by another thread, at least every 16 MiB and 30 s."""
        joiner = Joiner(lambda region, arrays: self.add(plane, region, arrays))
        try:
            yield joiner.add
        except BaseException:
            joiner.close(quietly=True)  # the first error is the one to tell
            raise
        joiner.close()

    def add(self, plane: int, region: Region, arrays: Arrays) -> None:
        """Write one rectangle of every kind; each file gets its name when it is complete and on the disk."""
        for kind, dtype in self.kinds.items():
            path = self.folder / _file_name(kind, plane, region)
            values = np.ascontiguousarray(arrays[kind], dtype=dtype)
            if values.shape != (region.height, region.width):
                raise ValueError(f"{kind}: {values.shape} for {region}")
            try:
                with atomic_path(path) as part, part.open("wb") as file:
                    _dump(file, values)
            except OSError as error:
                raise cannot_write(path, error, "what is finished is kept") from error
        self._note(plane, region)

    def rows(self, kind: str, plane: int, top: int, bottom: int) -> NDArray[Any]:
        """As `Store.rows`; only the bytes of these rows are read."""
        if self.missing(plane, Region(top, 0, bottom - top, self.width)):
            raise PixelwiseError(f"{self.folder}: rows {top}..{bottom} of plane {plane} are not finished. Run again.")
        result = np.empty((bottom - top, self.width), dtype=self.kinds[kind].newbyteorder("="))
        for region in self._regions[plane]:
            first, last = max(top, region.top), min(bottom, region.bottom)
            if first < last:
                part = self._read(kind, plane, region, first, last)
                result[first - top : last - top, region.left : region.right] = part
        return result

    def remove(self) -> None:
        """Delete the folder, and those of the same output by other settings."""
        for folder in (self.folder, *_stale(self.folder)):
            shutil.rmtree(folder, ignore_errors=True)

    def _meaning(self, name: str) -> tuple[str, int, Region | None]:
        """Kind, plane and rectangle of a file name; no kind if it is none of ours."""
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in self.kinds:
            return "", 0, None
        plane, top, bottom, left, right = (int(text) for text in match.groups()[1:])
        inside = plane < self.planes and 0 <= top < bottom <= self.height and 0 <= left < right <= self.width
        return (match[1], plane, Region(top, left, bottom - top, right - left)) if inside else ("", 0, None)

    def _is_sound(self, path: Path, kind: str, region: Region) -> bool:
        header, dtype = _header(self.kinds[kind], region), self.kinds[kind]
        size = region.height * region.width * dtype.itemsize
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != len(header) + size + len(_FOOTER) + 4:
                    return False
                if file.read(len(header)) != header:
                    return False
                checksum = 0
                for chunk in _chunks(file, size):
                    checksum = zlib.crc32(chunk, checksum)
                return file.read() == _FOOTER + checksum.to_bytes(4, "little")
        except OSError:
            return False

    def _read(self, kind: str, plane: int, region: Region, first: int, last: int) -> NDArray[Any]:
        path, dtype = self.folder / _file_name(kind, plane, region), self.kinds[kind]
        start = len(_header(dtype, region)) + (first - region.top) * region.width * dtype.itemsize
        try:
            with path.open("rb") as file:
                file.seek(start)
                values = np.fromfile(file, dtype=dtype, count=(last - first) * region.width)
            return values.reshape(last - first, region.width)
        except (OSError, ValueError) as error:
            raise PixelwiseError(f"{path}: a finished window cannot be read any more ({error}). Run again.") from error


def store_folder(output: str | Path, key: str) -> Path:
    """The hidden folder beside `output` for the store of the prediction called `key` (hexadecimal)."""
    output = Path(output)
    return output.with_name(f".{output.name[:40]}.store-{key[:16]}")


def _stale(folder: Path) -> list[Path]:
    """The folders beside that of a store with windows of the same output by other settings."""
    start, digits = folder.name[:-16], re.compile(r"[0-9a-f]{16}")
    names = []
    if start.endswith(".store-") and folder.parent.is_dir():
        names = [path.name for path in folder.parent.iterdir() if path.name.startswith(start)]
    names = [name for name in names if name != folder.name and digits.fullmatch(name.removeprefix(start))]
    return [folder.with_name(name) for name in sorted(names)]


def _file_name(kind: str, plane: int, region: Region) -> str:
    return f"{kind}-{plane}-{region.top}-{region.bottom}-{region.left}-{region.right}.npy"


def _names(folder: Path) -> Sequence[str]:
    """The names of the plain files in a folder; links are not followed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except OSError:
        return ()


def _header(dtype: np.dtype[Any], region: Region) -> bytes:
    buffer = io.BytesIO()
    shape = (region.height, region.width)
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def _dump(file: BinaryIO, values: NDArray[Any]) -> None:
    """An array as .npy and, behind it where readers of .npy do not look, its checksum."""
    file.write(_header(values.dtype, Region(0, 0, *values.shape)))
    data = memoryview(values).cast("B")  # type: ignore[arg-type]
    file.write(data)
    file.write(_FOOTER + zlib.crc32(data).to_bytes(4, "little"))


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, _CHUNK_BYTES))):
        size -= len(chunk)
        yield chunk
