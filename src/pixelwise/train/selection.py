"""Which of the validated weights are kept: by a score that can see what is looked for.

mIoU over the classes that occur in truth or prediction is a fine score to report, but where a class does not occur in the
val split it is highest for a network that never finds that class. So weights are chosen by the mean IoU of the classes that
do occur there; where that says too little, the newest are kept, since they have learnt for longest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.05  # what newer weights may lose on the classes of the val split, where it lacks others


@dataclass
class Progress:
    """What a run must remember beside its weights; part of every checkpoint."""

    elapsed_s: float = 0.0  # seconds of training, over all parts of an interrupted run
    validated_step: int = -1  # the step of the last validation, -1 before the first
    best_miou: float = -1.0  # of the weights that are kept, -1 before the first validation
    best_step: int = -1  # their step
    stale: int = 0  # validations since the score was last higher than ever before
    peak: float = -1.0  # the highest score that weights were chosen by
    best_headline: float = -1.0  # what `metrics.headline` says of the weights that are kept, -1 if it is undefined


@dataclass(frozen=True)
class Choice:
    """What a validation says of weights: the score they are chosen by, and how far it can be trusted."""

    score: float  # the mean IoU of the classes in the truth; NaN without labelled pixels
    can_choose: bool = True  # it differs between weights that find something and those that find nothing
    margin: float = 0.0  # by how much newer weights may be worse
    note: str = ""  # what the user should know, or nothing

    @classmethod
    def of(
        cls, matrix: Sequence[Sequence[int]], iou: Sequence[float], trained: Sequence[int], names: Sequence[str]
    ) -> "Choice":
        """The choice by a confusion matrix (K, K), rows are the truth, where training images hold `trained` (K,) pixels."""
        seen = [index for index, row in enumerate(matrix) if sum(row)]
        unseen = [names[index] for index, pixels in enumerate(trained) if pixels and index not in seen]
        if not seen:
            return cls(math.nan, can_choose=False, note="val holds no labelled pixel: the newest weights are kept.")
        score = sum(iou[index] for index in seen) / len(seen)
        if not unseen:
            return cls(score)
        lacks = f"val holds no pixel of {', '.join(unseen)}, which training images do"
        advice = "Put images with it into val."
        if len(seen) == 1:
            note = (
                f"{lacks}, so it cannot tell good weights from bad: the newest are kept (and patience waits). {advice}"
            )
            return cls(score, can_choose=False, note=note)
        note = f"{lacks}: of weights within {100 * MARGIN:.0f} points of the best on its other classes the newest are kept."
        return cls(score, margin=MARGIN, note=f"{note} {advice}")


def keep(progress: Progress, choice: Choice, step: int, miou: float, headline: float) -> bool:
    """Take note of a validation; whether its weights are the ones to keep. Of equals the newer ones are."""
    progress.validated_step = step
    is_higher = choice.score > progress.peak
    progress.stale = 0 if is_higher or not choice.can_choose else progress.stale + 1
    is_kept = not choice.can_choose or choice.score >= progress.peak - choice.margin or progress.best_step < 0
    if choice.can_choose and is_higher:
        progress.peak = choice.score
    if is_kept:
        progress.best_step = step
        progress.best_miou = -1.0 if math.isnan(miou) else miou
        progress.best_headline = -1.0 if math.isnan(headline) else headline
    return is_kept
