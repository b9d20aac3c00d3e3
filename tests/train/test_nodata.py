"""Declared nodata counts for nothing in training and scoring, exactly as in prediction."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

import pixelwise
from pixelwise.cli import main
from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.data.photometric import network_input
from pixelwise.data.scan import in_threads
from pixelwise.formats import open_source
from pixelwise.infer.bundle import load_card
from pixelwise.infer.heatmap import WindowClassifier
from pixelwise.train import make_config
from pixelwise.train.network import start_network
from pixelwise.train.plan import make_plan
from pixelwise.train.stream import make_dataset

TINY = {
    "model": "unet", "options": {"widths": [4, 6]}, "crop_px": 32, "batch_size": 2, "steps": 3, "workers": 0,
    "precision": "float32", "device": "cpu",
}  # fmt: skip
UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
KINDS = ["-9999", "-3.4028234663852886e+38", "nan", "uint16 0", "mask band", "alpha"]
SIDE, HOLE = 48, (slice(None), slice(30, None))


def scene(seed: int, bands: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance about 0.2, and 0.7 in a square of class 1: float (bands, rows, columns), and labels."""
    draws = np.random.default_rng(seed)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    y, x = draws.integers(0, SIDE - 20, 2)
    mask[y : y + 20, x : x + 20] = 1
    return 0.2 + 0.5 * mask + draws.normal(0, 0.04, (bands, SIDE, SIDE)), mask


def write(path: Path, kind: str, pixels: np.ndarray) -> None:
    """With a third of the columns empty, as the kind says it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": len(pixels), "dtype": "float32", **UTM}
    if kind in KINDS[:3]:
        profile["nodata"] = float(kind)
        pixels = pixels.astype("float32")
        pixels[:, *HOLE] = float(kind)
    elif kind == "uint16 0":
        profile |= {"nodata": 0, "dtype": "uint16"}
        pixels = (pixels * 60000).astype("uint16")
        pixels[:, *HOLE] = 0
    else:
        profile["dtype"] = "uint8"
        pixels = (pixels * 255).astype("uint8")
        pixels[:, *HOLE] = 255
    shown = np.full((SIDE, SIDE), 255, np.uint8)
    shown[HOLE] = 0
    if kind == "alpha":
        pixels = np.concatenate([pixels, shown[None]])
        profile |= {"count": len(pixels), "photometric": "rgb", "alpha": "yes"}
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels)
        if kind == "mask band":
            file.write_mask(shown)


def write_data(root: Path, kind: str, splits: tuple[str, ...] = ("train", "train", "train", "val", "test")) -> Path:
    """The masks know nothing of the holes, as those that were drawn on a larger picture; returns the last image."""
    for seed, split in enumerate(splits):
        pixels, mask = scene(seed)
        image = root / split / "images" / f"{seed}.tif"
        write(image, kind, pixels)
        write_mask(root / split / "masks" / f"{seed}.tif", mask)
    return image


def write_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": 1, "dtype": "uint8", **UTM}
    with rasterio.open(path, "w", **profile) as file:
        file.write(mask, 1)


@pytest.mark.filterwarnings("ignore:.*band 4 is left out")  # it says where there are data, and is told
@pytest.mark.parametrize("kind", KINDS)
def test_nodata_counts_for_nothing_from_statistics_to_labels(tmp_path, monkeypatch, kind):
    """Training, `evaluate`, `Predictor.predict` and `pixelwise predict` see the same pixels."""
    image = write_data(tmp_path / "data", kind)
    inspection = inspect_data(open_data(tmp_path / "data"))
    known = [scene(seed) for seed in range(3)]
    there = np.stack([np.delete(pixels, np.s_[30:], axis=2) for pixels, _ in known])
    largest = {"uint16 0": 60000 / 65535}.get(kind, 1)
    assert inspection.channels == 3
    assert inspection.mean == pytest.approx(there.mean(axis=(0, 2, 3)) * largest, abs=3e-3)
    assert inspection.std == pytest.approx(there.std(axis=(0, 2, 3)) * largest, abs=3e-3)
    counts = np.bincount(np.concatenate([mask[:, :30].ravel() for _, mask in known]), minlength=2)
    assert inspection.splits["train"].pixels == tuple(counts)
    assert inspection.splits["train"].void == 3 * SIDE * (SIDE - 30)

    run = pixelwise.train(tmp_path / "data", make_config(TINY), out=tmp_path / "run")
    assert load_card(run.folder).mean == inspection.mean
    predictor = pixelwise.load(run.folder)
    labels = predictor.predict(image).labels
    truth = scene(4)[1]
    assert (labels[HOLE] == 255).all() and (labels[:, :30] < 2).all()
    matrix = np.zeros((2, 2), int)
    np.add.at(matrix, (truth[:, :30], labels[:, :30]), 1)
    assert pixelwise.evaluate(run.folder, tmp_path / "data").matrix == matrix.tolist()
    arguments = ["pixelwise", "predict", str(run.folder), str(image), "--out", str(tmp_path / "out")]
    for more in ([], ["--tile", "16", "--overwrite"]):
        monkeypatch.setattr("sys.argv", arguments + more)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        with rasterio.open(tmp_path / "out" / "4.tif") as file:
            assert np.array_equal(file.read(1), labels)


@pytest.mark.parametrize(("kind", "is_foreign"), [*((kind, False) for kind in KINDS), (next(iter(KINDS)), True)])
@pytest.mark.parametrize("model", ["unet", "patch_classifier"])
def test_crops_hold_the_mean_where_there_is_no_data(tmp_path, kind, is_foreign, model):
    """What the network takes for 0: weights from elsewhere bring it (`is_foreign`); colours change about the data's own."""
    write_data(tmp_path / "data", kind)
    options = TINY | {"model": model, "photometric": 0.5, "scale": (1.0, 1.0)}
    if model == "patch_classifier":
        options |= {"options": {"window": 9, "widths": [6, 8], "kernels": [4, 2], "pools": [2, 2], "hidden": 8}}
        del options["crop_px"], options["scale"]
    config, inspection = make_config(options), inspect_data(open_data(tmp_path / "data"))
    start = start_network(config, inspection, is_resumed=False)
    plan = make_plan(config, inspection, start)
    if is_foreign:
        plan = replace(plan, mean=tuple(value - 40 for value in plan.mean), std=tuple(9 * value for value in plan.std))
    dataset = make_dataset(config, plan, inspection, start.model)
    mean, std = (torch.tensor(of)[:, None, None] for of in (inspection.mean, inspection.std))
    seen_mean, seen_std = (torch.tensor(of)[:, None, None] for of in (plan.mean, plan.std))
    empty = 0
    for position in range(12):
        image, changes, mask = dataset[(position % 3, position)]
        seen = network_input(image[None], changes[None])[0]
        is_empty = (seen == 0).all(dim=0)
        image = seen * seen_std + seen_mean
        assert ((image - mean) / std)[:, ~is_empty].abs().max() < 5
        if model == "unet":
            assert torch.equal(is_empty, mask == 255)
        empty += int(is_empty.sum())
    assert empty


@pytest.mark.filterwarnings("ignore:.*band 4 is left out")  # it says where there are data, and is told
def test_the_network_sees_the_mean_where_there_is_no_data(tmp_path):
    """What stands in the file under a hole changes no label beside it, in any way of computing."""
    write_data(tmp_path / "data", "alpha")
    run = pixelwise.train(tmp_path / "data", make_config(TINY), out=tmp_path / "run")
    predictor = pixelwise.load(run.folder)
    pixels, _ = scene(7)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).eval()
    classifier = WindowClassifier(net, names=("tabby", "lynx"), input_px=9, device="cpu")
    found, hot = [], []
    for name, value in (("a", 0.0), ("b", 0.9)):
        path = tmp_path / f"{name}.tif"
        pixels[:, *HOLE] = value
        shown = np.full((1, SIDE, SIDE), 255, np.uint8)
        shown[:, *HOLE] = 0
        profile = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": 4, "dtype": "uint8", **UTM}
        with rasterio.open(path, "w", **profile, photometric="rgb", alpha="yes") as file:
            file.write(np.concatenate([(pixels * 255).astype(np.uint8), shown]))
        hot += [classifier.classify(path, scale_px=scale).logits for scale in (None, 32)]
        found.append([predictor.predict(path, tile_px=tile).logits[:, :, :30] for tile in (None, 16)])
    assert torch.equal(hot[0], hot[2]) and torch.equal(hot[1], hot[3])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][0], found[0][1], atol=1e-4) and torch.allclose(found[0][0], found[1][1], atol=1e-4)


def test_reading_in_threads_is_the_same(tmp_path):
    image = write_data(tmp_path / "data", "nan", ("train",))
    with open_source(image) as source:
        whole = source.valid(0, 0, SIDE, SIDE)
        parts = in_threads(lambda top: source.valid(top, 0, 1, SIDE), range(SIDE))
    assert np.array_equal(np.concatenate(parts), whole)
