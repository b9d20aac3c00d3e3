"""One pass over the whole image, where that fits into memory."""

from collections.abc import Iterator

import torch

from pixelwise.infer.tiling.base import Read, Region, Scores
from pixelwise.ops.cost import PassMemory, Run


class WholeImage:
    """The scores of the whole image from one pass; of a region, cut from those.

    Each call of `score` is a pass over all of the image, however small the region.

    Args:
        run: images (N, C, h, w) -> logits (N, K, h, w).
        memory: what a pass takes.
        height: H of the image.
        width: W.

    Example:
        >>> image = torch.arange(12.0).view(1, 3, 4)
        >>> scorer = WholeImage(lambda x: x + 1, PassMemory(8.0), height=3, width=4)
        >>> read = lambda top, left, height, width: image[:, top : top + height, left : left + width]
        >>> [scores] = scorer.score(read, Region(1, 1, 2, 2))
        >>> scores.values.tolist()
        [[[6.0, 7.0], [10.0, 11.0]]]
    """

    way = "whole image"
    cost = 1.0

    def __init__(self, run: Run, memory: PassMemory, *, height: int, width: int) -> None:
        self.run, self.height, self.width = run, height, width
        self.memory_bytes = memory(1, height, width)

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """As `Scorer.score`: one window, the region itself."""
        image = read(0, 0, self.height, self.width).float()[None].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            logits = self.run(image)[0].float()  # (K, H, W)
        yield Scores(region, logits[:, region.top : region.bottom, region.left : region.right])
