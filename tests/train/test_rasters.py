"""Training on rasters by windows of their files, and the options of reading."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from pixelwise.data import scan
from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.data.pairs import Pair
from pixelwise.errors import DataError, UsageError
from pixelwise.formats import Source
from pixelwise.train import make_config, train
from pixelwise.train.network import start_network
from pixelwise.train.plan import epoch_pairs, make_plan
from pixelwise.train.stream import make_dataset

TINY = {
    "model": "unet",
    "options": {"widths": [4, 6]},
    "crop_px": 16,
    "batch_size": 2,
    "steps": 2,
    "workers": 0,
    "precision": "float32",
}
UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}


def pair_paths(root: Path, split: str, name: str, image: str, mask: str) -> tuple[Path, Path]:
    paths = root / split / "images" / f"{name}{image}", root / split / "masks" / f"{name}{mask}"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths


def scene(seed: int, side: int = 150) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    mask = np.zeros((side, side), np.uint8)
    mask[20:60, 30:90], mask[100:103, 5:9] = 1, 2
    return draws.integers(0, 99, (3, side, side), dtype=np.uint8) + 60 * mask, mask


def write_tif(path: Path, bands: np.ndarray, **profile: object) -> None:
    bands = bands if bands.ndim == 3 else bands[None]
    kind = {"driver": "GTiff", "count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    kind |= {"dtype": bands.dtype, "tiled": True, "blockxsize": 64, "blockysize": 64} | UTM | profile
    with rasterio.open(path, "w", **kind) as file:
        file.write(bands)


@pytest.fixture
def rasters(tmp_path: Path) -> Path:
    for seed, split in enumerate(("train", "val")):
        image, mask = pair_paths(tmp_path, split, "scene", ".tif", ".tif")
        bands, labels = scene(seed)
        write_tif(image, bands)
        write_tif(mask, labels)
    return tmp_path


@pytest.mark.parametrize("values", [{"slices": 2}, {"axis": 3}, {"intensity": "300,-200"}])
def test_options_of_reading_are_checked(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        make_config(values)


def test_a_picture_has_no_axis(toy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png: its format \(png\) has no option axis"):
        train(toy_data, make_config(TINY | {"axis": 0}), out=tmp_path / "run")


def crops(root: Path, count: int, **options: object) -> list[tuple[torch.Tensor, ...]]:
    config = make_config(TINY | options)
    inspection = inspect_data(open_data(root))
    plan = make_plan(config, inspection, start_network(config, inspection, is_resumed=False))
    made = make_dataset(config, plan, inspection, start_network(config, inspection, is_resumed=False).model)
    return [made[0, position] for position in range(count)]


@pytest.mark.parametrize(
    "options",
    [{"focus": 1.0, "elastic": 3.0, "flips": "dihedral"}, {"focus": 0.0, "crop_px": 250}, {"model": "patches"}],
)
def test_windows_of_files_give_the_crops_of_whole_images(
    rasters: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    if "model" in options:
        options = {"model": "patch_classifier", "options": {}, "crop_px": None}
    whole = crops(rasters, 12, **options)
    reads = []
    monkeypatch.setattr(scan, "WHOLE_PX", 9_000)
    monkeypatch.setattr(scan, "_STRIP_PX", 9_000)
    scan._scan_mask.cache_clear()
    inside = Source.__subclasses__()
    for kind in inside:
        if "read" in vars(kind):
            real = kind.read
            monkeypatch.setattr(kind, "read", lambda *a, real=real, **k: reads.append(a[3:5]) or real(*a, **k))
    cut = crops(rasters, 12, **options)
    scan._scan_mask.cache_clear()
    for one, other in zip(whole, cut, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert reads and (options.get("crop_px") == 250 or max(h * w for h, w in reads) <= 9_600)


def test_an_epoch_draws_as_many_crops_as_a_raster_has_room_for(
    rasters: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scan, "WHOLE_PX", 9_000)
    scan._scan_mask.cache_clear()
    inspection = inspect_data(open_data(rasters))
    assert len(epoch_pairs(inspection, 16)) == round(150 * 150 / 16**2)
    assert inspection.describe_images()["crs"] == {"EPSG:32633": 2}
    run = train(rasters, make_config(TINY | {"workers": 1}), out=tmp_path / "run")
    assert run.plan.steps_per_epoch == 44
    with pytest.raises(UsageError, match=r"separation: .*scene\.tif is too large"):
        train(rasters, make_config(TINY | {"separation": 5}), out=tmp_path / "other")
    scan._scan_mask.cache_clear()


def test_where_an_image_has_no_data_nothing_is_learnt(rasters: Path) -> None:
    bands, labels = scene(0)
    bands[:, :, 75:] = 0
    write_tif(rasters / "train/images/scene.tif", bands, nodata=0)
    inspection = inspect_data(open_data(rasters))
    assert max(inspection.mean) == pytest.approx(bands[:, :, :75].mean(axis=(1, 2)).max() / 255)
    (_, _, mask), *_ = crops(rasters, 1, crop_px=150, scale=[1, 1], flips="none")
    assert (mask[:, 75:] == 255).all() and torch.equal(mask[:, :75], torch.from_numpy(labels[:, :75]))


def test_a_large_picture_of_many_values_is_a_mask_that_is_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(400, dtype=np.uint16).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", values)
    monkeypatch.setattr(scan, "WHOLE_PX", 100)
    monkeypatch.setattr(scan, "_STRIP_PX", 100)
    scan._scan_mask.cache_clear()
    picture, array = (
        Pair(image=tmp_path / name, mask=tmp_path / name, split="train", name="a") for name in ("a.png", "a.npy")
    )
    found = scan.scan_mask(picture)
    assert found.counts == dict.fromkeys(range(400), 1) and found.places == ()
    with pytest.raises(DataError, match="different values; it looks like a photograph"):
        scan.scan_mask(array)
    scan._scan_mask.cache_clear()
