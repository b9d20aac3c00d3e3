"""How far a run is, and what learning rate that means."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of steps, or a number of seconds; exactly one is set.

    Example:
        >>> Budget(steps=10).progress(step=5, elapsed_s=99.0)
        0.5
    """

    steps: int | None = None
    seconds: float | None = None

    def progress(self, *, step: int, elapsed_s: float) -> float:
        """The share in [0, 1] that is spent after `step` steps and `elapsed_s` seconds."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, elapsed_s / (self.seconds or 1.0))


def lr_factor(progress: float, *, schedule: Literal["poly", "onecycle"], warmup: float, power: float) -> float:
    """The learning rate over its peak: a rise over `warmup`, then a fall that reaches zero with the budget.

    Args:
        progress: share of the budget spent, in [0, 1].
        schedule: `poly` rises linearly, then falls as (1 - p) ** power (DeepLab, arXiv:1606.00915); `onecycle` rises and
            falls as a half cosine (Smith and Topin, arXiv:1708.07120).
        warmup: share of the budget of the rise.
        power: of `poly`.

    Example:
        >>> [round(lr_factor(p, schedule="poly", warmup=0.1, power=1), 2) for p in (0.05, 0.1, 0.55, 1)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        rise = progress / warmup
        # A time budget starts at exactly 0 s: a first step without any learning rate would be wasted.
        return max(0.01, rise if schedule == "poly" else (1 - math.cos(math.pi * rise)) / 2)
    fall = (progress - warmup) / max(1e-12, 1 - warmup)
    return (1 - fall) ** power if schedule == "poly" else (1 + math.cos(math.pi * fall)) / 2
