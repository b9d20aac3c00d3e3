"""Labels: the one translation between the values of mask files and class ids."""

import json

import numpy as np
import pytest
from PIL import Image

from pixelwise.data.classes import load_labels, propose_labels, save_labels
from pixelwise.data.labels import (
    CAMVID_COLORS,
    CAMVID_NAMES,
    IGNORE_INDEX,
    MAX_CLASSES,
    LabelSpec,
    distinct_colors,
    value_counts,
)
from pixelwise.errors import DataError, UsageError

ELEVEN = LabelSpec(names=CAMVID_NAMES, colors=CAMVID_COLORS, values=tuple((i,) for i in range(11)))
MERGED = LabelSpec(
    names=("road", "car"), colors=((1, 2, 3), (4, 5, 6)), values=((0, 700), (-3,)), ignore_values=(9, 70000)
)
RGB = LabelSpec(
    names=("a", "b"),
    colors=((0, 0, 0), (9, 9, 9)),
    values=(((255, 0, 0), (0, 0, 1)), ((0, 255, 0),)),
    ignore_values=((0, 0, 0),),
    kind="rgb",
)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_encode_merges_wide_and_negative_values(dtype):
    raw = np.array([[0, 700], [-3, 9]], dtype=dtype)
    assert MERGED.encode(raw).tolist() == [[0, 0], [1, 255]]


def test_encode_equals_the_definition_on_random_masks():
    values = np.random.default_rng(0).integers(0, 11, (40, 50)).astype(np.uint8)
    shuffled = LabelSpec(names=CAMVID_NAMES, colors=CAMVID_COLORS, values=tuple(((7 * i) % 11,) for i in range(11)))
    expected = np.array([[shuffled.class_of(int(value)) for value in row] for row in values])
    for dtype in (np.uint8, np.uint16, np.int64):
        labels = shuffled.encode(values.astype(dtype))
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected)


def test_encode_reads_colours():
    raw = np.array([[[255, 0, 0], [0, 0, 1], [0, 255, 0], [0, 0, 0]]], dtype=np.uint8)
    assert RGB.encode(raw).tolist() == [[0, 0, 1, 255]]


def test_an_unknown_value_is_told_with_its_count_and_what_to_do():
    raw = np.zeros((40, 50), dtype=np.uint8)
    raw.flat[:1204] = 255
    with pytest.raises(DataError) as error:
        ELEVEN.encode(raw)
    assert str(error.value) == (
        "holds value 255 (1,204 px), but there are 11 classes (0..10). Pass --ignore 255, or map it in classes.yaml."
    )


def test_unknown_colours_and_wide_values_are_told():
    with pytest.raises(DataError, match=r"holds value \(1, 2, 3\) \(2 px\).*Map it in classes.yaml"):
        RGB.encode(np.full((1, 2, 3), (1, 2, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"holds values 5 \(1 px\), 254 \(1 px\)"):
        MERGED.encode(np.array([[254, 5, 0]], dtype=np.int32))


def test_a_mask_of_the_other_kind_is_refused():
    with pytest.raises(DataError, match="masks: rgb"):
        ELEVEN.encode(np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="masks: index"):
        RGB.encode(np.zeros((2, 2), dtype=np.uint8))


def test_value_counts():
    raw = np.array([[3, 3, 200]], dtype=np.uint8)
    assert value_counts(raw) == value_counts(raw.astype(np.int32)) == {3: 2, 200: 1}
    assert value_counts(np.array([[[1, 2, 3], [1, 2, 3]]], dtype=np.uint8)) == {(1, 2, 3): 2}


def test_colours_survive_a_palette_file(tmp_path):
    labels = np.array([[0, 10, IGNORE_INDEX]], dtype=np.uint8)
    image = Image.fromarray(labels)
    image.putpalette(ELEVEN.palette_bytes())
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        np.testing.assert_array_equal(np.asarray(opened.convert("RGB")), ELEVEN.colorize(labels))
    assert ELEVEN.colorize(labels)[0].tolist() == [[128, 128, 128], [0, 128, 192], [0, 0, 0]]


@pytest.mark.parametrize("labels", [ELEVEN, MERGED, RGB])
def test_json_and_yaml_give_back_an_equal_object(labels, tmp_path):
    assert LabelSpec.from_dict(json.loads(json.dumps(labels.to_dict()))) == labels
    save_labels(tmp_path / "classes.yaml", labels)
    assert load_labels(tmp_path / "classes.yaml") == labels


@pytest.mark.parametrize(
    "change",
    [
        {"names": "ab"},
        {"names": ["a", "a"]},
        {"names": ["a", 3]},
        {"names": [["a"], "b"]},
        {"names": []},
        {"names": ["a"]},
        {"names": ["a", "b\n"]},
        {"colors": [[0, 0, 0], [0, 0, 256]]},
        {"colors": [[0, 0, 0], [0, 0, True]]},
        {"colors": [[0, 0, 0], "red"]},
        {"colors": None},
        {"values": [[0], []]},
        {"values": [[0], [0]]},
        {"values": [[0], ["1"]]},
        {"values": [[0], [1.0]]},
        {"values": [[0], [[1, 2, 3]]]},
        {"values": [[0], [{"a": 1}]]},
        {"values": [[0], [[[1]]]]},
        {"values": [0, 1]},
        {"values": [[0], [10**30]]},
        {"ignore_values": [0]},
        {"ignore_values": 255},
        {"kind": "other"},
        {"kind": ["rgb"]},
        {"extra": 1},
    ],
)
def test_hostile_content_is_a_data_error(change):
    good = LabelSpec(names=("a", "b"), colors=((0, 0, 0), (1, 1, 1)), values=((0,), (1,))).to_dict()
    with pytest.raises(DataError):
        LabelSpec.from_dict(good | change)


@pytest.mark.parametrize("content", [None, [], "x", 3, {}, {"names": []}])
def test_content_of_another_type_is_a_data_error(content):
    with pytest.raises(DataError, match="expected the keys"):
        LabelSpec.from_dict(content)


def test_classes_yaml_in_full(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(
        "classes:\n"
        "  - sky\n"
        "  - {name: road, color: '#804080'}\n"
        "  - {name: vehicle, color: [64, 0, 128], values: [8, 9]}\n"
        "ignore_index: [11, 255]\n"
    )
    labels = load_labels(path)
    assert labels.names == ("sky", "road", "vehicle")
    assert labels.colors[1:] == ((128, 64, 128), (64, 0, 128))
    assert labels.values == ((0,), (1,), (8, 9))
    assert labels.ignore_values == (11, 255)


def test_classes_yaml_for_colours(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(
        "masks: rgb\n"
        "classes:\n"
        "  - {name: road, color: [128, 64, 128]}\n"
        "  - {name: vehicle, color: [1, 1, 1], values: [[64, 0, 128], '#400040']}\n"
        "  - {name: sky, color: [2, 2, 2], values: [3, 3, 3]}\n"
        "ignore_index: [0, 0, 0]\n"
    )
    labels = load_labels(path)
    assert labels.kind == "rgb"
    assert labels.values == (((128, 64, 128),), ((64, 0, 128), (64, 0, 64)), ((3, 3, 3),))
    assert labels.ignore_values == ((0, 0, 0),)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("classes: [a, b]\nignore: 3", "ignore"),
        ("classes: [{name: a, colour: [1, 2, 3]}]", "colour"),
        ("classes: [{name: a, color: red}, b]", "not a colour"),
        ("classes: [{name: a, values: {x: 1}}]", "neither a mask value nor a list"),
        ("classes: [a, a]", "stands twice"),
        ("classes: [a, b]\nignore_index: 1", "means both"),
        ("masks: rgb\nclasses: [a, b]", "needs a color"),
        ("classes: []", "at least 1"),
        ("classes: [yes, no]", "quote words like yes, no"),
        ("[1, 2", "YAML"),
        ("!!python/object/apply:os.system ['true']", "YAML"),
        ("", "classes.yaml"),
        ("a: &a [*a]", "classes.yaml"),
        ("[" * 3000, "YAML"),
    ],
)
def test_a_bad_classes_yaml_names_itself_and_the_place(text, part, tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"classes\.yaml") as error:
        load_labels(path)
    assert part in str(error.value)


def test_a_missing_or_binary_classes_yaml_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"absent\.yaml"):
        load_labels(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"binary\.yaml"):
        load_labels(tmp_path / "binary.yaml")


@pytest.mark.parametrize("values", [{0: 5, 1: 5}, {0: 5, 255: 5}])
def test_two_values_are_background_and_foreground(values):
    labels = propose_labels(values)
    assert labels.names == ("background", "foreground")
    assert labels.values == tuple((value,) for value in values)


def test_camvid_is_known_by_its_layout_and_its_void():
    values = dict.fromkeys(range(12), 1)
    labels = propose_labels(values, camvid=True)
    assert (labels.names, labels.colors, labels.ignore_values) == (CAMVID_NAMES, CAMVID_COLORS, (11,))
    assert propose_labels(values).num_classes == 12
    assert propose_labels({0: 1, 1: 1}, camvid=True).names == ("background", "foreground")
    assert propose_labels(values, camvid=True, ignore=(11,)) == labels


def test_a_lone_255_beside_indices_is_left_for_the_user_to_decide():
    labels = propose_labels(dict.fromkeys([*range(11), 255], 1))
    assert labels.num_classes == 11
    assert labels.class_of(255) is None
    assert propose_labels(dict.fromkeys([*range(11), 255], 1), ignore=(255,)).class_of(255) == IGNORE_INDEX
    assert propose_labels({0: 1, 128: 1, 255: 1}).num_classes == 3


def test_palette_colours_are_kept():
    palette = ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert propose_labels({0: 1, 2: 1}, palette=palette).colors == ((0, 0, 0), (0, 128, 0))


def test_rgb_masks_propose_a_class_for_each_colour():
    labels = propose_labels({(0, 0, 0): 1, (128, 64, 128): 1})
    assert labels.kind == "rgb"
    assert labels.names == ("#000000", "#804080")
    with pytest.raises(UsageError, match="RGB"):
        propose_labels({(0, 0, 0): 1, (128, 64, 128): 1}, ignore=(0,))


def test_hundreds_of_values_are_no_classes():
    with pytest.raises(DataError, match="instances"):
        propose_labels(dict.fromkeys(range(MAX_CLASSES + 1), 1))
    assert propose_labels(dict.fromkeys(range(MAX_CLASSES), 1)).num_classes == MAX_CLASSES
    with pytest.raises(DataError):
        propose_labels({})


def test_ignoring_a_class_contradicts():
    assert ELEVEN.with_ignored([255]).class_of(255) == IGNORE_INDEX
    with pytest.raises(UsageError, match="'road'"):
        ELEVEN.with_ignored([3])


def test_distinct_colors_differ_and_leave_black_to_void():
    colors = distinct_colors(MAX_CLASSES)
    assert (0, 0, 0) not in colors
    assert len(set(colors[:60])) == 60
