"""`pixelwise models --receptive-field`, and prediction with the halo cut."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import nn

from pixelwise.models.registry import register_model
from pixelwise.ops.receptive_field import ReceptiveField


def test_how_far_networks_look(program):
    done = program("models", "--receptive-field", "unet_*")
    assert done.code == 0 and done.err == ""
    header, line = done.out.splitlines()
    assert header.split()[:6] == ["name", "stride", "above", "below", "left", "right"]
    # 112 px of halo on each side, in whole strides
    assert line.split() == ["unet_valid", "16", "107", "107", "107", "107", f"{(1 + 224 / 1024) ** 2:.2f}x"]
    assert line.index("107") + 3 == header.index("above") + 5  # numbers stand under their names


def test_lines_come_one_by_one_and_say_where_there_is_no_end(program, monkeypatch, capfd):
    shown = []

    def measured(model):
        shown.append(capfd.readouterr().out)
        assert all(parameter.is_meta for parameter in model.parameters())  # nothing is allocated
        return ReceptiveField(bounded=False)

    monkeypatch.setattr("pixelwise.ops.receptive_field.receptive_field", measured)
    done = program("models", "fcn?s", "--receptive-field")
    assert done.code == 0 and [text.split()[0] for text in (*shown, done.out)] == ["name", "fcn8s"][: len(shown) + 1]
    assert done.out.split(maxsplit=1)[1].strip() == "the whole image"


def test_a_network_of_ones_own_is_measured(program, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int = 2
        in_channels: int = 3

    def build(config):
        layer = nn.Conv2d(config.in_channels, config.num_classes, 1)
        layer.stride = 1
        return layer

    monkeypatch.setattr("pixelwise.models.registry._MODELS", {})
    register_model("own", build, Config(), paper="none yet", tiny={})
    done = program("models")
    assert done.code == 0, done.err
    *_, header, _line, row = done.out.strip().splitlines()
    assert header.split() == ["name", "parameters", "GMAC", "stride", "paper"]
    assert row.split() == ["own", "44", "0.0", "1", "none", "yet"]  # 3 x 11 weights and 11 biases


def test_no_such_network(program):
    done = program("models", "x*", "--receptive-field")
    assert done.code == 2 and "no model matches 'x*'" in done.err


def test_a_tolerance_changes_few_labels(program, bundles, tmp_path):
    y, x = np.mgrid[:150, :170]
    picture = np.stack([y + x, 255 - y, (y * x) % 256], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    found = []
    for extra in ([], ["--tolerance", "0.05", "--tile", "48"]):
        out = tmp_path / f"out{len(found)}"
        done = program("predict", bundles[3], tmp_path / "picture.png", "--out", out, "--device", "cpu", *extra)
        assert done.code == 0, done.err
        found.append(np.array(Image.open(next(out.rglob("*.png")))))
    assert found[0].shape == found[1].shape == (150, 170)
    assert float((found[0] != found[1]).mean()) < 0.02
