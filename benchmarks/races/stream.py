"""Training from images to weights: images/s of a real run of ours against smp, albumentations and a DataLoader.

Equal backbone, batches of eight crops of 352 px, augmentation on, bfloat16 and channels_last for both. Every turn is a
process of its own. The clock runs from the seventh step to the last, so starting, decoding and caching are not counted.

    python benchmarks/races/stream.py {pixelwise,smp} DATA STEPS CROP_PX RESULT.json      # a single turn
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where a turn starts

from measure import Row, Setup, Turn, compare, interleave

from pixelwise import RunConfig, open_data
from pixelwise.data.layouts import DataFolder
from pixelwise.data.scenes import write_scenes

GOAL = 3.0
FIRST = 6  # steps that are not timed
BATCH = 8


def run(setup: Setup) -> list[Row]:
    if setup.data and (setup.data / "camvid").is_dir():
        data, what = setup.data / "camvid", "CamVid"
    else:
        data, what = write_scenes(setup.scratch / "drawn", {"train": 64, "val": 1}, sizes=((360, 480),)), "drawn scenes"
    steps = FIRST + (4 if setup.small else 20)
    names = {"pixelwise": "pixelwise", "smp, albumentations and DataLoader": "smp"}
    turns = {name: _turn(setup, who, data, steps) for name, who in names.items()}
    seconds = interleave(turns, setup.rounds(3), warm_up=False)
    mine, peer = names
    about = {
        "race": "end-to-end training",
        "case": f"{what}, 360 x 480 px, batches of {BATCH} crops",
        "unit": "images/s",
    }
    return [compare(seconds, mine, peer, amount=1, goal=GOAL, checked="same images, crop size and backbone", **about)]


def _turn(setup: Setup, who: str, data: Path, steps: int) -> Turn:
    """Seconds for an image."""

    def turn() -> float:
        result = setup.scratch / "turn.json"
        crop = "64" if setup.small else "352"
        subprocess.run([sys.executable, __file__, who, str(data), str(steps), crop, str(result)], check=True)
        return json.loads(result.read_text())

    return turn


def ours(folder: DataFolder, steps: int, crop_px: int, scratch: Path) -> float:
    from pixelwise.train import train

    times: dict[int, float] = {}
    options = {"options": {"backbone": "tf_efficientnet_lite0"}, "crop_px": crop_px, "batch_size": BATCH}
    options |= {"validate_every": 1e6, "max_val_images": 1}  # once, after the clock has stopped

    def report(event: dict) -> None:
        if "step" in event:
            times[event["step"]] = event["elapsed_s"]

    shutil.rmtree(scratch, ignore_errors=True)
    train(folder, RunConfig(**options, steps=steps), out=scratch, report=report)
    shutil.rmtree(scratch)
    return (times[steps] - times[FIRST]) / (BATCH * (steps - FIRST))


def smp(folder: DataFolder, steps: int, crop_px: int) -> float:
    import peer_smp

    times: dict[int, float] = {}
    crops = peer_smp.Crops(folder, "train", crop_px=crop_px, flips="horizontal", scale=(0.6, 1.8))
    model = peer_smp.build(folder.labels.num_classes, None)
    peer_smp.fit(
        model,
        peer_smp.batches(crops, BATCH),
        lambda step: step / steps,
        lambda step: times.update({step: time.perf_counter()}),
    )
    return (times[steps] - times[FIRST]) / (BATCH * (steps - FIRST))


def main() -> None:
    who, data, steps, crop_px, result = sys.argv[1:]
    arguments = (open_data(data), int(steps), int(crop_px))
    seconds = ours(*arguments, Path(result).with_suffix("")) if who == "pixelwise" else smp(*arguments)
    Path(result).write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
