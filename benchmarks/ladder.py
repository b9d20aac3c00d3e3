"""Every network on the same drawn scenes with the same budget: the table and the pictures of docs/ladder.md.

For each network: parameters, multiply-adds at 360 x 480 px and seconds of a training step as in its paper; then a narrow
version (the paper's depth, fewer maps: NARROW below) is trained from random weights for the same minutes, and scored on
unseen scenes. Networks that are in the result file already are left out, so an interrupted run goes on.

    python benchmarks/ladder.py --minutes 1 --out benchmarks/results/2026-11-23-ladder.json
    python benchmarks/ladder.py --page docs/ladder.md --out benchmarks/results/2026-11-23-ladder.json
"""

import argparse
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pixelwise
from pixelwise.files import read_json, write_json, write_text
from pixelwise.losses import cross_entropy
from pixelwise.models import create_model, describe_model
from pixelwise.models.registry import count_parameters
from pixelwise.ops.receptive_field import receptive_field
from pixelwise.ops.training import prepare_for_training

CLASSES = 11
STEP = {"batch": 2, "crop_px": 224}  # of the timed step
COUNTS = {"train": 96, "val": 8, "test": 24}
SIZES = ((128, 192),)
VGG = {"widths": [16, 32, 64, 128, 128]}  # a quarter of the paper's
FCN = {**VGG, "head_width": 256}
# Rung by rung, in the order of the page: the paper's layers with about a quarter of its maps.
NARROW: dict[str, dict[str, Any]] = {
    "patch_classifier": {"widths": [16, 16, 16, 16], "hidden": 64},
    "fullres_cnn": {"widths": [16] * 8},
    "fcn_alexnet": {"widths": [24, 64, 96, 96, 64], "head_width": 256},
    "fcn_googlenet": {"width": 0.25},
    "fcn32s": FCN,
    "fcn16s": FCN,
    "fcn8s": FCN,
    "fcn8s_at_once": FCN,
    "segnet_basic": {"width": 16},
    "segnet": VGG,
    "bayesian_segnet_basic": {"width": 16},
    "bayesian_segnet": VGG,
    "deconvnet": FCN,
    "unet_valid": {"widths": [16, 32, 64, 128, 256]},
    "unet": {"widths": [16, 32, 64, 128, 256]},
    "fcdensenet56": {"growth": 4, "first_width": 12},
    "fcdensenet67": {"growth": 4, "first_width": 12},
    "fcdensenet103": {"growth": 4, "first_width": 12},
    "mirror": {"backbone": "resnet10t"},
    "linknet": {"backbone": "resnet10t"},
    "enet": {},
    "encoder_decoder": {"backbone": "resnet10t", "widths": [64, 64, 32]},
}

# The receptive field depends on the layers, not on the number of maps.
PROBED = {name: {"growth": 1, "first_width": 1} for name in NARROW if name.startswith("fcdensenet")}


def facts(name: str) -> dict[str, Any]:
    """What the paper's own network has and costs."""
    row = describe_model(name, num_classes=CLASSES)
    field = receptive_field(create_model(name, num_classes=2, **NARROW[name] | PROBED.get(name, {})))
    return {
        "parameters": row["parameters"],
        "multiply_adds": row["multiply_adds"],
        "stride": row["stride"],
        "receptive_field_px": max(field.size_px) if field.size_px else None,
        "step_s": step_seconds(name),
    }


def step_seconds(name: str, steps: int = 3) -> float:
    """The median training step of the paper's network, bfloat16, after one warm-up."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=CLASSES).train().to(memory_format=torch.channels_last)
    prepare_for_training(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    side = STEP["crop_px"]
    image = torch.randn(STEP["batch"], 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (STEP["batch"], side, side))
    seconds = []
    for _ in range(1 + steps):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(image)
        cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def trained(name: str, data: Path, minutes: float, runs: Path) -> dict[str, Any]:
    """The narrow version after `minutes` of training, on the test scenes."""
    crop = {} if name == "patch_classifier" else {"crop_px": 96}  # that one is trained on windows
    options = pixelwise.RunConfig(model=name, options=NARROW[name], minutes=minutes, ema=0.98, **crop)
    run = pixelwise.train(data, options, out=runs / name)
    scores = pixelwise.evaluate(run.folder, data, split="test").scores
    narrow = create_model(name, num_classes=CLASSES, **NARROW[name])
    return {
        "narrow_options": NARROW[name],
        "narrow_parameters": count_parameters(narrow),
        "steps": run.steps,
        "miou": scores.miou,
        "global_accuracy": scores.global_accuracy,
    }


def race(out: Path, runs: Path, minutes: float, names: list[str]) -> None:
    data = runs / "scenes"
    if not data.exists():
        pixelwise.write_scenes(data, counts=COUNTS, seed=7, sizes=SIZES)
    result = read_json(out) if out.exists() else {"networks": {}}
    result |= {
        "minutes": minutes,
        "step": STEP,
        "scenes": COUNTS,
        "size": SIZES[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": torch.get_num_threads(),
    }
    for name in names:
        if name in result["networks"]:
            continue
        row = facts(name) | trained(name, data, minutes, runs)
        result["networks"][name] = row
        write_json(out, result)
        print(
            f"{name}: {row['miou']:.3f} after {row['steps']} steps, {row['step_s']:.2f} s a step of the paper's network"
        )


def table(result: dict[str, Any]) -> str:
    """The networks as a Markdown table, in the page's order."""
    lines = [
        "| network | parameters | GMAC at 360 x 480 | receptive field, px | s a step | narrow: parameters | steps | mIoU |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in NARROW:
        if name not in result["networks"]:
            continue
        row = result["networks"][name]
        field = row["receptive_field_px"] or "whole image"
        lines.append(
            f"| `{name}` | {row['parameters']:,} | {row['multiply_adds'] / 1e9:,.1f} | {field} | {row['step_s']:.2f} | "
            f"{row['narrow_parameters']:,} | {row['steps']:,} | {100 * row['miou']:.1f} |"
        )
    return "\n".join(lines)


def write_page(page: Path, result: dict[str, Any]) -> None:
    """Put the table between the page's marks."""
    text = page.read_text(encoding="utf-8")
    marked = re.compile(r"(<!-- ladder -->\n).*?(<!-- /ladder -->)", re.DOTALL)
    if not marked.search(text):
        raise SystemExit(f"{page}: has no <!-- ladder --> … <!-- /ladder --> to fill.")
    write_text(page, marked.sub(lambda found: found[1] + table(result) + "\n" + found[2], text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", nargs="*", default=list(NARROW))
    parser.add_argument("--runs", type=Path, default=None, help="where the runs stay; a temporary folder if unset")
    parser.add_argument("--page", type=Path, default=None, help="only write the table into this page")
    args = parser.parse_args()
    if args.page is not None:
        write_page(args.page, read_json(args.out))
        return
    with tempfile.TemporaryDirectory() as temporary:
        race(args.out, args.runs or Path(temporary), args.minutes, args.only)


if __name__ == "__main__":
    main()
