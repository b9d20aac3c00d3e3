from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pixelwise.infer.options as module
from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.infer.options import Decision, JobOptions
from pixelwise.infer.tiling import Region, Scores

SPEC = LabelSpec(names=("sky", "road", "car"), colors=((1, 1, 1), (2, 2, 2), (3, 3, 3)), values=((0,), (1,), (2,)))


def scores(*probabilities, spread=None, dtype=torch.float32):
    """Scores of a row of pixels; one tuple of probabilities for each pixel."""
    values = torch.tensor(probabilities, dtype=torch.float64).log().T[:, None].to(dtype)
    return Scores(Region(0, 0, 1, len(probabilities)), values, None if spread is None else torch.tensor([spread]))


def labels(*probabilities, **options):
    return Decision(num_classes=len(probabilities[0]), **options)(scores(*probabilities))["labels"][0].tolist()


def test_without_wishes_the_label_is_that_of_the_predictor():
    values = torch.randn(5, 7, 9)
    arrays = Decision(num_classes=5)(Scores(Region(0, 0, 7, 9), values))
    assert list(arrays) == ["labels"] and arrays["labels"].dtype == np.uint8
    assert np.array_equal(arrays["labels"], values.max(dim=0)[1].numpy())


@pytest.mark.parametrize("classes", [1, 2, 11, 63, 64, 200])
def test_of_equal_scores_the_first_class_is_given_however_the_scores_lie(classes):
    values = torch.randint(-3, 3, (classes, 9, 13), generator=torch.Generator().manual_seed(0)).float()
    values[0, 0] = -torch.inf
    truth = values.numpy().argmax(axis=0)
    for laid in (values, values.permute(1, 2, 0).contiguous().permute(2, 0, 1), values.repeat(1, 1, 2)[..., ::2]):
        laid.copy_(values)
        best, labels = module.largest(laid)
        assert np.array_equal(best.numpy(), values.numpy().max(axis=0)) and np.array_equal(labels.numpy(), truth)


def test_a_threshold_gives_the_class_where_it_is_reached_and_only_there():
    pixels = [(0.6, 0.35, 0.05), (0.6, 0.25, 0.15), (0.1, 0.28, 0.62), (0.05, 0.9, 0.05), (0.35, 0.3000001, 0.3499999)]
    assert labels(*pixels) == [0, 0, 2, 1, 0]
    assert labels(*pixels, thresholds={1: 0.3}) == [1, 0, 2, 1, 1]
    assert labels(*pixels, thresholds={1: 0.95}) == [0, 0, 2, 0, 0]
    assert labels(*pixels, thresholds={1: 1.0}) == [0, 0, 2, 0, 0]


def test_of_several_classes_the_largest_multiple_of_its_threshold_wins():
    pixels = [(0.5, 0.3, 0.2), (0.4, 0.3, 0.3), (0.8, 0.1, 0.1), (0.2, 0.6, 0.2)]
    assert labels(*pixels, thresholds={1: 0.3, 2: 0.1}) == [2, 2, 2, 1]
    assert labels(*pixels, thresholds={1: 0.15, 2: 0.25}) == [1, 1, 0, 1]
    assert labels((0.5, 0.25, 0.25), thresholds={1: 0.25, 2: 0.25}) == [1]


def test_where_all_classes_have_thresholds_and_none_is_reached_the_largest_is_given():
    assert labels((0.5, 0.3, 0.2), (0.2, 0.7, 0.1), thresholds={0: 0.6, 1: 0.6, 2: 0.6}) == [0, 1]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_thresholds_equal_the_rule_pixel_by_pixel(data):
    classes = data.draw(st.integers(1, 5))
    shares = st.floats(0.125, 1, width=32)
    thresholds = data.draw(st.dictionaries(st.integers(0, classes - 1), shares, max_size=classes))
    values = torch.from_numpy(
        np.random.default_rng(data.draw(st.integers(0, 999))).normal(size=(classes, 3, 4))
    ).float()
    found = Decision(num_classes=classes, thresholds=thresholds)(Scores(Region(0, 0, 3, 4), values))["labels"]
    for (row, column), label in np.ndenumerate(found):
        p = values.softmax(0)[:, row, column]
        reached = [k for k in sorted(thresholds) if bool(p[k] >= thresholds[k])]
        free = [k for k in range(classes) if k not in thresholds] or list(range(classes))
        wanted = (
            max(reached, key=lambda k: float(p[k] / thresholds[k])) if reached else max(free, key=lambda k: float(p[k]))
        )
        assert label == wanted


def test_maps_are_what_they_are_called():
    decision = Decision(num_classes=2, maps=("entropy", "mutual_information", "max_probability"))
    arrays = decision(scores((0.5, 0.5), (1.0, 0.0), (0.9, 0.1), spread=[0.2, 0.0, 0.4]))
    assert all(arrays[name].dtype == np.float32 and arrays[name].shape == (1, 3) for name in decision.maps)
    sure = -0.9 * np.log(0.9) - 0.1 * np.log(0.1)
    assert np.allclose(arrays["entropy"], [[np.log(2), 0, sure]], atol=1e-6)
    assert np.allclose(arrays["mutual_information"], [[np.log(2) - 0.2, 0, 0]], atol=1e-6)
    assert np.allclose(arrays["max_probability"], [[0.5, 1, 0.9]])


def test_mutual_information_needs_several_passes():
    with pytest.raises(UsageError, match="several passes"):
        JobOptions(maps=("mutual_information",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_class_and_a_single_pixel(dtype):
    arrays = Decision(num_classes=1, maps=("entropy", "max_probability"))(scores((1.0,), dtype=dtype))
    assert arrays["labels"].tolist() == [[0]]
    assert arrays["entropy"].tolist() == [[0.0]] and arrays["max_probability"].tolist() == [[1.0]]
    assert labels((1.0,), thresholds={0: 0.5}) == [0]


def test_half_precision_is_decided_in_float32():
    values = torch.randn(4, 5, 6).to(torch.bfloat16)
    arrays = Decision(num_classes=4, maps=("entropy",))(Scores(Region(0, 0, 5, 6), values))
    assert np.array_equal(arrays["labels"], values.float().argmax(0).numpy())
    assert arrays["entropy"].dtype == np.float32


def test_bands_of_rows_change_nothing(monkeypatch):
    values, valid = torch.randn(3, 13, 7), np.random.default_rng(0).random((13, 7)) < 0.7
    window = Scores(Region(0, 0, 13, 7), values, torch.rand(13, 7))
    decision = Decision(num_classes=3, thresholds={1: 0.2}, maps=module.MAPS)
    whole = decision(window, valid)
    monkeypatch.setattr(module, "_CHUNK", 50)
    banded = decision(window, valid)
    assert np.array_equal(banded.pop("labels"), whole["labels"])
    assert all(np.allclose(array, whole[name], atol=1e-6, equal_nan=True) for name, array in banded.items())


def test_pixels_without_data():
    valid = np.array([[True, False]])
    decision = Decision(num_classes=2, maps=("entropy",))
    arrays = decision(scores((0.5, 0.5), (0.2, 0.8)), valid)
    assert arrays["labels"].tolist() == [[0, 255]] and np.isnan(arrays["entropy"]).tolist() == [[False, True]]
    assert decision(scores((0.5, 0.5), (0.2, 0.8)), ~np.zeros((1, 2), bool))["labels"].tolist() == [[0, 1]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_overflow_are_an_error_unless_there_is_no_data(bad):
    values = torch.zeros(2, 1, 3)
    values[:, 0, 1] = bad
    window = Scores(Region(0, 0, 1, 3), values)
    decision = Decision(num_classes=2, precision="bf16")
    with pytest.raises(PixelwiseError, match=r"^the network's scores overflow \(bf16\)\. Check"):
        decision(window)
    with pytest.raises(PixelwiseError, match="overflow"):
        decision(window, np.array([[True, True, False]]))
    assert decision(window, np.array([[True, False, True]]))["labels"].tolist() == [[0, 255, 0]]


def test_one_class_may_be_impossible():
    window = Scores(Region(0, 0, 1, 1), torch.tensor([0.0, -float("inf")]).reshape(2, 1, 1))
    arrays = Decision(num_classes=2, maps=("entropy", "max_probability"))(window)
    assert (arrays["labels"].item(), arrays["entropy"].item(), arrays["max_probability"].item()) == (0, 0.0, 1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"thresholds": (("car", 0.0),)}, "above 0 and at most 1, not 0"),
        ({"thresholds": (("car", float("nan")),)}, "above 0"),
        ({"thresholds": (("car", 0.1), ("car", 0.2))}, "two thresholds"),
        ({"maps": ("variance",)}, "no map 'variance'"),
    ],
)
def test_values_that_are_not_allowed(options, message):
    with pytest.raises(UsageError, match=message):
        JobOptions(**options)


def test_the_decision_of_classes_and_options():
    options = SimpleNamespace(thresholds=(("car", 0.3),), maps=("entropy",))
    wanted = Decision(num_classes=3, thresholds={2: 0.3}, maps=("entropy",), precision="bf16")
    assert Decision.of(SPEC, options, "bf16") == wanted
    with pytest.raises(UsageError, match="Did you mean car"):
        Decision.of(SPEC, SimpleNamespace(thresholds=(("cars", 0.3),), maps=()), "bf16")
