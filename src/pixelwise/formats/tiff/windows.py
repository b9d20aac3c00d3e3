"""Windows of a stack of TIFF pages: only the rows, strips or tiles under a window are read, from any number of threads."""

import math
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.ranges import Handles

CACHE_BYTES = 64 * 2**20
MAX_BLOCK_BYTES = 2**30
_LERC = 34887
_STRIP_BYTES = 2**16

Span = tuple[int, int]
"""Start and stop."""


@dataclass(frozen=True)
class Layout:
    """Which axis of a stack is what: letters and lengths as tifffile has them, and the positions of three of them."""

    axes: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    channels: int | None = None

    @property
    def planes(self) -> tuple[int, ...]:
        """Positions of all other axes, in the order of the file."""
        return tuple(axis for axis in range(len(self.axes)) if axis not in (self.rows, self.columns, self.channels))

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Planes, rows, columns, channels."""
        planes = math.prod(self.shape[axis] for axis in self.planes)
        channels = 1 if self.channels is None else self.shape[self.channels]
        return planes, self.shape[self.rows], self.shape[self.columns], channels


def arrange(axes: str, shape: tuple[int, ...], wanted: int | None = None) -> Layout:
    """Tell channels from planes.

    S (samples) and C (channels) are channels, Z, T and pages (I) are planes. An axis that nothing names (Q) is the
    channels where it is the only one beside rows and columns, first or last. Where a file leaves it open, the number of
    channels that is wanted decides.
    """
    axes, shape = squeeze(axes, shape)
    if axes.count("Y") != 1 or axes.count("X") != 1:
        raise DataError(f"its images have the axes {axes or 'none'}; rows (Y) and columns (X) are needed.")
    rows, columns = axes.index("Y"), axes.index("X")
    rest = [axis for axis in range(len(axes)) if axis not in (rows, columns)]
    named = [axis for letter in "SC" for axis in rest if axes[axis] == letter]
    as_planes = Layout(axes, shape, rows, columns)
    if named or len(rest) != 1:
        return Layout(axes, shape, rows, columns, named[0]) if named else as_planes
    axis, as_channels = rest[0], Layout(axes, shape, rows, columns, rest[0])
    if axes[axis] != "Q":
        return as_channels if axes[axis] == "I" and wanted == shape[axis] else as_planes
    # an array (rows, columns, channels) may have been written as pages of (columns, channels)
    is_shortest = axis < rows < columns and shape[columns] < shape[axis]
    if is_shortest and (wanted == shape[columns] or wanted not in (1, 3, shape[axis])):
        return Layout(axes, shape, axis, rows, columns)
    return as_planes if wanted in (1, 3) and wanted != shape[axis] and axis < rows else as_channels


def squeeze(axes: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Leave out the axes of length 1 that are neither rows nor columns."""
    kept = [axis for axis in range(len(axes)) if shape[axis] != 1 or axes[axis] in "YX"]
    return "".join(axes[axis] for axis in kept), tuple(int(shape[axis]) for axis in kept)


class Stack:
    """Windows of a series of pages.

    Of uncompressed pages that lie in one piece the rows of a window are read, of others the strips or tiles, of which the
    last `cache_bytes` are kept decoded. A series whose pages are not its images (rows, for example) is decoded as a whole.
    `block` are the rows and columns that are stored together, `size` is planes, rows, columns, channels.
    """

    def __init__(
        self, series: Any, layout: Layout, handles: Handles, lock: Any = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._series, self._layout, self._handles = series, layout, handles
        self._key, self.size = series.keyframe, layout.size
        key = self._key
        self._cache_bytes = cache_bytes
        self._lock = lock or threading.Lock()  # tifffile's handle is used by one thread at a time
        self.dtype = np.dtype(key.dtype).newbyteorder("=")
        self._stored = self.dtype.newbyteorder(key.parent.byteorder)
        self._separate, self._depth, height, width, self._samples = (int(length) for length in key.shaped)
        axes, shape = squeeze(key.axes, tuple(key.shape))
        self._outer = outer = len(layout.axes) - len(axes)
        inside = layout.channels is not None and layout.channels >= outer
        is_paged = outer >= 0 and layout.shape[outer:] == shape and min(layout.rows, layout.columns) >= outer
        self._base = series.dataoffset
        if self._base is not None:
            self._check_end(self._base + math.prod(layout.shape) * self.dtype.itemsize)
            row_bytes = math.prod(layout.shape[layout.rows + 1 :]) * self.dtype.itemsize
            self.read, self.block = self._box, (max(1, min(layout.size[1], _STRIP_BYTES // row_bytes)), layout.size[2])
        elif is_paged and self._separate * self._samples == (layout.size[3] if inside else 1):
            self.read, self.block = self._paged, self._open_pages(height, width)
        else:
            self._array = lru_cache(1)(self._decode_all)
            self.read, self.block = self._box, layout.size[1:3]

    def _box(self, plane: int, rows: Span, columns: Span) -> NDArray[Any]:
        """A window of pages that lie in one piece, or that are decoded at once."""
        layout = self._layout
        box = [(0, length) for length in layout.shape]
        box[layout.rows], box[layout.columns] = rows, columns
        places = np.unravel_index(plane, [layout.shape[axis] for axis in layout.planes]) if layout.planes else ()
        for axis, place in zip(layout.planes, places, strict=True):
            box[axis] = (int(place), int(place) + 1)
        if self._base is None:
            found = self._array()[tuple(slice(*ends) for ends in box)].copy()
        else:
            found = self._handles.window(self._base, self._stored, layout.shape, box)
        order = [*layout.planes, layout.rows, layout.columns, *([] if layout.channels is None else [layout.channels])]
        window = found.transpose(order).reshape(rows[1] - rows[0], columns[1] - columns[0], -1)
        return np.ascontiguousarray(window, self.dtype)

    def _open_pages(self, height: int, width: int) -> Span:
        key, layout = self._key, self._layout
        tile = (int(key.tiledepth), int(key.tilelength), int(key.tilewidth))
        self._tile = tile if key.is_tiled else (1, max(1, min(int(key.rowsperstrip), height)), width)
        size = self._depth, height, width
        self._grid = tuple(-(-length // step) for length, step in zip(size, self._tile, strict=True))
        block_bytes = math.prod(self._tile) * self._samples * self.dtype.itemsize
        self._bands = bool(key.is_final)
        if block_bytes > MAX_BLOCK_BYTES and not self._bands:
            raise DataError(
                f"it is stored in {'tiles' if key.is_tiled else 'strips'} of {block_bytes / 2**30:,.1f} GiB, which can "
                f"only be decoded as a whole; at most {MAX_BLOCK_BYTES / 2**30:g} GiB are read. Save it in smaller tiles "
                "(tiffcp -8 -t -w 512 -l 512 in.tif out.tif)."
            )
        self._page = lru_cache(64)(self._find_page)
        self._block = lru_cache(max(1, self._cache_bytes // block_bytes))(self._decode)
        self._turn = threading.Lock() if 4 * block_bytes > CACHE_BYTES else nullcontext()
        offsets, counts, _ = self._page(0)
        self._check_end(max((at + count for at, count in zip(offsets, counts, strict=False) if count), default=0))
        numbers = np.arange(math.prod(layout.shape[: self._outer])).reshape(layout.shape[: self._outer])
        by_channel = numbers[..., None]
        if layout.channels is not None and layout.channels < self._outer:
            by_channel = np.moveaxis(numbers, layout.channels, -1)
        self._numbers = by_channel.reshape(-1, by_channel.shape[-1])
        return min(self._tile[1], height), min(self._tile[2], width)

    def _paged(self, plane: int, rows: Span, columns: Span) -> NDArray[Any]:
        """A window of pages of which each holds one image, one channel of it, or one block of planes."""
        number, depth = divmod(plane, self._depth)
        images = [self._page_window(int(page), depth, rows, columns) for page in self._numbers[number]]
        return images[0] if len(images) == 1 else np.concatenate(images, axis=2)

    def _page_window(self, page: int, depth: int, rows: Span, columns: Span) -> NDArray[Any]:
        key, samples = self._key, self._samples
        if self._bands:
            box = ((0, self._separate), (depth, depth + 1), rows, columns, (0, samples))
            found = self._handles.window(self._page(page)[0][0], self._stored, key.shaped, box)[:, 0]
            window = found.transpose(1, 2, 0, 3).reshape(*found.shape[1:3], -1)
            return np.ascontiguousarray(window, self.dtype)
        result = np.empty((rows[1] - rows[0], columns[1] - columns[0], self._separate * samples), self.dtype)
        layers, length, width = self._tile
        across = range(columns[0] // width, -(-columns[1] // width))
        for sample, down, right in product(
            range(self._separate), range(rows[0] // length, -(-rows[1] // length)), across
        ):
            index = ((sample * self._grid[0] + depth // layers) * self._grid[1] + down) * self._grid[2] + right
            y, x = down * length, right * width
            top, bottom = max(rows[0], y), min(rows[1], y + length)
            left, stop = max(columns[0], x), min(columns[1], x + width)
            target = result[top - rows[0] : bottom - rows[0], left - columns[0] : stop - columns[0]]
            target = target[:, :, sample * samples : (sample + 1) * samples]
            with self._turn:
                block = self._block(page, index)
            if block is not None:
                block = block[depth % layers, top - y : bottom - y, left - x : stop - x]
                if block.shape != target.shape:
                    raise DataError("a block of it is smaller than its tags say.")
            target[...] = key.nodata if block is None else block
        return result

    def _decode(self, page: int, index: int) -> NDArray[Any] | None:
        """A strip or tile (depth, rows, columns, samples); None if the file leaves it out."""
        offsets, counts, tables = self._page(page)
        if not offsets[index] or not counts[index]:
            return None
        data = self._handles.read(offsets[index], counts[index])
        if self._key.compression == _LERC:  # tifffile leaves out its masks, which say where NaN is
            block, there = imagecodecs.lerc_decode(data.tobytes(), masks=True)
            if there is not None and block.dtype.kind == "f":
                block[~there] = np.nan
            if there is not None and there.ndim == 3:  # each band has its own
                block = np.moveaxis(block, 0, -1)
            return block.reshape(1, *block.shape[:2], self._samples)
        decoded = self._key.decode(data.data, index, jpegtables=tables, jpegheader=self._key.jpegheader)
        return np.asarray(decoded[0])

    def _find_page(self, number: int) -> tuple[Any, Any, Any]:
        """Offsets and lengths of the blocks of a page, and the JPEG tables that they share."""
        with self._lock:
            page = self._series[number] if number < len(self._series) else None
            if page is None:
                raise DataError(f"its page {number + 1} is missing, or lies in another file.")
            found = page.dataoffsets, page.databytecounts, page.jpegtables
        wanted = 1 if self._bands else math.prod(self._grid) * self._separate
        if min(len(found[0]), len(found[1])) < wanted:
            raise DataError(f"of its {wanted:,} blocks only {min(len(found[0]), len(found[1])):,} are there.")
        return found

    def _check_end(self, end: int) -> None:
        if end > self._handles.size:
            raise DataError("its pixels reach beyond the end of the file; it is truncated.")

    def _decode_all(self) -> NDArray[Any]:
        with self._lock:
            return np.asarray(self._series.asarray(maxworkers=1)).reshape(self._layout.shape)
