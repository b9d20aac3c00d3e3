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
import time
import zlib
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import PixelwiseError
from pixelwise.files import atomic_path, cannot_write, short_name
from pixelwise.formats.base import SourceInfo
from pixelwise.infer.tiling import Region

Arrays = Mapping[str, NDArray[Any]]
Add = Callable[[Region, Arrays], None]
"""Takes what was found in a window, (height, width) of each kind."""

FLUSH_BYTES = 16 << 20
FLUSH_S = 30.0
"""What a killed run may lose, in bytes of results and in seconds."""

MOST_BYTES = 4 * FLUSH_BYTES  # what grows, two times what waits to be written, and one of these as it is joined

_NAME = re.compile(r"([a-z_0-9]{1,40})-(\d{1,9})-(\d{1,9})-(\d{1,9})-(\d{1,9})-(\d{1,9})\.npy")
_STORE = re.compile(r"\..+\.store-[0-9a-f]{16}", re.DOTALL)
_FOOTER = b"PWPART"  # before the checksum, 4 bytes, little-endian
_CHUNK_BYTES = 1 << 20


class Store:
    """Takes the windows of a prediction in any order and knows which are missing; this one keeps them in memory.

    Args:
        info: of the image, which has as many rows, columns and planes.
        kinds: what every window holds ("labels", maps), and its type of numbers.
    """

    def __init__(self, info: SourceInfo, kinds: Mapping[str, np.dtype[Any]]) -> None:
        self.height, self.width, self.planes, self.kinds = info.height, info.width, info.planes, dict(kinds)
        self.whole = Region(0, 0, info.height, info.width)
        self._regions: list[list[Region]] = [[] for _ in range(info.planes)]
        self._arrays: dict[tuple[str, int], NDArray[Any]] = {}
        self._lock = threading.Lock()

    def missing(self, plane: int, region: Region | None = None) -> list[Region]:
        """The rectangles of a plane (or of a region of it) that are not there yet, from top to bottom."""
        region = region or self.whole
        with self._lock:
            return uncovered(region, self._regions[plane]) if self._regions[plane] else [region]

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
            if values.shape[-2:] == self.whole[2:]:
                self._arrays[kind, plane] = values
                continue
            if (kind, plane) not in self._arrays:
                self._arrays[kind, plane] = np.empty((*values.shape[:-2], *self.whole[2:]), dtype=dtype)
            self._arrays[kind, plane][..., *region.within(self.whole)] = values
        self._note(plane, region)

    def rows(self, kind: str, plane: int, top: int, bottom: int) -> NDArray[Any]:
        """Rows top..bottom of a plane, (bottom - top, W)."""
        return self._arrays[kind, plane][..., top:bottom, :]

    def remove(self) -> None:
        """Forget everything."""
        self._arrays.clear()
        self._regions = [[] for _ in self._regions]

    def _note(self, plane: int, region: Region) -> None:
        with self._lock:
            self._regions[plane] = sorted({*self._regions[plane], region})


class DiskStore(Store):
    """A store in a folder, which is made when the first window is written.

    `only` is a plane and a rectangle of it: files elsewhere are not looked at, which is faster.
    """

    def __init__(
        self,
        folder: str | Path,
        info: SourceInfo,
        kinds: Mapping[str, np.dtype[Any]],
        only: tuple[int, Region] | None = None,
    ) -> None:
        super().__init__(info, kinds)
        self.folder, self._only = Path(folder), only
        self.scan()

    def scan(self) -> None:
        """Take in what lies in the folder, from this process or any other; what is damaged or foreign counts as missing.

        Every file is read once and its checksum compared.
        """
        found: dict[tuple[int, Region], set[str]] = defaultdict(set)
        for name in _names(self.folder):
            kind, plane, region = self._meaning(name)
            if not kind or region in self._regions[plane]:
                continue
            near = self._only is None or (plane == self._only[0] and region.overlap(self._only[1]).height)
            if near and self._is_sound(self.folder / name, kind, region):
                found[plane, region].add(kind)
        for (plane, region), kinds in found.items():
            if kinds == set(self.kinds):
                self._note(plane, region)

    @contextmanager
    def adding(self, plane: int) -> Iterator[Add]:
        """As `Store.adding`; windows are joined and written by another thread, at least every 16 MiB and 30 s."""
        joiner = _Joiner(lambda region, arrays: self.add(plane, region, arrays))
        try:
            yield joiner.add
        except BaseException:
            with suppress(PixelwiseError):  # the first error is the one to tell
                joiner.close()
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
                    file.write(_header(dtype, region))
                    file.write(values.data)
                    # Readers of .npy do not look behind the values.
                    file.write(_FOOTER + zlib.crc32(values.data).to_bytes(4, "little"))
            except OSError as error:
                raise cannot_write(path, error, "what is finished is kept") from error
        self._note(plane, region)

    def rows(self, kind: str, plane: int, top: int, bottom: int) -> NDArray[Any]:
        """As `Store.rows`; only the bytes of these rows are read."""
        wanted = Region(top, 0, bottom - top, self.width)
        if self.missing(plane, wanted):
            raise PixelwiseError(f"{self.folder}: rows {top}..{bottom} of plane {plane} are not finished. Run again.")
        result = np.empty(wanted[2:], dtype=self.kinds[kind])
        for region in self._regions[plane]:
            if (part := region.overlap(wanted)).height:
                result[part.within(wanted)] = self._read(kind, plane, region, part)
        return result

    def remove(self) -> None:
        """Delete the folder, and those of the same output by other settings."""
        super().remove()
        for folder in (self.folder, *_stale(self.folder)):
            shutil.rmtree(folder, ignore_errors=True)

    def _meaning(self, name: str) -> tuple[str, int, Region]:
        """Kind, plane and rectangle of a file name; no kind if it is none of ours."""
        match = _NAME.fullmatch(name)
        if match is not None and match[1] in self.kinds:
            plane, top, bottom, left, right = (int(text) for text in match.groups()[1:])
            if plane < self.planes and 0 <= top < bottom <= self.height and 0 <= left < right <= self.width:
                return match[1], plane, Region(top, left, bottom - top, right - left)
        return "", 0, Region(0, 0, 0, 0)

    def _is_sound(self, path: Path, kind: str, region: Region) -> bool:
        header, checksum = _header(self.kinds[kind], region), 0
        size = region.height * region.width * self.kinds[kind].itemsize
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != len(header) + size + len(_FOOTER) + 4:
                    return False
                if file.read(len(header)) != header:
                    return False
                for start in range(0, size, _CHUNK_BYTES):
                    checksum = zlib.crc32(file.read(min(_CHUNK_BYTES, size - start)), checksum)
                return file.read() == _FOOTER + checksum.to_bytes(4, "little")
        except OSError:
            return False

    def _read(self, kind: str, plane: int, region: Region, part: Region) -> NDArray[Any]:
        """The rows of a rectangle that `part` has."""
        path, dtype = self.folder / _file_name(kind, plane, region), self.kinds[kind]
        start = len(_header(dtype, region)) + (part.top - region.top) * region.width * dtype.itemsize
        try:
            with path.open("rb") as file:
                file.seek(start)
                values = np.fromfile(file, dtype=dtype, count=part.height * region.width)
            return values.reshape(part.height, region.width)
        except (OSError, ValueError) as error:
            raise PixelwiseError(f"{path}: a finished window cannot be read any more ({error}). Run again.") from error


class _Joiner:
    """Joins windows to large ones and writes them in a thread of its own; at most two times `FLUSH_BYTES` wait for it."""

    def __init__(self, write: Add) -> None:
        self._write = write
        self._windows: list[tuple[Region, Arrays]] = []
        self._bytes, self._since = 0, time.monotonic()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixelwise-write")
        self._waiting: deque[Future[None]] = deque()

    def add(self, region: Region, arrays: Arrays) -> None:
        """Take a window."""
        self._windows.append((region, arrays))
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes >= FLUSH_BYTES or time.monotonic() - self._since >= FLUSH_S:
            self._flush()

    def close(self) -> None:
        """Write the rest."""
        try:
            self._flush()
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown()

    def _flush(self) -> None:
        while len(self._waiting) >= 2:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write_all, self._windows))
        self._windows, self._bytes, self._since = [], 0, time.monotonic()

    def _write_all(self, windows: list[tuple[Region, Arrays]]) -> None:
        for axis in (1, 0):  # side by side, then below each other
            windows = [_joined(group, axis) for group in _neighbours(windows, axis)]
        for region, arrays in windows:
            self._write(region, arrays)


def _neighbours(windows: list[tuple[Region, Arrays]], axis: int) -> list[list[tuple[Region, Arrays]]]:
    """Windows that follow each other to the right (axis 1) or downwards (0), together."""
    groups: list[list[tuple[Region, Arrays]]] = []
    for region, arrays in windows:
        before = groups[-1][-1][0] if groups else Region(0, 0, 0, 0)
        beside = (before.top, before.right, before.height) == (region.top, region.left, region.height)
        below = (before.bottom, before.left, before.width) == (region.top, region.left, region.width)
        if groups and (beside if axis else below):
            groups[-1].append((region, arrays))
        else:
            groups.append([(region, arrays)])
    return groups


def _joined(windows: list[tuple[Region, Arrays]], axis: int) -> tuple[Region, Arrays]:
    if len(windows) == 1:
        return windows[0]
    first, last = windows[0][0], windows[-1][0]
    region = Region(first.top, first.left, last.bottom - first.top, last.right - first.left)
    return region, {kind: np.concatenate([found[kind] for _, found in windows], axis=axis) for kind in windows[0][1]}


def uncovered(target: Region, done: Iterable[Region]) -> list[Region]:
    """What is left of `target` without `done`, as rectangles that do not overlap, from top to bottom."""
    near = [both for region in done if (both := region.overlap(target)).height]
    tops = sorted({target.top, target.bottom, *(edge for region in near for edge in (region.top, region.bottom))})
    lefts = sorted({target.left, target.right, *(edge for region in near for edge in (region.left, region.right))})
    free = np.ones((len(tops) - 1, len(lefts) - 1), dtype=bool)  # the cells between these edges
    for region in near:
        rows = slice(bisect_left(tops, region.top), bisect_left(tops, region.bottom))
        free[rows, bisect_left(lefts, region.left) : bisect_left(lefts, region.right)] = False
    left, start = [], 0
    for row in range(1, len(tops)):
        if row == len(free) or (free[row] != free[start]).any():  # rows with the same gaps are one
            ends = np.flatnonzero(np.diff(free[start], prepend=False, append=False)).reshape(-1, 2)
            height = tops[row] - tops[start]
            left += [Region(tops[start], lefts[one], height, lefts[end] - lefts[one]) for one, end in ends]
            start = row
    return left


def store_folder(output: str | Path, key: str) -> Path:
    """The hidden folder beside `output` for the store of the prediction called `key` (hexadecimal)."""
    output = Path(output)
    return output.with_name(f".{short_name(output.name, 80)}.store-{key[:16]}")


def stores_in(folder: Path) -> dict[str, list[Path]]:
    """The folders of stores that lie in a folder, by the beginning of their names, which tells the output."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in folder.iterdir() if folder.is_dir() else ():
        if _STORE.fullmatch(path.name):
            found[path.name[:-16]].append(path)
    return found


def _stale(folder: Path) -> list[Path]:
    """The folders beside that of a store with windows of the same output by other settings."""
    start = folder.name[:-16]
    if not start.endswith(".store-") or not folder.parent.is_dir():
        return []
    known = re.compile(re.escape(start) + r"[0-9a-f]{16}")
    return [path for path in folder.parent.iterdir() if path != folder and known.fullmatch(path.name)]


def _file_name(kind: str, plane: int, region: Region) -> str:
    return f"{kind}-{plane}-{region.top}-{region.bottom}-{region.left}-{region.right}.npy"


def _names(folder: Path) -> list[str]:
    """The names of the plain files in a folder; links are not followed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except OSError:
        return []


def _header(dtype: np.dtype[Any], region: Region) -> bytes:
    """What `np.save` writes before the values."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": region[2:]}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()
