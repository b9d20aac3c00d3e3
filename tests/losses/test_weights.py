import math

import pytest
import torch

from pixelwise.errors import UsageError
from pixelwise.losses import class_weights

# CamVid's training split (367 images of 360 x 480 px), counted in SegNet's copy: class, labelled pixels, images that
# contain it, and the median-frequency weight that follows.
CAMVID = [
    ("Sky", 10_682_767, 366, 0.2793),
    ("Building", 14_750_079, 365, 0.2017),
    ("Pole", 623_349, 366, 4.7865),
    ("Road", 20_076_880, 367, 0.1490),
    ("Pavement", 2_845_085, 349, 1.0),
    ("Tree", 6_166_762, 319, 0.4217),
    ("SignSymbol", 743_859, 351, 3.8467),
    ("Fence", 714_595, 173, 1.9736),
    ("Car", 3_719_877, 360, 0.7889),
    ("Pedestrian", 405_385, 317, 6.3747),
    ("Bicyclist", 184_967, 201, 8.8587),
]
PIXELS = [row[1] for row in CAMVID]
IMAGE_PIXELS = [row[2] * 360 * 480 for row in CAMVID]


def test_median_frequency_weights_of_camvid():
    weights = class_weights("median_frequency", PIXELS, IMAGE_PIXELS)
    assert weights.dtype == torch.float32
    assert [round(value, 4) for value in weights.tolist()] == [row[3] for row in CAMVID]


def test_the_square_root_lies_between_balance_and_none():
    root = class_weights("sqrt_median_frequency", PIXELS, IMAGE_PIXELS)
    assert torch.allclose(root**2, class_weights("median_frequency", PIXELS, IMAGE_PIXELS), rtol=1e-5)


def test_enet_weights_of_camvid():
    weights = class_weights("enet", PIXELS, IMAGE_PIXELS)
    assert sum(PIXELS) == 60_913_605
    assert weights[3].item() == pytest.approx(1 / math.log(1.02 + 20_076_880 / 60_913_605), rel=1e-6)
    assert weights.max() < 1 / math.log(1.02) and weights.argmax() == 10


def test_linknet_weights_of_camvid():
    weights = class_weights("linknet", PIXELS, IMAGE_PIXELS)
    assert weights[3].item() == pytest.approx(1 / math.log(2.02), rel=1e-6)  # road, the most frequent
    assert weights[10].item() == pytest.approx(1 / math.log(1.02 + 184_967 / 20_076_880), rel=1e-6)


def test_none_is_one_for_all():
    assert class_weights("none", PIXELS, IMAGE_PIXELS).tolist() == [1.0] * 11


@pytest.mark.parametrize("scheme", ["median_frequency", "sqrt_median_frequency", "enet", "linknet"])
def test_a_class_without_pixels_weighs_nothing_and_changes_no_other(scheme):
    with_absent = class_weights(scheme, [*PIXELS, 0], [*IMAGE_PIXELS, 0])
    assert with_absent[-1] == 0 and torch.isfinite(with_absent).all()
    assert torch.equal(with_absent[:-1], class_weights(scheme, PIXELS, IMAGE_PIXELS))


@pytest.mark.parametrize("scheme", ["median_frequency", "enet", "linknet"])
def test_without_any_pixel_all_weigh_the_same(scheme):
    assert class_weights(scheme, [0, 0], [0, 0]).tolist() == [1.0, 1.0]


def test_an_unknown_scheme_is_refused():
    with pytest.raises(
        UsageError, match="'segnet' is not one of none, median_frequency, sqrt_median_frequency, enet, linknet"
    ):
        class_weights("segnet", PIXELS, IMAGE_PIXELS)


# What SegNet's authors printed for CamVid; no scheme gives them from the pixels of the released labels.
SEGNET = [0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614]


def test_printed_weights_are_taken_as_they_are():
    weights = class_weights(SEGNET, PIXELS, IMAGE_PIXELS)
    assert weights.dtype == torch.float32 and weights.tolist() == pytest.approx(SEGNET)
    assert class_weights((1, 0), [5, 0], [9, 0]).tolist() == [1, 0]
    assert class_weights((2, 3), [5, 0], [9, 0]).tolist() == [2, 3]


@pytest.mark.parametrize("given", [SEGNET[:-1], [*SEGNET, 1.0], []])
def test_as_many_weights_as_classes(given):
    with pytest.raises(UsageError, match=f"{len(given)} numbers were given, but there are 11 classes"):
        class_weights(given, PIXELS, IMAGE_PIXELS)


@pytest.mark.parametrize("given", [[-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], [0, 0]])
def test_weights_are_finite_not_negative_and_not_all_zero(given):
    with pytest.raises(UsageError, match="must be finite numbers of at least 0 and not all 0"):
        class_weights(given, [1, 1], [2, 2])
