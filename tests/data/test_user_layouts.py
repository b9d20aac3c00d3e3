"""Folders, names and lists as users bring them: followed, or refused with the reason, never replaced in silence."""

import csv
import json
import os
import re
import unicodedata

import numpy as np
import pytest
from PIL import Image

from pixelwise.data.check import inspect_data
from pixelwise.data.groups import find_groups
from pixelwise.data.layouts import open_data
from pixelwise.data.pairs import split_of
from pixelwise.errors import DataError, UsageError

RNG = np.random.default_rng(0)
FIELD = np.zeros((24, 32), np.uint8)
FIELD[2:22, 4:28] = 255


def blob(value=1):
    """A mask with a rectangle somewhere."""
    mask = np.zeros((24, 32), np.uint8)
    top, left = RNG.integers(0, 12, 2)
    mask[top : top + 6, left : left + 8] = value
    return mask


def save(path, pixels=None):
    """An image of the given pixels; by default a noisy photo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (24, 32, 3), dtype=np.uint8) if pixels is None else pixels).save(path)


def save_pairs(root, images, masks, names, suffixes=(".png", ".png")):
    for name in names:
        save(root / images / f"{name}{suffixes[0]}")
        save(root / masks / f"{name}{suffixes[1]}", blob())


def counts(folder):
    return {split: len(folder.split(split)) for split in folder.splits}


def names(folder):
    """(image, mask) file names."""
    return {(pair.image.name, pair.mask.name) for pair in folder.pairs}


def told(folder, severity="warning"):
    return " | ".join(problem.message for problem in inspect_data(folder).problems if problem.severity == severity)


# -- splits --


@pytest.mark.parametrize(
    ("words", "splits"),
    [
        (("train2017", "val2017"), ("train", "val")),
        (("train", "dev", "holdout"), ("train", "val", "test")),
        (("Training", "Validation", "Testing"), ("train", "val", "test")),
        (("train_set", "valid_2020", "test-set"), ("train", "val", "test")),
        (("trainset", "devset"), ("train", "val")),
    ],
)
@pytest.mark.parametrize("where", ["below", "above", "segnet", "together"])
def test_splits_are_known_by_other_names(tmp_path, words, splits, where):
    for number, word in enumerate(words):
        for index in range(3 + number):
            places = {
                "below": (f"images/{word}/{number}{index}.jpg", f"annotations/{word}/{number}{index}.png"),
                "above": (f"{word}/images/{number}{index}.jpg", f"{word}/labels/{number}{index}.png"),
                "segnet": (f"{word}/{number}{index}.jpg", f"{word}annot/{number}{index}.png"),
                "together": (f"{word}/{number}{index}.jpg", f"{word}/{number}{index}_mask.png"),
            }[where]
            save(tmp_path / places[0])
            save(tmp_path / places[1], blob())
    folder = open_data(tmp_path)
    assert counts(folder) == {split: 3 + number for number, split in enumerate(splits)}
    assert all(pair.mask for pair in folder.pairs)
    said = [
        word + ("/" if word.lower() == split else f"/ ({split})") for word, split in zip(words, splits, strict=True)
    ]
    assert where == "segnet" or " ".join(said) in folder.layout


def test_words_that_are_no_split():
    assert [split_of(word) for word in ("trainval", "data", "", "fold1", "train1", "contrast", "set", "2017")] == [
        ""
    ] * 8


def test_masks_without_splits_serve_images_with_splits(tmp_path):
    for split, name in (("train", "a"), ("val", "b")):
        save(tmp_path / f"images/{split}/{name}.jpg")
        save(tmp_path / f"masks/{name}.png", blob())
    assert [(pair.split, pair.mask.name) for pair in open_data(tmp_path).pairs] == [
        ("train", "a.png"),
        ("val", "b.png"),
    ]


@pytest.mark.parametrize("extra", ["images/internal/x.png", "images/x.png"])
def test_what_may_be_a_split_is_not_replaced_by_a_hash(tmp_path, extra):
    save_pairs(tmp_path, "images/train", "masks/train", "abcdefghij")
    save(tmp_path / extra)
    assert "the splits are not complete, and beside them lie" in told(open_data(tmp_path), "fatal")
    save_pairs(tmp_path, "images/val", "masks/val", "klm")
    folder = open_data(tmp_path)
    assert told(folder, "fatal") == ""
    assert "seen and not used: 1 image in images/" in told(folder)
    assert counts(folder) == {"train": 10, "val": 3}


def write_lists(root, folder="", **lists):
    for name, lines in lists.items():
        path = root / folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    "line", ["{}", "{}.jpg", "images/{}.jpg", "/old/disk/images/{}.jpg /old/disk/masks/{}.png", "a\\{}.jpg"]
)
def test_text_lists_of_splits_are_followed(tmp_path, line):
    save_pairs(
        tmp_path, "images", "masks", [f"n{i} x" if "old" not in line else f"n{i}" for i in range(9)], (".jpg", ".png")
    )
    stems = sorted(path.stem for path in (tmp_path / "images").iterdir())
    lines = [line.format(stem, stem) for stem in stems]
    write_lists(tmp_path, train=lines[:5], val=lines[5:7], trainval=lines[:7])
    folder = open_data(tmp_path)
    assert [(pair.split, pair.name) for pair in folder.pairs] == [
        ("train" if index < 5 else "val", stem) for index, stem in enumerate(stems[:7])
    ]
    assert "split by train.txt val.txt" in folder.layout
    assert "2 images are in no list of a split and not used" in told(folder)


def test_voc_as_distributed(tmp_path):
    stems = [f"2007_{index:06d}" for index in range(8)]
    for stem in stems:
        save(tmp_path / f"JPEGImages/{stem}.jpg")
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / f"Annotations/{stem}.xml").write_text("<annotation/>")
    for stem in stems[:5]:
        save(tmp_path / f"SegmentationClass/{stem}.png", blob(2))
        save(tmp_path / f"SegmentationObject/{stem}.png", blob(1))
    write_lists(tmp_path, "ImageSets/Segmentation", train=stems[:3], val=stems[3:5], trainval=stems[:5])
    write_lists(tmp_path, "ImageSets/Main", train=stems[:6], val=stems[6:])
    folder = open_data(tmp_path)
    assert counts(folder) == {"train": 3, "val": 2}
    assert {pair.mask.parent.name for pair in folder.pairs} == {"SegmentationClass"}
    assert told(folder, "fatal") == ""
    assert "5 images in SegmentationObject/" in told(folder)
    assert "8 files in Annotations/" in told(folder)


def test_lists_among_the_images_are_told(tmp_path):
    save_pairs(tmp_path, "images", "masks", "abcdef")
    for name in ("images/train.txt", "images/notes.txt", "masks/folds.json"):
        (tmp_path / name).write_text("a.png")
    assert told(open_data(tmp_path)).endswith("seen and not used: images/train.txt, masks/folds.json.")


def test_lists_that_do_not_fit_are_told(tmp_path):
    save_pairs(tmp_path, "images", "masks", "abcdef")
    write_lists(tmp_path, train=["a", "b", "gone"], val=["c"])
    assert "train.txt: 1 line names no image that is there, of 3: gone." in told(open_data(tmp_path))
    write_lists(tmp_path, train=["a", "c"], val=["c"])
    assert "c.png is in" in told(open_data(tmp_path), "fatal")
    write_lists(tmp_path, train=["x", "y"], val=["z"])
    assert "train.txt: 2 lines name no image" in told(open_data(tmp_path), "fatal")
    write_lists(tmp_path / "splits", train=["a"], val=["b"])
    with pytest.raises(DataError, match="several lists of splits"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"train": ["a", "b.png"], "valid": ["images/c.png"], "labels": {"0": "x"}},
        {"a.png": "train", "b.png": "Train", "c.png": "dev"},
        {"a": "train", "b": "train", "c": "val"},
        [
            {"image": "a.png", "split": "train"},
            {"image": "b.png", "split": "train"},
            {"image": "c.png", "split": "val"},
        ],
        {
            "training": [{"image": "./images/a.png", "label": "./masks/a.png"}, {"image": "./images/b.png"}],
            "val": ["c"],
        },
    ],
)
def test_a_json_of_splits_is_followed(tmp_path, content):
    save_pairs(tmp_path, "images", "masks", "abc")
    (tmp_path / "splits.json").write_text(json.dumps(content))
    assert [(pair.split, pair.name) for pair in open_data(tmp_path).pairs] == [
        ("train", "a"),
        ("train", "b"),
        ("val", "c"),
    ]


@pytest.mark.parametrize("folder", ["", "splits"])
@pytest.mark.parametrize("lines", [["filename,score", "{},0"], [",image", "3,images/{}"], ["{},x"], ["{}"]])
def test_csv_files_named_as_splits_are_followed(tmp_path, folder, lines):
    save_pairs(tmp_path, "images", "masks", "abcdef")
    (tmp_path / folder).mkdir(exist_ok=True)
    for split, stems in (("train", "abcd"), ("val", "ef")):
        text = [*lines[:-1], *(lines[-1].format(f"{stem}.png") for stem in stems)]
        (tmp_path / folder / f"{split}.csv").write_text("\n".join(text))
    found = open_data(tmp_path)
    assert [(pair.split, pair.name) for pair in found.pairs] == [
        ("train" if stem < "e" else "val", stem) for stem in "abcdef"
    ]
    assert "not used" not in told(found)


@pytest.mark.parametrize(
    "files",
    [
        {"lists/train_list.txt": "a\nb\nc\nd", "lists/val_list.txt": "e\nf"},
        {"splits/train.json": '["a", "b", "c", "d"]', "splits/val.json": '["e", "f"]'},
        {"splits/one.json": '{"train": ["a", "b", "c", "d"], "val": ["e", "f"]}'},
        {"ImageSets/one.yaml": "train: [a, b, c, d]\nval: [e, f]"},
        {"lists/all.csv": "image,split\na,train\nb,train\nc,train\nd,train\ne,val\nf,val"},
    ],
)
def test_lists_in_folders_of_their_own_are_followed(tmp_path, files):
    save_pairs(tmp_path, "images", "masks", "abcdef")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = open_data(tmp_path)
    assert {split: "".join(pair.name for pair in found.split(split)) for split in found.splits} == {
        "train": "abcd",
        "val": "ef",
    }
    assert told(found) == told(found, "fatal") == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [("splits.yaml", "folds: 5"), ("x.csv", "key,part\na,train\nb,val"), ("folds.json", '{"a.png": 0, "b.png": 1}')],
)
def test_what_may_list_splits_and_is_not_understood_is_refused(tmp_path, name, text):
    save_pairs(tmp_path, "images", "masks", "abc")
    (tmp_path / name).write_text(text)
    assert f"no split was found, but {name} may say one" in told(open_data(tmp_path), "fatal")


def test_a_list_of_training_images_alone_is_divided_as_a_folder_of_them_is(tmp_path):
    save_pairs(tmp_path, "images", "masks", "abcdefghijkl")
    write_lists(tmp_path, train="abcdefghij")
    folder = open_data(tmp_path)
    assert {pair.name for pair in folder.pairs} == set("abcdefghij")
    assert folder.splits == ("train", "val", "test")


def test_names_without_suffixes_in_a_csv(tmp_path):
    save_pairs(tmp_path, "images", "masks", "ab", (".jpg", ".png"))
    write_csv(tmp_path, rows=[("a", "a", "train"), ("b", "b", "val")])
    assert names(open_data(tmp_path)) == {("a.jpg", "a.png"), ("b.jpg", "b.png")}


@pytest.mark.parametrize(
    ("files", "count"),
    [
        (["{0}.jpg", "{0}.json"], "4 x .json"),
        (["images/{0}.jpg", "labels/{0}.txt"], "4 x .txt in labels/"),
        (["images/train/{0}.jpg", "annotations/instances_train.json"], "1 x .json in annotations/"),
    ],
)
def test_polygons_are_named(tmp_path, files, count):
    for index in range(4):
        save(tmp_path / files[0].format(index))
        path = tmp_path / files[1].format(index)
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    with pytest.raises(
        DataError, match=re.escape(f"Labels in text, such as polygons or boxes ({count}), have to be drawn")
    ):
        open_data(tmp_path)


TEXT_LABELS = {
    "labelme's polygons (train/*.json": ("train/{0}.json", '{"version": "5.0", "shapes": [], "imagePath": "0.jpg"}'),
    "COCO's annotations (annotations/*.json": (
        "annotations/{0}.json",
        '{"images": [], "annotations": [], "categories": []}',
    ),
    "YOLO polygons (labels/*.txt": ("labels/{0}.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.5 0.5 0.6 0.5 0.6 0.7\n"),
    "YOLO boxes (train/labels/*.txt": ("train/labels/{0}.txt", "0 0.1 0.1 0.5 0.25\n"),
    "VOC boxes (Annotations/*.xml": (
        "Annotations/{0}.xml",
        "<annotation><object><bndbox></bndbox></object></annotation>",
    ),
    "CVAT's XML (*.xml": ("{0}.xml", '<annotations><image id="0"><polygon/></image></annotations>'),
    "tasks of Label Studio (*.json": ("{0}.json", '[{"id": 1, "annotations": [{"result": [{"from_name": "tag"}]}]}]'),
}


@pytest.mark.parametrize("said", TEXT_LABELS)
def test_labels_in_text_are_named_by_the_tool_that_writes_them(tmp_path, said):
    name, text = TEXT_LABELS[said]
    images = {"train/labels": "train/images", "train": "train"}.get(name.rpartition("/")[0], "images")
    for index in range(4):
        save(tmp_path / images / f"{index}.jpg")
        path = tmp_path / name.format(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(DataError, match=re.escape(f"There are labels as text: {said}: 4 files)")) as error:
        open_data(tmp_path)
    assert "or list the pairs in a CSV file" in str(error.value)


def test_folders_of_masks_that_hold_no_images_are_named(tmp_path):
    save(tmp_path / "images/0.png")
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="masks/ is empty"):
        open_data(tmp_path)
    np.savez(tmp_path / "masks/0.npz", blob())
    with pytest.raises(DataError, match=r"1 x \.npz.*numpy\.save"):
        open_data(tmp_path)


def test_what_differs_in_a_name_is_said(tmp_path):
    for image, mask in (("Zug", "zug"), ("Bu\u0308hne", "B\u00fchne"), ("image_01", "mask_01")):
        root = tmp_path / image
        save_pairs(root, "images", "masks", ["a", "b"])
        save(root / f"images/{image}.png")
        save(root / f"masks/{mask}.png", blob())
        how = {"Zug": ", which differs in upper and lower case.", "image_01": "."}.get(
            image, ", in another Unicode form."
        )
        assert (
            f"1 mask has another name than its image: masks/{mask}.png was paired with images/{image}.png{how}"
            in told(open_data(root))
        )


def test_folders_that_may_be_splits_are_named(tmp_path):
    for split, stems in (("part1", "abcd"), ("part2", "ef")):
        save_pairs(tmp_path / "a", f"images/{split}", f"masks/{split}", stems)
    assert "the folders part1/ (4), part2/ (2) are not taken as splits" in told(open_data(tmp_path / "a"))


def test_what_lies_outside_of_the_data_folder_does_not_count(tmp_path):
    save_pairs(tmp_path / "test", "imagesTr", "labelsTr", "abcdefgh")
    save_pairs(tmp_path / "other", "imagesTr", "labelsTr", "abc")
    save(tmp_path / "loose.png")
    assert inspect_data(open_data(tmp_path / "test")).problems == ()


def test_folds_are_refused_and_other_json_is_left_alone(tmp_path):
    save_pairs(tmp_path, "images", "masks", "abc")
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": [{"id": 1}], "categories": []}))
    assert open_data(tmp_path).splits == ("train", "val", "test")
    fold = {"train": ["a", "b"], "val": ["c"]}
    for content in ([fold, fold], {"fold0": fold, "fold1": fold}):
        (tmp_path / "splits_final.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match="holds 2 ways to split"):
            open_data(tmp_path)


# -- CSV --


def write_csv(root, header="image,mask,split", *, sep=",", encoding="utf-8", rows=None, start="", end="\n"):
    lines = [header, *(sep.join(row) for row in rows)]
    (root / "pairs.csv").write_bytes((start + end.join(lines) + end).encode(encoding))


def rows_of(root, stem="{:02d}"):
    rows = []
    for index in range(6):
        name = stem.format(index)
        save(root / f"pics/{name}.png")
        save(root / f"truth/{name}.png", blob())
        rows.append(
            (f"pics/{name}.png", f"truth/{name}.png", ("Train", "Train", "Train", "VALID", "dev", "Test")[index])
        )
    return rows


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"sep": ";", "header": "image;mask;split"}, None),
        ({"sep": "\t", "header": "Image\tMask\tSplit", "end": "\r\n"}, None),
        ({"encoding": "utf-16"}, None),
        ({"encoding": "cp1252"}, None),
        ({"header": "filename,label,subset"}, None),
        ({"header": "img_path,mask_path,partition"}, None),
        ({"header": "Image Path,Mask-Name,Set"}, None),
        ({"start": "# made by hand\n", "header": "image, mask ,split"}, None),
        ({}, lambda text: text.replace("/", "\\")),
        ({}, lambda text: "D:\\data\\" + text.replace("/", "\\")),
        ({}, lambda text: "/home/somebody/else/" + text),
    ],
)
def test_csv_files_of_any_system(tmp_path, options, change):
    rows = rows_of(tmp_path, "Straße {:02d}")
    if change:
        rows = [(change(image), change(mask), split) for image, mask, split in rows]
    write_csv(tmp_path, rows=rows, **options)
    folder = open_data(tmp_path)
    assert [(pair.split, pair.name) for pair in folder.pairs] == [
        (split, f"pics/Straße {index:02d}")
        for index, split in enumerate(("train", "train", "train", "val", "val", "test"))
    ]
    assert all(pair.image.exists() and pair.mask.exists() for pair in folder.pairs)
    assert ("cp1252" in told(folder)) == (options.get("encoding") == "cp1252")
    assert ("taken from below the list" in told(folder)) == bool(change and change("a") != "a")


def test_a_class_for_each_image_is_no_list_of_pairs_but_may_be_one_of_splits(tmp_path):
    save_pairs(tmp_path, "images", "masks", "abcd")
    write_csv(tmp_path, "filename,label", rows=[(f"{name}.png", "cat") for name in "abcd"])
    folder = open_data(tmp_path)
    assert folder.layout.startswith("images/ + masks/")
    assert "pairs.csv" in told(folder)
    rows = [(f"{name}.png", "cat", "train" if name < "c" else "val") for name in "abcd"]
    write_csv(tmp_path, "filename,label,split", rows=rows)
    assert counts(open_data(tmp_path)) == {"train": 2, "val": 2}


def test_folds_in_a_csv_are_refused_and_other_columns_named(tmp_path):
    rows = rows_of(tmp_path)
    write_csv(tmp_path, rows=[(*row[:2], str(index % 3)) for index, row in enumerate(rows)])
    with pytest.raises(DataError, match=r"line 2: split '0' is not one of .* numbers folds, write val"):
        open_data(tmp_path)
    write_csv(tmp_path, ",image,mask,split,patient", rows=[("0", *row, "p1") for row in rows])
    assert "columns that are not used: patient." in told(open_data(tmp_path))


@pytest.mark.parametrize("title", ["kfold", "cv_fold", "is_train"])
def test_columns_that_may_say_a_split_are_asked_about(tmp_path, title):
    rows = [(*row[:2], str(index % 2)) for index, row in enumerate(rows_of(tmp_path))]
    write_csv(tmp_path, f"image,mask,{title}", rows=rows)
    assert f"no split was found, but the column '{title}' numbers folds or says" in told(open_data(tmp_path), "fatal")


def test_a_column_of_splits_is_followed_whatever_its_title(tmp_path):
    write_csv(tmp_path, "image,mask,dataset", rows=rows_of(tmp_path))
    assert counts(open_data(tmp_path)) == {"train": 3, "val": 2, "test": 1}


def test_a_column_names_groups_that_stay_together(tmp_path):
    rows = rows_of(tmp_path)
    patients = ["p1", "p1", "p2", "p2", "p3", "p3"]
    write_csv(tmp_path, "image,mask,split,Patient ID", rows=[(*row, p) for row, p in zip(rows, patients, strict=True)])
    assert "'Patient ID' looks like 3 groups of images; 2 are in several splits" in told(open_data(tmp_path))
    assert "divide groups: 'p2' (train and val), 'p3' (val and test)" in told(
        open_data(tmp_path, group_by="patient id"), "fatal"
    )
    write_csv(tmp_path, "image,mask,patient", rows=[(*row[:2], p) for row, p in zip(rows, patients, strict=True)])
    assert "'patient' looks like 3 groups of images: --group-by patient keeps each in one split." in told(
        open_data(tmp_path)
    )
    found = open_data(tmp_path, group_by="patient")
    assert {pair.name[-2:]: pair.group for pair in found.pairs} == {f"{i:02d}": p for i, p in enumerate(patients)}
    assert all(len({pair.split for pair in found.pairs if pair.group == p}) == 1 for p in patients)
    assert counts(found) == {"train": 2, "val": 2, "test": 2} and "not used" not in told(found)
    write_csv(tmp_path, "image,mask,patient", rows=[(*row[:2], "") for row in rows])
    with pytest.raises(DataError, match="line 2: the column 'patient' is empty"):
        open_data(tmp_path, group_by="patient")


def test_a_void_value_is_asked_about_once_for_all_splits(tmp_path):
    for split, stems in (("train", "abc"), ("val", "de")):
        for stem in stems:
            save(tmp_path / split / "images" / f"{stem}.jpg")
            save(tmp_path / split / "masks" / f"{stem}.png", np.where(np.arange(32) < 9, 255, blob()).astype(np.uint8))
    assert told(open_data(tmp_path), "fatal").startswith(
        "train, val: mask a.png (and 4 more masks, 3 in train, 2 in val, pixels added up) holds value 255 (1,080 px), but"
    )


def test_everything_is_train_in_a_csv_means_it(tmp_path):
    write_csv(tmp_path, rows=[(*row[:2], "train") for row in rows_of(tmp_path)])
    folder = open_data(tmp_path)
    assert counts(folder) == {"train": 6}
    assert told(folder, "fatal") == ""
    assert "the last weights are kept, not the best" in told(folder)


def test_the_hash_split_does_not_depend_on_where_the_data_lie(tmp_path):
    found = []
    for root, base in ((tmp_path / "a", ""), (tmp_path / "b/c", "abs"), (tmp_path / "d", "abs")):
        rows = [row[:2] for row in rows_of(root)]
        rows = [tuple(str(root / cell) for cell in row) for row in rows] if base else rows
        listed = tmp_path / "lists" if root.name == "d" else root  # the list lies elsewhere
        listed.mkdir(exist_ok=True)
        write_csv(listed, "image,mask", rows=rows)
        found.append([(pair.name, pair.split) for pair in open_data(listed / "pairs.csv").pairs])
    assert found[0] == found[1] == found[2]
    assert found[0][0][0].startswith("pics/")


# -- names --


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (unicodedata.normalize("NFD", "Málaga_02.jpg"), unicodedata.normalize("NFC", "Málaga_02.png")),
        ("IMG_0001.JPG", "img_0001.png"),
        ("01.jpg", "01.jpg.png"),
        ("image_01.png", "mask_01.png"),
        ("img01.png", "mask01.png"),
        ("img-7.png", "gt-007.png"),
        ("street-3.png", "street-3-labelled.png"),
        ("x_jpg.rf.0a1b.jpg", "x_png.rf.77ff.png"),
        ("x.png", "x_mask_1.png"),
        ("21_training.tif", "21_manual1.gif"),
        ("Image_01L.jpg", "Image_01L_1stHO.png"),
        ("a b.png", "a_b_mask.png"),
        ("frame_12.jpg", "mask_12.png"),
        ("liver_3_0000.png", "liver_3.png"),
    ],
)
def test_spellings_of_one_name(tmp_path, image, mask):
    save_pairs(tmp_path, "images", "masks", ["other9"])
    save(tmp_path / "images" / image)
    save(tmp_path / "masks" / mask, blob())
    assert (image, mask) in names(open_data(tmp_path))


def test_a_spelling_that_fits_two_images_is_not_guessed(tmp_path):
    save_pairs(tmp_path, "images", "masks", ["other9"])
    for name in ("a1.png", "A1.jpg"):
        save(tmp_path / "images" / name)
    save(tmp_path / "masks/mask_a1.png", blob())
    assert "2 images have no mask" in told(open_data(tmp_path), "fatal")
    assert "mask_a1.png" in told(open_data(tmp_path), "fatal")


def test_train_and_test_of_one_number_are_not_confused(tmp_path):
    save_pairs(tmp_path, "images", "masks", ["other9"])
    save(tmp_path / "images/train_01.png")
    save(tmp_path / "masks/test_01.png", blob())
    assert "1 image has no mask: images/train_01.png" in told(open_data(tmp_path), "fatal")


def test_several_masks_of_one_image_are_refused(tmp_path):
    save_pairs(tmp_path, "images", "masks", ["b (1)"])
    save(tmp_path / "images/b (0).png")
    for name in ("b (0)_mask.png", "b (0)_mask_1.png"):
        save(tmp_path / "masks" / name, blob())
    assert "b (0)_mask.png and masks/b (0)_mask_1.png both stand for 'b (0)'" in told(open_data(tmp_path), "fatal")


def test_what_cannot_pair_says_how_to(tmp_path):
    save_pairs(tmp_path, "images", "masks", ["k"])
    save(tmp_path / "images/street_7.png")
    save(tmp_path / "masks/task-7-Car.png", blob())
    save(tmp_path / "masks/streets-8.png", blob())
    message = told(open_data(tmp_path), "fatal")
    assert "The closest of the masks without image is masks/streets-8.png" in message
    assert "CSV file with the columns image,mask,split" in message


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("case_{0}/slice_{1}.tif", "case_{0}/slice_{1}_mask.tif"),
        ("case_{0}{1}/image.png", "case_{0}{1}/mask.png"),
        ("case_{0}{1}/scan.png", "case_{0}{1}/seg.png"),
        ("p{0}{1}/p{0}{1}_flair.png", "p{0}{1}/p{0}{1}_seg.png"),
        ("case_{0}/images/{1}.png", "case_{0}/masks/{1}.png"),
        ("{0}{1}.jpg", "{0}{1}.png"),
        ("{0}{1}.png", "{0}{1}_mask.png"),
    ],
)
def test_images_and_masks_together(tmp_path, image, mask):
    for case in range(3):
        for index in range(2):
            save(tmp_path / image.format(case, index))
            save(tmp_path / mask.format(case, index), blob())
    folder = open_data(tmp_path)
    assert len(folder.pairs) == 6
    assert told(folder, "fatal") == ""
    expected = {(image.format(c, i), mask.format(c, i)) for c in range(3) for i in range(2)}
    found = {tuple(path.relative_to(tmp_path).as_posix() for path in (pair.image, pair.mask)) for pair in folder.pairs}
    assert found == expected


def test_a_layout_further_down_is_not_read_without_its_splits(tmp_path):
    for split in ("train", "val"):
        save_pairs(tmp_path / "set", f"{split}/images", f"{split}/masks", "abc")
    with pytest.raises(DataError, match=r"Perhaps .*set is meant"):
        open_data(tmp_path)
    save_pairs(tmp_path / "more", "val/images", "val/masks", "abc")
    with pytest.raises(DataError, match="2 folders, such as"):
        open_data(tmp_path)


# -- folders of masks --


def test_two_folders_of_labels_are_asked_about(tmp_path):
    for index in range(5):
        save(tmp_path / f"images/{index:02d}_training.tif")
        save(tmp_path / f"1st_manual/{index:02d}_manual1.png", blob(255))
        save(tmp_path / f"mask/{index:02d}_training_mask.png", FIELD)
    with pytest.raises(DataError) as caught:
        open_data(tmp_path)
    text = str(caught.value)
    assert "proposed is --masks 1st_manual" in text
    assert "- 1st_manual/: masks for 5 of 5 images, values 0 (93.8%), 255 (6.2%)" in text
    assert "- mask/: masks for 5 of 5 images, values 255 (62.5%), 0 (37.5%); much the same region" in text
    folder = open_data(tmp_path, masks="1st_manual")
    assert {pair.mask.parent.name for pair in folder.pairs} == {"1st_manual"}
    assert folder.masks == "1st_manual"
    assert "5 images in mask/" in told(folder)
    with pytest.raises(UsageError, match=r"folder beside the images \(there are: 1st_manual, mask\)"):
        open_data(tmp_path, masks="vessels")


def test_masks_beside_labels_are_asked_about_with_splits_above(tmp_path):
    for split in ("train", "val"):
        for index in range(4):
            save(tmp_path / f"{split}/images/{index}.png")
            save(tmp_path / f"{split}/labels/{index}.png", blob())
            save(tmp_path / f"{split}/masks/{index}.png", FIELD)
    with pytest.raises(DataError, match="proposed is --masks labels"):
        open_data(tmp_path)
    assert {pair.mask.parent.name for pair in open_data(tmp_path, masks="labels").pairs} == {"labels"}


def test_a_folder_without_labels_is_no_folder_of_masks(tmp_path):
    for index in range(4):
        save(tmp_path / f"images/{index}.png")
        save(tmp_path / f"annotations/{index}.png", blob())
        save(tmp_path / f"masks_overlay/{index}.png")
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / f"labels/{index}.txt").write_text("0 0.5 0.5 0.1 0.1")
    folder = open_data(tmp_path)
    assert folder.layout.startswith("images/ + annotations/")
    assert "4 files in labels/" in told(folder)
    assert "4 images in masks_overlay/" in told(folder)


def test_the_same_labels_in_two_formats_are_no_question(tmp_path):
    for index in range(4):
        save(tmp_path / f"JPEGImages/{index}.jpg")
        mask = blob(2)
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        np.save(tmp_path / f"SegmentationClass/{index}.npy", mask.astype(np.int32))
        save(tmp_path / f"SegmentationClassPNG/{index}.png", mask)
        save(tmp_path / f"SegmentationClassVisualization/{index}.jpg")
    folder = open_data(tmp_path)
    assert folder.labels.values == ((0,), (2,))
    assert "4 images in SegmentationClassVisualization/" in told(folder)


def test_several_kinds_of_masks_in_one_folder_are_told_apart_by_their_ending(tmp_path):
    for index in range(4):
        save(tmp_path / f"leftImg8bit/a_{index}_leftImg8bit.png")
        for kind, value in (("labelIds", 7), ("labelTrainIds", 1), ("color", 9), ("instanceIds", 5)):
            save(tmp_path / f"gtFine/a_{index}_gtFine_{kind}.png", blob(value))
    message = told(open_data(tmp_path), "fatal")
    assert "Say which with --masks labelIds or --masks labelTrainIds." in message
    folder = open_data(tmp_path, masks="labelTrainIds")
    assert folder.labels.values == ((0,), (1,))
    assert told(folder, "fatal") == ""
    assert "12 images in gtFine/" in told(folder)
    with pytest.raises(UsageError, match="neither a folder beside the images"):
        open_data(tmp_path, masks="Ids2")


def test_a_field_of_view_alone_is_doubted(tmp_path):
    for index in range(4):
        save(tmp_path / f"images/im{index:04d}.png")
        save(tmp_path / f"mask/im{index:04d}.png", FIELD)
        save(tmp_path / f"vessels/by-hand{index + 7}.png", blob())
    assert "mark much the same region in every image" in told(open_data(tmp_path))


# -- links, what is left out --


def test_links_to_folders_are_followed_and_cycles_noticed(tmp_path):
    save_pairs(tmp_path / "disk", "images", "masks", "abc")
    data = tmp_path / "data"
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
        (data / kind / "batch").symlink_to(tmp_path / "disk" / kind)
    (data / "images/again").symlink_to(data / "images")
    (tmp_path / "disk/images/back").symlink_to(data / "images")  # a cycle of two links
    folder = open_data(data)
    assert sorted(pair.name for pair in folder.pairs if pair.mask) == ["batch/a", "batch/b", "batch/c"]
    assert len(folder.pairs) == 3
    assert "leads to a folder that it lies in; not followed" in told(folder)


def test_what_cannot_be_read_is_counted(tmp_path):
    save_pairs(tmp_path, "images", "masks", "abc")
    for name in ("d.heic", "e.HEIC", "f.jp2"):
        (tmp_path / "images" / name).write_bytes(b"x")
    (tmp_path / "images/link").symlink_to(tmp_path / "gone")
    assert "not used: 2 x .heic, 1 x .jp2, 1 x link" in told(open_data(tmp_path))


# -- groups --


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("patient{0}-IM-{1}", 6),
        ("case_{0}/slice_{1}", 6),
        ("TCGA_{0}_{1}", 6),
        ("0016E{0}_{1}", 6),
        ("street_{0}_jpg.rf.a{1}", 6),
        ("2012_00{0}{1}", None),
        ("00{0}{1}", None),
        ("ADE_train_00{0}{1}", None),
        ("cat_{0}{1}", None),
    ],
)
def test_groups_are_seen_in_names(pattern, count):
    found = find_groups([pattern.format(case, index) for case in range(6) for index in range(4)])
    assert (found and len(set(found[2]))) == count


def test_groups_that_the_hash_divides_are_proposed(tmp_path):
    save_pairs(tmp_path, "images", "masks", [f"patient{case}-IM-{index}" for case in range(8) for index in range(3)])
    message = told(open_data(tmp_path))
    assert "look like 8 groups" in message
    expression = message.partition("--group-by '")[2].partition("'")[0]
    folder = open_data(tmp_path, group_by=expression)
    assert "--group-by" not in told(folder)
    assert len({pair.group for pair in folder.pairs}) == 8


def test_groups_that_given_splits_leave_whole_are_no_problem(tmp_path):
    for split, cases in (("train", (0, 1, 2)), ("val", (3, 4))):
        save_pairs(
            tmp_path, f"{split}/images", f"{split}/masks", [f"p{case}_{index}" for case in cases for index in range(3)]
        )
    assert "groups" not in told(open_data(tmp_path))
    save_pairs(tmp_path, "val/images", "val/masks", ["p0_9"])
    assert "1 of them in several splits" in told(open_data(tmp_path))


def test_a_csv_with_the_other_unicode_form(tmp_path):
    save(tmp_path / unicodedata.normalize("NFD", "Kraków.png"))
    save(tmp_path / "k_mask.png", blob())
    with (tmp_path / "list.csv").open("w", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "mask"), (unicodedata.normalize("NFC", "Kraków.png"), "k_mask.png")])
    assert [pair.image.exists() for pair in open_data(tmp_path).pairs] == [True]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_are_refused_and_never_waited_for(tmp_path):
    save_pairs(tmp_path / "data", "images", "masks", "abc")
    for name in ("train.txt", "splits.json", "classes.yaml", "list.csv"):
        os.mkfifo(tmp_path / name)
    os.mkfifo(tmp_path / "data" / "train.txt")
    with pytest.raises(DataError, match=r"train\.txt: cannot be read as text \(it is no regular file\)"):
        open_data(tmp_path / "data")
    for path in (tmp_path / "list.csv", "/dev/zero"):
        with pytest.raises(DataError, match="is neither a folder nor a file"):
            open_data(path)
    for name in ("splits.json", "classes.yaml"):
        (tmp_path / "data" / "train.txt").unlink(missing_ok=True)
        (tmp_path / name).rename(tmp_path / "data" / name)
    with pytest.raises(DataError, match=r"classes\.yaml: cannot be read as YAML \(it is no regular file\)"):
        open_data(tmp_path / "data")


# -- what met each other in one folder --


def test_unlabelled_frames_are_no_channels_of_one_image(tmp_path):
    for split, masks in (("train", "trainannot"), ("val", "valannot")):
        for number in range(4):
            save(tmp_path / f"{split}/frame_{number:04d}.png")
            save(tmp_path / f"{masks}/frame_{number:04d}.png", blob())
    for number in range(6):
        save(tmp_path / f"test/frame_{number:04d}.png")
    folder = open_data(tmp_path)
    assert counts(folder) == {"train": 4, "val": 4, "test": 6} and folder.reading == {}


def test_an_image_without_mask_beside_masks_in_splits_is_fatal(tmp_path):
    for number in range(8):
        save(tmp_path / f"images/{number}.png")
    for number in range(7):
        save(tmp_path / f"masks/{'train' if number < 5 else 'val'}/{number}.png", blob())
    assert "1 image has no mask: images/7.png" in told(open_data(tmp_path), "fatal")


def test_joined_masks_have_one_region_and_one_meaning_of_numbers(tmp_path):
    for number in range(6):
        save(tmp_path / f"images/{number}.png")
        for part in (1, 2):
            mask = Image.fromarray(blob(), "P")
            mask.putpalette([0, 0, 0, *((255, 0, 0) if part == 1 else (0, 255, 0))])
            (tmp_path / "masks").mkdir(exist_ok=True)
            mask.save(tmp_path / f"masks/{number}_mask_{part}.png")
        save(tmp_path / f"fov/{number}.png", np.full((24, 32), 255, np.uint8))
    with pytest.raises(DataError, match="a number has another colour in it than in another mask of its image"):
        open_data(tmp_path, masks="masks/all")
    for path in (tmp_path / "masks").iterdir():
        save(path, blob())
    assert told(open_data(tmp_path, masks="masks/all", region="fov"), "fatal") == ""


def test_lines_of_an_image_with_several_groups_are_refused(tmp_path):
    save(tmp_path / "a.png")
    lines = ["image,mask,patient"]
    for part in (1, 2):
        save(tmp_path / f"a_{part}.png", blob())
        lines.append(f"a.png,a_{part}.png,p{part}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.png name several regions or groups"):
        open_data(tmp_path / "pairs.csv", group_by="patient")


def test_a_column_called_folder_says_no_folds(tmp_path):
    save_pairs(tmp_path, "images", "masks", "abcdef")
    rows = [f"images/{name}.png,masks/{name}.png,scan{name}" for name in "abcdef"]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,mask,folder", *rows]))
    assert told(open_data(tmp_path / "pairs.csv"), "fatal") == ""
