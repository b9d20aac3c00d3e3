"""Where a run takes place, for the record: the processor and the command line."""

import platform
import shlex
import sys
from pathlib import Path


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command_line() -> list[str]:
    """What was typed, as a shell would take it."""
    return [shlex.quote(part) for part in (Path(sys.argv[0]).name, *sys.argv[1:])]
