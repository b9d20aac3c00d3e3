"""Training on a GeoTIFF of 20,000 x 20,000 pixels with its label raster: how much memory all processes take together.

A pair of tiled, deflated GeoTIFFs (three bands and one, uint8) is written strip by strip. `pixelwise train` checks it,
trains a few steps on windows of it, and evaluates the network on a second, smaller pair. While it runs, the memory of the
process and of all that it starts (workers that cut crops, the decoding child) is watched: the peak of each (VmHWM), and of
their sum, in which memory that they share counts once (Pss).

    python benchmarks/large_raster.py --out benchmarks/results
    python benchmarks/large_raster.py --side 5000 --test-side 2000
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.windows import Window

from pixelwise.files import write_json

STRIP_PX = 512
LIMIT_BYTES = 2 << 30


def write_pair(folder: Path, side: int) -> int:
    """A smooth scene of three classes; gives the bytes of both files."""
    profile = {
        "driver": "GTiff", "height": side, "width": side, "dtype": "uint8", "tiled": True, "blockxsize": STRIP_PX,
        "blockysize": STRIP_PX, "compress": "deflate", "zlevel": 1, "BIGTIFF": "YES", "crs": "EPSG:32633",
        "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
    }  # fmt: skip
    paths = [folder / kind / "scene.tif" for kind in ("images", "masks")]
    for path in paths:
        path.parent.mkdir(parents=True)
    columns = np.sin(np.arange(side) / 700)
    with (
        rasterio.open(paths[0], "w", count=3, **profile) as image,
        rasterio.open(paths[1], "w", count=1, **profile) as mask,
    ):
        for top in range(0, side, STRIP_PX):
            rows = np.arange(top, min(top + STRIP_PX, side))
            height = np.add.outer(np.cos(rows / 900), columns)  # -2..2
            labels = np.digitize(height, (-0.6, 0.8)).astype(np.uint8)
            bands = np.stack([60 * labels + 20, (height * 30 + 70).astype(np.uint8), 200 - 50 * labels]).astype(
                np.uint8
            )
            window = Window(0, top, side, len(rows))
            image.write(bands, window=window)
            mask.write(labels, 1, window=window)
    return sum(path.stat().st_size for path in paths)


def status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def family(root: int) -> list[int]:
    """A process and all below it."""
    parents = {int(path.name): status(int(path.name)).get("PPid", "0") for path in Path("/proc").glob("[0-9]*")}
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if int(parent) == pid]
    return found


def shared_once(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))


def kind_of(pid: int, root: int) -> str:
    if pid == root:
        return "main process"
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "other"
    return "decoding child" if b"pixelwise.formats.worker" in words else "worker process"


def watch(process: "subprocess.Popen[bytes]", every_s: float = 0.03) -> dict[str, Any]:
    """Peaks in bytes until the process ends."""
    peaks: dict[tuple[str, int], int] = {}
    together = 0
    while process.poll() is None:
        pids = family(process.pid)
        together = max(together, sum(map(shared_once, pids)))
        for pid in pids:
            if peak := status(pid).get("VmHWM"):
                key = kind_of(pid, process.pid), pid
                peaks[key] = max(peaks.get(key, 0), int(peak.split()[0]) << 10)
        time.sleep(every_s)
    each: dict[str, list[int]] = {}
    for (kind, _), peak in sorted(peaks.items()):
        each.setdefault(kind, []).append(peak)
    return {"together_bytes": together, "peak_bytes": each}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20_000, help="of the raster that is trained on")
    parser.add_argument("--test-side", type=int, default=5_000, help="of the raster that is evaluated")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="where the rasters are written for the time being")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file; without it there is none")
    args, args.options = parser.parse_known_args()
    return args


def main() -> None:
    """Options that are not known here go to `pixelwise train`, such as `--set batch_size=4`."""
    args = parse()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        data = Path(folder) / "data"
        sides = {"train": args.side, "val": 512, "test": args.test_side}
        disk = {split: write_pair(data / split, side) for split, side in sides.items()}
        code = "import sys; from pixelwise.cli import main; main(sys.argv[1:])"
        options = ["--model", "unet", "--steps", str(args.steps), "--set", "options.widths=[8, 16, 32]"]
        options += ["--set", "crop_px=256", "--set", f"workers={args.workers}", *args.options]
        command = [sys.executable, "-c", code, "train", str(data), "--out", str(Path(folder) / "run"), *options]
        started = time.perf_counter()
        with subprocess.Popen(command) as process:
            found = watch(process)
        if process.returncode:
            sys.exit(process.returncode)
        seconds = time.perf_counter() - started
    for kind, peaks in found["peak_bytes"].items():
        print(f"{kind}: {', '.join(f'{peak / 2**20:,.0f} MiB' for peak in peaks)}")
    print(f"together: {found['together_bytes'] / 2**20:,.0f} MiB at most; {seconds:.0f} s")
    if args.out is not None:
        date = datetime.now(UTC).date().isoformat()
        result = {
            "date": date,
            "sides_px": sides,
            "file_bytes": disk,
            "steps": args.steps,
            "options": options,
            **found,
            "within_limit": found["together_bytes"] < LIMIT_BYTES,
            "seconds": seconds,
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        }
        write_json(args.out / f"{date}-large-raster.json", result)


if __name__ == "__main__":
    main()
