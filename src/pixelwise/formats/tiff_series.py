"""Windows of a stack of TIFF pages, in whatever way the pages hold it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.blocks import Bytes, StoredArray
from pixelwise.formats.tiff_layout import Layout, squeeze
from pixelwise.formats.tiff_pages import PageReader, Part

_WHOLE_BYTES = 256 * 2**20
_STRIP_BYTES = 2**16

Window = Callable[[int, Part, Part], NDArray[Any]]
"""(plane, rows, columns) -> (rows, columns, channels) as stored."""


class SeriesReader:
    """Reads windows of tifffile's series, or of a single page.

    Args:
        file: the bytes.
        series: series or page.
        layout: which of its axes is what.
        pages: how many the file has.

    Attributes:
        read: (plane, rows, columns) -> (rows, columns, channels), as stored; from any number of threads.
        block: rows and columns that are stored together.
        cache_bytes: the most that decoded blocks take.

    Raises:
        DataError: pages are missing, or cannot be read in windows.
    """

    read: Window

    def __init__(self, file: Bytes, series: Any, layout: Layout, pages: int) -> None:
        self._file, self._series, self._layout = file, series, layout
        self._page = getattr(series, "keyframe", series)
        self.cache_bytes = 0
        page_axes, page_shape = squeeze(self._page.axes, tuple(self._page.shape))
        outer = len(layout.axes) - len(page_axes)
        are_images = outer >= 0 and layout.shape[outer:] == page_shape and layout.rows >= outer <= layout.columns
        offset = getattr(series, "dataoffset", None) if series is not self._page else None
        if offset is not None:
            self.read, self.block = self._stored(offset)
        elif are_images:
            count = math.prod(layout.shape[:outer])
            if count > max(pages, 1):
                raise DataError(f"its description says it has {count:,} images, but only {pages:,} are there.")
            self.read, self.block = self._paged(outer)
        else:
            self.read, self.block = self._whole()

    def _stored(self, offset: int) -> tuple[Window, tuple[int, int]]:
        """All pages lie in one piece."""
        dtype = np.dtype(self._page.dtype).newbyteorder(self._page.parent.byteorder)
        stored = StoredArray(self._file, offset, self._layout.shape, dtype)
        if stored.end > self._file.size:
            raise DataError("its pixels reach beyond the end of the file; it is truncated.")
        _, height, width, channels = self._layout.size
        rows = max(1, min(height, _STRIP_BYTES // (width * channels * dtype.itemsize)))
        return _from_array(stored.read, self._layout), (rows, width)

    def _paged(self, outer: int) -> tuple[Window, tuple[int, int]]:
        """Each page holds the last axes of the layout."""
        series = self._series
        reader = PageReader(self._file, self._page, (lambda _: series) if series is self._page else series._getitem)
        self.cache_bytes = reader.cache_bytes
        reader.check(0)
        return _from_pages(reader, self._layout, outer), reader.block

    def _whole(self) -> tuple[Window, tuple[int, int]]:
        """For the rare files whose pages are not images but, for example, rows: decoded at once."""
        series, page = self._series, self._page
        size = math.prod(series.shape) * np.dtype(series.dtype).itemsize
        if size > min(_WHOLE_BYTES, max(2**26, 4096 * self._file.size)):
            raise DataError(
                f"its pages ({page.axes} {page.shape}) are not its images ({series.axes} {series.shape}), so it cannot "
                "be read in windows. Save each image as one page."
            )
        array = np.asarray(series.asarray(maxworkers=1)).reshape(self._layout.shape)
        self.cache_bytes = array.nbytes
        window = _from_array(lambda box: array[tuple(slice(*part) for part in box)], self._layout)
        return window, (self._layout.size[1], self._layout.size[2])


def _from_array(read: Callable[[list[Part]], NDArray[Any]], layout: Layout) -> Window:
    """Windows of an array with all the axes of the layout."""

    def window(plane: int, rows: Part, columns: Part) -> NDArray[Any]:
        box: list[Part] = [(0, 1)] * len(layout.shape)
        places = np.unravel_index(plane, [layout.shape[axis] for axis in layout.planes] or [1])
        for axis, place in zip(layout.planes, places, strict=False):
            box[axis] = (int(place), int(place) + 1)
        box[layout.rows], box[layout.columns] = rows, columns
        order = [*layout.planes, layout.rows, layout.columns]
        if layout.channels is not None:
            box[layout.channels] = (0, layout.shape[layout.channels])
            order.append(layout.channels)
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        return read(box).transpose(order).reshape(height, width, layout.size[3])

    return window


def _from_pages(reader: PageReader, layout: Layout, outer: int) -> Window:
    """Windows of pages, of which each holds the last axes of the layout."""
    inside = layout.channels is not None and layout.channels >= outer
    depth_axes = [axis for axis in layout.planes if axis >= outer]
    channels = layout.size[3]

    def window(plane: int, rows: Part, columns: Part) -> NDArray[Any]:
        places = np.unravel_index(plane, [layout.shape[axis] for axis in layout.planes] or [1])
        place = dict(zip(layout.planes, map(int, places), strict=False))
        depth = place[depth_axes[0]] if depth_axes else 0

        def page(channel: int) -> int:
            number = 0
            for axis in range(outer):
                number = number * layout.shape[axis] + (channel if axis == layout.channels else place[axis])
            return number

        if inside or channels == 1:
            return reader.read(page(0), depth, rows, columns, (0, channels))
        parts = [reader.read(page(channel), depth, rows, columns, (0, 1)) for channel in range(channels)]
        return np.concatenate(parts, axis=2)

    return window
