"""Small areas take the label of their surroundings, in label images of any size: only a band of rows is in memory.

Rows become runs of equal labels. Runs that touch, also at a corner, belong to one area; an area that reaches the next
band stays open and grows on there. What is found goes into a table, one number for each run, so that any rows can be
rewritten afterwards.
"""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import PixelwiseError

Labels = NDArray[np.unsignedinteger]
Numbers = NDArray[np.signedinteger]
Mask = NDArray[np.bool_]
Rows = Callable[[int, int], Labels]
"""(top, bottom) -> the labels of these rows, (bottom - top, W), unsigned."""

_IN_MEMORY_BYTES = 16 << 20
_BLOCK = 1 << 16
_KEEP, _SMALL = -1, -2  # what the table says of a run, unless it is the class that the run takes
_BAND_PX = 1 << 20
_LAYERS = 16
_CLASSES = 1 << 16


def remove_small(
    rows: Rows,
    height: int,
    width: int,
    min_area_px: int,
    *,
    nodata: int | None = None,
    band_px: int | None = None,
    folder: str | Path | None = None,
) -> Rows:
    """The same labels, where areas of fewer than `min_area_px` pixels have the label of their surroundings.

    An area is all pixels of one class that are connected by sides or corners, so that a thin slanting line is one area. A
    small one takes the class with which it shares the longest border (in pixel sides; of equal ones, the lowest class), but
    not that of another small area. Where it touches none but small ones, it waits until these have their classes. No small
    area is left but those that no large one reaches so, because there is none around (an image smaller than
    `min_area_px`), or because more than 15 small ones lie between (noise, not areas).

    The image is read at least twice, band by band, and again for the result. The memory is that of a band, 200 to 400 MiB
    where every pixel differs from the next, and 16 bytes for each run of small areas that cross into the next band.
    """
    if min_area_px <= 1:
        return rows
    step = band_px or max(1, _BAND_PX // width)
    image = _Image(rows, height, step, nodata, _Table(folder), np.zeros(height + 1, dtype=np.int64))
    small = _find_small(image, min_area_px)
    if not small:
        return rows
    for _ in range(_LAYERS):
        given = _give_classes(image)
        small -= given
        if not small or not given:
            break
    return image.cleaned


class _Band:
    """The runs of some rows (h, w), from top left to bottom right, and which of them touch."""

    def __init__(self, labels: Labels) -> None:
        height, width = labels.shape
        starts = np.ones((height, width), dtype=bool)
        np.not_equal(labels[:, 1:], labels[:, :-1], out=starts[:, 1:])
        places = np.flatnonzero(starts)
        self.values: Numbers = labels.reshape(-1)[places].astype(np.int32)  # label of each run
        self.lengths: Numbers = np.diff(places, append=height * width).astype(np.int32)
        self.lines: Numbers = (places // width).astype(np.int32)  # row of each run, counted from the first of the band
        run_at = np.cumsum(starts, dtype=np.int32)
        run_at -= 1
        # Wherever a run begins in a row or in the next, another pair of runs lies one below the other.
        cuts = np.flatnonzero(starts[:-1] | starts[1:])
        shared = np.diff(cuts, append=(height - 1) * width).astype(np.int32)  # pixel sides
        self.stacked: Numbers = np.stack([run_at[cuts], run_at[cuts + width], shared])
        # Runs of one label that touch at a corner, but at no side: both begin there, in two rows.
        meets = np.flatnonzero(starts[:-1] & starts[1:])
        meets = meets[meets % width > 0]
        upper = np.concatenate([run_at[meets - 1], run_at[meets]])
        lower = np.concatenate([run_at[meets + width], run_at[meets + width - 1]])
        self.corners: Numbers = np.stack([upper, lower])[:, self.values[upper] == self.values[lower]]

    def areas(self, joins: Mask, carried: Numbers, open_areas: int) -> Numbers:
        """The number of the area of each run, then of each of the areas that are open from above."""
        from scipy.sparse import coo_array  # slow to import, and few ask for a clean-up
        from scipy.sparse.csgraph import connected_components

        runs, known = len(self.values), np.flatnonzero(carried >= 0)
        equal = self.values[self.stacked[0]] == self.values[self.stacked[1]]
        touching = np.concatenate([self.stacked[:2, equal], self.corners], axis=1)
        open_above = np.stack([known, carried[known] + runs]).astype(np.int32)
        pairs = np.concatenate([touching[:, joins[touching].all(axis=0)], open_above], axis=1)
        ones = np.ones(pairs.shape[1], dtype=np.int8)
        graph = coo_array((ones, (pairs[0], pairs[1])), shape=(runs + open_areas, runs + open_areas))
        return connected_components(graph, directed=False)[1]  # int32

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


class _OpenAreas:
    """The areas that reach the last row so far, and their runs above that wait for what becomes of them."""

    def __init__(self) -> None:
        self.count = 0
        self.carried: Numbers = np.empty(0, dtype=np.int64)  # the open area of each run of the last row, or -1
        self.waiting: Numbers = np.empty(0, dtype=np.int64)  # numbers of the runs that wait, in the whole image
        self.owner: Numbers = np.empty(0, dtype=np.int64)  # the open area of each of these

    def reaching(self, band: _Band, area: Numbers, joins: Mask, *, is_last: bool) -> Mask:
        """By area: whether it reaches the last row of a band and may go on below it."""
        reaches = np.zeros(int(area.max()) + 1, dtype=bool)
        if not is_last:
            reaches[area[: len(band.values)][joins & (band.lines == band.lines[-1])]] = True
        return reaches

    def renumber(self, band: _Band, area: Numbers, reaches: Mask, waits: Mask, numbers: Numbers, new: Mask) -> None:
        """Go on to the next band; the open areas are then those of `reaches`, in this order."""
        runs = len(band.values)
        fresh = np.where(reaches, np.cumsum(reaches) - 1, -1)
        added = new & (reaches & waits)[area[:runs]]
        before = area[runs:][self.owner]
        kept = (reaches & waits)[before]
        self.waiting = np.concatenate([self.waiting[kept], numbers[added]])
        self.owner = np.concatenate([fresh[before[kept]], fresh[area[:runs][added]]])
        self.carried = fresh[area[:runs]][band.lines == band.lines[-1]]
        self.count = int(reaches.sum())


class _Table:
    """A number (int32) for each run of an image; what is large lies in a temporary file, in `folder` if that is given."""

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
        """Set the numbers of the runs from `start` on."""
        with self._locked():
            self._file.seek(4 * int(start))
            self._file.write(numbers.astype(np.int32).tobytes())

    def patch(self, runs: Numbers, numbers: Numbers) -> None:
        """Set the numbers of some runs, in ascending order."""
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


@dataclass(frozen=True)
class _Image:
    """The labels, and what the table says of their runs; `first[row]` is the number of the first run of a row."""

    rows: Rows
    height: int
    step: int
    nodata: int | None
    table: _Table
    first: Numbers

    def bands(self) -> Iterator[tuple[int, int, _Band]]:
        """(new, bottom, runs of the rows up to `bottom`): rows before `new` were the last of the band before."""
        for new in range(0, self.height, self.step):
            bottom = min(self.height, new + self.step)
            yield new, bottom, _Band(np.asarray(self.rows(max(0, new - 1), bottom)))

    def has_data(self, band: _Band) -> Mask:
        return np.ones(len(band.values), dtype=bool) if self.nodata is None else band.values != self.nodata

    def cleaned(self, top: int, bottom: int) -> Labels:
        """The new labels of some rows."""
        if bottom - top > self.step:
            starts = range(top, bottom, self.step)
            return np.concatenate([self.cleaned(start, min(bottom, start + self.step)) for start in starts])
        labels = np.asarray(self.rows(top, bottom))
        said = self.table.read(self.first[top], self.first[bottom])
        if not (said >= 0).any():
            return labels
        band = _Band(labels)
        values = np.where(said >= 0, said, band.values).astype(labels.dtype)
        return np.repeat(values, band.lengths).reshape(labels.shape)


def _find_small(image: _Image, min_area_px: int) -> int:
    """Write to the table which runs belong to small areas, and count these runs."""
    areas, size_so_far, small_runs = _OpenAreas(), np.empty(0, dtype=np.int64), 0
    for new, bottom, band in image.bands():
        has_data = image.has_data(band)
        area = band.areas(has_data, areas.carried, areas.count)
        is_new, runs = band.lines >= (new > 0), len(band.values)
        size = np.bincount(area[:runs], weights=np.where(is_new, band.lengths, 0), minlength=area.max() + 1)
        np.add.at(size, area[runs:], size_so_far)
        is_small = size < min_area_px

        grown = ~is_small[area[runs:][areas.owner]]  # runs above that were held for small
        image.table.patch(areas.waiting[grown], np.full(grown.sum(), _KEEP))
        said = np.where(has_data & is_small[area[:runs]], _SMALL, _KEEP)[is_new]
        counts = np.bincount(band.lines[is_new] - (new > 0), minlength=bottom - new)
        image.first[new + 1 : bottom + 1] = image.first[new] + np.cumsum(counts)
        image.table.write(image.first[new], said)
        small_runs += int((said == _SMALL).sum()) - int(grown.sum())

        reaches = areas.reaching(band, area, has_data, is_last=bottom == image.height)
        numbers = image.first[max(0, new - 1)] + np.arange(runs)
        areas.renumber(band, area, reaches, is_small, numbers, is_new)
        size_so_far = size[reaches].astype(np.int64)
    return small_runs


def _give_classes(image: _Image) -> int:
    """Give a class to the small areas that touch others than small ones; the number of runs that got one."""
    areas, given = _OpenAreas(), 0
    borders_so_far = np.empty((3, 0), dtype=np.int64)  # open area, class, pixel sides
    for new, bottom, band in image.bands():
        start, runs = image.first[max(0, new - 1)], len(band.values)
        said = image.table.read(start, image.first[bottom])
        is_small, is_new = said == _SMALL, band.lines >= (new > 0)
        area = band.areas(is_small, areas.carried, areas.count)
        own, other, shared = band.borders(is_small, ~is_small & image.has_data(band), int(new > 0))
        found = np.stack([area[own], np.where(said >= 0, said, band.values)[other], shared])
        borders_so_far[0] = area[runs:][borders_so_far[0]]
        borders = _summed(np.concatenate([borders_so_far, found], axis=1))

        reaches = areas.reaching(band, area, is_small, is_last=bottom == image.height)
        closed = borders[:, ~reaches[borders[0]]]
        choice = _longest(closed, len(reaches))
        waiting = choice[area[runs:][areas.owner]]
        image.table.patch(areas.waiting[waiting >= 0], waiting[waiting >= 0])
        chosen = np.where(is_small, choice[area[:runs]], -1)[is_new]
        image.table.write(image.first[new], np.where(chosen >= 0, chosen, said[is_new]))
        given += int((waiting >= 0).sum()) + int((chosen >= 0).sum())

        areas.renumber(band, area, reaches, np.ones_like(reaches), start + np.arange(runs), is_new & is_small)
        borders_so_far = borders[:, reaches[borders[0]]]
        borders_so_far[0] = (np.cumsum(reaches) - 1)[borders_so_far[0]]
    return given


def _summed(borders: Numbers) -> Numbers:
    """(area, class, pixel sides), with each pair of area and class once, in their order."""
    keys, place = np.unique(borders[0].astype(np.int64) * _CLASSES + borders[1], return_inverse=True)
    sides = np.bincount(place, weights=borders[2], minlength=len(keys)).astype(np.int64)
    return np.stack([keys // _CLASSES, keys % _CLASSES, sides])


def _longest(borders: Numbers, areas: int) -> Numbers:
    """By area: the class of its longest border, the lowest of equal ones; -1 if it has none."""
    choice = np.full(areas, -1, dtype=np.int64)
    order = np.lexsort((-borders[1], borders[2], borders[0]))  # the last of each area is the one
    choice[borders[0][order]] = borders[1][order]
    return choice
