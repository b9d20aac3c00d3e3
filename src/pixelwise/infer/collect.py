"""Small windows of results, joined to larger parts and written by another thread."""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import PixelwiseError
from pixelwise.infer.parts import Parts
from pixelwise.infer.tiling.base import Region

FLUSH_BYTES = 16 << 20
FLUSH_S = 30.0
"""What a job that is killed may lose, in bytes of results and in seconds."""

MOST_BYTES = 4 * FLUSH_BYTES  # one that grows, one as it is joined, two that wait to be written

Arrays = Mapping[str, NDArray[Any]]


class Collector:
    """Takes windows of one plane in any order and writes them as few parts; at most two parts wait to be written.

    Windows that stand side by side become a band, bands below each other a part.

    Args:
        parts: where they go.
        plane: of the image.
        flush_bytes: size at which a part is written.
        flush_s: seconds after which what is there is written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> parts = Parts(Path(tempfile.mkdtemp()), 2, 4, 1, {"labels": np.dtype(np.uint8)})
        >>> with Collector(parts, 0) as collector:
        ...     for left in (0, 2):
        ...         collector.add(Region(0, left, 2, 2), {"labels": np.full((2, 2), left, dtype=np.uint8)})
        >>> parts.rows("labels", 0, 0, 1).tolist()
        [[0, 0, 2, 2]]
    """

    def __init__(
        self,
        parts: Parts,
        plane: int,
        *,
        flush_bytes: int = FLUSH_BYTES,
        flush_s: float = FLUSH_S,
    ) -> None:
        self.parts, self.plane = parts, plane
        self.flush_bytes, self.flush_s = flush_bytes, flush_s
        self._band: list[tuple[Region, Arrays]] = []  # side by side
        self._stack: list[tuple[Region, Arrays]] = []  # below each other
        self._bytes, self._since = 0, time.monotonic()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixelwise-write")
        self._waiting: deque[Future[None]] = deque()

    def add(self, region: Region, arrays: Arrays) -> None:
        """Take the results of a window.

        Raises:
            PixelwiseError: an earlier part could not be written.
        """
        if self._band and not _beside(self._band[-1][0], region):
            self._close_band()
        self._band.append((region, arrays))
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes >= self.flush_bytes or time.monotonic() - self._since >= self.flush_s:
            self.flush()

    def flush(self) -> None:
        """Hand all that is there to the writing thread."""
        self._close_band()
        self._close_stack()
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the rest, also after an error: what was computed need not be computed again."""
        try:
            self.flush()
            while self._waiting:
                self._waiting.popleft().result()
        except PixelwiseError:
            if error is None:
                raise  # else the first error is the one to tell
        finally:
            self._pool.shutdown()

    def _close_band(self) -> None:
        if not self._band:
            return
        band = _joined(self._band, axis=1)
        self._band = []
        if self._stack and not _below(self._stack[-1][0], band[0]):
            self._close_stack()
        self._stack.append(band)

    def _close_stack(self) -> None:
        if not self._stack:
            return
        region, arrays = _joined(self._stack, axis=0)
        self._stack = []
        while len(self._waiting) >= 2:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self.parts.write, self.plane, region, arrays))


def _beside(first: Region, second: Region) -> bool:
    return (first.top, first.height, first.right) == (second.top, second.height, second.left)


def _below(first: Region, second: Region) -> bool:
    return (first.left, first.width, first.bottom) == (second.left, second.width, second.top)


def _joined(pieces: list[tuple[Region, Arrays]], axis: int) -> tuple[Region, Arrays]:
    """Neighbours as one; axis 0 joins downwards, 1 to the right."""
    if len(pieces) == 1:
        return pieces[0]
    first, last = pieces[0][0], pieces[-1][0]
    region = Region(first.top, first.left, last.bottom - first.top, last.right - first.left)
    kinds = pieces[0][1]
    return region, {kind: np.concatenate([arrays[kind] for _, arrays in pieces], axis=axis) for kind in kinds}
