"""Crops or windows: how each network is fed, and that training on windows teaches dense labels."""

from pathlib import Path

import pytest
import torch

import pixelwise
from pixelwise.errors import UsageError
from pixelwise.models import create_model
from pixelwise.train import make_config, train
from pixelwise.train.folder import read_history
from pixelwise.train.network import check_options, training_logits, window_px

WINDOW = {"window": 9, "widths": [6, 8], "kernels": [4, 2], "pools": [2, 2], "hidden": 8}
TINY = {"model": "patch_classifier", "options": WINDOW, "lr": 0.02, "workers": 0, "precision": "float32"}


def patch_classifier():
    torch.manual_seed(0)
    return create_model(
        "patch_classifier", num_classes=2, **{key: tuple(v) if isinstance(v, list) else v for key, v in WINDOW.items()}
    )


def test_most_networks_are_fed_crops():
    model = create_model("unet", num_classes=3, tiny=True)
    assert window_px(model) is None
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(training_logits(model, image), model(image))
    check_options(make_config({"crop_px": 32, "elastic": 3, "separation": 10}), model)


def test_a_classifier_of_windows_is_fed_windows():
    model = patch_classifier().eval()
    assert window_px(model) == 9
    image = torch.rand(4, 3, 9, 9)
    logits = training_logits(model, image)
    assert logits.shape == (4, 2, 1, 1)
    assert torch.allclose(logits[..., 0, 0], model(image)[..., 4, 4], atol=1e-5)  # its pixel in the whole image


@pytest.mark.parametrize(
    ("key", "value"), [("crop_px", 32), ("scale", [1, 1]), ("focus", 0.1), ("elastic", 2), ("separation", 10)]
)
def test_options_of_crops_are_refused_for_windows(key, value):
    with pytest.raises(UsageError, match=rf"trained on windows of 9 px, not on crops, so {key} means nothing"):
        check_options(make_config({**TINY, key: value}), patch_classifier())


def test_training_on_windows_labels_every_pixel(toy_data: Path, tmp_path: Path) -> None:
    run = train(toy_data, make_config({**TINY, "epochs": 10}), out=tmp_path / "run")
    assert (run.plan.inputs, run.plan.crop_px, run.plan.batch_size) == ("windows", 9, 128)
    assert 2 <= run.plan.steps_per_epoch <= 4 and run.steps == 10 * run.plan.steps_per_epoch
    assert run.best_miou is not None and run.best_miou > 0.8
    assert pixelwise.load(run.folder).predict(torch.rand(3, 17, 23)).labels.shape == (17, 23)
    assert read_history(run.folder / "metrics.csv")


def test_windows_are_the_same_after_an_interruption(toy_data: Path, tmp_path: Path) -> None:
    import os
    import signal

    config = make_config({**TINY, "batch_size": 16, "steps": 8, "flips": "dihedral", "dice": 0.5})
    train(toy_data, config, out=tmp_path / "whole")

    def stop(event: dict) -> None:
        if event.get("step") == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(toy_data, config, out=tmp_path / "torn", report=stop).interrupted == "SIGTERM"
    assert train(toy_data, out=tmp_path / "torn", resume=True).steps == 8
    one, other = (pixelwise.load(tmp_path / name, device="cpu").model.state_dict() for name in ("whole", "torn"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_windows_need_no_class_weights(toy_data: Path) -> None:
    from pixelwise.data.check import inspect_data
    from pixelwise.data.layouts import open_data
    from pixelwise.train.module import loss_weights

    inspection = inspect_data(open_data(toy_data))
    model = patch_classifier()
    for scheme in ("sqrt_median_frequency", "median_frequency"):
        assert loss_weights(make_config({"class_weights": scheme}), inspection, model).tolist() == [1, 1]
    assert loss_weights(make_config({"class_weights": [3, 0.5]}), inspection, model).tolist() == [3, 0.5]
