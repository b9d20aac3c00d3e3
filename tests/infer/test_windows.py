"""`Predictor.predict` of images that are computed piece by piece."""

import numpy as np
import pytest
import torch

import pixelwise.infer.pipeline as module
from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.options import Tiling
from pixelwise.infer.predictor import Predictor
from pixelwise.models import create_model

SPEC = LabelSpec(names=("a", "b", "c"), colors=((0, 0, 0), (9, 9, 9), (5, 5, 5)), values=((0,), (1,), (2,)))


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    config = {"tiny": True, "num_classes": 3, "in_channels": 3}
    card = ModelCard(model="unet", config=config, labels=SPEC, mean=(0.5,) * 3, std=(0.2,) * 3)
    return Predictor(create_model("unet", **config), card, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (133, 90, 3), dtype=np.uint8)


def test_tiles_give_what_one_pass_gives(predictor, image):
    whole, tiled = predictor.predict(image), predictor.predict(image, tile_px=50)
    assert torch.allclose(tiled.logits, whole.logits, atol=1e-4)
    clear = np.diff(np.sort(whole.logits.numpy(), axis=0)[-2:], axis=0)[0] > 1e-4
    assert clear.any() and np.array_equal(tiled.labels[clear], whole.labels[clear])
    only = predictor.predict(image, tile_px=50, probabilities=False)
    assert only.logits is None and np.array_equal(only.labels, tiled.labels)


def test_a_large_image_is_never_kept_as_logits_of_one_pass(predictor, image, monkeypatch):
    monkeypatch.setattr(module, "ONE_PASS_PX", 100)
    monkeypatch.setattr(module, "_one_pass", None)
    assert predictor.predict(image, tiling=Tiling(memory_bytes=1 << 20)).labels.shape == (133, 90)


def test_averages_have_probabilities(predictor, image):
    prediction = predictor.predict(image, tiling=Tiling(tta="flips"))
    assert np.allclose(prediction.probabilities.sum(0), 1, atol=1e-5)


def test_scores_that_overflow_name_the_image(predictor):
    with pytest.raises(PixelwiseError, match=r"^the image: the network's scores overflow"):
        predictor.predict(np.full((40, 40, 3), np.inf, np.float32), tile_px=32)
