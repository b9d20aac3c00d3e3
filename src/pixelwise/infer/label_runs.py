"""Label images as runs of equal labels, band by band: which runs touch, and a number for each run, kept on the disk."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pixelwise.errors import PixelwiseError

Labels = NDArray[np.unsignedinteger]
Numbers = NDArray[np.signedinteger]
Mask = NDArray[np.bool_]
Rows = Callable[[int, int], Labels]
"""(top, bottom) -> the labels of these rows, (bottom - top, W), unsigned."""

_IN_MEMORY_BYTES = 16 << 20
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Band:
    """The runs of some rows, from top left to bottom right, and which of them touch.

    Attributes:
        values: label of each run.
        lengths: of each run, in pixels.
        lines: row of each run, counted from the first of the band.
        stacked: (3, n): a run, one below it, and the pixel sides they share.
        corners: (2, n): two runs of one label that touch at a corner, but at no side.
    """

    values: Numbers
    lengths: Numbers
    lines: Numbers
    stacked: Numbers
    corners: Numbers

    @classmethod
    def of(cls, labels: Labels) -> "Band":
        """The runs of labels (h, w)."""
        height, width = labels.shape
        starts = np.ones((height, width), dtype=bool)
        np.not_equal(labels[:, 1:], labels[:, :-1], out=starts[:, 1:])
        places = np.flatnonzero(starts)
        values = labels.reshape(-1)[places].astype(np.int32)
        run_at = np.cumsum(starts, dtype=np.int32)
        run_at -= 1
        # Wherever a run begins in a row or in the next, another pair of runs lies one below the other.
        cuts = np.flatnonzero(starts[:-1] | starts[1:])
        shared = np.diff(cuts, append=(height - 1) * width)
        # Runs meet at a corner where one begins in both rows.
        meets = np.flatnonzero(starts[:-1] & starts[1:])
        meets = meets[meets % width > 0]
        upper = np.concatenate([run_at[meets - 1], run_at[meets]])
        lower = np.concatenate([run_at[meets + width], run_at[meets + width - 1]])
        equal = values[upper] == values[lower]
        return cls(
            values=values,
            lengths=np.diff(places, append=height * width).astype(np.int32),
            lines=(places // width).astype(np.int32),
            stacked=np.stack([run_at[cuts], run_at[cuts + width], shared.astype(np.int32)]),
            corners=np.stack([upper[equal], lower[equal]]),
        )

    def areas(self, joins: Mask, carried: Numbers, open_areas: int) -> Numbers:
        """The number of the area of each run, then of each of the areas that are open from above.

        Args:
            joins: the runs that are joined to areas; each of the others is alone.
            carried: the open area of each run of the first row, or -1; empty if there is no row above.
            open_areas: how many there are.
        """
        runs = len(self.values)
        equal = self.values[self.stacked[0]] == self.values[self.stacked[1]]
        first = np.concatenate([self.stacked[0][equal], self.corners[0]])
        second = np.concatenate([self.stacked[1][equal], self.corners[1]])
        joined = joins[first] & joins[second]
        known = np.flatnonzero(carried >= 0)
        first = np.concatenate([first[joined], known])
        second = np.concatenate([second[joined], carried[known] + runs])
        nodes = runs + open_areas
        graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(nodes, nodes))
        areas: Numbers = connected_components(graph, directed=False)[1]  # int32
        return areas

    def borders(self, own: Mask, other: Mask, first_line: int) -> Numbers:
        """(3, n): a run of `own`, a run of `other` beside, above or below it, and the pixel sides they share.

        Runs side by side are left out in the rows before `first_line`.
        """
        mine = np.flatnonzero(own & (self.lines >= first_line))
        found = []
        for step in (-1, 1):  # the run before and the one behind, in the same row
            there = np.clip(mine + step, 0, len(own) - 1)
            beside = (self.lines[there] == self.lines[mine]) & other[there]
            found.append(np.stack([mine[beside], there[beside], np.ones(beside.sum(), dtype=np.int64)]))
        upper, lower, shared = self.stacked
        for first, second in ((upper, lower), (lower, upper)):
            meets = np.flatnonzero(own[first] & other[second])
            found.append(np.stack([first[meets], second[meets], shared[meets]]))
        return np.concatenate(found, axis=1)


class OpenAreas:
    """The areas that reach the last row so far, and their runs above that wait for what becomes of them.

    Attributes:
        count: how many there are.
        carried: the open area of each run of the last row, or -1.
        waiting: numbers of the runs that wait, in the whole image.
        owner: the open area of each of these.
    """

    def __init__(self) -> None:
        self.count = 0
        self.carried: Numbers = np.empty(0, dtype=np.int64)
        self.waiting: Numbers = np.empty(0, dtype=np.int64)
        self.owner: Numbers = np.empty(0, dtype=np.int64)

    def reaching(self, band: Band, area: Numbers, joins: Mask, *, is_last: bool) -> Mask:
        """By area: whether it reaches the last row of a band and may go on below it."""
        reaches = np.zeros(int(area.max()) + 1, dtype=bool)
        if not is_last:
            reaches[area[: len(band.values)][joins & (band.lines == band.lines[-1])]] = True
        return reaches

    def renumber(self, band: Band, area: Numbers, reaches: Mask, waits: Mask, numbers: Numbers, new: Mask) -> None:
        """Go on to the next band; the open areas are then those of `reaches`, in this order.

        Args:
            band: the one that ends.
            area: of each run, then of each area that was open.
            reaches: by area, as `reaching` gave it.
            waits: by area, whether its runs wait.
            numbers: of the runs in the whole image.
            new: the runs that do not lie in the row of the band before.
        """
        runs = len(band.values)
        fresh = np.where(reaches, np.cumsum(reaches) - 1, -1)
        added = new & (reaches & waits)[area[:runs]]
        before = area[runs:][self.owner]
        kept = (reaches & waits)[before]
        self.waiting = np.concatenate([self.waiting[kept], numbers[added]])
        self.owner = np.concatenate([fresh[before[kept]], fresh[area[:runs][added]]])
        self.carried = fresh[area[:runs]][band.lines == band.lines[-1]]
        self.count = int(reaches.sum())


class Table:
    """A number (int32) for each run of an image; what is large lies in a temporary file.

    Args:
        folder: of the temporary file; the system's own unless given.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = str(folder or tempfile.gettempdir())
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES, dir=self._folder)  # noqa: SIM115  (it lives on)
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """The numbers of runs start..stop."""
        with self._locked():
            self._file.seek(4 * int(start))
            return np.frombuffer(self._file.read(4 * int(stop - start)), dtype=np.int32)

    def write(self, start: int, numbers: NDArray[np.integer]) -> None:
        """Set the numbers of the runs from `start` on.

        Raises:
            PixelwiseError: there is no room for the temporary file.
        """
        with self._locked():
            self._file.seek(4 * int(start))
            self._file.write(numbers.astype(np.int32).tobytes())

    def patch(self, runs: Numbers, numbers: Numbers) -> None:
        """Set the numbers of some runs, in any order.

        Raises:
            PixelwiseError: there is no room for the temporary file.
        """
        order = np.argsort(runs, kind="stable")
        runs, numbers = runs[order], numbers[order]
        blocks = runs // _BLOCK
        for part in np.split(np.arange(len(runs)), np.flatnonzero(np.diff(blocks)) + 1):
            if len(part):
                start = int(runs[part[0]])
                values = self.read(start, int(runs[part[-1]]) + 1).copy()
                values[runs[part] - start] = numbers[part]
                self.write(start, values)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except OSError as error:
                raise PixelwiseError(
                    f"clean-up: the temporary file in {self._folder} cannot be used ({error.strerror or error}). Free some "
                    "space there, or set TMPDIR to another folder."
                ) from error

    def __del__(self) -> None:
        self._file.close()
