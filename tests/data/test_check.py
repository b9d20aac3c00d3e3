"""The check: exact numbers, every kind of problem, and CamVid as the paper counts it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pixelwise.data import check
from pixelwise.data.check import inspect_data
from pixelwise.data.labels import CAMVID_COLORS, CAMVID_NAMES, LabelSpec
from pixelwise.data.layouts import open_data
from pixelwise.errors import DataError

CAMVID = Path(os.environ.get("PIXELWISE_DATA", Path(__file__).parents[3] / "shared/data")) / "camvid"
ELEVEN = LabelSpec(names=CAMVID_NAMES, colors=CAMVID_COLORS, values=tuple((i,) for i in range(11)))
RNG = np.random.default_rng(0)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


@pytest.fixture
def tree(tmp_path):
    """Two pairs of 6 x 4 pixels in each split, every mask with the values 0, 1 and 2."""
    for split in ("train", "val", "test"):
        for name in (f"{split}_a", f"{split}_b"):
            save(tmp_path / split / "images" / f"{name}.png", RNG.integers(0, 256, (4, 6, 3)))
            save(tmp_path / split / "masks" / f"{name}.png", np.arange(24).reshape(4, 6) % 3)
    return tmp_path


def messages(root, severity=None, **options):
    problems = inspect_data(open_data(root, **options)).problems
    return [problem.message for problem in problems if severity in (None, problem.severity)]


def test_numbers_equal_their_definitions(tree):
    save(tree / "train/masks/train_a.png", [[0] * 6, [0] * 6, [1] * 6, [9] * 6])
    inspection = inspect_data(open_data(tree, ignore=(9,)))
    train = inspection.splits["train"]
    assert train.images == 2
    assert train.pixels == (12 + 8, 6 + 8, 8)
    assert train.void == 6
    assert train.images_with == (2, 2, 1)
    assert train.image_pixels == (48, 48, 24)
    assert (inspection.channels, inspection.dtypes, inspection.sizes) == (3, {"uint8": 6}, {"6x4": 6})
    files = sorted((tree / "train/images").iterdir())
    pixels = np.concatenate([np.asarray(Image.open(file)).reshape(-1, 3) for file in files]) / 255
    np.testing.assert_allclose(inspection.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(inspection.std, pixels.std(axis=0), rtol=1e-12)
    assert inspection.problems == ()
    inspection.raise_if_fatal()


def test_grey_among_colour_counts_for_every_channel(tree):
    save(tree / "train/images/train_a.png", np.full((4, 6), 51))
    save(tree / "train/images/train_b.png", np.full((4, 6, 3), (153, 51, 51)))
    inspection = inspect_data(open_data(tree))
    assert inspection.channels == 3
    np.testing.assert_allclose(inspection.mean, (0.4, 0.2, 0.2))
    np.testing.assert_allclose(inspection.std, (0.2, 1.0, 1.0))  # constant channels can still be divided by


def test_16_bit_and_float_images_are_in_their_own_scale(tree):
    for split in ("train", "val", "test"):
        for name in "ab":
            (tree / f"{split}/images/{split}_{name}.png").unlink()
            pixels = RNG.integers(0, 4096, (4, 6, 5), dtype=np.uint16)
            tifffile.imwrite(
                tree / f"{split}/images/{split}_{name}.tif", pixels, photometric="minisblack", planarconfig="contig"
            )
    inspection = inspect_data(open_data(tree))
    assert (inspection.channels, inspection.dtypes) == (5, {"uint16": 6})
    stored = np.stack([tifffile.imread(path) for path in sorted((tree / "train/images").iterdir())]) / 65535
    np.testing.assert_allclose(inspection.mean, stored.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(inspection.std, stored.std(axis=(0, 1, 2)), rtol=1e-9)


def test_the_message_of_an_unknown_value(tree):
    mask = np.zeros((40, 50), np.uint8)
    mask.flat[:1204] = 255
    save(tree / "train/images/street_004.png", RNG.integers(0, 256, (40, 50, 3)))
    save(tree / "train/masks/street_004.png", mask)
    folder = open_data(tree, labels=ELEVEN)
    fatal = [problem for problem in inspect_data(folder).problems if problem.severity == "fatal"]
    assert [problem.message for problem in fatal] == [
        "train: mask street_004.png holds value 255 (1,204 px), but there are 11 classes (0..10). "
        "Pass --ignore 255, or map it in classes.yaml."
    ]
    assert fatal[0].files == ("train/masks/street_004.png",)


def test_a_proposal_leaves_255_to_the_user(tree):
    save(tree / "val/masks/val_a.png", [[0, 1, 2, 255, 255, 0]] * 4)
    assert messages(tree, "fatal") == [
        "val: mask val_a.png holds value 255 (8 px), but there are 3 classes (0..2). "
        "Pass --ignore 255, or map it in classes.yaml."
    ]
    assert messages(tree, "fatal", ignore=(255,)) == []


def test_all_fatal_problems_are_listed_at_once(tree):
    save(tree / "train/masks/train_a.png", np.zeros((6, 4)))
    (tree / "val/images/val_b.png").write_bytes((tree / "val/images/val_b.png").read_bytes()[:60])
    (tree / "test/masks/test_a.png").write_bytes(b"")
    save(tree / "test/images/lonely.png", np.ones((4, 6, 3)))
    save(tree / "test/masks/test_b.png", np.zeros((4, 6, 3)))
    with pytest.raises(DataError) as error:
        inspect_data(open_data(tree)).raise_if_fatal()
    text = str(error.value)
    assert text.startswith(f"{tree}: 5 problems must be fixed first:\n- ")
    for part in (
        "train: mask train/masks/train_a.png is 4 x 6 px, but its image train/images/train_a.png is 6 x 4 px",
        "EXIF",
        "val: image val_b.png cannot be used: the file is damaged or truncated",
        "test: mask test_a.png cannot be used: the file is empty (0 bytes).",
        "test: 1 image has no mask: test/images/lonely.png",
        "test: mask test_b.png holds an RGB colour for each pixel",
    ):
        assert part in text


def test_one_fatal_problem_is_one_sentence(tree):
    (tree / "test/masks/test_a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"test: mask test_a\.png cannot be used"):
        inspect_data(open_data(tree)).raise_if_fatal()


def test_many_problems_of_one_kind_are_counted_not_listed(tree):
    for number in range(30):
        (tree / f"train/images/bad{number:02}.png").write_bytes(b"")
        save(tree / f"train/masks/bad{number:02}.png", [[0, 1, 2]])
    found = messages(tree, "fatal")
    assert len(found) == 21
    assert found[-1].startswith("train: 10 more files cannot be used")


def test_several_masks_with_unknown_values_are_one_problem(tree):
    save(tree / "train/masks/train_a.png", [[7] * 6] * 4)
    save(tree / "train/masks/train_b.png", [[7] * 5 + [8]] * 4)
    labels = LabelSpec(names=tuple("abc"), colors=CAMVID_COLORS[:3], values=((0,), (1,), (2,)))
    assert messages(tree, "fatal", labels=labels) == [
        "train: mask train_a.png (and 1 more mask, pixels added up) holds values 7 (44 px), 8 (4 px), but there are 3 "
        "classes (0..2). Pass --ignore 7 --ignore 8, or map them in classes.yaml. Values in so few pixels may be strays: "
        "7 in train_a.png at row 0, column 0; 8 in train_b.png at row 0, column 5. Most pixels are of no class: are these "
        "masks of another data set, or the classes?"
    ]


def test_the_same_image_in_two_splits_is_found_across_formats(tree):
    with Image.open(tree / "train/images/train_a.png") as image:
        image.save(tree / "test/images/test_a.bmp")
    (tree / "test/images/test_a.png").unlink()
    assert messages(tree, "warning") == [
        "1 image is both in train and in test: train/images/train_a.png = test/images/test_a.bmp. That flatters the "
        "score on test."
    ]


def test_a_group_in_two_given_splits_is_fatal(tree):
    found = messages(tree, "fatal", group_by="_(.)")
    assert len(found) == 1
    assert "divide groups: 'a' (train and val and test), 'b' (train and val and test)" in found[0]
    assert messages(tree, "fatal", group_by="(.*)_") == []


def test_missing_classes_and_empty_masks_are_warnings(tree):
    for name in "ab":
        save(tree / f"val/masks/val_{name}.png", [[0, 1] * 3] * 4)
    save(tree / "test/masks/test_a.png", [[9] * 6] * 4)
    assert messages(tree, ignore=(9,)) == [
        "test: 1 mask holds no labelled pixel: test/masks/test_a.png.",
        "val: no mask contains 'class 2'. It cannot be scored there.",
    ]


def test_masks_of_background_alone_are_counted(tmp_path):
    for name in "abcdefghij":
        save(tmp_path / f"images/{name}.png", RNG.integers(0, 256, (4, 6)))
        save(tmp_path / f"masks/{name}.png", [[0, 255]] if name < "f" else [[0, 0]])
    found = " ".join(messages(tmp_path))
    assert "nothing but background" in found


def test_images_that_cannot_be_used_together(tree):
    tifffile.imwrite(
        tree / "train/images/train_a.tif",
        np.zeros((4, 6, 5), np.uint8),
        photometric="minisblack",
        planarconfig="contig",
    )
    (tree / "train/images/train_a.png").unlink()
    assert any("number of channels (5 with 3, 1 with 5)" in message for message in messages(tree, "fatal"))
    tifffile.imwrite(tree / "train/images/train_a.tif", np.ones((4, 6), np.uint16))
    assert any("bit depth (5 x uint8, 1 x uint16)" in message for message in messages(tree, "warning"))


def test_nothing_to_learn_or_to_learn_from(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"test/images/{name}.png", RNG.integers(0, 256, (4, 6)))
        save(tmp_path / f"test/masks/{name}.png", np.zeros((4, 6)))
    found = messages(tmp_path, "fatal")
    assert any("there is nothing to learn" in message for message in found)
    assert any("no training images" in message for message in found)


def test_the_fingerprint_is_of_the_pixels_not_of_the_place(tree, tmp_path_factory):
    first = inspect_data(open_data(tree)).fingerprint
    moved = tmp_path_factory.mktemp("moved") / "data"
    tree.rename(moved)
    assert inspect_data(open_data(moved)).fingerprint == first
    with Image.open(moved / "train/masks/train_a.png") as mask:
        pixels = np.array(mask)
    pixels[0, 0] = 1 - pixels[0, 0]
    save(moved / "train/masks/train_a.png", pixels)
    assert inspect_data(open_data(moved)).fingerprint != first


def test_the_number_of_threads_changes_nothing(tree, monkeypatch):
    many = inspect_data(open_data(tree)).to_dict()
    monkeypatch.setattr("pixelwise.data.scan.worker_count", lambda: 1)
    assert inspect_data(open_data(tree)).to_dict() == many


def test_the_dictionary_is_json(tree):
    content = inspect_data(open_data(tree)).to_dict()
    assert json.loads(json.dumps(content)) == content
    assert LabelSpec.from_dict(content["labels"]).num_classes == 3
    assert set(content["splits"]) == {"train", "val", "test"}


def test_progress_is_told(tree):
    told = []
    inspect_data(open_data(tree), lambda *numbers: told.append(numbers))
    assert told == [(done, 6) for done in range(1, 7)]


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}; set PIXELWISE_DATA")
def test_camvid_is_counted_exactly():
    folder = open_data(CAMVID)
    train = check.DataFolder(root=CAMVID, layout=folder.layout, pairs=folder.split("train"), labels=folder.labels)
    inspection = inspect_data(train)
    stats = inspection.splits["train"]
    assert [len(folder.split(name)) for name in folder.splits] == [367, 101, 233]
    assert stats.pixels == (
        10_682_767, 14_750_079, 623_349, 20_076_880, 2_845_085, 6_166_762, 743_859, 714_595, 3_719_877, 405_385, 184_967,
    )  # fmt: skip
    assert stats.images_with == (366, 365, 366, 367, 349, 319, 351, 173, 360, 317, 201)
    assert stats.void == 2_503_995
    np.testing.assert_allclose(inspection.mean, (0.41189488, 0.42513280, 0.43267069), atol=5e-9)
    np.testing.assert_allclose(inspection.std, (0.30707349, 0.31161108, 0.30721843), atol=5e-9)
