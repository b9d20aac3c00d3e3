"""How a user may want large images to be predicted."""

from dataclasses import dataclass
from typing import Literal, get_args

from pixelwise.errors import UsageError

Blend = Literal["gaussian", "cosine", "uniform"]
TTA = Literal["flips", "d4", "scales"]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The user's wishes; what is None is chosen from the network, the image and the memory.

    Attributes:
        tile_px: side of the tiles (with `blend`: of the windows).
        blend: weight of the windows' pixels where windows overlap; also for networks that allow exact tiles.
        overlap: share of a window that the next one repeats, 0 to 0.9 (blended tiles).
        tolerance: the halo is cut where the measured influence of a pixel falls below this share (0: never).
        memory_bytes: what prediction may take beside the weights.
        scratch: an existing folder, on whose disk rows of maps may wait where memory is short (on CPUs); None: nowhere.
        tta: average over transformed images.
        samples: passes with dropout to average; 1 is none.
        seed: of the dropout.

    Raises:
        UsageError: a value that is not allowed, or two that exclude each other.

    Example:
        >>> Tiling(tile_px=512).overlap
        0.25
    """

    tile_px: int | None = None
    blend: Blend | None = None
    overlap: float = 0.25
    tolerance: float = 0.0
    memory_bytes: int | None = None
    scratch: str | None = None
    tta: TTA | None = None
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for key, allowed in (("blend", get_args(Blend)), ("tta", get_args(TTA))):
            if getattr(self, key) not in (None, *allowed):
                raise UsageError(f"{key} is one of {', '.join(allowed)}, not {getattr(self, key)!r}.")
        if self.tile_px is not None and self.tile_px < 1:
            raise UsageError(f"tile must be at least 1 px, not {self.tile_px}.")
        if not 0 <= self.overlap <= 0.9:
            raise UsageError(f"overlap must be a share from 0 to 0.9, not {self.overlap}.")
        if not 0 <= self.tolerance < 1:
            raise UsageError(f"tolerance must be a share from 0 to less than 1, not {self.tolerance}.")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise UsageError(f"memory must be a positive number of bytes, not {self.memory_bytes}.")
        if self.samples < 1:
            raise UsageError(f"samples must be at least 1, not {self.samples}.")
        if self.tta and self.samples > 1:
            raise UsageError("tta and samples cannot be combined; choose one.")
        if self.tolerance and (self.tta or self.samples > 1):
            raise UsageError(
                "tolerance cannot be combined with tta or samples, which stream tiles without a halo to cut."
            )
        if self.blend and self.tolerance:
            raise UsageError("tolerance belongs to exact tiles and blend to overlapping windows; choose one.")
