"""U-Net's weights of gaps, from the files of a data folder to the loss of a step."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import pixelwise
from pixelwise.data.layouts import Pair, open_data
from pixelwise.data.samples import load_sample
from pixelwise.data.separation import (
    instance_file,
    separate,
    separate_touching,
    separation_weights,
    where_objects_come_from,
)
from pixelwise.errors import DataError
from pixelwise.losses import cross_entropy
from pixelwise.models import create_model
from pixelwise.train import make_config, train
from pixelwise.train.module import SegmentationModule

TINY = {
    "model": "unet",
    "options": {"widths": [4, 6]},
    "crop_px": 32,
    "batch_size": 4,
    "workers": 0,
    "precision": "float32",
    "steps": 5,
    "separation": 10.0,
    "separation_sigma_px": 3.0,
}
# Two cells that touch, one apart; the mask does not tell the first two from each other.
CELLS = np.zeros((24, 30), dtype=np.uint16)
CELLS[4:12, 3:10], CELLS[4:12, 10:18], CELLS[15:20, 5:12] = 300, 7, 8


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """A folder of cells with masks."""
    root, draws = tmp_path / "cells", np.random.default_rng(0)
    for kind in ("images", "masks", "instances"):
        (root / kind).mkdir(parents=True)
    for index in range(12):
        instances = np.roll(CELLS, index, axis=1)
        image = draws.integers(0, 60, instances.shape) + 100 * (instances > 0)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{index}.png")
        Image.fromarray((instances > 0).astype(np.uint8)).save(root / "masks" / f"{index}.png")
        Image.fromarray(instances).save(root / "instances" / f"{index}.png")
    return root


def separated(root: Path, **options: float):
    folder = open_data(root)
    pair = next(pair for pair in folder.pairs if pair.name == "0")
    given = {"w0": 10.0, "sigma_px": 3.0, **options}
    sample = load_sample(pair, folder.labels)
    return sample, *separate(pair, sample, **given)


def test_instances_part_cells_that_touch(cells: Path) -> None:
    before, sample, weights = separated(cells)
    parted = separate_touching(CELLS)
    assert weights.dtype == torch.float32 and weights.shape == sample.mask.shape
    assert np.array_equal(sample.mask.numpy(), (parted > 0).astype(np.uint8))
    removed = (before.mask.numpy() > 0) & (sample.mask.numpy() == 0)
    assert 0 < removed.sum() <= 8 and weights.numpy()[removed].min() > 9  # the line between them weighs most
    wanted = separation_weights(parted, w0=10, sigma_px=3, is_instances=True)
    assert torch.allclose(weights + 1, torch.from_numpy(wanted))
    assert (weights[sample.mask > 0] == 0).all()


def test_without_instances_the_regions_of_the_mask_are_the_objects(cells: Path) -> None:
    shutil.rmtree(cells / "instances")
    before, sample, weights = separated(cells)
    assert torch.equal(sample.mask, before.mask)
    wanted = separation_weights(before.mask.numpy(), w0=10, sigma_px=3)
    assert torch.allclose(weights + 1, torch.from_numpy(wanted)) and weights.max() > 1


def test_void_weighs_nothing_and_is_no_object(cells: Path) -> None:
    shutil.rmtree(cells / "instances")
    folder = open_data(cells, ignore=[9])
    path = cells / "masks" / "0.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[:, 20:] = 9
    Image.fromarray(mask).save(path)
    pair = next(pair for pair in folder.pairs if pair.name == "0")
    sample, weights = separate(pair, load_sample(pair, folder.labels), w0=10, sigma_px=3)
    assert (sample.mask[:, 20:] == 255).all() and (weights[:, 20:] == 0).all() and weights.max() > 0


def test_instances_by_colour_are_told_apart(cells: Path) -> None:
    _, _, wanted = separated(cells)
    colours = np.random.default_rng(0).integers(1, 256, (301, 3), dtype=np.uint8)
    colours[0] = 0
    Image.fromarray(colours[CELLS]).save(cells / "instances" / "0.png")
    assert torch.equal(separated(cells)[2], wanted)


def test_instances_of_another_size_are_refused_before_anything_is_written(cells: Path, tmp_path: Path) -> None:
    Image.fromarray(CELLS[:20]).save(cells / "instances" / "0.png")
    with pytest.raises(DataError, match=r"0\.png: the instance map is 30 x 20 px, but its mask is 30 x 24 px"):
        separated(cells)
    with pytest.raises(DataError, match="instance map"):
        train(cells, make_config(TINY), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["above", "below", "none"])
def test_instance_maps_are_found_beside_the_masks(tmp_path: Path, split: str) -> None:
    masks, instances = {
        "above": ("train/masks", "train/instances"),
        "below": ("masks/train", "instances/train"),
        "none": ("masks", "instances"),
    }[split]
    path = tmp_path / instances / "a.png"
    path.parent.mkdir(parents=True)
    path.touch()
    pair = Pair(image=tmp_path / "a.png", mask=tmp_path / masks / "a.png", split="train", group="a", name="a")
    assert instance_file(pair) == path
    other = Pair(image=tmp_path / "b.png", mask=tmp_path / masks / "b.png", split="train", group="b", name="b")
    none = Pair(image=tmp_path / "c.png", mask=None, split="train", group="c", name="c")
    assert instance_file(other) is None and instance_file(none) is None
    assert where_objects_come_from([pair]) == "between the objects that instances/ numbers"
    assert where_objects_come_from([other]) == "between the connected regions of the masks"
    assert "instances/ numbers in 1 images, else between connected regions" in where_objects_come_from([pair, other])


# -- the loss of a step --


def task(**options: object) -> SegmentationModule:
    torch.manual_seed(0)
    model = create_model("unet", num_classes=2, in_channels=1, tiny=True)
    weight = options.pop("weight", None)
    config = make_config({"channels_last": False, "ema": 0, **options})
    plan = SimpleNamespace(mean=(0.0,), std=(1.0,), steps=1, steps_per_epoch=1)
    return SegmentationModule(model, config, plan, weight)


def test_the_weights_of_class_and_gap_are_added():
    draws = torch.Generator().manual_seed(0)
    image, gaps = torch.rand(2, 1, 16, 16, generator=draws), 10 * torch.rand(2, 16, 16, generator=draws)
    labels = torch.randint(2, (2, 16, 16), generator=draws, dtype=torch.uint8)
    labels[0, :3] = 255
    weight = torch.tensor([0.5, 3.0])
    made = task(weight=weight)
    stored, changes = image.permute(0, 2, 3, 1).contiguous(), torch.tensor([[1.0], [0.0]]).expand(2, 2, 1)  # as it is
    by_pixel = torch.nn.functional.cross_entropy(made.model(image), labels.long(), ignore_index=255, reduction="none")
    whole = torch.where(labels == 1, 3.0, 0.5) + gaps
    valid = (labels != 255).sum()
    assert torch.allclose(made.training_step((stored, changes, labels, gaps), 0), (by_pixel * whole).sum() / valid)
    assert torch.allclose(
        task().training_step((stored, changes, labels, gaps), 0), (by_pixel * (1 + gaps)).sum() / valid
    )
    summed = task(reduction="sum").training_step((stored, changes, labels, gaps), 0)
    assert torch.allclose(summed, (by_pixel * (1 + gaps)).sum())
    plain = cross_entropy(made.model(image), labels, weight=weight)
    assert torch.allclose(made.training_step((stored, changes, labels), 0), plain)


# -- whole runs --


def test_training_with_gaps_and_elastic_deformation(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({**TINY, "elastic": 4.0, "flips": "dihedral"})
    run = train(cells, config, out=tmp_path / "whole")
    assert run.plan.separation == "between the objects that instances/ numbers"

    def stop(event: dict) -> None:
        if event.get("step") == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    train(cells, config, out=tmp_path / "torn", report=stop)
    monkeypatch.setattr("pixelwise.train.stream.fits_in_cache", lambda _bytes: False)  # computed anew for each crop
    assert train(cells, out=tmp_path / "torn", resume=True).steps == 5
    one, other = (pixelwise.load(tmp_path / name, device="cpu").model.state_dict() for name in ("whole", "torn"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    plain = train(cells, make_config({**TINY, "separation": 0, "separation_sigma_px": 5.0}), out=tmp_path / "plain")
    assert plain.plan.separation == ""
    weight = pixelwise.load(tmp_path / "plain", device="cpu").model.state_dict()["score.weight"]
    assert not torch.equal(weight, one["score.weight"])
