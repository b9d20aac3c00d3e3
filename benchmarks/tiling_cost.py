"""What an image of 30,000 x 30,000 px costs every network of the registry: how it is computed, multiply-adds, memory.

Nothing is computed: the way is planned on weights and maps that have shapes only, as `pixelwise predict` plans it on a CPU
(float32, 11 classes, `--memory`). Multiply-adds are those of all pieces over those of one pass over the whole image; for
exact tiles (networks that cannot be streamed) and blended tiles likewise. Memory is what the maps are foretold to take,
beside the weights. The goal is at most 1.25 times the multiply-adds within 2 GiB for every network whose receptive field
has an end.

    python benchmarks/tiling_cost.py --out benchmarks/results
    python benchmarks/tiling_cost.py --side 8192 --memory 1 --models unet linknet
"""

import argparse
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError
from pixelwise.files import write_json
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.options import Tiling
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.tiling import choose_scorer
from pixelwise.infer.tiling.stripes import Stripes
from pixelwise.models import create_model, list_models

CLASSES = 11
GOAL = 1.25
SCRATCH = Path(tempfile.gettempdir())
NEED_WEIGHTS = ("encoder_decoder", "mirror", "patch_classifier", "unet_valid")
"""Whose graph depends on the values of a tensor, or whose parts are built from others."""

BACKBONES = {"encoder_decoder": ("resnet18", "tf_efficientnet_lite0", "resnet50", "convnext_tiny")}


def variants(names: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The networks and their fields; of those with a choice of encoder some."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for name in names:
        rows += [(name, {"backbone": backbone}) for backbone in BACKBONES.get(name, ())] or [(name, {})]
    return rows


def make_model(name: str, fields: dict[str, Any]) -> nn.Module:
    if name in NEED_WEIGHTS:
        return create_model(name, num_classes=CLASSES, **fields).eval()
    with torch.device("meta"):
        return create_model(name, num_classes=CLASSES, **fields).eval()


def plan(name: str, fields: dict[str, Any], side: int, budget_bytes: int) -> dict[str, Any]:
    """The way, its cost and its memory for one network."""
    started = time.perf_counter()
    model = make_model(name, fields)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row: dict[str, Any] = {"model": name, **fields, "parameters": parameters}
    try:
        if next(model.parameters()).is_meta:
            scorer: Any = Stripes(model, side, side, in_channels=3, budget_bytes=budget_bytes, scratch=SCRATCH)
        else:
            tiling = Tiling(memory_bytes=budget_bytes, scratch=str(SCRATCH))
            scorer = choose_scorer(predictor(name, model), side, side, tiling)
    except PixelwiseError as error:
        return row | {"error": str(error)}
    return row | {
        "way": scorer.way,
        "cost": scorer.cost,
        "memory_bytes": scorer.memory_bytes,
        "disk_bytes": getattr(scorer, "disk_bytes", 0),
        "is_stripes": isinstance(scorer, Stripes),
        "planned_s": time.perf_counter() - started,
    }


def predictor(name: str, model: nn.Module) -> Predictor:
    names = tuple(f"class{index}" for index in range(CLASSES))
    spec = LabelSpec(
        names=names,
        colors=tuple((index, 0, 0) for index in range(CLASSES)),
        values=tuple((index,) for index in range(CLASSES)),
    )
    config = {"num_classes": CLASSES, "in_channels": 3}
    card = ModelCard(model=name, config=config, labels=spec, mean=(0.5,) * 3, std=(0.25,) * 3)
    return Predictor(model, card, device="cpu", precision="float32")


def show(row: dict[str, Any]) -> None:
    name = " ".join(str(row[key]) for key in ("model", "backbone") if key in row)
    if "error" in row:
        print(f"{name:40} {row['error']}", flush=True)
        return
    mark = "" if row["cost"] <= GOAL else "  (!)"
    print(
        f"{name:40} {row['cost']:6.3f}  {row['memory_bytes'] / 2**30:5.2f} GiB  "
        f"{row['disk_bytes'] / 2**30:5.2f} GiB of disk  {row['planned_s']:5.1f} s  {row['way']}{mark}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=30_000, help="of the image, in pixels")
    parser.add_argument("--memory", type=float, default=2.0, help="that the maps may take, in GiB")
    parser.add_argument("--models", nargs="+", default=list_models(), metavar="NAME")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file; without it there is none")
    args = parser.parse_args()
    rows = []
    for name, fields in variants(args.models):
        rows.append(plan(name, fields, args.side, int(args.memory * 2**30)))
        show(rows[-1])
    if args.out is None:
        return
    date = datetime.now(UTC).date().isoformat()
    result = {
        "date": date,
        "side_px": args.side,
        "memory_bytes": int(args.memory * 2**30),
        "num_classes": CLASSES,
        "precision": "float32",
        "networks": rows,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    write_json(args.out / f"{date}-tiling-cost.json", result)


if __name__ == "__main__":
    main()
