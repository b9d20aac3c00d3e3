"""On which device, and in which precision, a network computes."""

from typing import Literal

import torch

from pixelwise.errors import UsageError
from pixelwise.infer.estimates import heed_quota

PRECISIONS = ("auto", "bf16", "float32")


def resolve_device(name: str | torch.device) -> torch.device:
    """The device meant by `name`; "auto" is the first GPU, else the CPU, whose threads then heed a container's quota."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {str(name)!r} cannot be used here ({reason}). Use auto, cpu or cuda.") from error
    if device.type == "meta":
        raise UsageError("device 'meta' computes nothing. Use auto, cpu or cuda.")
    if device.type == "cpu":
        heed_quota()
    return device


def resolve_precision(name: str, device: torch.device) -> Literal["bf16", "float32"]:
    """The precision meant by `name` on `device`; "auto" is bf16 where the hardware multiplies in it."""
    if name not in PRECISIONS:
        raise UsageError(f"precision {name!r} is unknown; use one of {', '.join(PRECISIONS)}.")
    if name == "float32":
        return "float32"
    return "bf16" if name == "bf16" or computes_in_bf16(device) else "float32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware of `device` multiplies in bfloat16 (CUDA since Ampere; CPUs with AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # torch has no public question for this; where a version lacks these, float32 is always right.
    questions = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(question() for question in questions if question is not None)
