"""Which images a TIFF holds, besides thumbnails and masks, and several of one size as the planes of one stack."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.errors import UsageError
from pixelwise.formats.ranges import Handles
from pixelwise.formats.tiff.windows import CACHE_BYTES, Layout, Span, Stack

_MOST_SIZES = 5  # that a warning lists


def is_meant(page: Any) -> bool:
    """Whether a page is an image of its own: no smaller copy of one (NewSubfileType bit 0), and no mask (bit 2)."""
    return not (page.is_reduced or page.is_mask)


def main_page(tiff: tifffile.TiffFile) -> Any:
    """The page of the first image; the very first page if all are smaller copies or masks."""
    first = tiff.pages.first
    if is_meant(first):
        return first
    pages: Any = tiff.pages
    return next((page for page in pages if is_meant(page)), first)


def choose(
    images: Sequence[Any], number: int | None, sizes: Sequence[tuple[str, Any]]
) -> tuple[list[Any], tuple[str, ...]]:
    """The images to read, all of which become planes if their `sizes` are equal, and what is to be said of the others.

    A size is words for it, and whatever else must be equal. `number` takes one image alone, counted from 0.

    Raises:
        UsageError: there is no such image.
    """
    if number is not None:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(images):
            raise UsageError(f"series {number!r}: the file holds {len(images):,}, counted from 0.")
        return [images[number]], ()
    if all(size == sizes[0] for size in sizes):
        return list(images), ()
    listed = ", ".join(dict.fromkeys(words for words, _ in sizes[:_MOST_SIZES]))
    listed += ", ..." if len(sizes) > _MOST_SIZES else ""
    return [images[0]], (
        f"it holds {len(images):,} images that differ ({listed}), of which only the first is read; take another by series "
        "(--series 1, counted from 0)",
    )


class Stacks:
    """Images of one size and layout, one after the other, as the planes of one stack, or `as_channels` of one image.

    Of planes only the last two images are kept open.
    """

    def __init__(self, images: Sequence[Any], layout: Layout, handles: Handles, *, as_channels: bool = False) -> None:
        lock = threading.RLock()  # of tifffile's handle, which all of them share
        self._lock = lock
        kept = len(images) if as_channels else 2
        cache_bytes = CACHE_BYTES // kept if as_channels else CACHE_BYTES  # each window needs all channels
        self._stack = lru_cache(kept)(lambda number: Stack(images[number], layout, handles, lock, cache_bytes))
        first = self._stack(0)
        self.block, self._each = first.block, first.size[0]
        self.size = (len(images) * self._each, *first.size[1:])
        self._channels = len(images) if as_channels else 0
        if as_channels:
            self.size = (1, *first.size[1:3], len(images))

    def read(self, plane: int, rows: Span, columns: Span) -> NDArray[Any]:
        """A window (rows, columns, channels) of a plane."""
        if self._channels:
            return np.concatenate([self._read(number, 0, rows, columns) for number in range(self._channels)], axis=2)
        number, inner = divmod(plane, self._each)
        return self._read(number, inner, rows, columns)

    def _read(self, number: int, plane: int, rows: Span, columns: Span) -> NDArray[Any]:
        with self._lock:
            stack = self._stack(number)
        return np.asarray(stack.read(plane, rows, columns))
