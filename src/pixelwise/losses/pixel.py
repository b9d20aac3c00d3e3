"""Losses over all pixels of a batch.

Shapes: N batch, K classes, H W image size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
Reduction = Literal["mean", "sum"]


def cross_entropy(
    logits_NKHW: Tensor,
    labels_NHW: Tensor,
    *,
    ignore_index: int = IGNORE,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Pixel-wise cross-entropy, summed over pixels and images and divided by the number of labelled pixels.

    With weights, each pixel's term is multiplied by them, and the divisor stays the number of labelled pixels, as SegNet's
    code does it (arXiv:1511.00561); torch's own weighted mean divides by the sum of the weights instead, so that a batch
    without rare classes would count for more.

    Args:
        logits_NKHW: scores of any float type; the loss is computed in float32.
        labels_NHW: integer classes 0..K-1, or `ignore_index`.
        ignore_index: pixels that give neither loss nor gradient.
        weight: (K,), one factor per class.
        pixel_weight: (N, H, W), one factor per pixel, such as U-Net's map (arXiv:1505.04597, equation 1).
        label_smoothing: share in [0, 1) of the target that is spread evenly over the classes.
        reduction: "sum" leaves out the division, as the authors of FCN train (arXiv:1411.4038): an image counts as often as
            it has labelled pixels, and learning rates are smaller by that number.

    Returns:
        A scalar; 0 (with zero gradient) if no pixel is labelled.

    Example:
        >>> logits = torch.zeros(1, 4, 2, 2)
        >>> labels = torch.tensor([[[0, 3], [255, 255]]])
        >>> round(cross_entropy(logits, labels).item(), 4)  # ln 4
        1.3863
    """
    labels = labels_NHW.long()
    loss = F.cross_entropy(
        logits_NKHW.float(),
        labels,
        weight=weight,
        ignore_index=ignore_index,
        reduction="sum" if pixel_weight is None else "none",
        label_smoothing=label_smoothing,
    )
    total = loss if pixel_weight is None else (loss * pixel_weight).sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)


def dice_loss(logits_NKHW: Tensor, labels_NHW: Tensor, *, ignore_index: int = IGNORE) -> Tensor:
    """One minus the soft Dice coefficient, pooled over the batch and averaged over the classes that the labels hold.

    Source: Milletari, Navab, Ahmadi. V-Net. 3DV 2016 (arXiv:1606.04797), with sums instead of squares in the divisor.

    Args:
        logits_NKHW: scores.
        labels_NHW: integer classes 0..K-1, or `ignore_index`; those pixels count nowhere.
        ignore_index: see above.

    Returns:
        A scalar in [0, 1]; 0 if no pixel is labelled.

    Example:
        >>> labels = torch.tensor([[[0, 1]]])
        >>> sure = torch.tensor([[[[99.0, -99.0]], [[-99.0, 99.0]]]])
        >>> round(dice_loss(sure, labels).item(), 4)
        0.0
    """
    classes = logits_NKHW.shape[1]
    labelled_NHW = labels_NHW != ignore_index
    probabilities = logits_NKHW.float().softmax(1) * labelled_NHW[:, None]
    labels = labels_NHW.long().where(labelled_NHW, 0)
    # The probability of the true class, summed per class, is the intersection; no one-hot copy of the labels is needed.
    hit = probabilities.gather(1, labels[:, None])[:, 0]
    flat = labels[labelled_NHW]
    intersection = hit.new_zeros(classes).index_add(0, flat, hit[labelled_NHW])
    truth = torch.bincount(flat, minlength=classes).to(hit)
    dice = 2 * intersection / (probabilities.sum((0, 2, 3)) + truth).clamp(min=1e-6)
    present = truth > 0
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)
