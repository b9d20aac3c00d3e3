"""What this process may use of the machine: memory, processors, shared memory.

In a container, a job of a cluster or a shell with `ulimit` that is less than the machine has, and whoever counts on the
machine's is killed without a word. So all limits are asked, and the narrowest is named.
"""

import ctypes
import errno
import functools
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pixelwise.errors import PixelwiseError

_CGROUPS, _SELF, _MEMORY, _SHARED = (
    Path("/sys/fs/cgroup"),
    Path("/proc/self"),
    Path("/proc/meminfo"),
    Path("/dev/shm"),
)
_SPARE = 64 << 20  # of the memory that is free, for what the kernel counts beside
_UNLIMITED = -1  # resource.RLIM_INFINITY
_outside: int | None = None  # RLIMIT_DATA outside of `within_room`, where that lowered it


@dataclass(frozen=True, order=True)
class Room:
    """Bytes that this process may still take, and what sets the limit, in words."""

    bytes: int
    limit: str

    def __str__(self) -> str:
        return f"{max(0, self.bytes) / 2**30:.1f} GiB are free of {self.limit}"


def memory_room() -> Room | None:
    """The memory that this process may still take; None where the system does not tell.

    Example:
        >>> room = memory_room()
        >>> room is None or room.bytes > 0
        True
    """
    return min((*_free_of_machine(), *_free_of_cgroups(), *_free_of_process()), default=None)


@contextmanager
def within_room(share: float = 1.0, beside: int = 0, unused: int = 0) -> Iterator[None]:
    """Inside, taking more memory than a container or job has raises an error; its kernel would kill without a word.

    On Linux the process's own limit (RLIMIT_DATA) is lowered to what it holds and `share` of what is free, without the bytes
    that processes `beside` it need, and put back at the end; `unused` bytes are counted by it but never taken, as most of
    the stacks of threads. On other systems, and where no cgroup limits memory, nothing changes: what others on a machine
    take comes and goes. Processes that are started inside keep the limit, so this is for a short trial.

    Example:
        >>> with within_room():
        ...     small = bytearray(1000)
    """
    global _outside
    before, around = _lower_limit(share, beside, unused), _outside
    if around is None:
        _outside = before
    try:
        yield
    finally:
        _outside = around
        if before is not None:
            _set_limit(before)


def _lower_limit(share: float, beside: int, unused: int) -> int | None:
    """Limit the memory of this process to what there is; RLIMIT_DATA as it was, None where it stays."""
    with suppress(ImportError, OSError, ValueError, KeyError):
        import resource  # not on Windows

        room = min(_free_of_cgroups(), default=None)
        if room is not None:
            before, held = resource.getrlimit(resource.RLIMIT_DATA)[0], _sizes_of_process()["VmData"]
            most = held + unused + int(share * max(0, room.bytes - beside - _SPARE))
            _set_limit(most if before == _UNLIMITED else min(most, before))
            return before
    return None


def _set_limit(most: int) -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def shared_memory_room() -> Room | None:
    """What fits into the shared memory by which processes hand over arrays; None on systems that have no such place."""
    try:
        free, total = shutil.disk_usage(_SHARED).free, shutil.disk_usage(_SHARED).total
    except OSError:
        return None
    return Room(free, f"the {_bytes(total)} of {_SHARED} (docker: --shm-size)")


def processors() -> int:
    """How many processors this process may use at a time.

    Example:
        >>> 1 <= processors() <= (os.cpu_count() or 1)
        True
    """
    count = allowed_cores()
    for folder in _cgroups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError, IndexError):
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()[:2]
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota.strip() != "max" and int(quota) > 0:
                count = min(count, max(1, int(quota) // int(period)))
    return count


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where this user's programs keep what can be found out again: $XDG_CACHE_HOME/pixelwise, else ~/.cache/pixelwise.

    Raises:
        OSError: there is no home folder.
    """
    told = os.environ.get("XDG_CACHE_HOME", "")
    if Path(told).is_absolute():  # the XDG specification: anything else is to be ignored
        return Path(told) / "pixelwise"
    try:
        return Path.home() / ".cache" / "pixelwise"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "there is no home folder") from error


# glibc's mallopt: the names of its settings; what keeps memory; and what a program with large arrays comes to by itself, for
# glibc moves the last two as it sees arrays freed, until somebody sets them.
_MMAP_MAX, _TRIM_THRESHOLD, _MMAP_THRESHOLD = -4, -1, -3
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
_USUAL = {_MMAP_MAX: 1 << 16, _TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}


def keep_freed_memory(keep: bool) -> None:
    """Whether memory that this process frees stays with it, for what it allocates next.

    The C library gives large arrays back to the system as soon as they are freed, and gets new ones page by page, full of
    zeros. A training step makes the same large arrays again and again, and spends a tenth to a fifth of its time on that.
    Going back to not keeping gives back all that is free. Nothing happens where the C library is not glibc.

    Example:
        >>> keep_freed_memory(True)
        >>> keep_freed_memory(False)
    """
    glibc = _glibc()
    if glibc is None:
        return
    for setting, value in (_KEEPING if keep else _USUAL).items():
        glibc.mallopt(setting, value)
    if not keep:
        glibc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


_OUT_OF_MEMORY = (
    "not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed",
    "could not create a primitive", "can't start new thread", "storage size calculation overflowed",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, as Python, torch and the system say it."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | PixelwiseError) and any(
        text in str(error).lower() for text in _OUT_OF_MEMORY
    )


_NO_PROCESS = "no further process or thread may be started (ulimit -u, or the limit of this container or job)"
_FEWER = "Allow more, or use fewer worker processes."


def refused(error: BaseException) -> str | None:
    """What the machine refused and what to do, as one sentence or two; None if the error is of another kind.

    Example:
        >>> print(refused(OSError(errno.EMFILE, "Too many open files", "a.png")))
        a.png: too many files are open at once (ulimit -n). Allow more (ulimit -n 4096), or use fewer worker processes.
    """
    is_cut_short = (
        isinstance(error, ImportError | SystemError) and _has_limit_on_addresses()
    )  # of a library as it is loaded
    if is_out_of_memory(error) or is_cut_short:
        room = memory_room()
        free = f"; {room}" if room else ""
        if "start new thread" in str(error):
            return f"{_NO_PROCESS}, or memory ran out{free}. {_FEWER}"
        return f"memory ran out{free}. Give it more, or ask for less at a time."
    number, name = getattr(error, "errno", None), getattr(error, "filename", None)
    where = f"{name}: " if name else ""
    for text in (str(error),) if number is None else ():  # torch and multiprocessing say it in words only
        number = next((code for words, code in _IN_WORDS.items() if words in text), None)
    if number in (errno.EMFILE, errno.ENFILE):
        more = "Allow more (ulimit -n 4096), or use fewer worker processes."
        return f"{where}too many files are open at once (ulimit -n). {more}"
    if number == errno.EAGAIN:
        return f"{where}{_NO_PROCESS}. {_FEWER}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full ({os.strerror(number)}). Free some space or choose another folder."
    return f"{where}{getattr(error, 'strerror', None) or error}." if isinstance(error, OSError) else None


def _has_limit_on_addresses() -> bool:
    return any("ulimit -v" in room.limit for room in _free_of_process())


_IN_WORDS = {
    "Too many open files": errno.EMFILE, "received 0 items of ancdata": errno.EMFILE, "No space left": errno.ENOSPC,
    "Resource temporarily unavailable": errno.EAGAIN,
}  # fmt: skip


def allowed_cores() -> int:
    """The processors that this process may run on, whatever share of their time it gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_of_machine() -> Iterator[Room]:
    with suppress(OSError, ValueError, IndexError, KeyError):
        sizes = _sizes(_MEMORY)
        yield Room(sizes["MemAvailable"], f"the {_bytes(sizes['MemTotal'])} of this machine")
        return
    with suppress(AttributeError, OSError, ValueError, KeyError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Room(total, f"the {_bytes(total)} of this machine")


def _free_of_cgroups() -> Iterator[Room]:
    for folder in _cgroups("memory"):
        names = ("memory.max", "memory.current", "inactive_file")
        if not (folder / names[0]).is_file():
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        with suppress(OSError, ValueError):
            limit, used = (folder / names[0]).read_text().strip(), int((folder / names[1]).read_text())
            if limit == "max" or int(limit) >= 1 << 60:
                continue
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            total, mapped = ("total_", "total_mapped_file") if "total_" in names[2] else ("", "file_mapped")
            active = int(stat.get(f"{total}active_file", 0)) - int(stat.get(mapped, 0))
            used -= int(stat.get(names[2], 0)) + max(0, active)  # pages of files, which go when memory is short
            yield Room(int(limit) - used, f"the {_bytes(int(limit))} of this container or job (cgroup)")


def _free_of_process() -> Iterator[Room]:
    with suppress(ImportError, OSError, ValueError, KeyError):
        import resource  # not on Windows

        sizes = _sizes_of_process()
        of_user = _outside if _outside is not None else resource.getrlimit(resource.RLIMIT_DATA)[0]
        limits = ((resource.getrlimit(resource.RLIMIT_AS)[0], "VmSize", "-v"), (of_user, "VmData", "-d"))
        for limit, used, name in limits:
            if limit >= 0:
                yield Room(limit - sizes[used], f"the {_bytes(limit)} that `ulimit {name}` allows")


def _sizes_of_process() -> dict[str, int]:
    return _sizes(_SELF / "status")


def _sizes(path: Path) -> dict[str, int]:
    """The rows `name: number kB` of a file of the kernel, in bytes."""
    lines = path.read_text(errors="replace").splitlines()
    return {line.partition(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith("kB")}


def _cgroups(controller: str) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, for versions 1 and 2: its own and all above it."""
    with suppress(OSError, ValueError):
        for line in (_SELF / "cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            top = (
                _CGROUPS / names if names and (_CGROUPS / names).is_dir() else _CGROUPS / (controller if names else "")
            )
            below = top / path.lstrip("/")
            yield from (folder for folder in (below, *below.parents) if folder == top or top in folder.parents)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"
