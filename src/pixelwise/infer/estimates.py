"""Bytes: what this process holds, what is free, and how they are told."""

import os
import shutil
import sys
from pathlib import Path


def memory_now() -> int:
    """Bytes that this process holds at present; on systems that do not tell, the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gibibytes(count: int) -> str:
    """A number of bytes for the eye.

    Example:
        >>> gibibytes(1_400_000_000), gibibytes(3_000_000)
        ('1.3 GiB', '3 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 0.1 * 2**30 else f"{max(1, round(count / 2**20))} MiB"


def free_bytes(folder: Path) -> tuple[int, Path]:
    """The room on the disk on which `folder` is or will be, and the part of its path that exists.

    Example:
        >>> free_bytes(Path("no/such/folder"))[1].as_posix()
        '.'
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free, folder
