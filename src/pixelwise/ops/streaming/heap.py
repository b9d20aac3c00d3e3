"""Keeping the process to the memory that was stated: what malloc holds back is returned to the system when it must be.

Freed memory of one size is of no use for the next map, which is a little larger, so malloc asks the system for more. It is
fastest to let it, within a limit; beyond that `malloc_trim` returns all that is free, also between what is in use.
"""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_STATM = Path("/proc/self/statm")
_MARGIN = 0.05  # of the limit: how much is freed in vain before the next attempt


def return_freed_memory() -> None:
    """Give back to the system what was freed but is kept by the C library for reuse; nothing happens where it cannot."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


class HeapLimit:
    """Holds the growth of the process, from now on, to a number of bytes, as far as freed memory allows; on Linux only.

    Example:
        >>> limit = HeapLimit(1 << 30)
        >>> limit.hold()
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = resident_bytes() + limit_bytes if _malloc_trim() else 0
        self._margin = int(_MARGIN * limit_bytes)
        self._alarm = self._limit

    def hold(self) -> None:
        """Return what is free to the system if the process has grown beyond the limit."""
        if not self._limit or resident_bytes() <= self._alarm:
            return
        return_freed_memory()
        # What is in use cannot be returned, and trying takes time.
        self._alarm = max(self._limit, resident_bytes() + self._margin)


def resident_bytes() -> int:
    """Bytes of this process that lie in memory now; Linux only.

    Example:
        >>> import sys
        >>> sys.platform != "linux" or resident_bytes() > 0
        True
    """
    return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@cache
def _malloc_trim() -> Any:
    """The function of glibc; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
