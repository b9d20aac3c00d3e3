"""How the network of a predictor computes: as it is, or made ready for inference; and whether that may be trusted.

What is made of a network is compared with it before it is used, on one small image of noise: in bfloat16 it may be no
further from the network in float32 than twice what autocast is, in float32 it may differ by rounding only. What 8 bits cost
is measured on images (`infer.int8`), so here they only must give numbers.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixelwise.errors import DataError, UsageError, brief
from pixelwise.ops.folding import fold
from pixelwise.ops.quantization import quantizable, quantize

ACCELERATIONS = ("auto", "none", "fold", "int8")
USUAL = 1e4  # normalised numbers beyond it are not of images, and may overflow
CHECKED_PX = 96  # side of the image that is compared
TOLERANCE = {"bf16": 5e-3, "float32": 1e-5}  # of the deviation of the scores, whatever autocast's is


@dataclass(frozen=True)
class Acceleration:
    """What computes the scores.

    Attributes:
        kind: "none", "fold" or "int8".
        model: the network, or what was made of it; both take and give float32.
        reason: why it is this one, in words.
        is_refused: whether the network could not be folded, or not with its own scores.
    """

    kind: str
    model: nn.Module
    reason: str
    is_refused: bool = False


def accelerated(
    model: nn.Module, kind: str, *, in_channels: int, device: torch.device, precision: str, autocast: Callable[[], Any],
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Acceleration:  # fmt: skip
    """What computes the scores of `model` in a precision, on the device where it lies.

    "auto" folds where that was measured to be faster and changes no more than `precision` does: in bf16 on a CPU. "int8"
    folds, and takes the `ranges` of maps.

    Raises:
        UsageError: the network was asked to be folded, and cannot be.
        DataError: the ranges are not those of this network.
    """
    if kind == "none" or (kind == "auto" and (precision != "bf16" or device.type != "cpu")):
        return Acceleration("none", model, "the network as it is")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        image = _noise(in_channels).to(device)
        folded = fold(model, image, dtype)
        amiss = departure(folded, model, image, autocast if precision == "bf16" else nullcontext, TOLERANCE[precision])
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
        amiss = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    if not amiss and kind == "int8":
        return quantized_by(folded, ranges or {}, in_channels)
    if not amiss:
        return Acceleration("fold", folded, "batch norm folded into the convolutions (--accelerate none leaves it out)")
    if kind == "auto":
        return Acceleration(
            "none", model, f"the network as it is, since it cannot be folded ({amiss})", is_refused=True
        )
    raise UsageError(
        f"accelerate {kind}: this network cannot be folded ({amiss}). Use accelerate none, or leave it out."
    )


@torch.inference_mode()
def quantized_by(folded: Any, ranges: Mapping[str, tuple[float, float]], in_channels: int) -> Acceleration:
    """A folded network in 8 bits.

    Raises:
        UsageError: none of its convolutions gains by them.
        DataError: the ranges are not those of this network, or its scores are no numbers.
    """
    names = quantizable(folded, in_channels).keys()
    if not names:
        raise UsageError("accelerate int8: no convolution of this network gains by 8 bits. Use accelerate auto.")
    if names != ranges.keys():
        odd = min(names ^ ranges.keys())
        raise DataError(f"int8.json: its ranges are not those of this network ({brief(odd)}). Make it again.")
    made = quantize(folded, ranges, in_channels)
    if not bool(made(_noise(in_channels)).isfinite().all()):
        raise DataError("int8.json: with its ranges the scores are no finite numbers. Make it again.")
    return Acceleration("int8", made, f"{len(names)} convolutions in 8 bits (int8.json), the others folded")


@torch.inference_mode()
def departure(made: nn.Module, model: nn.Module, image: Tensor, autocast: Callable[[], Any], tolerance: float) -> str:
    """In words, how far the scores of `made` are from those of `model`; "" if that is within the bounds.

    The measure is the mean difference from the model's scores in float32. It may be twice that of the model under
    `autocast`, and `tolerance` of the standard deviation of the scores in any case.
    """
    image = image.contiguous(memory_format=torch.channels_last)
    exact = model(image).float()
    with autocast():
        usual = model(image).float()
    spread = float(exact.std(correction=0))
    far, wide = (float((scores - exact).abs().mean()) for scores in (made(image), usual))
    if far <= 2 * wide + tolerance * spread:  # never so where a score is NaN
        return ""
    return f"its scores differ by {far:.2g}, where autocast's do by {wide:.2g} and all scores deviate by {spread:.2g}"


def _noise(channels: int) -> Tensor:
    """An image like a normalised one, always the same: (1, C, 96, 96)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, CHECKED_PX, CHECKED_PX, generator=generator)


def is_usual(x: Tensor) -> bool:
    """Whether normalised images are in a range in which nothing overflows; not so if one holds NaN.

    oneDNN's ReLU makes a number of NaN, so what overflows in a folded network might get a label without notice.
    """
    if type(x) is not Tensor:  # one without numbers, to see what a pass takes
        return True
    return bool(torch.stack(torch.aminmax(x)).abs().max() <= USUAL)


def check_acceleration(kind: str) -> str:
    """Raise `UsageError` for an unknown kind."""
    if kind not in ACCELERATIONS:
        raise UsageError(f"accelerate {kind!r} is unknown; use one of {', '.join(ACCELERATIONS)}.")
    return kind
