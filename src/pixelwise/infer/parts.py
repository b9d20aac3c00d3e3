"""The finished pieces of a large prediction on the disk, so that a job that was killed goes on where it was.

They lie in a hidden folder beside the output, whose name holds a key of network, input and options, so pieces of other
settings never mix. Each piece is one .npy file of one rectangle, followed by a checksum; what is damaged is made again.
"""

import io
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import PixelwiseError
from pixelwise.files import atomic_path, cannot_write
from pixelwise.infer.tiling.base import Region

_NAME = re.compile(r"([a-z_0-9]{1,40})-(\d{1,9})-(\d{1,9})-(\d{1,9})-(\d{1,9})-(\d{1,9})\.npy")
_FOOTER = b"PWPART"  # before the checksum, 4 bytes, little-endian
_CHUNK_BYTES = 1 << 20


def parts_folder(output: str | Path, key: str) -> Path:
    """The hidden folder beside `output` for the pieces of the job called `key` (hexadecimal).

    Example:
        >>> parts_folder("labels/scene.tif", "0123456789abcdef0").as_posix()
        'labels/.scene.tif.parts-0123456789abcdef'
    """
    output = Path(output)
    return output.with_name(f".{output.name[:40]}.parts-{key[:16]}")


def stale_folders(output: str | Path, key: str) -> list[Path]:
    """The folders beside `output` with pieces of the same output by other settings.

    Example:
        >>> stale_folders("no/such.tif", "0123456789abcdef")
        []
    """
    mine = parts_folder(output, key)
    start, digits = mine.name.removesuffix(key[:16]), re.compile(r"[0-9a-f]{16}")
    try:
        names = [path.name for path in mine.parent.iterdir() if path.name.startswith(start)]
    except OSError:
        return []
    names = [name for name in names if name != mine.name and digits.fullmatch(name.removeprefix(start))]
    return [mine.with_name(name) for name in sorted(names)]


def uncovered(target: Region, done: Iterable[Region]) -> list[Region]:
    """What is left of `target` without `done`, as rectangles that do not overlap, from top to bottom.

    Example:
        >>> uncovered(Region(0, 0, 9, 9), [Region(0, 0, 4, 9), Region(4, 0, 2, 3)])
        [Region(top=4, left=3, height=2, width=6), Region(top=6, left=0, height=3, width=9)]
    """
    near = sorted(
        (region for region in done if region.top < target.bottom and region.bottom > target.top),
        key=lambda region: region.top,
    )
    edges = {target.top, target.bottom}
    edges |= {edge for region in near for edge in (region.top, region.bottom) if target.top < edge < target.bottom}
    active: list[Region] = []
    waiting = iter([*near, None])
    coming = next(waiting)
    left: list[Region] = []
    open_gaps: tuple[tuple[int, int], ...] = ()
    start = target.top
    for top, _ in pairwise(sorted(edges)):
        while coming is not None and coming.top <= top:
            active.append(coming)
            coming = next(waiting)
        active = [region for region in active if region.bottom > top]
        gaps = _gaps(target, active)
        if gaps != open_gaps:
            left += [Region(start, first, top - start, last - first) for first, last in open_gaps]
            open_gaps, start = gaps, top
    left += [Region(start, first, target.bottom - start, last - first) for first, last in open_gaps]
    return left


def _gaps(target: Region, active: Iterable[Region]) -> tuple[tuple[int, int], ...]:
    """The columns of `target` that no active region covers, as (first, behind the last)."""
    gaps, at = [], target.left
    for region in sorted(active, key=lambda region: region.left):
        if region.left > at:
            gaps.append((at, min(region.left, target.right)))
        at = max(at, region.right)
        if at >= target.right:
            break
    if at < target.right:
        gaps.append((at, target.right))
    return tuple(gaps)


class Parts:
    """The pieces of one prediction: rectangles of labels and maps of all planes.

    Args:
        folder: where they lie; made when the first one is written.
        height: rows of a plane.
        width: columns of a plane.
        planes: how many there are.
        kinds: what every rectangle holds, and its type of numbers.
        only: a plane and a rectangle of it; pieces elsewhere are not looked at, which is faster. None is all.

    Example:
        >>> import tempfile
        >>> parts = Parts(Path(tempfile.mkdtemp()) / "parts", 4, 3, 1, {"labels": np.dtype(np.uint8)})
        >>> parts.write(0, Region(0, 0, 2, 3), {"labels": np.ones((2, 3), dtype=np.uint8)})
        >>> parts.missing(0)
        [Region(top=2, left=0, height=2, width=3)]
        >>> parts.rows("labels", 0, 1, 2).tolist()
        [[1, 1, 1]]
    """

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
        self.folder, self.height, self.width, self.planes = Path(folder), height, width, planes
        self.kinds = {kind: np.dtype(dtype).newbyteorder("<") for kind, dtype in kinds.items()}
        self._regions: list[list[Region]] = [[] for _ in range(planes)]
        self._lock, self._only = threading.Lock(), only
        self.scan()

    def scan(self) -> None:
        """Take in what lies in the folder, from this process or any other; what is damaged or foreign counts as missing.

        Every piece is read once and its checksum compared.
        """
        known = {(plane, region) for plane, regions in enumerate(self._regions) for region in regions}
        found: dict[tuple[int, Region], set[str]] = {}
        for name in _names(self.folder):
            kind, plane, region = self._meaning(name)
            if not kind or region is None or (plane, region) in known or not _touches(plane, region, self._only):
                continue
            if self._is_sound(self.folder / name, kind, region):
                found.setdefault((plane, region), set()).add(kind)
        for (plane, region), kinds in found.items():
            if kinds == set(self.kinds):
                self._add(plane, region)

    def missing(self, plane: int, region: Region | None = None) -> list[Region]:
        """The rectangles of a plane (or of a region of it) that are not there yet, from top to bottom."""
        with self._lock:
            return uncovered(region or Region(0, 0, self.height, self.width), self._regions[plane])

    def holds(self, name: str, near: tuple[int, Region] | None = None) -> bool:
        """Whether a file of this name would be a part, one that touches a rectangle of a plane if that is given."""
        kind, plane, region = self._meaning(name)
        return bool(kind) and region is not None and _touches(plane, region, near)

    @property
    def done_px(self) -> int:
        """Pixels of all planes that are there."""
        return sum(region.height * region.width for regions in self._regions for region in regions)

    def write(self, plane: int, region: Region, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store one rectangle of every kind; each file gets its name when it is complete and on the disk.

        Raises:
            PixelwiseError: it cannot be written (disk full, no permission).
        """
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
        self._add(plane, region)

    def rows(self, kind: str, plane: int, top: int, bottom: int) -> NDArray[Any]:
        """Rows top..bottom of a plane, (bottom - top, W); only their bytes are read.

        Raises:
            PixelwiseError: some of them are not there, or cannot be read.
        """
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
        """Delete the folder; nothing happens if there is none."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _add(self, plane: int, region: Region) -> None:
        with self._lock:
            self._regions[plane] = sorted({*self._regions[plane], region}, key=lambda item: (item.top, item.left))

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
            raise PixelwiseError(f"{path}: a finished part cannot be read any more ({error}). Run again.") from error


def _touches(plane: int, region: Region, near: tuple[int, Region] | None) -> bool:
    return near is None or (plane == near[0] and uncovered(region, [near[1]]) != [region])


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
