"""What all races share: turns, medians and spread, equality, the machine, and what is a regression.

Contestants take turns (A B A B ...), so that a machine that slows down slows all of them, and a ratio is taken within each
round: the peer's seconds over ours. Told are the median of the ratios, and the lowest and the highest.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "pixelwise", "torch", "torchvision", "timm", "segmentation-models-pytorch", "monai", "torchmetrics", "albumentations",
    "onnx", "onnxruntime", "ultralytics",
)  # fmt: skip
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
Turn = Callable[[], float]
"""A turn of a contestant; returns its seconds."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a race is run."""

    scratch: Path  # a folder for files that nobody keeps
    data: Path | None = None  # real data (camvid, ...), if there are any
    few: bool = False  # a third of the rounds, and nothing that takes minutes: for `make bench-check`
    small: bool = False  # small work, one round: shows that everything runs, and measures nothing

    def rounds(self, wanted: int) -> int:
        """The number of rounds, of those that a full run has."""
        return 1 if self.small else max(2, wanted // 3) if self.few else wanted


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    race: str
    case: str  # what was raced
    peer: str  # against whom
    unit: str  # of `ours` and `theirs`
    ours: float  # median
    theirs: float  # median
    ratios: tuple[float, ...]  # of each round, more is better for us
    goal: float | None = None  # of the median ratio
    checked: str = ""  # what was compared for equality, and what came out
    note: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The median."""
        return statistics.median(self.ratios)

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        return None if self.goal is None else self.ratio >= self.goal

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the derived ones too."""
        spread = {"ratio": self.ratio, "lowest": min(self.ratios), "highest": max(self.ratios), "met": self.is_met}
        return asdict(self) | spread


def timed(step: Callable[[], object], least_s: float = 0.2) -> Turn:
    """A turn that repeats `step` for at least so long, and returns the seconds of one."""

    def turn() -> float:
        started, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - started) < least_s or not count:
            step()
            count += 1
        return spent / count

    return turn


def interleave(turns: Mapping[str, Turn], rounds: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    """The seconds of each contestant in each round; a first turn of each that is not counted, with `warm_up`."""
    if warm_up:
        for turn in turns.values():
            turn()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            seconds[name].append(turn())
    return seconds


def compare(seconds: Mapping[str, list[float]], ours: str, peer: str, *, amount: float, **about: Any) -> Row:
    """The row of two contestants who did the same work, of `amount` units a turn."""
    ratios = tuple(b / a for a, b in zip(seconds[ours], seconds[peer], strict=True))
    rates = [amount / statistics.median(seconds[name]) for name in (ours, peer)]
    kept = {name: list(seconds[name]) for name in (ours, peer)}
    return Row(peer=peer, ours=rates[0], theirs=rates[1], ratios=ratios, seconds=kept, **about)


def fastest(seconds: Mapping[str, list[float]], *names: str) -> str:
    """Who of these has the lowest median."""
    return min(names, key=lambda name: statistics.median(seconds[name]))


def equal_share(ours: Any, theirs: Any) -> str:
    """Which share of two label arrays is equal, in words."""
    if tuple(ours.shape) != tuple(theirs.shape):
        raise ValueError(f"labels of shape {tuple(ours.shape)} cannot be compared with {tuple(theirs.shape)}")
    return f"{float((ours == theirs).mean()):.3%} of labels equal"


def machine() -> dict[str, Any]:
    """What the figures depend on; no name of the machine and no path."""
    model, flags = platform.processor() or platform.machine(), ""
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        key, _, value = line.partition(":")
        model = value.strip() if key.strip() == "model name" else model
        flags = value if key.strip() == "flags" else flags
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "flags": [flag for flag in FLAGS if flag in flags.split()],
        "memory_gib": round(memory),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of python and of everything that is raced, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def newest(folder: Path, kind: str) -> Path | None:
    """The newest result of a kind: files are called DATE-KIND.json."""
    return max(folder.glob(f"????-??-??-{kind}.json"), default=None)


def regressions(new: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> list[str]:
    """The rows whose ratio fell by more than the spread of both runs, in words.

    That is: the new median is below the lowest recorded round, and the recorded median above the highest new round. A
    recorded row that the new run lacks is no regression; nothing in common is an error.
    """
    before = {(row["race"], row["case"], row["peer"]): row for row in recorded}
    pairs = [(row, before[key]) for row in new if (key := (row["race"], row["case"], row["peer"])) in before]
    if not pairs:
        raise ValueError("the two runs have no row in common, so nothing was compared")
    return [
        f"{row['race']}, {row['case']}, against {row['peer']}: {row['ratio']:.2f} "
        f"({row['lowest']:.2f} to {row['highest']:.2f}), recorded {old['ratio']:.2f} "
        f"({old['lowest']:.2f} to {old['highest']:.2f})"
        for row, old in pairs
        if row["ratio"] < old["lowest"] and old["ratio"] > row["highest"]
    ]
