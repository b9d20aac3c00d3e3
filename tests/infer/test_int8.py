"""What int8.json may hold, and where 8 bits are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.infer import int8_file, load
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.evaluate import open_for
from pixelwise.infer.int8 import Int8, quantize_run
from pixelwise.infer.int8_file import INT8_NAME
from pixelwise.infer.options import Tiling
from pixelwise.models import create_model
from pixelwise.ops import quantization
from pixelwise.ops.quantization import has_int8

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU has no instructions for 8 bits")
CONFIG = {"num_classes": 2, "in_channels": 3, "widths": (16, 16), "batch_norm": True}
IMAGE = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)


def write_network(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    spec = LabelSpec(names=("ground", "disc"), colors=((0, 0, 255), (90, 90, 90)), values=((0,), (1,)))
    card = ModelCard(model="unet", config=CONFIG, labels=spec, mean=(0.3,) * 3, std=(0.25,) * 3)
    save_bundle(folder, create_model("unet", **CONFIG), card)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quantization, "LEAST_WORK", 0)  # so that a small network is quantised too
    (tmp_path / "run").mkdir()
    return write_network(tmp_path / "run", 0)


def found(run: Path, toy_data: Path) -> Int8:
    return quantize_run(run, lambda network: open_for(network, toy_data), calibration_images=3)


@needs_int8
def test_a_calibrated_network_is_loaded_with_the_scores_that_were_told(run: Path, toy_data: Path) -> None:
    before = sorted(path.name for path in run.iterdir())
    result = found(run, toy_data)
    assert sorted(path.name for path in run.iterdir()) == before
    assert result.folded.acceleration == "fold" and result.int8.acceleration == "int8"
    assert result.cost["miou"] == pytest.approx(100 * (result.folded.scores.miou - result.int8.scores.miou))
    assert result.speed > 0 and result.calibration_images == 3
    result.save(run, force=True)
    network = load(run, device="cpu", precision="bf16", accelerate="int8")
    assert network.acceleration.kind == "int8" and "5 convolutions in 8 bits" in network.computing
    plain = load(run, device="cpu", precision="bf16")
    assert plain.acceleration.kind == "fold"
    with pytest.raises(UsageError, match="ranges for 8 bits were found without dropout"):
        network.predict(IMAGE, tiling=Tiling(samples=2))
    whole = network.predict(IMAGE)
    tiles = network.predict(IMAGE, tiling=Tiling(tile_px=32))
    assert np.array_equal(whole.labels, tiles.labels)
    assert whole.logits is not None and (usual := plain.predict(IMAGE).logits) is not None
    assert not torch.equal(whole.logits, usual)
    assert float((whole.logits - usual).std()) < 0.2 * float(usual.std())


@needs_int8
def test_more_than_a_point_is_refused_unless_it_is_forced(
    run: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = found(run, toy_data)
    for cost in (1.01, float("nan")):
        monkeypatch.setattr(Int8, "cost", {"miou": 0.0, "headline": cost})
        with pytest.raises(PixelwiseError, match=r"points, more than 1\.00, so nothing was written"):
            result.save(run)
        assert not (run / INT8_NAME).exists()
    result.save(run, force=True)
    monkeypatch.setattr(Int8, "cost", {"miou": 1.0, "headline": -2.0})
    result.save(run)
    assert json.loads((run / INT8_NAME).read_text())["cost"] == {"miou": 1.0, "headline": -2.0}


@needs_int8
def test_a_damaged_or_foreign_file_is_refused(run: Path, toy_data: Path) -> None:
    path = found(run, toy_data).save(run, force=True)
    good: dict[str, Any] = json.loads(path.read_text())
    name = next(iter(good["ranges"]))
    others: list[tuple[dict[str, Any] | str, str]] = [
        ("{", "cannot be read as JSON"),
        ("[]", "is not of format 1"),
        (good | {"format": 2}, "is not of format 1"),
        (good | {"format": True}, "is not of format 1"),
        (good | {"more": 1}, "has keys"),
        (good | {"ranges": [1]}, "must be a mapping"),
        (good | {"ranges": {}}, "are not those of this network"),
        (good | {"ranges": good["ranges"] | {"other": [0, 1]}}, "are not those of this network"),
    ]
    for span in (None, [1], [0, "1"], [0, True], [1, 2], [0, 1e39], [-1, float("nan")], [2, 1], [0, float("inf")]):
        others.append((good | {"ranges": good["ranges"] | {name: span}}, "must be two numbers"))
    for values, message in others:
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        with pytest.raises(DataError, match=message):
            load(run, device="cpu", precision="bf16", accelerate="int8").predict(IMAGE)
    path.write_text(json.dumps(good))
    write_network(run, 1)
    with pytest.raises(UsageError, match=r"belongs to other weights.*pixelwise quantize"):
        load(run, device="cpu", precision="bf16", accelerate="int8")
    path.unlink()
    with pytest.raises(UsageError, match=r"there is no int8.json in .*pixelwise quantize"):
        load(run, device="cpu", precision="bf16", accelerate="int8")


def test_8_bits_are_refused_where_they_gain_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_file, "has_int8", lambda: True)
    with pytest.raises(UsageError, match="compute in bf16, not float32"):
        load(run, device="cpu", precision="float32", accelerate="int8")
    with pytest.raises(UsageError, match="batch statistics"):
        load(run, device="cpu", precision="bf16", accelerate="int8", batch_statistics=True)
    with pytest.raises(UsageError, match="it is for CPUs"):
        int8_file.check_int8(torch.device("cuda"), "bf16")
    monkeypatch.setattr(int8_file, "has_int8", lambda: False)
    with pytest.raises(UsageError, match=r"neither AVX512-VNNI nor AMX, so 8 bits would be slower\. Use"):
        load(run, device="cpu", precision="bf16", accelerate="int8")


@needs_int8
def test_a_network_of_small_convolutions_and_data_without_training_images_are_refused(
    run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_test = tmp_path / "data"
    only_test.mkdir()
    (only_test / "val").symlink_to(toy_data / "val")
    with pytest.raises(DataError, match="split 'train' holds no images"):
        found(run, only_test)
    monkeypatch.setattr(quantization, "LEAST_WORK", 1e9)
    with pytest.raises(UsageError, match="no convolution of this network gains by 8 bits"):
        found(run, toy_data)
