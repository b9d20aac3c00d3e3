"""Class names that tools write beside masks are followed where they fit, and named where they do not."""

import json

import numpy as np
import pytest
from PIL import Image

from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data

COLORS = np.array([[0, 0, 0], [250, 50, 83], [51, 221, 255], [255, 255, 255]], np.uint8)
LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,50,83::\ndog:51,221,255::\n"
BACKGROUND_CAT_DOG = ("background", "cat", "dog")


def ids(number):
    """Two rectangles on background: labels 0, 1 and 2, (24, 32)."""
    mask = np.zeros((24, 32), np.uint8)
    mask[2:12, 3 : 12 + number] = 1
    mask[14:22, 5 + number : 30] = 2
    return mask


def write(root, files, make=ids, mode=None, count=6):
    """images/ and masks/ with masks that `make(number)` draws, and text files."""
    draws = np.random.default_rng(4)
    for kind in ("images", "masks"):
        (root / kind).mkdir(exist_ok=True)
    for number in range(count):
        Image.fromarray(draws.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(root / f"images/{number}.png")
        mask = Image.fromarray(make(number))
        if mode == "P":
            mask.putpalette(COLORS.tobytes())
        mask.save(root / f"masks/{number}.png")
    for name, text in files.items():
        (root / name).write_text(text)
    return open_data(root)


def told(folder):
    return " | ".join(problem.message for problem in inspect_data(folder).problems)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("_classes.csv", "Pixel Value, Class\n0, background\n1, cat\n2, dog\n"),
        ("class_names.txt", "_background_\ncat\ndog\n"),
        ("labels.txt", "__ignore__\n_background_\ncat\ndog\n"),
        ("classes.txt", "background\ncat\ndog\n"),
        ("codes.txt", "background\ncat\ndog"),
        ("dataset.json", json.dumps({"labels": {"background": 0, "cat": 1, "dog": 2}})),
        ("dataset.json", json.dumps({"labels": {"0": "background", "1": "cat", "2": "dog"}})),
        ("masks/_classes.csv", "Pixel Value, Class\n0, background\n1, cat\n2, dog\n"),
    ],
)
def test_numbers_get_their_names(tmp_path, name, text):
    folder = write(tmp_path, {name: text})
    assert folder.labels.names == BACKGROUND_CAT_DOG
    assert folder.labels.values == ((0,), (1,), (2,))
    assert folder.layout == f"images/ + masks/, class names from {name.rpartition('/')[2]}, split by hash"
    assert "not used" not in told(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labelmap.txt", LABELMAP),
        ("label_colors.txt", "0 0 0 background\n250 50 83 cat\n51 221 255 dog\n"),
        ("class_dict.csv", "name,r,g,b\nbackground, 0,0,0\ncat,250,50,83\ndog,51,221,255\n"),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_colours_get_their_names(tmp_path, name, text, mode):
    folder = write(tmp_path, {name: text}, ids if mode == "P" else lambda number: COLORS[ids(number)], mode)
    assert folder.labels.names == BACKGROUND_CAT_DOG
    assert folder.labels.colors == folder.labels.values[0] + folder.labels.values[1] + folder.labels.values[2]
    assert [sum(stats.pixels[1] for stats in inspect_data(folder).splits.values())] == [
        sum(int((ids(number) == 1).sum()) for number in range(6))
    ]


def test_greys_in_three_channels_are_numbers(tmp_path):
    folder = write(tmp_path, {"classes.txt": "background\ncat\ndog"}, lambda number: np.dstack([ids(number)] * 3))
    assert folder.labels.names == BACKGROUND_CAT_DOG
    assert folder.labels.values[2] == ((2, 2, 2),)


def test_void_of_labelme_and_nnunet(tmp_path):
    def make(number):
        return np.where(ids(number) == 2, 255, ids(number)).astype(np.uint8)

    folder = write(tmp_path, {"class_names.txt": "__ignore__\n_background_\ncat\n"}, make)
    assert folder.labels.names == ("background", "cat")
    assert folder.labels.class_of(255) == 255
    (tmp_path / "class_names.txt").unlink()
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "cat": 1, "ignore": 255}}))
    again = open_data(tmp_path)
    assert again.labels.names == ("background", "cat")
    assert again.labels.class_of(255) == 255


def test_a_class_that_no_mask_holds_is_one_and_told(tmp_path):
    folder = write(tmp_path, {"classes.txt": "background\ncat\ndog\nVoid\n"})
    assert folder.labels.names == (*BACKGROUND_CAT_DOG, "Void")
    assert "train: no mask contains 'Void'." in told(folder)
    assert "names 'Void' (3), a class like others; if it is void, pass --ignore" in told(folder)
    ignored = open_data(tmp_path, ignore=[3])
    assert ignored.labels.names == BACKGROUND_CAT_DOG
    assert ignored.labels.class_of(3) == 255


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("classes.txt", "background\ncat\n", "the masks hold values that it does not name: 2"),
        ("classes.txt", "cat\ndog\n", "it begins with 'cat', not with a background"),
        ("labelmap.txt", LABELMAP, "it names colours, but the masks hold numbers"),
        (
            "dataset.json",
            json.dumps({"labels": {"background": 0, "all": [1, 2]}}),
            "its labels are regions that overlap",
        ),
        ("dataset.json", "{", "it is not written as files of this name are"),
        ("_classes.csv", "Pixel Value, Class\n0, background\n0, cat\n", "it names a value twice"),
        ("labelmap.txt", "cat\n", "it is not written as files of this name are"),
        ("codes.txt", "", "it names nothing"),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_not_followed(tmp_path, name, text, why):
    folder = write(tmp_path, {name: text})
    assert folder.labels.names == ("class 0", "class 1", "class 2")
    assert f"class names in {name} are not used: {why}" in told(folder)
    assert "class names" not in folder.layout


def test_a_json_without_labels_is_nothing(tmp_path):
    assert "dataset.json" not in told(write(tmp_path, {"dataset.json": json.dumps({"images": []})}))


def test_classes_yaml_wins_and_other_files_are_named(tmp_path):
    names = {"labels.txt": "_background_\ncat\ndog", "codes.txt": "a\nb\nc", "classes.yaml": "classes: [x, y, z]"}
    folder = write(tmp_path, names)
    assert folder.labels.names == ("x", "y", "z")
    assert "class names in labels.txt are not used: classes.yaml gives the classes." in told(folder)
    (tmp_path / "classes.yaml").unlink()
    assert "class names in labels.txt are not used: codes.txt gives the names." in told(open_data(tmp_path))


def test_files_beside_a_csv_are_read_too(tmp_path):
    write(tmp_path, {"classes.txt": "background\ncat\ndog", "codes.txt": ""})
    rows = [f"images/{number}.png,masks/{number}.png" for number in range(6)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,mask", *rows]))
    folder = open_data(tmp_path / "pairs.csv")
    assert folder.labels.names == BACKGROUND_CAT_DOG
    assert "class names in codes.txt are not used: it names nothing." in told(folder)


def test_files_of_the_splits_must_agree(tmp_path):
    for split, last in (("train", "dog"), ("valid", "dog"), ("test", "cow")):
        (tmp_path / split).mkdir()
        for number in range(3):
            name = tmp_path / split / f"{split}{number}"
            Image.fromarray(np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(
                f"{name}.jpg"
            )
            Image.fromarray(ids(number)).save(f"{name}_mask.png")
        (tmp_path / split / "_classes.csv").write_text(f"Pixel Value, Class\n0, background\n1, cat\n2, {last}\n")
    differ = "test/_classes.csv, train/_classes.csv, valid/_classes.csv differ"
    assert f"class names in test/_classes.csv are not used: {differ}." in told(open_data(tmp_path))
    (tmp_path / "test" / "_classes.csv").write_text((tmp_path / "train" / "_classes.csv").read_text())
    assert open_data(tmp_path).labels.names == BACKGROUND_CAT_DOG


def test_questions_are_asked_under_the_names(tmp_path):
    def soft(number):
        mask = np.where(ids(number) > 0, 255, 0).astype(np.uint8)
        rim = np.roll(mask, 1, axis=1) != mask
        return np.where(rim, np.random.default_rng(number).integers(40, 215, mask.shape), mask).astype(np.uint8)

    folder = write(tmp_path, {"_classes.csv": "Pixel Value, Class\n0, background\n255, cell\n"}, soft)
    assert folder.labels.names == ("background", "cell")
    assert "only 0 and 255 fill areas" in told(folder)
