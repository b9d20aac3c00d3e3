"""Test-time augmentation: the same network on transformed images, its scores brought back to the image as it was.

Flips and quarter turns only move pixels, so they are undone exactly. Scales resample twice, the image and the scores.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.infer.network import Read, Region


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Something done to images (N, C, H, W) before the network, and undone to its scores (N, K, H', W').

    First rows and columns are exchanged, then mirrored, then the image is resized; undoing takes the reverse order.

    Attributes:
        transpose: exchange rows and columns.
        flip_rows: upside down.
        flip_columns: left to right.
        scale: of the sides; resized bilinearly, pixel areas aligned, without a blur before it shrinks.
    """

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    scale: float = 1.0

    @property
    def is_identity(self) -> bool:
        """Whether images stay what they are."""
        return self == Transform()

    def apply(self, image: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W'), H' and W' at least 1."""
        if self.transpose:
            image = image.transpose(-2, -1)
        if self._axes:
            image = image.flip(self._axes)
        height, width = image.shape[-2:]
        return _resize(image, (_scaled(height, self.scale), _scaled(width, self.scale)))

    def undo(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, K, H', W') -> (N, K, H, W), where `size` = (H, W) is that of the image given to `apply`."""
        height, width = size
        scores = _resize(scores, (width, height) if self.transpose else (height, width))
        if self._axes:
            scores = scores.flip(self._axes)
        return scores.transpose(-2, -1) if self.transpose else scores

    def place(self, region: Region, size: tuple[int, int]) -> Region:
        """Where a region of an image of `size` = (H, W) lies in the transformed image; flips and turns only."""
        self._check_exact()
        if self.transpose:
            region, size = Region(region.left, region.top, region.width, region.height), (size[1], size[0])
        return self._mirrored(region, size)

    def reader(self, read: Read, size: tuple[int, int]) -> Read:
        """Reads windows of the transformed image, where `read` reads those of the image of `size`; flips and turns only."""
        self._check_exact()
        turned = (size[1], size[0]) if self.transpose else size

        def transformed(top: int, left: int, height: int, width: int) -> Tensor:
            found = self._mirrored(Region(top, left, height, width), turned)
            if self.transpose:
                found = Region(found.left, found.top, found.width, found.height)
            return self.apply(read(found.top, found.left, found.height, found.width))

        return transformed

    def _mirrored(self, region: Region, size: tuple[int, int]) -> Region:
        top = size[0] - region.bottom if self.flip_rows else region.top
        left = size[1] - region.right if self.flip_columns else region.left
        return Region(top, left, region.height, region.width)

    def _check_exact(self) -> None:
        if self.scale != 1:
            raise UsageError("only flips and quarter turns move windows; a scale mixes pixels.")

    @property
    def _axes(self) -> list[int]:
        return [axis for axis, flipped in ((-2, self.flip_rows), (-1, self.flip_columns)) if flipped]


_FLIPS = tuple(Transform(flip_rows=rows, flip_columns=columns) for rows in (False, True) for columns in (False, True))
TRANSFORMS: dict[str, tuple[Transform, ...]] = {
    "flips": _FLIPS,
    "d4": _FLIPS
    + tuple(
        Transform(transpose=True, flip_rows=item.flip_rows, flip_columns=item.flip_columns) for item in _FLIPS
    ),  # the eight symmetries of the square: four turns, each also mirrored
    "scales": (Transform(scale=0.75), Transform(), Transform(scale=1.25)),
}


def transforms_of(tta: str) -> tuple[Transform, ...]:
    """The transforms called "flips" (4), "d4" (8: flips and quarter turns) or "scales" (3: 0.75, 1, 1.25)."""
    if tta not in TRANSFORMS:
        raise UsageError(f"tta is one of {', '.join(TRANSFORMS)}, not {tta!r}.")
    return TRANSFORMS[tta]


class Transformed(nn.Module):
    """A network that sees the transformed image and answers for the image as it is; logits stay logits.

    The weights are those of `model` itself. Its code has no branch on values, so torch.export and make_fx capture it
    at a fixed size as flips, transpositions and bilinear resizing around the network.
    """

    def __init__(self, model: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.model, self.transform = model, transform
        self.train(model.training)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        return self.transform.undo(self.model(self.transform.apply(image)), (height, width))  # (N, K, H, W)


def _scaled(length: int, scale: float) -> int:
    return length if scale == 1 else max(1, int(length * scale + 0.5))


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = maps.shape[-2:]
    if (height, width) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=False)
