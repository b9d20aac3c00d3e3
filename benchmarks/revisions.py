"""Two revisions of pixelwise, old and new, on the same commands in turn: no change may make the whole slower.

Each command runs in a process of its own, as a user would type it, old and new alternating, so that a machine that slows
down slows both. Reported is old seconds over new seconds, of the fastest rounds, which other work on the machine disturbs
least, and of the medians: above 1 the new revision is faster.

    git worktree add /tmp/old REVISION
    python benchmarks/revisions.py --old /tmp/old --camvid CAMVID --out benchmarks/results
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import tifffile
import torch

from pixelwise.files import write_json

SUMMARIES = {"fastest": min, "median": statistics.median}
STEPS = 46  # an epoch of CamVid's 367 images in batches of 8
CONFIG = """\
model: encoder_decoder
options: {backbone: resnet18}
crop_px: 256
batch_size: 8
"""


def run(root: Path, arguments: list[str]) -> float:
    """Seconds of one call of the command line of the checkout at `root`."""
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    code = "import sys; from pixelwise.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{root}: {' '.join(arguments)}\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - started


def commands(work: Path, camvid: Path) -> dict[str, list[str]]:
    """What is timed: arguments of the command line; {out} is a new folder each time."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    scene = np.kron(coarse, np.ones((64, 64, 1), np.uint8)) + rng.integers(0, 16, (4096, 4096, 3), dtype=np.uint8)
    tifffile.imwrite(work / "scene.tif", scene, photometric="rgb", tile=(256, 256), compression="zlib")
    (work / "epoch.yaml").write_text(CONFIG + f"steps: {STEPS}\n")
    trained = str(work / "run")
    return {
        "predict a folder of photos": ["predict", trained, str(camvid / "test"), "--out", "{out}"],
        "predict a 4,096 px TIFF": ["predict", trained, str(work / "scene.tif"), "--out", "{out}"],
        "evaluate CamVid test": ["evaluate", trained, str(camvid), "--split", "test"],
        "train an epoch": ["train", str(camvid), "--config", str(work / "epoch.yaml"), "--out", "{out}"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="checkout of the old revision")
    parser.add_argument("--new", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--camvid", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only commands whose name contains this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    (work / "first.yaml").write_text(CONFIG + "steps: 2\n")
    run(options.old, ["train", str(options.camvid), "--config", str(work / "first.yaml"), "--out", str(work / "run")])
    seconds: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for name, arguments in commands(work, options.camvid).items():
        if options.only not in name:
            continue
        seconds[name] = {"old": [], "new": []}
        for turn in range(options.rounds):
            order = (("old", options.old), ("new", options.new))
            for kind, root in order if turn % 2 == 0 else reversed(order):
                out = str(work / "out")
                shutil.rmtree(out, ignore_errors=True)
                seconds[name][kind].append(run(root, [out if item == "{out}" else item for item in arguments]))
        ratios[name] = {what: f(seconds[name]["old"]) / f(seconds[name]["new"]) for what, f in SUMMARIES.items()}
        print(
            name, {kind: [f"{value:.1f} s" for value in values] for kind, values in seconds[name].items()}, ratios[name]
        )
    shutil.rmtree(work)
    if options.out is not None:
        path = options.out / f"{datetime.now(UTC):%Y-%m-%d}-revisions.json"
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        command = "python benchmarks/revisions.py --old OLD --camvid CAMVID --out benchmarks/results"
        write_json(path, {"command": command, "ratios": ratios, "seconds": seconds, "machine": machine})


if __name__ == "__main__":
    main()
