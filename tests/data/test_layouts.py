"""Layouts: fake trees in the real layouts, and splits that never move."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelwise.data.check import inspect_data
from pixelwise.data.groups import check_expression, find_groups, match_groups
from pixelwise.data.image_files import relative
from pixelwise.data.labels import CAMVID_NAMES, LabelSpec
from pixelwise.data.layouts import open_data
from pixelwise.data.matching import FolderPair, match_source
from pixelwise.data.pairs import assign_splits
from pixelwise.errors import DataError, UsageError


def write(path, pixels=None, **options):
    """A file of the given pixels; by default 2 x 2 zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((2, 2), np.uint8) if pixels is None else np.asarray(pixels, np.uint8)).save(
        path, **options
    )


def write_pairs(root, images, masks, names, values=((0, 1), (1, 0))):
    """Images with masks of the same stem."""
    for name in names:
        write(root / images / f"{name}.png")
        write(root / masks / f"{name}.png", values)


def table(folder):
    """(split, name, image, mask) of every pair, with paths below the root."""
    return [
        (pair.split, pair.name, relative(pair.image, folder.root), pair.mask and relative(pair.mask, folder.root))
        for pair in folder.pairs
    ]


def test_splits_above(tmp_path):
    for split in ("train", "val", "test"):
        write_pairs(tmp_path, f"{split}/images", f"{split}/masks", [f"{split}1", f"{split}0"])
    folder = open_data(tmp_path)
    assert folder.splits == ("train", "val", "test")
    assert table(folder)[0] == ("train", "train0", "train/images/train0.png", "train/masks/train0.png")
    assert [pair.name for pair in folder.pairs] == ["train0", "train1", "val0", "val1", "test0", "test1"]
    assert folder.labels.names == ("background", "foreground")
    assert folder.problems == ()
    assert "images/ + masks/" in folder.layout


def test_splits_below_with_other_words_for_everything(tmp_path):
    for split in ("Training", "valid", "testing"):
        write_pairs(tmp_path, f"imgs/{split}", f"Annotations/{split.lower()}", ["a"])
    folder = open_data(tmp_path)
    assert [(pair.split, pair.name) for pair in folder.pairs] == [
        ("train", "train/a"),
        ("val", "val/a"),
        ("test", "test/a"),
    ]
    assert {pair.group for pair in folder.pairs} == {"a"}
    assert all(pair.mask for pair in folder.pairs)


def test_segnets_camvid(tmp_path):
    for split in ("train", "val", "test"):
        write_pairs(tmp_path, split, f"{split}annot", [f"0001TP_{split}"], np.arange(12).reshape(3, 4))
    folder = open_data(tmp_path)
    assert folder.layout == "train/ trainannot/ val/ valannot/ test/ testannot/"
    assert folder.labels.names == CAMVID_NAMES
    assert folder.labels.ignore_values == (11,)


def test_flat_with_folders_inside_and_others_beside(tmp_path):
    write_pairs(tmp_path, "images/p1", "masks/p1", ["a", "b"])
    write_pairs(tmp_path, "images/p2", "masks/p2", ["a"])
    write(tmp_path / "instances/p2/a.png", [[300 % 256]])
    write(tmp_path / "images/._a.png")
    (tmp_path / "images/notes.txt").write_text("x")
    folder = open_data(tmp_path)
    assert sorted(pair.name for pair in folder.pairs) == ["p1/a", "p1/b", "p2/a"]
    assert [problem.message for problem in folder.problems] == [
        "seen and not used: 1 image in instances/.",
        "the folders p1/ (2), p2/ (1) are not taken as splits; each is divided by hash.",
    ]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.jpg", "a_mask.png"),
        ("a.jpg", "a-label.png"),
        ("a.jpg", "a_gt.png"),
        ("a_sat.jpg", "a_mask.png"),
        ("b_leftImg8bit.jpg", "b_gtFine_labelIds.png"),
        ("x_mask.jpg", "x_mask.png"),
        ("a.b.jpg", "a.b.png"),
        ("a.jpg", "a.png"),
    ],
)
def test_names_match_by_stem_and_usual_suffixes(tmp_path, image, mask):
    write(tmp_path / "images" / image)
    write(tmp_path / "masks" / mask, [[0, 1]])
    write(tmp_path / "masks" / "b_gtFine_color.png", [[0, 1]])
    folder = open_data(tmp_path)
    assert folder.pairs[0].mask.name == mask
    assert [problem.severity for problem in folder.problems] in ([], ["warning"])


def test_an_equal_stem_wins_over_a_suffix(tmp_path):
    write_pairs(tmp_path, "images", "masks", ["a", "a_mask"])
    folder = open_data(tmp_path)
    assert {pair.name: pair.mask.stem for pair in folder.pairs} == {"a": "a", "a_mask": "a_mask"}


def test_what_stays_alone_is_told(tmp_path):
    write_pairs(tmp_path, "train/images", "train/masks", ["a", "b"])
    write_pairs(tmp_path, "val/images", "val/masks", ["c"])
    for number in range(7):
        write(tmp_path / f"train/images/lonely{number}.png")
    write(tmp_path / "train/masks/orphan.png")
    write(tmp_path / "train/images/a.jpg")
    write(tmp_path / "test/images/t.png")
    problems = {problem.message: problem.severity for problem in open_data(tmp_path).problems}
    assert problems == {
        "train: train/images/a.jpg and train/images/a.png both stand for 'a'. Keep one of them.": "fatal",
        "train: 7 images have no mask: train/images/lonely0.png, train/images/lonely1.png, train/images/lonely2.png, "
        "train/images/lonely3.png, train/images/lonely4.png and 2 more. The closest of the masks without image is "
        "train/masks/orphan.png. Rename them to match, or list all pairs in a CSV file with the columns "
        "image,mask,split.": "fatal",
        "train: 1 mask has no image: train/masks/orphan.png. They are not used.": "warning",
        "test: none of the 1 images has a mask, so it cannot be evaluated.": "warning",
    }


def test_a_csv_of_pairs(tmp_path):
    write_pairs(tmp_path, "x", "y", ["a", "b", "c"])
    lines = [
        "\ufeffImage, Mask ,split",
        "x/a.png,y/a.png,train",
        "",
        "x/b.png,y/b.png,validation",
        "x/c.png,y/c.png,test",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    expected = [
        ("train", "x/a", "x/a.png", "y/a.png"),
        ("val", "x/b", "x/b.png", "y/b.png"),
        ("test", "x/c", "x/c.png", "y/c.png"),
    ]
    assert table(open_data(tmp_path)) == expected
    assert [row[:2] for row in table(open_data(tmp_path / "pairs.csv"))] == [row[:2] for row in expected]


def test_one_csv_for_each_split(tmp_path):
    write_pairs(tmp_path, "x", "y", ["a", "b"])
    for split, name in (("train", "a"), ("test", "b")):
        (tmp_path / f"{split}.csv").write_text(f"image,mask\nx/{name}.png,y/{name}.png\n")
    assert [pair.split for pair in open_data(tmp_path).pairs] == ["train", "test"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "must name the columns"),
        ("a,b\n1,2", "must name the columns"),
        ("image,mask\n", "lists no pairs"),
        ("image,mask\na.png", "line 2: 1 cells"),
        ("image,mask\n,b.png", "line 2: no image"),
        ("image,mask,split\na,b,train\nc,d,later", "line 3: split 'later'"),
        ("image,mask,split\na,b,train\nc,d,", "some lines give a split"),
        ('image,mask\n"a', "CSV"),
        ("image,mask\na\0b,c", "a"),
    ],
)
def test_a_bad_csv_names_the_line(tmp_path, text, part):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(part)):
        open_data(path)


def test_csv_lines_that_repeat_or_lack_something(tmp_path):
    write_pairs(tmp_path, "x", "y", ["a"])
    (tmp_path / "pairs.csv").write_text("image,mask\nx/a.png,y/a.png\nx/a.png,y/a.png\nx/b.png,\n")
    messages = [problem.message for problem in open_data(tmp_path).problems]
    assert "x/a.png stands in two lines" in messages[0]
    assert "1 image has no mask, the first is x/b.png" in messages[1]


def test_the_split_by_hash_is_stable_and_keeps_its_shares():
    names = [f"image {number}" for number in range(2000)]
    splits = assign_splits(names, (0.8, 0.1, 0.1))
    assert splits == assign_splits(reversed(names), (0.8, 0.1, 0.1))
    more = assign_splits([*names, *(f"new {number}" for number in range(500))], (0.8, 0.1, 0.1))
    assert {name: more[name] for name in names} == splits
    shares = [list(splits.values()).count(name) / len(names) for name in ("train", "val", "test")]
    np.testing.assert_allclose(shares, (0.8, 0.1, 0.1), atol=0.02)


@pytest.mark.parametrize("count", range(1, 12))
def test_small_folders_still_have_every_split(count):
    for salt in range(20):
        splits = assign_splits([f"{salt} {number}" for number in range(count)], (0.8, 0.1, 0.1))
        wanted = {"train", "val", "test"} if count > 2 else {"train", "val"} if count == 2 else {"train"}
        assert set(splits.values()) == wanted


@pytest.mark.parametrize("fractions", [(1, 1, 1), (0, 0.5, 0.5), (0.5, 0.5), (1.2, -0.1, -0.1)])
def test_impossible_fractions(fractions):
    with pytest.raises(UsageError, match="add up to 1"):
        assign_splits("ab", fractions)


def test_groups_stay_together(tmp_path):
    names = [f"patient{patient}-IM-{number}" for patient in range(9) for number in range(3)]
    write_pairs(tmp_path, "images", "masks", names)
    folder = open_data(tmp_path, group_by="(.*)-IM-")
    assert {pair.group for pair in folder.pairs} == {f"patient{patient}" for patient in range(9)}
    for patient in range(9):
        assert len({pair.split for pair in folder.pairs if pair.group == f"patient{patient}"}) == 1
    assert folder.group_by is not None
    assert {pair.group for pair in open_data(tmp_path, group_by=r"patient\d").pairs} == {
        pair.group for pair in folder.pairs
    }


def test_a_given_test_split_never_moves_and_val_is_carved_by_group(tmp_path):
    train = [f"p{patient}-IM-{number}" for patient in range(20) for number in range(2)]
    write_pairs(tmp_path, "train/images", "train/masks", train)
    write_pairs(tmp_path, "test/images", "test/masks", ["q1-IM-0", "q2-IM-0"])
    folder = open_data(tmp_path, group_by="(.*)-IM-")
    assert [pair.name for pair in folder.split("test")] == ["q1-IM-0", "q2-IM-0"]
    assert folder.layout.endswith(", 15% of train is val by hash")
    assert 2 <= len(folder.split("val")) <= 12
    assert not {pair.group for pair in folder.split("val")} & {pair.group for pair in folder.split("train")}


def test_a_training_folder_alone_is_split_and_a_test_folder_alone_is_not(tmp_path):
    write_pairs(tmp_path / "one", "train/images", "train/masks", "abcdefgh")
    assert open_data(tmp_path / "one").splits == ("train", "val", "test")
    write_pairs(tmp_path / "two", "test/images", "test/masks", "abcdefgh")
    assert open_data(tmp_path / "two").splits == ("test",)


def test_group_by_must_match_and_be_a_regular_expression(tmp_path):
    write_pairs(tmp_path, "images", "masks", ["a1", "b1"])
    with pytest.raises(UsageError, match="does not match 1 of 2 names, for example 'b1'"):
        open_data(tmp_path, group_by="a.")
    with pytest.raises(UsageError, match="not a regular expression"):
        open_data(tmp_path, group_by="(")


def test_classes_come_from_the_file_the_argument_or_the_masks(tmp_path):
    write_pairs(tmp_path, "images", "masks", ["a"], [[0, 4], [255, 0]])
    assert open_data(tmp_path, ignore=(255,)).labels.values == ((0,), (4,))
    (tmp_path / "classes.yaml").write_text("classes: [nothing, {name: yes it is, values: [4]}]\nignore_index: 9")
    assert open_data(tmp_path).labels.names == ("nothing", "yes it is")
    assert open_data(tmp_path, ignore=(255,)).labels.ignore_values == (9, 255)
    (tmp_path / "other.yaml").write_text("classes: [x, {name: y, values: 4}]")
    assert open_data(tmp_path, classes=tmp_path / "other.yaml").labels.names == ("x", "y")
    known = LabelSpec(names=("k", "l"), colors=((0, 0, 0), (1, 1, 1)), values=((0,), (4,)))
    assert open_data(tmp_path, labels=known).labels == known


def test_palette_masks_give_the_colours(tmp_path):
    for name in "ab":
        write(tmp_path / f"images/{name}.png")
        mask = Image.fromarray(np.array([[0, 1], [2, 2]], np.uint8))
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / f"masks/{name}.png")
    assert open_data(tmp_path).labels.colors == ((0, 0, 0), (128, 0, 0), (0, 128, 0))


def test_jpeg_masks_are_refused(tmp_path):
    write(tmp_path / "images/a.png")
    write(tmp_path / "masks/a.jpg", np.kron(np.eye(4), np.ones((5, 5))) * 5, quality=60)
    with pytest.raises(DataError, match="JPEG, which blurs values"):
        open_data(tmp_path)


def test_folders_that_are_not_understood(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_data(tmp_path / "absent")
    with pytest.raises(DataError, match="holds nothing"):
        open_data(tmp_path)
    write_pairs(tmp_path, "deep/images", "deep/masks", ["a"])
    with pytest.raises(DataError, match=r"holds deep/.*Perhaps .*deep is meant"):
        open_data(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="no folder of masks beside it"):
        open_data(tmp_path)
    (tmp_path / "masks").mkdir()
    (tmp_path / "images/a.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"without images \(1 x \.txt\)"):
        open_data(tmp_path)
    write(tmp_path / "images/a.png")
    write(tmp_path / "masks/b.png")
    with pytest.raises(DataError, match=r"not one image has a mask.*images/a\.png"):
        open_data(tmp_path)


def test_masks_that_cannot_be_read_at_all(tmp_path):
    write(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its masks can be read.*a\.png: the file is empty"):
        open_data(tmp_path)


def test_names_that_are_no_text_can_be_printed(tmp_path):
    write_pairs(tmp_path, "images", "masks", ["a", "b", "c"])
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/images/\xff.png")).write_bytes(b"")
    folder = open_data(tmp_path)
    problems = [*folder.problems, *inspect_data(folder).problems]
    assert any("\\udcff.png" in problem.message for problem in problems)
    json.dumps([problem.message for problem in problems], ensure_ascii=False).encode()


# -- volumes, folders that are one image --


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def found(folder, masks):
    pairs, problems = match_source(FolderPair(split="", images=folder, masks=masks), folder.parent)
    assert not problems, problems
    return {pair.name: (pair.image.name, pair.mask.name) for pair in pairs}


def test_double_suffixes_and_zarr_folders_are_one_name(tmp_path):
    touch(
        tmp_path, "images/a.nii.gz", "images/b.ome.tif", "images/c.ome.zarr/0/zarr.json", "images/c.ome.zarr/zarr.json"
    )
    touch(tmp_path, "masks/a_seg.nii", "masks/b.zarr/.zarray", "masks/c.npy")
    assert found(tmp_path / "images", tmp_path / "masks") == {
        "a": ("a.nii.gz", "a_seg.nii"),
        "b": ("b.ome.tif", "b.zarr"),
        "c": ("c.ome.zarr", "c.npy"),
    }


def test_a_folder_of_dicom_files_is_one_image_unless_its_files_have_masks(tmp_path):
    touch(tmp_path, *(f"images/{case}/{index}.dcm" for case in "ab" for index in range(3)))
    touch(tmp_path, "masks/a.nii.gz", "masks/b/seg.dcm")
    assert found(tmp_path / "images", tmp_path / "masks") == {"a": ("a", "a.nii.gz"), "b": ("b", "seg.dcm")}
    touch(tmp_path, *(f"slices/{case}/{index}.png" for case in "ab" for index in range(3)))
    assert found(tmp_path / "images", tmp_path / "slices") == {
        f"{case}/{index}": (f"{index}.dcm", f"{index}.png") for case in "ab" for index in range(3)
    }


def test_the_folder_of_images_may_be_one_series(tmp_path):
    touch(tmp_path, "images/1.dcm", "images/2.dcm", "masks/liver.nii.gz")
    assert found(tmp_path / "images", tmp_path / "masks") == {"images": ("images", "liver.nii.gz")}


def test_several_segmentations_are_no_series(tmp_path):
    touch(tmp_path, *(f"images/{case}/{index}.dcm" for case in "ab" for index in range(3)))
    touch(tmp_path, "masks/a.dcm", "masks/b_seg.dcm")
    assert found(tmp_path / "images", tmp_path / "masks") == {"a": ("a", "a.dcm"), "b": ("b", "b_seg.dcm")}


def test_an_expression_that_never_ends_is_given_up(monkeypatch):
    names = [f"patient{number}_{slice}" for number in range(3) for slice in range(2)]
    assert match_groups(r"patient\d", names) == [name[:8] for name in names]
    assert match_groups("(é)|x", ["é", "x", "\udcff"]) == ["é", None, None]
    monkeypatch.setattr("pixelwise.data.groups._MATCHING_S", 0.5)
    with pytest.raises(UsageError, match=r"--group-by '\(a\+\)\+\$' takes more than 0\.5 s for 1 names.*repetitions"):
        match_groups("(a+)+$", ["a" * 60 + "b"])
    with pytest.raises(UsageError, match="has 2,000 characters; at most 1,000"):
        check_expression("a" * 2000)
    assert find_groups(["1" * 3000] * 4) is None  # which took minutes
