import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pixelwise.cli import main


@pytest.fixture
def pixelwise(monkeypatch, capsys):
    """Run the command line as a user does; gives the exit code, what was printed and what was complained about."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pixelwise", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "1000")
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        return code, printed.out, printed.err

    return call


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "street.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_the_best_classes_are_listed_and_the_best_is_drawn(pixelwise, photo, weights, tmp_path):
    out = tmp_path / "heat.png"
    code, printed, _ = pixelwise("heatmap", photo, "--classifier", "test_resnet", "--weights", weights, "--out", out)
    lines = printed.splitlines()
    assert code == 0 and len(lines) == 6
    assert all(re.match(r" *\d+\.\d%  \S", line) for line in lines[:5])
    best = lines[0].split("%  ")[1]
    assert lines[5].startswith(f"{out}: {best}, at most ") and lines[5].endswith("(a score every 32 px)")
    with Image.open(out) as picture:
        assert picture.size == (70, 50) and picture.mode == "RGB"


def test_a_class_a_finer_grid_and_a_scale_can_be_asked_for(pixelwise, photo, weights, tmp_path):
    options = ("--classifier", "test_resnet", "--weights", weights, "--class", "Tabby", "--dense", 16, "--scale", 64)
    code, printed, _ = pixelwise("heatmap", photo, *options, "--out", tmp_path / "a.png")
    assert code == 0 and ": tabby, at most" in printed and "every 16 px" in printed
    code, printed, _ = pixelwise("heatmap", photo, *options, "--cells", "--out", tmp_path / "b.png")
    assert code == 0 and (tmp_path / "b.png").read_bytes() != (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--class", "tably"), "the classifier knows no class 'tably'. Did you mean tabby"),
        (("--class", "1000"), "class 1000: the classifier knows 1000, from 0 to 999"),
        (("--weights", "none.pth"), "--weights none.pth: there is no such file"),
        (("--classifier", "test_resnett"), "there is no backbone called 'test_resnett'"),
        (("--classifier", "test_vit"), "cannot be made fully convolutional"),
        (("--dense", "0"), "--dense must be at least 1 pixel, not 0"),
        (("--dense", "5"), "dense must be one of 1, 2, 4, 8, 16, 32"),
        (("--scale", "0"), "scale_px must be at least 1 pixel, not 0"),
        (("--out", "heat.jpg"), "--out heat.jpg: pictures are written as PNG"),
        (("--device", "tpu"), "device 'tpu' cannot be used here"),
    ],
)
def test_what_is_wrong_is_said(pixelwise, photo, tmp_path, options, message):
    given = {"--classifier": "test_resnet", "--weights": "random", "--out": str(tmp_path / "heat.png")}
    given |= dict([options])
    code, _, complaint = pixelwise("heatmap", photo, *(word for pair in given.items() for word in pair))
    assert code == 2 and message in complaint
    assert not (tmp_path / "heat.png").exists()


def test_a_photo_that_cannot_be_read_is_named(pixelwise, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    code, _, complaint = pixelwise(
        "heatmap",
        tmp_path / "bad.jpg",
        "--classifier",
        "test_resnet",
        "--weights",
        "random",
        "--out",
        tmp_path / "h.png",
    )
    assert code == 2 and "bad.jpg" in complaint


def test_weights_that_cannot_be_fetched_say_what_to_do(pixelwise, photo, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code, _, complaint = pixelwise("heatmap", photo, "--classifier", "efficientnet_b6", "--out", tmp_path / "h.png")
    assert code == 2 and "pass a file of weights (--weights FILE)" in complaint
