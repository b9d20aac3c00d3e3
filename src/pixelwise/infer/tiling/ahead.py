"""Read the next windows of an image while the network works on those before."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pixelwise.infer.tiling.base import Read, Region


class ReadAhead:
    """Gives batches of windows of one size, and fetches the next batch in a thread of its own.

    At most two batches are in memory: the one given and the next. What `read` raises comes out of `batch`.

    Args:
        read: as in `base`; called from one other thread.

    Example:
        >>> image = torch.arange(12.0).view(1, 3, 4)
        >>> windows = [Region(0, 0, 2, 2), Region(1, 2, 2, 2)]
        >>> with ReadAhead(lambda top, left, height, width: image[:, top : top + height, left : left + width]) as ahead:
        ...     ahead.batch(windows, then=()).shape
        torch.Size([2, 1, 2, 2])
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._next: tuple[tuple[Region, ...], Future[Tensor]] | None = None

    def batch(self, windows: Sequence[Region], then: Sequence[Region]) -> Tensor:
        """The windows, (N, C, height, width) float32 in channels_last order; those of `then` are fetched meanwhile."""
        waiting, self._next = self._next, None
        wanted = tuple(windows)
        found = waiting[1].result() if waiting and waiting[0] == wanted else self._stack(wanted)
        if then:
            self._next = (tuple(then), self._pool.submit(self._stack, tuple(then)))
        return found

    def _stack(self, windows: tuple[Region, ...]) -> Tensor:
        read = [self._read(window.top, window.left, window.height, window.width).float() for window in windows]
        stacked = read[0][None] if len(read) == 1 else torch.stack(read)
        return stacked.contiguous(memory_format=torch.channels_last)  # the order that networks run fastest in

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._next = None
