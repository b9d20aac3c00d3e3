"""Race windows and whole reads of TIFFs of this checkout against an older one.

    python benchmarks/tiff_windows.py --old /path/to/older/checkout

Each checkout reads in a process of its own; they take turns, file by file, and the median of the ratios of each turn
(old time / new time) is printed: above 1 the new one is faster. Windows are timed by the processor, so that other
programs disturb little; `read_image`, where a child may decode, by the clock.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

SIZE = 4096
TILE = {"tile": (512, 512)}
RGB = {"photometric": "rgb"}
FILES = {
    "one strip": RGB,
    "strips of 64 rows": {**RGB, "rowsperstrip": 64},
    "tiles": {**RGB, **TILE},
    "tiles, deflate + predictor": {**RGB, **TILE, "compression": "zlib", "predictor": True},
    "strips, LZW": {**RGB, "rowsperstrip": 64, "compression": "lzw"},
    "one strip, deflate": {**RGB, "rowsperstrip": SIZE, "compression": "zlib"},
    "tiles, JPEG": {"photometric": "ycbcr", **TILE, "compression": "jpeg", "subsampling": (2, 2)},
    "tiles, zstd": {**RGB, **TILE, "compression": "zstd"},
    "planes, deflate tiles": {"photometric": "minisblack", "planarconfig": "separate", **TILE, "compression": "zlib"},
}


def _windows(kind: str) -> list[tuple[int, int, int, int]]:
    if kind == "grid":  # windows with a halo, as tiles of a prediction
        places = range(0, SIZE - 1088 + 1, 1002)
        return [(top, left, 1088, 1088) for top in places for left in places]
    if kind == "bands":
        return [(top, 0, 256, SIZE) for top in range(0, SIZE, 256)]
    if kind == "crops":
        rng = random.Random(0)
        return [(rng.randrange(SIZE - 512), rng.randrange(SIZE - 512), 512, 512) for _ in range(24)]
    return [(0, 0, SIZE, SIZE)]


def _found(function: str, *modules: str) -> Callable[..., Any]:
    """A function of pixelwise in the one of these modules that has it."""
    for name in modules:
        with suppress(ImportError, AttributeError):
            return getattr(import_module(f"pixelwise.{name}"), function)
    raise ImportError(function)


def _serve(layout: str) -> None:
    """Read what is asked for on standard input, and answer how long it took."""
    # of older and newer checkouts
    open_tiff = _found("open_tiff", f"{layout}.tiff", "formats.tiff.read")
    read_image = _found("read_image", "data.readers", "formats.readers", "formats.opening")
    for line in sys.stdin:
        path, kind = json.loads(line)
        clock = time.perf_counter if kind == "read_image" else time.process_time  # a child may do the work
        started = clock()
        if kind == "read_image":
            read_image(path)
        else:
            with open_tiff(path) as source:
                for window in _windows(kind):
                    source.read(*window)
        print(clock() - started, flush=True)


class Reader:
    """A process that reads with one checkout."""

    def __init__(self, checkout: Path) -> None:
        source = checkout / "src"
        layout = "formats" if (source / "pixelwise/formats").exists() else "data.sources"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", layout],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        )

    def seconds(self, path: Path, kind: str) -> float:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(path), kind]) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="an older checkout")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve)
        return
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 250, (SIZE // 16, SIZE // 16, 3)), np.ones((16, 16, 1), int)).astype(np.uint8)
    image = smooth + rng.integers(0, 5, smooth.shape, dtype=np.uint8)
    readers = {"old": Reader(options.old), "new": Reader(Path(__file__).resolve().parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in FILES.items():
            path = Path(folder) / "a.tif"
            pixels = np.ascontiguousarray(image.transpose(2, 0, 1)) if "planarconfig" in layout else image
            tifffile.imwrite(path, pixels, **layout)
            for kind in ("grid", "bands", "crops", "whole", "read_image"):
                ratios, times = [], []
                for turn in range(options.turns + 1):
                    order = ("old", "new") if turn % 2 else ("new", "old")
                    took = {who: readers[who].seconds(path, kind) for who in order}
                    if turn:  # the first one warms up
                        ratios.append(took["old"] / took["new"])
                        times.append(took["new"])
                print(f"{name:28} {kind:10} {statistics.median(ratios):5.2f}   {1000 * min(times):7.1f} ms", flush=True)


if __name__ == "__main__":
    main()
