"""Where to compute and in what numbers: the devices and precisions a user may ask for, and the memory they take."""

import sys
from typing import Literal

import torch

from pixelwise.errors import UsageError

PRECISIONS = ("auto", "bf16", "float32")

# How torch reports that memory ran out where it does not raise torch.OutOfMemoryError.
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed")


def resolve_device(name: str | torch.device) -> torch.device:
    """The device meant by `name`; "auto" is the first GPU, else the CPU.

    Raises:
        UsageError: there is no such device here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {str(name)!r} cannot be used here ({reason}). Use auto, cpu or cuda.") from error
    if device.type == "meta":
        raise UsageError("device 'meta' computes nothing. Use auto, cpu or cuda.")
    return device


def resolve_precision(name: str, device: torch.device) -> Literal["bf16", "float32"]:
    """The precision meant by `name` on `device`; "auto" is bf16 where the hardware multiplies in it.

    Raises:
        UsageError: `name` is none of auto, bf16, float32.

    Example:
        >>> resolve_precision("float32", torch.device("cpu"))
        'float32'
    """
    if name not in PRECISIONS:
        raise UsageError(f"precision {name!r} is unknown; use one of {', '.join(PRECISIONS)}.")
    if name == "float32":
        return "float32"
    return "bf16" if name == "bf16" or computes_in_bf16(device) else "float32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware of `device` multiplies in bfloat16 (CUDA since Ampere; CPUs with AVX512-BF16 or AMX).

    Example:
        >>> computes_in_bf16(torch.device("meta"))
        False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # torch has no public question for this; where a version lacks these, float32 is always right.
    questions = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(question() for question in questions if question is not None)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The largest memory so far: of the GPU's allocator, else of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory"))
        True
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)
