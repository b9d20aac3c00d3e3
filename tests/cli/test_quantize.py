"""`pixelwise quantize`, and predicting with what it wrote."""

import json

import pytest
import torch

from pixelwise.data.labels import LabelSpec
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.models import create_model
from pixelwise.ops import quantization

pytestmark = pytest.mark.skipif(not quantization.has_int8(), reason="this CPU has no instructions for 8 bits")
SPEC = LabelSpec(names=("ground", "disc"), colors=((0, 0, 0), (250, 0, 0)), values=((0,), (1,)))


def test_a_run_is_quantized_and_predicts_and_evaluates(program, toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "LEAST_WORK", 0)
    torch.manual_seed(0)
    run, config = tmp_path / "run", {"num_classes": 2, "in_channels": 3, "widths": (16, 16)}
    card = ModelCard(model="unet", config=config, labels=SPEC, mean=(0.3,) * 3, std=(0.25,) * 3)
    save_bundle(run, create_model("unet", **config), card)
    out = tmp_path / "labels"
    missing = program("predict", run, toy_data / "val", "--out", out, "--accelerate", "int8")
    assert missing.code == 2 and f"pixelwise quantize {run} DATA" in " ".join(missing.err.split())

    done = program("quantize", run, toy_data, "--calibration-images", "4", "--force")
    assert done.code == 0, done.err
    for text in (
        "bf16: mIoU",
        "int8: mIoU",
        "points of mIoU",
        "points of disc IoU",
        "calibrated on 4 images",
        "--accelerate int8",
    ):
        assert text in done.out
    values = json.loads((run / "int8.json").read_text())
    assert values["calibration_images"] == 4 and values["split"] == "val" and len(values["ranges"]) == 5

    labelled = program("predict", run, toy_data / "val" / "images", "--out", out, "--accelerate", "int8")
    assert labelled.code == 0 and "5 convolutions in 8 bits" in labelled.err and len(list(out.rglob("*.png"))) == 4
    scored = program("evaluate", run, toy_data, "--split", "val", "--accelerate", "int8", "--json", "-")
    result = json.loads(scored.out)
    assert result["acceleration"] == "int8" and result["scores"]["miou"] == values["int8"]["miou"]


def test_what_costs_too_much_is_not_written(program, toy_data, tmp_path, monkeypatch):
    from pixelwise.infer import int8

    monkeypatch.setattr(quantization, "LEAST_WORK", 0)
    monkeypatch.setattr(int8, "MOST_COST", -200.0)
    torch.manual_seed(0)
    run, config = tmp_path / "run", {"num_classes": 2, "in_channels": 3, "widths": (16, 16)}
    card = ModelCard(model="unet", config=config, labels=SPEC, mean=(0.3,) * 3, std=(0.25,) * 3)
    save_bundle(run, create_model("unet", **config), card)
    refused = program("quantize", run, toy_data, "--calibration-images", "2")
    assert refused.code == 2 and "nothing was written" in refused.err and "int8: mIoU" in refused.out
    assert not (run / "int8.json").exists()
