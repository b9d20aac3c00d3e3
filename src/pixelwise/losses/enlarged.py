"""Cross-entropy on scores of a coarse grid that are enlarged to the image, without ever holding the enlarged scores.

The enlarged scores of all classes, their copies in float32 and the gradients of both are the largest arrays of a training
step, though each of their values is needed once. Here they are made, used and dropped some rows at a time, while they are in
the processor's cache, and the gradient of the coarse scores is computed on the way (as "Cut Your Losses" does it for the
vocabulary of language models, arXiv:2411.09009).
Shapes: N batch, K classes, h w the coarse grid, H W image size.
"""

from typing import Any

import torch
from torch import Tensor

from pixelwise.losses.pixel import IGNORE, Reduction
from pixelwise.ops.resize import CoarseLogits

CHUNK = 1 << 18  # enlarged scores at a time: 1 MiB in float32, as much as the cache of a core


def enlarged_cross_entropy(
    coarse: CoarseLogits,
    labels_NHW: Tensor,
    *,
    ignore_index: int = IGNORE,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """`cross_entropy` of `coarse.enlarge()`, in a fraction of the time and memory on a CPU.

    The scores are enlarged in float32 (in float64 if they are float64), whatever autocast says; so it is a little more exact
    than the loss of logits that were enlarged in bfloat16. The gradient of `pixel_weight` is not computed.

    Args:
        coarse: scores (N, K, h, w) of any float type, and how they are enlarged to (H, W).
        labels_NHW: integer classes 0..K-1, or `ignore_index`.
        ignore_index: as for `cross_entropy`, like all that follow.
        weight: (K,), one factor per class.
        pixel_weight: (N, H, W), one factor per pixel.
        label_smoothing: share in [0, 1) of the target that is spread evenly over the classes.
        reduction: "sum" leaves out the division by the number of labelled pixels.

    Returns:
        A scalar; 0 (with zero gradient) if no pixel is labelled.

    Example:
        >>> from pixelwise.losses import cross_entropy
        >>> from pixelwise.ops.resize import CoarseLogits, bilinear_matrix
        >>> coarse = CoarseLogits(torch.randn(1, 3, 4, 5), bilinear_matrix(4, 16), bilinear_matrix(5, 20))
        >>> labels = torch.randint(3, (1, 16, 20))
        >>> torch.allclose(enlarged_cross_entropy(coarse, labels), cross_entropy(coarse.enlarge(), labels), atol=1e-5)
        True
    """
    total: Tensor = _Enlarged.apply(
        coarse.scores, coarse.rows, coarse.columns, labels_NHW, ignore_index, weight, pixel_weight, label_smoothing
    )
    return total if reduction == "sum" else total / (labels_NHW != ignore_index).sum().clamp(min=1)


class _Enlarged(torch.autograd.Function):
    """The sum over all pixels; its gradient is known as soon as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        scores_NKhw: Tensor,
        rows_Hh: Tensor,
        columns_Ww: Tensor,
        labels_NHW: Tensor,
        ignore_index: int,
        weight: Tensor | None,
        pixel_weight: Tensor | None,
        smoothing: float,
    ) -> Tensor:
        dtype = torch.promote_types(scores_NKhw.dtype, torch.float32)
        rows, columns = rows_Hh.to(dtype), columns_Ww.to(dtype)
        weight = scores_NKhw.new_ones(scores_NKhw.shape[1], dtype=dtype) if weight is None else weight.to(dtype)
        total = rows.new_zeros(())
        bands = _bands(rows, scores_NKhw.shape[1] * len(columns))
        grads = []
        with torch.autocast(scores_NKhw.device.type, enabled=False):
            for index, scores in enumerate(scores_NKhw):
                wide = scores.to(dtype) @ columns.T  # (K, h, W)
                grad = torch.zeros_like(wide)
                for top, bottom, first, last in bands:
                    labels = labels_NHW[index, top:bottom].long()
                    pixels = None if pixel_weight is None else pixel_weight[index, top:bottom].to(dtype)
                    band = rows[top:bottom, first:last]
                    logits = band @ wide[:, first:last]  # (K, rows, W)
                    loss, grad_logits = _pixels(logits, labels, ignore_index, weight, pixels, smoothing)
                    grad[:, first:last] += band.T @ grad_logits
                    total += loss
                grads.append(grad @ columns)  # (K, h, w)
        ctx.save_for_backward(torch.stack(grads).to(scores_NKhw.dtype if dtype == torch.float64 else dtype))
        ctx.dtype = scores_NKhw.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_scores,) = ctx.saved_tensors
        return (grad_scores * grads[0]).to(ctx.dtype), *(None,) * 7


def _bands(rows_Hh: Tensor, row_size: int) -> list[tuple[int, int, int, int]]:
    """Bands top..bottom of the enlarged rows, and the coarse rows first..last that they are made of."""
    height = len(rows_Hh)
    step = max(1, CHUNK // row_size)
    bands = []
    for top in range(0, height, step):
        bottom = min(height, top + step)
        used = rows_Hh[top:bottom].any(0).nonzero()
        bands.append((top, bottom, int(used[0]), int(used[-1]) + 1))
    return bands


def _pixels(
    logits: Tensor, labels: Tensor, ignore_index: int, weight: Tensor, pixel_weight: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The loss of pixels with `logits` (K, rows, W), summed, and its gradient (K, rows, W)."""
    ignored = labels == ignore_index
    labels = labels.masked_fill(ignored, 0)[None]
    factor = weight[labels] * (1 - smoothing)  # (1, rows, W): of the label's term
    pixel = (~ignored)[None].to(logits.dtype) if pixel_weight is None else pixel_weight.masked_fill(ignored, 0)[None]
    factor = factor * pixel
    log_p = logits.log_softmax(0)
    loss = -(log_p.gather(0, labels) * factor).sum()
    spread = factor
    if smoothing:
        even = weight[:, None, None] * (smoothing / len(weight))  # of every class's term
        loss = loss - (log_p * even * pixel).sum()
        spread = factor + even.sum() * pixel
    grad = log_p.exp_() * spread
    grad.scatter_add_(0, labels, -factor)
    return loss, grad - even * pixel if smoothing else grad
