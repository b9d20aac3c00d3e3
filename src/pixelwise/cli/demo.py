"""`pixelwise demo`: draw street scenes, train, evaluate and predict."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

SCENES = {"train": 400, "val": 40, "test": 60}
SIZES = ((192, 256), (224, 288), (240, 320))  # (height, width)
NEW_SIZES = ((200, 360), (320, 240), (270, 480))  # none of them was trained on

# Chosen for a few minutes of training on two cores: a narrow U-Net, and little augmentation, because the scenes are diverse.
SETTINGS = (
    "options.widths=[16, 32, 64, 96, 128]",
    "options.batch_norm=true",
    "crop_px=160",
    "lr=0.004",
    "class_weights=none",
    "dice=0.5",
    "focus=0.3",
    "scale=[1, 1]",
    "photometric=0.1",
    "validate_every=4",
)
STEPS = 1000  # of which two cores do three in a second or more
# `make demo` on two quiet cores: 76.1 in 3.1 minutes (README), 76.9 in 5.5 (benchmarks/results/2026-11-23-demo.json).
QUIET = f"On a quiet machine with two cores {STEPS:,} steps take 3 to 6 minutes and reach a test mIoU of about 76."


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the scenes, the run and the labels.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = STEPS,
    minutes: Annotated[float, typer.Option(help="Training time in minutes, at most.")] = 12,
) -> None:
    """Draw street scenes, train a network, evaluate it, write the report and label new scenes.

    On a quiet machine with two cores it takes under 8 minutes. An interrupted demo resumes where it stopped.

    Example: pixelwise demo

    Example: pixelwise demo --out /tmp/demo --minutes 1
    """
    from pixelwise.cli.predict import predict
    from pixelwise.cli.train import train
    from pixelwise.data.scenes import write_scenes
    from pixelwise.files import read_json

    console = Console(soft_wrap=True)
    console.rule("1. Draw scenes with exact masks")
    data = write_scenes(out / "scenes", SCENES, sizes=SIZES)
    console.print(f"{sum(SCENES.values()):,} scenes. To inspect them: pixelwise inspect {data}")
    console.rule("2. Train, evaluate, report")
    if (out / "config.yaml").exists():
        console.print("There is a run already; it goes on with its own options, whatever --steps and --minutes are.")
        train(data, out=out, resume=True)
    else:
        train(data, out=out, model="unet", steps=steps, settings=[*SETTINGS, f"max_minutes={minutes}"])
    console.rule("3. Label new scenes of other sizes")
    new = write_scenes(out / "new", {"test": 6}, seed=1, sizes=NEW_SIZES)
    predict(out, [str(new / "test" / "images")], out=str(out / "labels"), overlay=True)
    done, planned = read_json(out / "environment.json")["steps"], read_json(out / "plan.json")["steps"]
    told = f"{done:,} steps of training were done."
    if done < planned:
        told = (
            f"Only {done:,} of {planned:,} planned steps were done: the time was up, on a slower machine or a busy one."
        )
    console.print(f"{told} {QUIET}")
    console.print(f"Report: {out / 'report.html'}. Labels of the new scenes: {out / 'labels'}.")
