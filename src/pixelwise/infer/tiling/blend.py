"""Overlapping windows whose scores are averaged with weights, for networks that look at the whole image.

The windows lie on a grid of the whole image, and their logits are added up in float32 over a band of rows: what no further
window reaches is divided by the sum of its weights and given away. The band is as high as a window; nothing is ever of the
size of the image.
"""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice, pairwise
from math import ceil

import torch
from torch import Tensor

from pixelwise.infer.options import Blend
from pixelwise.infer.prefetch import prefetch, read_batch
from pixelwise.infer.tiling import Read, Region, Scorer, Scores
from pixelwise.ops.cost import PassMemory, Run

LEAST_WEIGHT = 1e-3  # of a pixel in its window, so that sums of weights are far from zero
GIVEN_BYTES = 2**24  # scores are given away in pieces of about this size


class BlendedTiles(Scorer):
    """Weighted averages of the logits of overlapping windows; see the module.

    Windows are as many as steps of `window_px * (1 - overlap)` need to cover the image, and spread evenly and symmetrically:
    what the last step would overshoot goes into all overlaps alike. A side shorter than the window is taken as it is. Logits
    are averaged, not probabilities; weights fall from the middle of a window to its border, never below 0.001.

    Where the band does not fit into `budget_bytes`, the columns are done in groups; windows across a seam between groups are
    computed for either. The cost is that of the pixels of all windows that are computed.

    Args:
        run: images (N, C, h, w) -> logits (N, K, h, w) of any float type; one window at a time.
        memory: what a pass takes.
        window_px: side of the windows.
        overlap: share of a window that the next one repeats at least, 0 to 0.9.
        weights: "gaussian" (deviation: an eighth of the side), "cosine" (half a period of it) or "uniform".
    """

    def __init__(
        self,
        run: Run,
        memory: PassMemory,
        *,
        in_channels: int,
        num_classes: int,
        height: int,
        width: int,
        window_px: int,
        overlap: float = 0.25,
        weights: Blend = "gaussian",
        budget_bytes: int | None = None,
    ) -> None:
        self.run, self.memory, self.in_channels, self.num_classes = run, memory, in_channels, num_classes
        self.size = (min(window_px, height), min(window_px, width))
        self.way = f"blended tiles of {self.size[0]} x {self.size[1]} px"
        self.tops, self.lefts = starts(height, self.size[0], overlap), starts(width, self.size[1], overlap)
        self.weight = window_weights(self.size, weights)  # (h, w)
        self.group_px = self._group_px(height, width, budget_bytes)
        self.memory_bytes = self._bytes(self.group_px)
        groups = range(0, width, self.group_px)
        across = sum(len(self._reaching(left, min(left + self.group_px, width))) for left in groups)
        self.cost = len(self.tops) * across * self.size[0] * self.size[1] / (height * width)

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """As `Scorer.score`: rows of the region as soon as they are final; one group of columns after the other."""
        left = region.left
        while left < region.right:
            right = min((left // self.group_px + 1) * self.group_px, region.right)
            yield from self._band(read, Region(region.top, left, region.height, right - left))
            left = right

    def _band(self, read: Read, region: Region) -> Iterator[Scores]:
        """The scores of a region whose columns are done together."""
        height, width = self.size
        rows = [top for top in self.tops if top < region.bottom and top + height > region.top]
        lefts, step = self._reaching(region.left, region.right), self._rows_given(region.width)
        windows = [Region(top, left, height, width) for top in rows for left in lefts]
        sums = torch.empty(0)  # (K + 1, height, columns) of weighted logits, and of the weights
        with closing(prefetch(lambda window: read_batch(read, [window]), windows)) as coming:
            for top, after in pairwise([*rows, region.bottom]):
                band = Region(max(top, region.top), region.left, height, region.width)
                for window, image in islice(coming, len(lefts)):
                    with torch.no_grad():
                        logits = self.run(image.result())[0].float()  # (K, h, w)
                    if not sums.numel():  # only now is the device known
                        sums = torch.zeros(self.num_classes + 1, height, region.width, device=logits.device)
                        weight = self.weight.to(logits.device)
                    both = window.overlap(region)
                    part, inner = sums[:, *both.within(band)], both.within(window)
                    part[:-1].addcmul_(logits[:, *inner], weight[inner])
                    part[-1].add_(weight[inner])
                    del logits, image
                done = max(0, after - band.top)  # rows that no further window reaches
                for start in range(0, done, step):
                    final = sums[:, start : min(start + step, done)]
                    given = Region(band.top + start, region.left, final.shape[1], region.width)
                    yield Scores(given, final[:-1] / final[-1])
                for plane in sums if done else ():  # one after the other, so that the copy is small
                    plane[: height - done] = plane[done:].clone()
                    plane[height - done :] = 0

    def _reaching(self, left: int, right: int) -> list[int]:
        """First columns of the windows that cover any of the columns left ... right - 1."""
        return [start for start in self.lefts if start < right and start + self.size[1] > left]

    def _bytes(self, group_px: int) -> int:
        """A pass, the windows read meanwhile, the band with its weights, and two of the pieces that are given away."""
        height, width = self.size
        window = height * width
        band = (self.num_classes + 2) * height * group_px  # one of its maps is copied to move its rows
        given = 2 * self._rows_given(group_px) * self.num_classes * group_px
        logits = window * self.num_classes  # weighted, in float32
        read = window * self.in_channels
        return self.memory(1, height, width) + 4 * (read + band + given + logits)

    def _rows_given(self, width: int) -> int:
        return max(1, GIVEN_BYTES // (4 * self.num_classes * width))

    def _group_px(self, height: int, width: int, budget_bytes: int | None) -> int:
        """Columns to do together: all, or as many as the budget allows, a window at least."""
        count = 1
        while budget_bytes is not None and self._bytes(ceil(width / count)) > budget_bytes:
            if ceil(width / count) <= self.size[1]:
                break
            count += 1
        return ceil(width / count)


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin so that neighbours share `overlap` of them or more, from border to border and symmetrically."""
    spare = length - window
    step = max(1, int(window * (1 - overlap)))
    steps = -(-spare // step)
    if steps <= 0:
        return [0]
    # Rounded up in the first half and mirrored, so that no gap is wider than the step.
    first = [-(-index * spare // steps) for index in range(steps // 2 + 1)]
    return first + [spare - start for start in first[: steps + 1 - len(first)][::-1]]


def window_weights(size: tuple[int, int], kind: Blend) -> Tensor:
    """The weights of a window's pixels, float32 (height, width), from 0.001 to 1.

    "gaussian" is the importance map of MONAI: the product of exp(-x^2 / (2 (side / 8)^2)) over rows and columns, x from the
    middle of the window, and no less than 0.001.
    """
    sides = []
    for side in size:
        middle = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
        if kind == "gaussian":
            sides.append(torch.exp(-(middle**2) / (2 * (side / 8) ** 2)))
        else:
            sides.append(torch.cos(middle / side * torch.pi) if kind == "cosine" else torch.ones_like(middle))
    return (sides[0][:, None] * sides[1]).float().clamp(min=LEAST_WEIGHT)
