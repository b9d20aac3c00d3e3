"""The score of what the user looks for, and how sure it is.

With a background and one other class the mean over both says little: it is high for a network that finds nothing of a rare
object. So the headline is the object's own IoU and Dice, with the background's apart; of more classes it is mIoU, with the
worst class named.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pixelwise.metrics.confusion import ConfusionMatrix, Scores

BACKGROUND = ("background", "bg", "void", "unlabeled", "unlabelled", "other", "others", "rest", "none", "nothing")


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One score in 0..1 (NaN if it is undefined), what it is called, and the line to print, in percent."""

    name: str
    value: float
    text: str


def foreground_of(names: Sequence[str], values: Sequence[Sequence[Any]] = ()) -> int | None:
    """The index of the class that is looked for, if there are two and the other one is background; else None.

    The background is called so, or it is the class of mask value 0 (black).

    Example:
        >>> foreground_of(("background", "road")), foreground_of(("cell", "tissue"), ((1,), (0,)))
        (1, 0)
        >>> foreground_of(("sky", "road", "car")) is None
        True
    """
    if len(names) != 2:
        return None
    called = [index for index, name in enumerate(names) if name.strip().casefold() in BACKGROUND]
    black = [index for index, given in enumerate(values) if 0 in given or (0, 0, 0) in given]
    found = called or black
    return 1 - found[0] if len(found) == 1 else None


def headline(scores: Scores, names: Sequence[str], foreground: int | None, error: float = math.nan) -> Headline:
    """The headline of `scores`; `error` is its standard error, NaN where nothing is known of it.

    Example:
        >>> import numpy as np
        >>> confusion = ConfusionMatrix(2)
        >>> confusion.update(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
        >>> headline(confusion.scores(), ("background", "road"), 1).text
        'road: IoU 50.00, Dice 66.67 (background: IoU 66.67)'
        >>> headline(confusion.scores(), ("grass", "road"), None, 0.1).text
        'mIoU 58.33 ± 10.00 (worst: road 50.00)'
    """
    spread = "" if math.isnan(error) else f" ± {100 * error:.2f}"
    if foreground is not None:
        value, name, other = scores.iou[foreground], names[foreground], 1 - foreground
        apart = f"({names[other]}: IoU {_percent(scores.iou[other])})"
        found = f"IoU {_percent(value)}{spread}, Dice {_percent(scores.dice[foreground])}"
        if math.isnan(value):
            found = "IoU undefined, since no image holds it and none was predicted"
        return Headline(name=f"{name} IoU", value=value, text=f"{name}: {found} {apart}")
    worst = worst_of(scores, names)
    named = f" (worst: {worst[1]} {_percent(worst[0])})" if worst else ""
    return Headline(name="mIoU", value=scores.miou, text=f"mIoU {_percent(scores.miou)}{spread}{named}")


def worst_of(scores: Scores, names: Sequence[str]) -> tuple[float, str] | None:
    """The lowest IoU with its class; None unless several are defined."""
    defined = [(value, name) for value, name in zip(scores.iou, names, strict=True) if not math.isnan(value)]
    return min(defined, key=lambda item: item[0]) if len(defined) > 1 else None


def standard_error(parts: Sequence[ConfusionMatrix], score: Callable[[Scores], float]) -> float:
    """How far a score of all `parts` together may lie from that of many more such parts: the jackknife's standard error.

    Each part is an image, or the slices of one volume. NaN where it cannot be told: of a single part, or if the score is
    undefined without one of them.

    Example:
        >>> import numpy as np
        >>> parts = [ConfusionMatrix(2) for _ in range(2)]
        >>> for part, right in zip(parts, (1, 3)):
        ...     part.update(np.array([0] * right + [1] * (4 - right)), np.zeros(4, dtype=int))
        >>> standard_error(parts, lambda scores: scores.global_accuracy)
        0.25
    """
    if len(parts) < 2:
        return math.nan
    total = parts[0]
    for part in parts[1:]:
        total += part
    without = []
    for part in parts:
        rest = ConfusionMatrix(total.num_classes, total.ignore_index)
        rest.matrix = total.matrix - part.matrix
        without.append(score(rest.scores()))
    mean = sum(without) / len(without)
    return math.sqrt((len(parts) - 1) / len(parts) * sum((value - mean) ** 2 for value in without))


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
