"""Exact tiles: each carries the surroundings that its scores depend on, so that they equal those of one pass.

A tile is a core and a halo. Cores start on multiples of the network's stride, so that its coarse grids fall on the same
pixels as in one pass; halos reach as far as the receptive field and end where the image does, so that the network treats
the border as in one pass. Of the scores only the core's are kept.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch

from pixelwise.errors import UsageError
from pixelwise.infer.prefetch import prefetch, read_batch
from pixelwise.infer.tiling import BUDGET_BYTES, Read, Region, Scorer, Scores
from pixelwise.ops.cost import PassMemory, Run
from pixelwise.ops.receptive_field import ReceptiveField

Radius = tuple[int, int, int, int]
"""Pixels above, below, left and right."""

BATCH_PX = 1024**2  # more pixels at a time do not go through a network any faster
MOST_TILES = 1024  # along a side, where the tile's size is chosen


@dataclass(frozen=True)
class Axis:
    """Rows or columns of the image, and how tiles lie along them; in pixels."""

    length: int
    stride: int  # multiples of it are where cores and crops may begin
    before: int  # halo above (or left), at least
    after: int  # halo below (or right), at least
    shortest: int = 0  # of the crops at the border, as far as the image goes

    def cores(self, tile: int) -> list[tuple[int, int]]:
        """First and last + 1 of each core: as many as tiles of `tile` px (a multiple of the stride) need, evenly spread."""
        count = -(-self.length // tile)
        step = self.up(-(-self.length // count))
        return [(start, min(start + step, self.length)) for start in range(0, self.length, step)]

    def crop(self, start: int, stop: int) -> tuple[int, int]:
        """First and last + 1 of what the core start ... stop is computed from.

        At the border it is never shorter than `shortest`, a field of the network, as networks without padding, which pad a
        short image first, would give its border other surroundings than that of a long one.
        """
        low = max(0, start - self.up(self.before))
        high = min(self.length, self.up(stop + self.after))
        least = max(self.up(self.shortest), self.field_px)
        if low == 0:
            high = min(self.length, max(high, least))
        elif high == self.length:
            low = max(0, min(low, (self.length - least) // self.stride * self.stride))
        return low, high

    @property
    def field_px(self) -> int:
        """What the smallest core is computed from, away from the border."""
        return self.up(self.before) + self.stride + self.up(self.after)

    def up(self, px: int) -> int:
        """The next multiple of the stride."""
        return -(-px // self.stride) * self.stride

    def sums(self, tile: int) -> tuple[int, int]:
        """Lengths of all crops together, and that of the longest."""
        lengths = [high - low for low, high in (self.crop(*core) for core in self.cores(tile))]
        return sum(lengths), max(lengths)


class HaloTiles(Scorer):
    """Exact tiles; see the module.

    The cost is that of the areas of all crops; with tiles of t px and radius r it is about (1 + 2 r / t) ** 2.

    Args:
        run: images (N, C, h, w) -> logits (N, K, h, w); of one image of a batch, whatever the others are.
        receptive: of the network.
        memory: what a pass takes.
        tile_px: the side of the cores at most, rounded up to the stride; None chooses height and width for the least cost
            that `budget_bytes` allow.
        radius_px: the halo above, below, left and right, if it is not the whole of the network's.
        batch: crops of equal size that go through the network together, at most. More than one changes scores by no more
            than rounding. None: as many as 1024 x 1024 px hold, if the budget does (a larger tile saves more than a
            larger batch of small ones).

    Raises:
        UsageError: the receptive field has no end, or the smallest tile takes more than the budget.
    """

    def __init__(
        self,
        run: Run,
        receptive: ReceptiveField,
        memory: PassMemory,
        *,
        in_channels: int,
        num_classes: int,
        height: int,
        width: int,
        tile_px: int | None = None,
        radius_px: Radius | None = None,
        batch: int | None = None,
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        if not receptive.bounded or receptive.stride is None or receptive.radius_px is None:
            raise UsageError(
                "exact tiles need a network whose receptive field has an end, and this one's has none (it looks at the "
                "whole image, or farther than was tried). Use blended tiles: --blend gaussian."
            )
        self.run, self.memory, self.in_channels, self.num_classes = run, memory, in_channels, num_classes
        (above, below, left, right), stride = receptive.radius_px, receptive.stride
        # Crops are never shorter than those that the whole of the network's halo would make.
        shortest = Axis(height, stride, above, below).field_px, Axis(width, stride, left, right).field_px
        above, below, left, right = radius_px or receptive.radius_px
        self.rows = Axis(height, stride, above, below, shortest[0])
        self.columns = Axis(width, stride, left, right, shortest[1])
        self.batch = max(1, batch or 1)
        if tile_px is None:
            self.tile = self._choose(budget_bytes)
        else:
            self.tile = (self.rows.up(tile_px), self.columns.up(tile_px))
        (tall, crop_height), (wide, crop_width) = (
            axis.sums(tile) for axis, tile in zip((self.rows, self.columns), self.tile, strict=True)
        )
        self.cost = tall * wide / (height * width)
        tiles = len(self.rows.cores(self.tile[0])) * len(self.columns.cores(self.tile[1]))
        most = min(tiles, BATCH_PX // (crop_height * crop_width))
        while batch is None and self.batch < most:  # one crop more at a time, while it fits
            if self._bytes(crop_height, crop_width, *self.tile, batch=self.batch + 1) > budget_bytes:
                break
            self.batch += 1
        self.memory_bytes = self._bytes(crop_height, crop_width, *self.tile)
        halo = max(self.rows.before, self.rows.after, self.columns.before, self.columns.after)
        self.way = f"halo tiles of {self.tile[0]} x {self.tile[1]} px with {halo} px around them"

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """As `Scorer.score`: every tile that touches the region, row by row, cropped to the region."""
        columns = self.columns.cores(self.tile[1])
        cores = [
            Region(top, left, bottom - top, right - left)
            for top, bottom in self.rows.cores(self.tile[0])
            for left, right in columns
        ]
        cores = [core for core in cores if core.overlap(region).height]
        with closing(prefetch(lambda batch: read_batch(read, map(self.crop, batch)), self._batches(cores))) as coming:
            for batch, images in coming:
                with torch.no_grad():
                    logits = self.run(images.result())  # (N, K, h, w)
                del images
                # In memory of their own, so that the scores of the halo are freed.
                parts = [
                    logits[index][:, *core.within(self.crop(core))].to(
                        torch.float32, copy=True, memory_format=torch.contiguous_format
                    )
                    for index, core in enumerate(batch)
                ]
                del logits
                for core in batch:
                    inner = core.overlap(region)
                    yield Scores(inner, parts.pop(0)[:, *inner.within(core)])

    def _batches(self, cores: Sequence[Region]) -> Iterator[list[Region]]:
        """Neighbours whose crops have one size, as many as a batch takes."""
        for _, alike in groupby(cores, key=lambda core: self.crop(core)[2:]):
            waiting = list(alike)
            for start in range(0, len(waiting), self.batch):
                yield waiting[start : start + self.batch]

    def crop(self, core: Region) -> Region:
        """What the scores of a core are computed from."""
        top, bottom = self.rows.crop(core.top, core.bottom)
        left, right = self.columns.crop(core.left, core.right)
        return Region(top, left, bottom - top, right - left)

    def _bytes(
        self, crop_height: int, crop_width: int, core_height: int, core_width: int, batch: int | None = None
    ) -> int:
        """A pass, the crops read meanwhile, and the scores of the cores before, which the caller may still hold."""
        count = batch or self.batch
        read = 4 * self.in_channels * crop_height * crop_width
        given = 4 * self.num_classes * min(core_height, crop_height) * min(core_width, crop_width)
        return self.memory(count, crop_height, crop_width) + count * (read + given)

    def _choose(self, budget_bytes: int) -> tuple[int, int]:
        """The height and width of the cores that cost least within the budget."""
        best: tuple[float, tuple[int, int]] | None = None
        columns = [(tile, *self.columns.sums(tile)) for tile in _sizes(self.columns)]  # widest first

        def widest(tall: int, crop_height: int) -> int:
            """The place of the widest that fits."""
            return bisect_left(
                columns, True, key=lambda item: self._bytes(crop_height, item[2], tall, item[0]) <= budget_bytes
            )

        for tall in _sizes(self.rows):
            area, crop_height = self.rows.sums(tall)
            place = widest(tall, crop_height)
            if place < len(columns) and (best is None or area * columns[place][1] < best[0]):
                best = (area * columns[place][1], (tall, columns[place][0]))
        if best is None:
            (_, crop_height), (wide, _, crop_width) = self.rows.sums(self.rows.stride), columns[-1]
            needed = self._bytes(crop_height, crop_width, self.rows.stride, wide)
            raise UsageError(
                f"the smallest exact tile takes {needed / 2**20:,.0f} MiB ({crop_height} x {crop_width} px with its halo), "
                f"and {budget_bytes / 2**20:,.0f} MiB are allowed. Allow more memory, or cut the halo with --tolerance 1e-3."
            )
        return best[1]


@lru_cache(maxsize=16)
def _sizes(axis: Axis) -> tuple[int, ...]:
    """The sizes of cores worth trying along an axis, largest first; the stride is the last."""
    counts = range(1, min(-(-axis.length // axis.stride), MOST_TILES) + 1)
    sizes = {axis.up(-(-axis.length // count)) for count in counts} | {axis.stride}
    return tuple(sorted(sizes, reverse=True))
