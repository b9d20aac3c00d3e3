"""Outside of the region that counts, a field of view for example, pixels are void: in statistics, loss and scores."""

import shutil

import numpy as np
import pytest
from PIL import Image

import pixelwise
from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.data.samples import load_sample
from pixelwise.errors import DataError, UsageError
from pixelwise.infer.bundle import load_card
from pixelwise.infer.evaluate import open_for
from pixelwise.losses import class_weights
from pixelwise.train import make_config
from pixelwise.train.folder import recorded_choices
from pixelwise.train.module import loss_weights

TINY = {
    "model": "unet", "options": {"widths": [4, 6]}, "crop_px": 32, "batch_size": 2, "steps": 2, "workers": 0,
    "precision": "float32", "device": "cpu", "class_weights": "median_frequency",
}  # fmt: skip
INSIDE = np.hypot(*(np.mgrid[:40, :40] - 20)) < 15
SPLITS = ("train", "train", "train", "val", "test")


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def eye(seed):
    """A bright disc with dark vessels on black, its labels, which reach beyond the disc, as (image, mask)."""
    draws = np.random.default_rng(seed)
    mask = np.zeros((40, 40), np.uint8)
    mask[draws.integers(5, 30) :][:4] = 255
    image = np.where(INSIDE, 150 - (mask > 0) * 60, 5)[..., None] + draws.integers(0, 20, (40, 40, 3))
    return image.astype(np.uint8), mask


@pytest.fixture
def data(tmp_path):
    """As DRIVE: mask/ is the field of view, 1st_manual/ the vessels."""
    for seed, split in enumerate(SPLITS):
        image, mask = eye(seed)
        write(tmp_path / split / "images" / f"{seed}_training.png", image)
        write(tmp_path / split / "1st_manual" / f"{seed}_manual1.gif", mask)
        write(tmp_path / split / "mask" / f"{seed}_training_mask.gif", INSIDE.astype(np.uint8) * 255)
    return tmp_path


def test_the_region_is_proposed(data):
    with pytest.raises(
        DataError, match="proposed is --masks 1st_manual --region mask, which counts only the pixels ins"
    ):
        open_data(data)
    with pytest.raises(UsageError, match="--region 1st_manual: these are the masks"):
        open_data(data, masks="1st_manual", region="1st_manual")
    (advice,) = [p.message for p in open_data(data, masks="1st_manual").problems if "field of view" in p.message]
    assert "--region mask counts only the pixels inside of it" in advice


def test_outside_is_void_in_statistics_loss_and_scores(data):
    folder = open_data(data, masks="1st_manual", region="mask")
    inspection = inspect_data(folder)
    assert not any(problem.severity == "fatal" or "not used" in problem.message for problem in inspection.problems)
    known = [eye(seed) for seed in range(3)]
    there = np.concatenate([image[INSIDE] for image, _ in known]) / 255
    assert inspection.mean == pytest.approx(there.mean(axis=0)) and inspection.std == pytest.approx(there.std(axis=0))
    pixels = np.bincount(np.concatenate([mask[INSIDE] > 0 for _, mask in known]), minlength=2)
    assert inspection.splits["train"].pixels == tuple(pixels)
    assert inspection.splits["train"].void == 3 * (~INSIDE).sum()
    sample = load_sample(folder.split("train")[0], folder.labels)
    assert (
        sample.valid is None and (sample.mask.numpy()[~INSIDE] == 255).all() and sample.mask.numpy()[INSIDE].max() == 1
    )

    run = pixelwise.train(folder, make_config(TINY), out=data / "run")
    assert load_card(run.folder).mean == inspection.mean
    stats = inspection.splits["train"]
    shares = pixels / (3 * INSIDE.size)  # Eigen and Fergus: of the pixels of the images that contain the class
    weights = class_weights("median_frequency", stats.pixels, stats.image_pixels)
    assert weights.tolist() == pytest.approx((np.median(shares) / shares).tolist())
    assert loss_weights(make_config(TINY), inspection, None).tolist() == weights.tolist()
    labels = pixelwise.load(run.folder).predict(data / "test/images/4_training.png").labels
    assert labels.max() < 2  # an image by itself has no region: labels everywhere
    matrix = np.zeros((2, 2), int)
    np.add.at(matrix, ((eye(4)[1][INSIDE] > 0).astype(int), labels[INSIDE]), 1)
    told = []
    evaluation = pixelwise.evaluate(run.folder, data, note=told.append)  # the run knows the folders by itself
    assert evaluation.matrix == matrix.tolist() and "has another name" in " ".join(told)

    assert recorded_choices(run.folder) == {"masks": "1st_manual", "region": "mask"}
    assert pixelwise.train(data, out=run.folder, resume=True).steps == 2
    for split in SPLITS:
        shutil.rmtree(data / split / "mask", ignore_errors=True)
    other = open_for(pixelwise.load(run.folder), data)
    assert other.masks == "1st_manual" and other.region is None
    assert "trained with --region mask, which is not here: all pixels count" in other.problems[-1].message


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "1 image has no mask of what counts in mask/: train/images/1_training.png"),
        ("size", "the region is 30 x 40 px, but its image"),
        ("values", "holds 0, 7, 255, but the mask of a region that counts holds 0"),
        ("empty", "holds 0, but the mask of a region"),
    ],
)
def test_regions_that_cannot_be_meant_are_refused(data, fault, message):
    path, region = data / "train/mask/1_training_mask.gif", INSIDE.astype(np.uint8) * 255
    path.unlink()
    region[3, 4] = 7 if fault == "values" else 0
    region = {"size": region[:, :30], "empty": region * 0}.get(fault, region)
    if fault != "missing":
        write(path.with_suffix(".png"), region)
    problems = inspect_data(open_data(data, masks="1st_manual", region="mask")).problems
    assert [message in problem.message for problem in problems if problem.severity == "fatal"] == [True]


def test_a_column_names_the_regions(data):
    rows = []
    for image in sorted(data.rglob("*_training.png")):
        split = image.parent.parent
        rows.append(f"{image},{split}/1st_manual/{image.name[0]}_manual1.gif,{split}/mask/{image.stem}_mask.gif")
    (data / "list.csv").write_text("\n".join(["image,mask,fov", *rows]))
    found = open_data(data / "list.csv")
    assert any("'fov' names files" in p.message and "--region fov" in p.message for p in found.problems)
    stats = inspect_data(open_data(data / "list.csv", region="FOV")).splits
    assert sum(split.void for split in stats.values()) == 5 * (~INSIDE).sum()
    with pytest.raises(UsageError, match=r"--region roi: .* has no such column; it has image, mask, fov"):
        open_data(data / "list.csv", region="roi")
