"""The confusion matrix counts exactly, and its scores are scikit-learn's."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pixelwise.errors import DataError, UsageError
from pixelwise.metrics import ConfusionMatrix, Scores
from pixelwise.metrics import confusion as module

VOID = 255


def _pair(
    seed: int, num_classes: int, shape: tuple[int, ...], void_share: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """A random (prediction, truth), right in about half of the pixels, with some classes drawn rarely or never."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(num_classes, 0.3))
    truth = rng.choice(num_classes, size=shape, p=weights).astype(np.uint8)
    guess = rng.integers(0, num_classes, size=shape).astype(np.uint8)
    prediction = np.where(rng.random(shape) < 0.5, truth, guess).astype(np.uint8)
    truth[rng.random(shape) < void_share] = VOID
    return prediction, truth


def _count(prediction, truth, num_classes: int, ignore_index: int = VOID) -> ConfusionMatrix:
    confusion = ConfusionMatrix(num_classes, ignore_index)
    confusion.update(prediction, truth)
    return confusion


CASES = [
    (seed, num_classes, shape)
    for seed, (num_classes, shape) in enumerate(
        itertools.product((1, 2, 3, 11, 40, 150), ((7,), (5, 9), (64, 48), (3, 17, 31), (2, 1, 1)))
    )
]


@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")  # it warns about undefined scores; which are is tested below
@pytest.mark.parametrize("seed, num_classes, shape", CASES)
def test_counts_and_scores_are_those_of_scikit_learn(seed, num_classes, shape):
    prediction, truth = _pair(seed, num_classes, shape)
    truth.flat[0] = prediction.flat[0]  # at least one labelled pixel
    confusion = _count(prediction, truth, num_classes)
    scores = confusion.scores()

    pixels = truth[truth != VOID], prediction[truth != VOID]
    every = list(range(num_classes))
    present = sorted(set(np.concatenate(pixels).tolist()))
    assert np.array_equal(confusion.matrix.numpy(), sk.confusion_matrix(*pixels, labels=every))
    assert scores.pixels == pixels[0].size
    assert scores.absent == tuple(sorted(set(every) - set(present)))

    per_class = {
        "iou": sk.jaccard_score(*pixels, labels=present, average=None, zero_division=0),
        "dice": sk.f1_score(*pixels, labels=present, average=None, zero_division=0),
        "precision": sk.precision_score(*pixels, labels=present, average=None, zero_division=np.nan),
        "recall": sk.recall_score(*pixels, labels=present, average=None, zero_division=np.nan),
    }
    means = {
        "miou": sk.jaccard_score(*pixels, labels=present, average="macro", zero_division=0),
        "mean_dice": sk.f1_score(*pixels, labels=present, average="macro", zero_division=0),
        "fwiou": sk.jaccard_score(*pixels, labels=every, average="weighted", zero_division=0),
        "global_accuracy": sk.accuracy_score(*pixels),
        "class_accuracy": sk.balanced_accuracy_score(*pixels),
    }
    for name, values in per_class.items():  # the same float64 division of the same integers: equal to the last bit
        assert np.array_equal(np.array(getattr(scores, name))[present], values, equal_nan=True), name
    for name, value in means.items():  # and the same order of summation
        assert getattr(scores, name) == value, name


def test_a_class_without_truth_costs_iou_but_not_recall():
    scores = _count([0, 0, 1, 2], [0, 0, 0, 0], 3).scores()
    assert scores.iou == (0.5, 0.0, 0.0)
    assert scores.dice == (2 / 3, 0.0, 0.0)
    assert scores.precision == (1.0, 0.0, 0.0)
    assert scores.recall[0] == 0.5 and math.isnan(scores.recall[1]) and math.isnan(scores.recall[2])
    assert scores.miou == pytest.approx(0.5 / 3)
    assert scores.class_accuracy == 0.5
    assert scores.absent == ()


def test_a_class_never_predicted_has_no_precision():
    scores = _count([0, 0], [0, 1], 2).scores()
    assert scores.iou == (0.5, 0.0) and scores.recall == (1.0, 0.0)
    assert scores.precision[0] == 0.5 and math.isnan(scores.precision[1])
    assert scores.miou == 0.25 and scores.class_accuracy == 0.5


def test_an_absent_class_is_listed_and_left_out_of_the_means():
    with_absent = _count([0, 1, 1, 3], [0, 1, 3, 3], 5).scores()
    without = _count([0, 1, 1, 2], [0, 1, 2, 2], 3).scores()
    assert with_absent.absent == (2, 4)
    assert all(math.isnan(with_absent.iou[k]) and math.isnan(with_absent.dice[k]) for k in (2, 4))
    for name in ("miou", "mean_dice", "fwiou", "global_accuracy", "class_accuracy"):
        assert getattr(with_absent, name) == getattr(without, name)


def test_without_pixels_every_score_is_undefined_and_nothing_warns():
    for confusion in (
        ConfusionMatrix(3),
        _count([0, 1], [VOID, VOID], 3),
        _count(np.zeros((0, 4), int), np.zeros((0, 4), int), 3),
    ):
        scores = confusion.scores()
        assert scores.pixels == 0 and scores.absent == (0, 1, 2)
        assert all(math.isnan(value) for value in (*scores.iou, scores.miou, scores.fwiou, scores.global_accuracy))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 400), st.integers(0, 400))
def test_parts_in_any_order_add_up_to_the_whole(seed, num_classes, size, cut):
    prediction, truth = _pair(seed, num_classes, (size,))
    whole = _count(prediction, truth, num_classes)
    order = np.random.default_rng(seed).permutation(size)
    shuffled = _count(prediction[order], truth[order], num_classes)
    first, second = (_count(prediction[part], truth[part], num_classes) for part in (slice(cut), slice(cut, None)))
    in_two_updates = _count(prediction[:cut], truth[:cut], num_classes)
    in_two_updates.update(prediction[cut:], truth[cut:])
    for other in (shuffled, first + second, second + first, in_two_updates):
        assert torch.equal(other.matrix, whole.matrix)
    assert int(whole.matrix.sum()) == int((truth != VOID).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_what_is_predicted_on_void_does_not_matter(seed):
    prediction, truth = _pair(seed, 4, (50,))
    noisy = prediction.astype(np.int64)
    noisy[truth == VOID] = np.random.default_rng(seed).integers(-999, 999, size=int((truth == VOID).sum()))
    assert torch.equal(_count(noisy, truth, 4).matrix, _count(prediction, truth, 4).matrix)


def test_large_images_are_counted_in_pieces_without_a_difference(monkeypatch):
    prediction, truth = _pair(3, 5, (61, 67))
    whole = _count(prediction, truth, 5)
    monkeypatch.setattr(module, "CHUNK_PX", 100)
    assert torch.equal(_count(prediction, truth, 5).matrix, whole.matrix)


def test_counts_beyond_32_bits_stay_exact():
    part = _count([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], 2)
    part.matrix *= 2**31 + 1
    whole = part + part + part
    assert whole.matrix.dtype == torch.int64
    assert whole.matrix.tolist() == [[n * 3 * (2**31 + 1) for n in row] for row in ([1, 1], [1, 2])]
    scores = whole.scores()
    assert scores.pixels == 15 * (2**31 + 1)
    assert scores.iou == (1 / 3, 0.5) and scores.global_accuracy == 0.6


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64", ">i4", ">u2"]
)
def test_every_integer_type_is_counted_alike(dtype):
    truth, prediction = np.array([[0, 1, 2], [2, 1, 0]]), np.array([[0, 1, 1], [2, 2, 0]])
    expected = _count(prediction, truth, 3).matrix
    assert torch.equal(_count(prediction.astype(dtype), truth.astype(dtype), 3).matrix, expected)
    assert torch.equal(_count(prediction.astype(dtype)[:, ::-1], torch.from_numpy(truth).flip(1), 3).matrix, expected)
    assert torch.equal(_count(prediction.tolist(), truth.astype(dtype), 3).matrix, expected)


def test_binary_masks_may_be_boolean():
    assert _count(np.array([True, False]), torch.tensor([True, True]), 2).matrix.tolist() == [[0, 0], [1, 1]]


def test_a_negative_void_value_is_not_mistaken_for_255():
    assert _count([0, 1], np.array([0, -1], np.int8), 2, ignore_index=-1).matrix.tolist() == [[1, 0], [0, 0]]
    with pytest.raises(DataError, match="truth holds value 255"):
        _count([0, 1], np.array([0, 255], np.uint8), 2, ignore_index=-1)


def test_the_arrays_are_not_changed():
    prediction, truth = _pair(5, 3, (20,))
    read_only = truth.copy()
    read_only.flags.writeable = False
    before = prediction.copy()
    _count(prediction, read_only, 3)
    assert np.array_equal(prediction, before) and np.array_equal(truth, read_only)


def test_values_outside_the_classes_are_named_with_their_counts(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_PX", 7)  # the count is of the whole image, not of a piece
    truth = np.full((10, 10), 3)
    truth[0], truth[1, :2] = 12, -4
    confusion = ConfusionMatrix(11)
    with pytest.raises(
        DataError, match=r"truth holds value -4 \(2 px\), 12 \(10 px\), but there are 11 classes \(0\.\.10\)"
    ):
        confusion.update(np.zeros_like(truth), truth)
    with pytest.raises(DataError, match=r"prediction holds value 255 \(1 px\)"):
        confusion.update([0, 255, 255], [0, 1, 255])
    with pytest.raises(DataError, match="and 15 more values"):
        confusion.update(np.zeros(20, int), np.arange(20) + 100)
    assert confusion.matrix.sum() == 0  # a refused image leaves no trace


@pytest.mark.parametrize(
    "bad", [np.zeros(3), torch.zeros(3), np.array(["a", "b", "c"]), torch.zeros(3, dtype=torch.complex64)]
)
def test_only_integers_are_class_ids(bad):
    with pytest.raises(DataError, match="prediction must hold integer class ids"):
        ConfusionMatrix(2).update(bad, [0, 0, 0])


def test_shapes_must_agree():
    with pytest.raises(DataError, match=r"\(2, 3\) but truth has \(3, 2\)"):
        ConfusionMatrix(2).update(np.zeros((2, 3), int), np.zeros((3, 2), int))


@pytest.mark.parametrize("num_classes, ignore_index", [(0, 255), (-1, 255), (2**20, -1), (300, 255), (3, 0)])
def test_unusable_arguments_are_refused(num_classes, ignore_index):
    with pytest.raises(UsageError):
        ConfusionMatrix(num_classes, ignore_index)


def test_only_matrices_of_the_same_classes_add_up():
    with pytest.raises(UsageError, match="cannot be added"):
        ConfusionMatrix(2) + ConfusionMatrix(3)
    with pytest.raises(UsageError, match="cannot be added"):
        ConfusionMatrix(2) + ConfusionMatrix(2, ignore_index=-1)
    with pytest.raises(TypeError):
        ConfusionMatrix(2) + 1


@pytest.mark.parametrize("seed", range(5))
def test_scores_survive_json(seed):
    scores = _count(*_pair(seed, 6, (30,)), 6).scores()
    text = json.dumps(scores.to_dict(), allow_nan=False)
    again = Scores.from_dict(json.loads(text))
    assert again.to_dict() == scores.to_dict()
    assert isinstance(again.iou, tuple) and isinstance(again.absent, tuple) and isinstance(again.pixels, int)
    assert np.array_equal(again.recall, scores.recall, equal_nan=True)


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"miou": "high"},
        {"iou": 3},
        {"iou": [0.5]},
        {"absent": None},
        {"pixels": "many"},
        {"pixels": None},
        {"miou": [1]},
        {"miou": 1.5},
        {"recall": [math.inf, 0]},
        {"dice": [-0.5, 0]},
    ],
)
def test_scores_that_are_none_are_refused(change):
    values = _count([0, 1], [0, 1], 2).scores().to_dict()
    with pytest.raises(DataError, match="scores"):
        Scores.from_dict(values | change)
    with pytest.raises(DataError, match="keys"):
        Scores.from_dict({"miou": 1.0})
    with pytest.raises(DataError, match="keys"):
        Scores.from_dict([1.0])
