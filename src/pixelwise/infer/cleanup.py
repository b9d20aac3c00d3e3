"""Small areas take the label of their surroundings, in label images of any size: only a band of rows is in memory.

Rows become runs of equal labels. Runs that touch, also at a corner, belong to one area; an area that reaches the next
band stays open and grows on there. What is found goes into a table, one number for each run, so that any rows can be
rewritten afterwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixelwise.errors import UsageError
from pixelwise.infer.label_runs import Band, Labels, Mask, Numbers, OpenAreas, Rows, Table

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

    Args:
        rows: gives the labels; always the same.
        height: rows of the image.
        width: columns.
        min_area_px: 1 or 0 changes nothing.
        nodata: label of pixels without data, which are never changed, and nobody's neighbours.
        band_px: rows at a time, about a million pixels unless given; the result does not depend on it.
        folder: of the temporary file that holds what takes more than 16 MiB (4 bytes for each run).

    Returns:
        gives the new labels, in any order and from any thread.

    Raises:
        UsageError: a number that is not allowed.
        PixelwiseError: there is no room for the temporary file.
    """
    if min(height, width) < 1 or min_area_px < 0 or (band_px is not None and band_px < 1):
        raise UsageError(
            f"clean-up: {height} x {width} px in bands of {band_px} rows, areas of {min_area_px} px; sides and bands must "
            "be at least 1, the smallest area at least 0."
        )
    if min_area_px <= 1:
        return rows
    step = band_px or max(1, _BAND_PX // width)
    image = _Image(rows, height, step, nodata, Table(folder), np.zeros(height + 1, dtype=np.int64))
    small = _find_small(image, min_area_px)
    if not small:
        return rows
    for _ in range(_LAYERS):
        given = _give_classes(image)
        small -= given
        if not small or not given:
            break
    return image.cleaned


@dataclass(frozen=True)
class _Image:
    """The labels, and what the table says of their runs; `first[row]` is the number of the first run of a row."""

    rows: Rows
    height: int
    step: int
    nodata: int | None
    table: Table
    first: Numbers

    def bands(self) -> Iterator[tuple[int, int, Band]]:
        """(new, bottom, runs of the rows up to `bottom`): rows before `new` were the last of the band before."""
        for new in range(0, self.height, self.step):
            bottom = min(self.height, new + self.step)
            yield new, bottom, Band.of(np.asarray(self.rows(max(0, new - 1), bottom)))

    def has_data(self, band: Band) -> Mask:
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
        band = Band.of(labels)
        values = np.where(said >= 0, said, band.values).astype(labels.dtype)
        return np.repeat(values, band.lengths).reshape(labels.shape)


def _find_small(image: _Image, min_area_px: int) -> int:
    """Write to the table which runs belong to small areas, and count these runs."""
    areas, size_so_far, small_runs = OpenAreas(), np.empty(0, dtype=np.int64), 0
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
    areas, given = OpenAreas(), 0
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
