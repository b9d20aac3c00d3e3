"""Where the classes of a large mask lie, so that a pixel of a class can be drawn without reading the mask as a whole."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from pixelwise.data.labels import IGNORE_INDEX, LabelSpec, Value

_BLOCK_PX = 512  # columns that are counted together
_TABLE_BYTES = 4 << 20  # for each value; of wider masks more columns are counted together

ReadMask = Callable[[int, int, int, int], torch.Tensor]  # (top, left, height, width) -> class ids


class Places:
    """How many pixels of each value lie in each row of each block of columns."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.block_px = max(_BLOCK_PX, -(-width * height * 4 // _TABLE_BYTES))
        self.counts: dict[Value, NDArray[np.uint32]] = {}  # (height, blocks) each

    def add(self, top: int, raw: NDArray[np.generic], values: Iterable[Value]) -> None:
        """Count the rows of a strip from `top` on; `values` are those that it holds."""
        starts = np.arange(0, self.width, self.block_px)
        for value in values:
            here = raw == value if raw.ndim == 2 else (raw == np.array(value)).all(axis=2)
            if value not in self.counts:
                self.counts[value] = np.zeros((self.height, len(starts)), dtype=np.uint32)
            self.counts[value][top : top + len(raw)] = np.add.reduceat(here, starts, axis=1, dtype=np.uint32)


class ClassPlaces:
    """`Places` by class: draws pixels as `draw_pixel` does from a mask in memory, to the same random numbers."""

    def __init__(self, places: Places, labels: LabelSpec) -> None:
        self.block_px, self.width = places.block_px, places.width
        self.counts: dict[int, NDArray[np.uint32]] = {}
        for value, counts in places.counts.items():
            index = labels.class_of(value)
            index = IGNORE_INDEX if index is None else index
            self.counts[index] = self.counts[index] + counts if index in self.counts else counts
        self.ends = {index: counts.sum(axis=1, dtype=np.int64).cumsum() for index, counts in self.counts.items()}
        self.classes = sorted(index for index in self.counts if index != IGNORE_INDEX)

    def draw(self, read: ReadMask) -> tuple[int, int] | None:
        """Row and column of a pixel of a class drawn evenly from those present; None if all is void."""
        if not self.classes:
            return None
        wanted = self.classes[int(torch.randint(len(self.classes), ()))]
        ends = self.ends[wanted]
        number = int(torch.randint(int(ends[-1]), ()))
        row = int(np.searchsorted(ends, number, side="right"))
        number -= int(ends[row - 1]) if row else 0
        blocks = self.counts[wanted][row].cumsum(dtype=np.int64)
        block = int(np.searchsorted(blocks, number, side="right"))
        number -= int(blocks[block - 1]) if block else 0
        left = block * self.block_px
        found = read(row, left, 1, min(self.block_px, self.width - left))[0]
        columns = (found == wanted).nonzero().flatten()
        # Where the image has no data, labels count but are read as void.
        return row, left + (int(columns[number]) if number < len(columns) else 0)
