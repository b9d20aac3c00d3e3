"""How far a run is, and what learning rate that means."""

import math
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["poly", "onecycle", "constant", "exponential"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of steps, or a number of seconds; exactly one is set."""

    steps: int | None = None  # of the optimiser
    seconds: float | None = None  # of training
    steps_per_epoch: int = 1  # how many steps are a pass over the data

    def progress(self, *, step: int, elapsed_s: float) -> float:
        """The share in [0, 1] that is spent after `step` steps and `elapsed_s` seconds."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, elapsed_s / (self.seconds or 1.0))


def lr_factor(
    progress: float,
    *,
    schedule: Schedule,
    warmup: float,
    power: float,
    epoch: float = 0.0,
    decay: float = 1.0,
    decay_epochs: float = 1.0,
) -> float:
    """The learning rate over its peak: a rise over `warmup`, then what the schedule says.

    `poly` rises linearly, then falls as (1 - p) ** power (DeepLab, arXiv:1606.00915); `onecycle` rises and falls as a half
    cosine (Smith and Topin, arXiv:1708.07120); both reach zero with the budget. `constant` stays (FCN, SegNet).
    `exponential` is multiplied by `decay` after every `decay_epochs` (FC-DenseNet: 0.995 an epoch).
    """
    if progress < warmup:
        rise = progress / warmup
        # A time budget starts at exactly 0 s: a first step without any learning rate would be wasted.
        return max(0.01, (1 - math.cos(math.pi * rise)) / 2 if schedule == "onecycle" else rise)
    if schedule == "constant":
        return 1.0
    if schedule == "exponential":
        return decay ** math.floor(epoch / decay_epochs + 1e-9)  # 0.3 / 0.1 is a little less than 3
    fall = (progress - warmup) / max(1e-12, 1 - warmup)
    return (1 - fall) ** power if schedule == "poly" else (1 + math.cos(math.pi * fall)) / 2
