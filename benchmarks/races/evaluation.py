"""Counting 8.4 million pixels of 19 classes (four images of Cityscapes' size): ours, torchmetrics, MONAI, smp.

All start from the same uint8 labels, as files hold them, with 255 for void in the truth, and end with exact counts for every
class. Each runs as its documentation shows: MONAI wants one-hot tensors and knows no void, so void is taken out of both
tensors; smp wants int64.
"""

import torch
import torch.nn.functional as F
from measure import Row, Setup, compare, fastest, interleave, timed
from torch import Tensor

from pixelwise.metrics import ConfusionMatrix

CLASSES, VOID = 19, 255
GOAL = 5.0


def run(setup: Setup) -> list[Row]:
    torch.manual_seed(0)
    shape = (4, 64, 128) if setup.small else (4, 1024, 2048)
    blocks = torch.randint(CLASSES, (shape[0], 1, shape[1] // 32, shape[2] // 32)).float()
    truth = F.interpolate(blocks, size=shape[1:])[:, 0].to(torch.uint8)  # areas, as masks have them
    wrong = torch.rand(shape) < 0.2
    prediction = torch.where(wrong, torch.randint(CLASSES, shape, dtype=torch.uint8), truth)
    truth = truth.masked_fill(torch.rand(shape) < 0.05, VOID)
    contestants = {"pixelwise": ours, "torchmetrics": torchmetrics, "MONAI": monai, "smp": smp}
    exact = ours(prediction, truth)
    for name, count in contestants.items():
        if not torch.equal(count(prediction, truth), exact):
            raise ValueError(f"{name} counts other pixels than pixelwise does")
    turns = {name: timed(lambda count=count: count(prediction, truth)) for name, count in contestants.items()}
    seconds = interleave(turns, setup.rounds(5))
    best = fastest(seconds, *[name for name in contestants if name != "pixelwise"])
    case = f"{truth.numel() / 1e6:.1f} Mpx, {CLASSES} classes"
    checked = "true and false positives and false negatives of each class are equal"
    rows = []
    for name in contestants:
        if name != "pixelwise":
            goal = GOAL if name == best else None
            about = {"race": "evaluation", "case": case, "unit": "Mpx/s", "goal": goal, "checked": checked}
            rows.append(compare(seconds, "pixelwise", name, amount=truth.numel() / 1e6, **about))
    return rows


def from_matrix(matrix: Tensor) -> Tensor:
    """True positives, false positives and false negatives of each class, (3, K), of a matrix with the truth in rows."""
    hits = matrix.diag()
    return torch.stack([hits, matrix.sum(0) - hits, matrix.sum(1) - hits])


def ours(prediction: Tensor, truth: Tensor) -> Tensor:
    confusion = ConfusionMatrix(CLASSES)
    confusion.update(prediction, truth)
    return from_matrix(confusion.matrix)


def torchmetrics(prediction: Tensor, truth: Tensor) -> Tensor:
    from torchmetrics.classification import MulticlassConfusionMatrix

    metric = MulticlassConfusionMatrix(CLASSES, ignore_index=VOID)
    metric.update(prediction.long(), truth.long())
    return from_matrix(metric.compute())


def monai(prediction: Tensor, truth: Tensor) -> Tensor:
    from monai.metrics import get_confusion_matrix
    from monai.networks import one_hot

    hot = [one_hot(labels[:, None].long(), CLASSES + 1) for labels in _without_void(prediction, truth)]
    counts = get_confusion_matrix(hot[0][:, :CLASSES], hot[1][:, :CLASSES])  # (N, K, 4): tp, fp, tn, fn
    return counts.double().sum(0).long().T[[0, 1, 3]]


def smp(prediction: Tensor, truth: Tensor) -> Tensor:
    from segmentation_models_pytorch.metrics import get_stats

    hits, extra, missed, _ = get_stats(
        prediction.long(), truth.long(), mode="multiclass", ignore_index=VOID, num_classes=CLASSES
    )
    return torch.stack([hits.sum(0), extra.sum(0), missed.sum(0)])


def _without_void(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Void as one more class of both, which is then left out."""
    void = truth == VOID
    return prediction.masked_fill(void, CLASSES), truth.masked_fill(void, CLASSES)
