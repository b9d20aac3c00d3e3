"""Several masks of one image: joined where the user says so, refused where they contradict each other."""

import zlib

import numpy as np
import pytest
from PIL import Image

from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.data.samples import load_sample
from pixelwise.errors import DataError, UsageError


def box(top, left, value=255):
    mask = np.zeros((24, 32), np.uint8)
    mask[top : top + 6, left : left + 8] = value
    return mask


ONE, TWO = box(2, 3), box(12, 20)


def save(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    photo = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(photo if pixels is None else pixels).save(path)


def fatal(folder):
    return " | ".join(problem.message for problem in inspect_data(folder).problems if problem.severity == "fatal")


LAYOUTS = {
    "one folder": ("benign/benign ({0}).png", "benign/benign ({0})_mask.png", "benign/benign ({0})_mask_1.png"),
    "two folders": ("images/{0}.png", "masks/{0}_mask.png", "masks/{0}_mask_1.png"),
    "a folder for each image": ("images/{0}.png", "masks/{0}/a.png", "masks/{0}/b.png"),
    "a folder for each case": ("stage1/x{0}/images/x{0}.png", "stage1/x{0}/masks/7f.png", "stage1/x{0}/masks/a0.png"),
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_several_masks_are_asked_about_and_joined_on_request(tmp_path, names):
    for number in range(6):
        save(tmp_path / names[0].format(number))
        save(tmp_path / names[1].format(number), ONE)
        save(tmp_path / names[2].format(number), TWO)
    assert "--masks all joins them" in fatal(open_data(tmp_path))
    folder = open_data(tmp_path, masks="all")
    assert "the masks of each image joined" in folder.layout
    inspection = inspect_data(folder)
    assert [problem.message for problem in inspection.problems] == []
    assert sum(stats.pixels[1] for stats in inspection.splits.values()) == 6 * 96
    sample = load_sample(folder.pairs[0], folder.labels)
    assert np.array_equal(sample.mask.numpy(), (ONE | TWO) // 255)


def test_joined_masks_keep_their_numbers_and_must_not_contradict_each_other(tmp_path):
    for number in range(6):
        save(tmp_path / f"images/{number}.png")
        save(tmp_path / f"masks/{number}_mask_1.png", box(2, 3, 1))
        save(tmp_path / f"masks/{number}_mask_2.png", box(12, 20, 2))
    assert open_data(tmp_path, masks="masks/all").labels.values == ((0,), (1,), (2,))
    save(tmp_path / "masks/3_mask_2.png", box(4, 5, 2))
    message = fatal(open_data(tmp_path, masks="all"))
    assert "marks 24 pixels that another mask of its image marks with another value" in message
    assert "row 4, column 5: 1 and 2" in message
    save(tmp_path / "masks/3_mask_2.png", box(4, 5, 2)[:20])
    assert "not of the size" in fatal(open_data(tmp_path, masks="all"))
    with pytest.raises(UsageError, match="nor 'all'"):
        open_data(tmp_path, masks="every")


def test_lines_of_a_csv_that_name_one_image_are_joined_and_told(tmp_path):
    rows = ["image,mask"]
    for number in range(6):
        save(tmp_path / f"photos/{number}.png")
        for part, mask in (("a", ONE), ("b", TWO)):
            save(tmp_path / f"drawn/{part}{number}.png", mask)
            rows.append(f"photos/{number}.png,drawn/{part}{number}.png")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    folder = open_data(tmp_path)
    inspection = inspect_data(folder)
    assert sum(stats.pixels[1] for stats in inspection.splits.values()) == 6 * 96
    assert any("6 images have several masks, which are joined" in problem.message for problem in inspection.problems)
    assert not any("seen and not used" in problem.message for problem in inspection.problems)
    (tmp_path / "pairs.csv").write_text("\n".join([*rows, rows[1]]))
    assert "stands in two lines" in fatal(open_data(tmp_path))


def test_masks_of_label_studio_name_no_image(tmp_path):
    for number in range(4):
        save(tmp_path / f"images/{number:08x}-street.jpg")
        for tag in ("Car", "Road"):
            save(tmp_path / f"masks/task-{number + 1}-annotation-{number}-by-1-tag-{tag}-0.png", ONE)
    with pytest.raises(DataError, match=r"Label Studio does, by a task's number and a tag \(Car, Road\).*CSV file"):
        open_data(tmp_path)


def test_splits_of_the_masks_alone_and_of_the_images_alone(tmp_path):
    for number in range(6):
        split = "train" if number < 4 else "val"
        for root, images, masks in (("a", "", f"{split}/"), ("b", f"{split}/", "")):
            save(tmp_path / root / f"images/{images}{number}.png")
            save(tmp_path / root / f"masks/{masks}{number}.png", ONE)
    for root in ("a", "b"):
        folder = open_data(tmp_path / root)
        assert {pair.name: pair.split for pair in folder.pairs} == {
            **dict.fromkeys("0123", "train"), **dict.fromkeys("45", "val")
        }  # fmt: skip
        assert all(pair.name == pair.mask.stem for pair in folder.pairs)
        assert folder.problems == ()
    save(tmp_path / "b/images/val/0.png")
    assert "1 mask belongs to images of several splits by name: masks/0.png" in fatal(open_data(tmp_path / "b"))
    save(tmp_path / "a/masks/val/0.png", TWO)
    assert "masks/train/0.png and masks/val/0.png both stand for '0'" in fatal(open_data(tmp_path / "a"))
