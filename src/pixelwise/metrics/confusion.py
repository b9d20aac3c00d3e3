"""One exact confusion matrix, and every score of semantic segmentation derived from it.

With n_ij the number of pixels of class i labelled as class j, t_i the sum of row i and p_i the sum of column i
(Long, Shelhamer, Darrell, CVPR 2015, section 5):

    IoU_i        n_ii / (t_i + p_i - n_ii)             mIoU             the mean of IoU_i
    Dice_i       2 n_ii / (t_i + p_i)                  mean Dice        the mean of Dice_i
    precision_i  n_ii / p_i                            fwIoU            the sum of t_i IoU_i over the sum of t_i
    recall_i     n_ii / t_i                            global accuracy  the sum of n_ii over the sum of t_i
                                                       class accuracy   the mean of recall_i

What happens to a class that is missing somewhere (nothing is smoothed, no zero is invented):

    in truth  in prediction   IoU, Dice   precision   recall   counts in mIoU, mean Dice   in class accuracy
    yes       no              0           undefined   0        yes                         yes
    no        yes             0           0           undef.   yes                         no
    no        no              undefined   undefined   undef.   no; listed in `absent`      no

Void pixels (`ignore_index` in the truth) are dropped from truth and prediction before anything is counted, so what was
predicted there does not matter.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pixelwise.errors import DataError, UsageError

CHUNK_PX = 1 << 18  # the int64 copies that counting makes stay in the cache, and small however large the image
MAX_CLASSES = 1 << 15  # a larger matrix would need more than 8 GiB; so many classes are surely a mistake
MAX_LISTED = 5

_PER_CLASS = ("iou", "dice", "precision", "recall")
_MEANS = ("miou", "mean_dice", "fwiou", "global_accuracy", "class_accuracy")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Every score of one confusion matrix; fractions in 0..1, NaN where a score is undefined.

    Attributes:
        iou: intersection over union of each class, (K,).
        dice: Dice coefficient (F1) of each class, (K,).
        precision: of the pixels labelled as the class, the share that is right, (K,).
        recall: of the pixels of the class, the share that was found, (K,).
        miou: mean IoU over the classes that occur in truth or prediction.
        mean_dice: mean Dice over the same classes.
        fwiou: IoU weighted by how frequent each class is in the truth.
        global_accuracy: share of all labelled pixels that is right.
        class_accuracy: mean recall over the classes that occur in the truth (balanced accuracy).
        absent: classes that occur in neither truth nor prediction, left out of the means.
        pixels: how many pixels were counted (void is not).

    Example:
        >>> matrix = ConfusionMatrix(3)
        >>> matrix.update(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]))
        >>> scores = matrix.scores()
        >>> scores.iou
        (0.5, 0.6666666666666666, nan)
        >>> scores.absent, scores.pixels
        ((2,), 4)
    """

    iou: tuple[float, ...]
    dice: tuple[float, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    miou: float
    mean_dice: float
    fwiou: float
    global_accuracy: float
    class_accuracy: float
    absent: tuple[int, ...]
    pixels: int

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON-able values: lists for tuples, None for an undefined score.

        Example:
            >>> ConfusionMatrix(2).scores().to_dict()["iou"]
            [None, None]
        """
        values: dict[str, Any] = {name: [_to_json(score) for score in getattr(self, name)] for name in _PER_CLASS}
        values |= {name: _to_json(getattr(self, name)) for name in _MEANS}
        return values | {"absent": list(self.absent), "pixels": self.pixels}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scores":
        """The scores that `to_dict` gave; the round trip keeps every bit.

        Raises:
            DataError: a key is missing or unknown, or a value is not what `to_dict` writes.

        Example:
            >>> scores = ConfusionMatrix(2).scores()
            >>> Scores.from_dict(scores.to_dict()).to_dict() == scores.to_dict()
            True
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            given = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise DataError(f"scores need exactly the keys {sorted(names)}, got {given}. Evaluate the run again.")
        try:
            lists = {name: tuple(_from_json(score) for score in values[name]) for name in _PER_CLASS}
            means = {name: _from_json(values[name]) for name in _MEANS}
            absent, pixels = tuple(int(index) for index in values["absent"]), int(values["pixels"])
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"scores hold a value that is no score ({error}). Evaluate the run again.") from error
        if len({len(scores) for scores in lists.values()}) != 1:
            raise DataError(f"scores of different numbers of classes: { {k: len(v) for k, v in lists.items()} }.")
        return cls(absent=absent, pixels=pixels, **lists, **means)  # type: ignore[arg-type]


class ConfusionMatrix:
    """How many pixels of each class were given each label, counted exactly in int64.

    `matrix` has shape (K, K): rows are the truth, columns the prediction. It stays on the CPU, wherever the arrays are.
    Matrices of parts add up to the matrix of the whole, in any order.

    Args:
        num_classes: K, at least 1.
        ignore_index: the value that means void in the truth; must not be a class.

    Raises:
        UsageError: `num_classes` or `ignore_index` cannot be used.

    Example:
        >>> confusion = ConfusionMatrix(2)
        >>> confusion.update(np.array([[0, 1], [1, 1]]), np.array([[0, 0], [1, 255]]))
        >>> confusion.matrix.tolist()
        [[1, 1], [0, 1]]
        >>> round(confusion.scores().miou, 3)
        0.5
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if not 1 <= num_classes <= MAX_CLASSES:
            raise UsageError(f"num_classes must be between 1 and {MAX_CLASSES:,}, got {num_classes}.")
        if 0 <= ignore_index < num_classes:
            raise UsageError(
                f"ignore_index {ignore_index} is also a class (0..{num_classes - 1}), and could then never be scored. "
                "Give void a value that no class has, such as -1."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def __repr__(self) -> str:
        return f"ConfusionMatrix(num_classes={self.num_classes}, pixels={int(self.matrix.sum()):,})"

    def update(self, prediction: ArrayLike | Tensor, truth: ArrayLike | Tensor) -> None:
        """Count the pixels of one image or batch.

        Args:
            prediction: class ids 0..K-1 of any integer type and any shape; void pixels may hold any value.
            truth: class ids 0..K-1 or `ignore_index`, of the same shape.

        Raises:
            DataError: shapes differ, a type is not integer, or a value is outside the classes. Nothing is counted then.
        """
        prediction, truth = _as_integers(prediction, "prediction"), _as_integers(truth, "truth")
        if prediction.shape != truth.shape:
            raise DataError(
                f"prediction has shape {tuple(prediction.shape)} but truth has {tuple(truth.shape)}; "
                "they must be equal. Resize neither: predict at the size of the truth."
            )
        prediction, truth = prediction.to(truth.device).flatten(), truth.flatten()
        table, void = self._table(prediction, truth)
        labelled = table[1:-1]
        if int(table.sum()) - int(labelled.sum()) != void:
            self._refuse("truth", truth, truth)
        if int(labelled[:, 0].sum()) or int(labelled[:, -1].sum()):
            self._refuse("prediction", prediction, truth)
        self.matrix += labelled[:, 1:-1]

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        """The matrix of both parts together.

        Raises:
            UsageError: the two have different classes or another void value.
        """
        if not isinstance(other, ConfusionMatrix):
            return NotImplemented
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise UsageError(
                f"confusion matrices of {self.num_classes} classes (void {self.ignore_index}) and of "
                f"{other.num_classes} classes (void {other.ignore_index}) cannot be added; they must agree in both."
            )
        both = ConfusionMatrix(self.num_classes, self.ignore_index)
        both.matrix = self.matrix + other.matrix
        return both

    def scores(self) -> Scores:
        """Every score, computed in float64 from the integer counts."""
        counts: NDArray[np.int64] = self.matrix.numpy()
        hits, truth, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
        iou, dice = _divide(hits, truth + predicted - hits), _divide(2 * hits, truth + predicted)
        precision, recall = _divide(hits, predicted), _divide(hits, truth)
        total = int(truth.sum())
        return Scores(
            iou=tuple(iou.tolist()),
            dice=tuple(dice.tolist()),
            precision=tuple(precision.tolist()),
            recall=tuple(recall.tolist()),
            miou=_mean(iou),
            mean_dice=_mean(dice),
            fwiou=float(np.average(np.nan_to_num(iou), weights=truth)) if total else math.nan,
            global_accuracy=int(hits.sum()) / total if total else math.nan,
            class_accuracy=_mean(recall),
            absent=tuple(np.flatnonzero(truth + predicted == 0).tolist()),
            pixels=total,
        )

    def _table(self, prediction: Tensor, truth: Tensor) -> tuple[Tensor, int]:
        """The counts of two flat tensors, (K+2, K+2) on the CPU, and the number of void pixels.

        The table has a margin for values below and above the classes, so that invalid values are found without selecting
        the labelled pixels first (which would take twice as long as everything here).
        """
        size = self.num_classes + 2
        table, void = torch.zeros(size, size, dtype=torch.int64), 0
        are_bytes = prediction.dtype == truth.dtype == torch.uint8 and 0 <= self.ignore_index <= 255 > self.num_classes
        least = 0 if are_bytes else -1
        for predicted, true in zip(prediction.split(CHUNK_PX), truth.split(CHUNK_PX), strict=True):
            if not are_bytes:  # before comparing: torch would compare a uint8 255 and -1 as equal
                predicted, true = predicted.to(torch.int64), true.to(torch.int64)
            void += int((true == self.ignore_index).sum())
            # Bytes are clamped as bytes, many at a time, and places fit into 32 bits: in the cache, five times as fast.
            rows, columns = (values.clamp(least, self.num_classes) for values in (true, predicted))
            places = ((rows.int() if are_bytes else rows) + 1) * size + 1 + columns
            table += torch.bincount(places, minlength=size * size).reshape(size, size).cpu()
        return table, void

    def _refuse(self, what: str, values: Tensor, truth: Tensor) -> NoReturn:
        """Raise the error that lists the values outside the classes among the labelled pixels of a flat tensor."""
        values = values.to(torch.int64)[truth.to(torch.int64) != self.ignore_index]
        outside, counts = torch.unique(values[(values < 0) | (values >= self.num_classes)], return_counts=True)
        found = list(zip(outside.tolist(), counts.tolist(), strict=True))
        listed = ", ".join(f"{value} ({count:,} px)" for value, count in found[:MAX_LISTED])
        more = f" and {len(found) - MAX_LISTED} more values" if len(found) > MAX_LISTED else ""
        advice = (
            f"Map it to a class, or to {self.ignore_index}, which means void and is not scored."
            if what == "truth"
            else "A prediction must name a class wherever the truth does."
        )
        classes = f"{self.num_classes} classes (0..{self.num_classes - 1})"
        raise DataError(f"{what} holds value {listed}{more}, but there are {classes}. {advice}")


def _as_integers(values: ArrayLike | Tensor, what: str) -> Tensor:
    """`values` as a tensor of some integer type (bool counts as 0 and 1)."""
    if isinstance(values, Tensor):
        is_integer, dtype = not (values.is_floating_point() or values.is_complex()), str(values.dtype)
    else:
        values = np.asarray(values)
        is_integer, dtype = values.dtype.kind in "iub", str(values.dtype)
    if not is_integer:
        raise DataError(f"{what} must hold integer class ids, got {dtype}. Of class scores, take the argmax first.")
    if isinstance(values, np.ndarray):
        # torch refuses foreign byte order, negative strides and read-only memory; a native copy has none of these.
        native = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(native)
    return values.detach()


def _divide(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.float64]:
    """Elementwise quotient, NaN where the denominator is 0."""
    quotient = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def _mean(scores: NDArray[np.float64]) -> float:
    """The mean of the defined scores, NaN if there are none."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if defined.size else math.nan


def _to_json(score: float) -> float | None:
    """The score, or None if it is undefined."""
    return None if math.isnan(score) else score


def _from_json(score: Any) -> float:
    """The score, NaN for None; ValueError outside 0..1."""
    value = math.nan if score is None else float(score)
    if not 0 <= value <= 1 and score is not None:
        raise ValueError(f"{value} is not in 0..1")
    return value
