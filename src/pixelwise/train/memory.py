"""How much memory a run takes, and how running out of it is told from other errors."""

import sys

import torch

# How torch reports that memory ran out where it does not raise torch.OutOfMemoryError.
_MESSAGES = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed")


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
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MESSAGES)
