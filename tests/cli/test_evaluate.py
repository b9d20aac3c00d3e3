import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pixelwise.cli import main
from pixelwise.data.classes import save_labels
from pixelwise.data.labels import LabelSpec
from pixelwise.data.numbers import Numbers
from pixelwise.infer.bundle import ModelCard, load_bundle, save_bundle
from pixelwise.infer.evaluate import evaluate
from pixelwise.models import create_model

SPEC = LabelSpec(
    names=("sky", "[road]", "car"), colors=((9, 9, 250), (90, 80, 70), (250, 0, 0)), values=((0,), (1,), (2,))
)
CONFIG = {"tiny": True, "num_classes": 3, "in_channels": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    card = ModelCard(model="unet", config=CONFIG, labels=SPEC, mean=(0.5,) * 3, std=(0.25,) * 3)
    model = create_model("unet", **CONFIG)
    with torch.no_grad():  # so that the last class is never predicted
        for parameter in list(model.parameters())[-2:]:
            parameter[2] = -1 if parameter.ndim > 1 else -100
    save_bundle(folder, model, card)
    return folder


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind, shape, most in (("images", (12, 15, 3), 256), ("masks", (12, 15), 2)):
            folder = tmp_path / "data" / split / kind
            folder.mkdir(parents=True)
            for index in range(2):
                Image.fromarray(rng.integers(0, most, shape, dtype=np.uint8)).save(folder / f"{split}{index}.png")
    save_labels(tmp_path / "data" / "classes.yaml", SPEC)
    return tmp_path / "data"


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


def test_scores_of_each_class_and_the_totals_are_printed(run, data, tmp_path, pixelwise):
    code, out, _ = pixelwise("evaluate", run, data, "--json", tmp_path / "scores.json")
    assert code == 0
    assert "test: 2 images, 360 labelled pixels" in out
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["matrix"] == json.loads((run / "evaluation-test.json").read_text())["matrix"]
    for index, name in enumerate(("sky", "[road]")):
        row = next(line for line in out.splitlines() if f" {name} " in line)
        for key in ("iou", "dice", "precision", "recall"):
            value = written["scores"][key][index]
            assert ("-" if value is None else f"{100 * value:.2f}") in row
        assert f"{sum(written['matrix'][index]):,}" in row
    assert f"mIoU {100 * written['scores']['miou']:.2f}" in out
    assert "In neither truth nor prediction, so left out of the means: car." in " ".join(out.split())


def test_json_alone_can_be_piped(run, data, pixelwise):
    code, out, err = pixelwise("evaluate", run, data, "--split", "val", "--json", "-")
    assert code == 0 and "val: no mask contains 'car'. It cannot be scored there." in err
    assert json.loads(out)["matrix"] == evaluate(run, data, split="val", note=None).matrix


def test_statistics_of_the_batch(run, data, tmp_path, pixelwise):
    code, _, err = pixelwise("evaluate", run, data, "--batch-statistics")
    assert code == 2 and "unet has no batch norm" in err
    config = CONFIG | {"batch_norm": True}
    card = ModelCard(model="unet", config=config, labels=SPEC, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.manual_seed(0)
    save_bundle(tmp_path / "normed", create_model("unet", **config), card)
    code, out, _ = pixelwise("evaluate", tmp_path / "normed", data, "--batch-statistics")
    assert code == 0 and "Batch norm by the statistics of each batch, of up to 10 images." in out
    written = json.loads((tmp_path / "normed" / "evaluation-test.json").read_text())
    assert (written["statistics"], written["batch"]) == ("batch", 10)
    _, out, _ = pixelwise("evaluate", tmp_path / "normed", data, "--batch", "2", "--json", "-")
    running = json.loads(out)
    assert (running["statistics"], running["batch"]) == ("running", 2)
    assert running["matrix"] != written["matrix"]
    assert pixelwise("evaluate", run, data, "--batch", "0")[0] == 2


def test_an_undefined_score_is_null_in_json(run, data, pixelwise):
    _, out, _ = pixelwise("evaluate", run, data, "--json", "-")
    assert "NaN" not in out
    assert json.loads(out)["scores"]["iou"][2] is None


def test_ignored_values_are_void(run, data, pixelwise):
    path = data / "test" / "masks" / "test0.png"
    values = np.asarray(Image.open(path)).copy()
    values[0] = 77
    Image.fromarray(values).save(path)
    code, _, err = pixelwise("evaluate", run, data)
    assert code == 2
    assert "value 77 (15 px)" in " ".join(err.split())
    code, out, _ = pixelwise("evaluate", run, data, "--ignore", "77", "--json", "-")
    assert code == 0
    assert json.loads(out)["scores"]["pixels"] == 345


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{data}", "--split", "dev"], "the splits are train (2), val (2), test (2)"),
        (["{run}", "{data}/nowhere"], "there is no such folder"),
        (["{data}", "{data}"], "holds no model.json"),
        (["{run}", "{data}", "--classes", "{data}/none.yaml"], "none.yaml"),
        (["{run}", "{data}", "--group-by", "("], "group-by"),
        (["{run}", "{data}", "--json", "{data}/classes.yaml/x.json"], "cannot be written"),
        (["{run}"], "DATA"),
    ],
)
def test_wrong_usage_says_what_is_wrong(run, data, pixelwise, arguments, message):
    code, _, err = pixelwise("evaluate", *(text.format(run=run, data=data) for text in arguments))
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_other_classes_are_explained(run, data, pixelwise):
    other = LabelSpec(names=("sky", "tree", "car"), colors=SPEC.colors, values=SPEC.values)
    save_labels(data / "classes.yaml", other)
    code, _, err = pixelwise("evaluate", run, data)
    assert code == 2
    assert "class 1 is 'tree', but the network's is '[road]'" in " ".join(err.split())


def test_help_shows_an_example(pixelwise):
    code, out, _ = pixelwise("evaluate", "--help")
    assert code == 0
    assert "Example: pixelwise evaluate" in " ".join(out.split())


def test_a_run_folder_that_may_not_be_written_is_scored_all_the_same(run, data, tmp_path, pixelwise, monkeypatch):
    (run / "evaluation-val.json").unlink(missing_ok=True)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (run, os.W_OK))
    code, out, err = pixelwise("evaluate", run, data, "--split", "val", "--json", tmp_path / "scores.json")
    assert code == 0 and "val: 2 images" in out and (tmp_path / "scores.json").exists(), err
    assert "nothing may be written there, so evaluation-val.json and the pictures are left out" in err
    assert not (run / "evaluation-val.json").exists()


def test_what_should_be_known_of_the_images_is_said_beside_the_scores(run, data, pixelwise):
    """One line each on stderr, with names as they are; JSON stays alone on stdout."""
    for index in range(2):
        path = data / "test" / "images" / f"test{index}.png"
        pixels = np.dstack([np.asarray(Image.open(path)) // 64 + 250, np.full((12, 15), 9 * index, np.uint8)])
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    faint = save_bundle_with_numbers(run, data.parent / "faint")
    code, out, err = pixelwise("evaluate", faint, data, "--json", "-")
    assert code == 0 and json.loads(out)["images"] == 2
    opacity, numbers = (line for line in err.splitlines() if line.startswith(str(data)))
    assert opacity.startswith(f"{data}/test/images/test0.png: its opacity (alpha) is left out")
    assert numbers.startswith(f"{data}/test/images/test0.png: its numbers (uint8, 0.98..0.992")
    assert "trained on (uint8, 0..0.1, mean 0.04, deviation 0.02)" in numbers


def save_bundle_with_numbers(run, folder):
    """The same network, as if it had learnt faint images."""
    model, card = load_bundle(run)
    low, high, mean, std = ((value,) * 3 for value in (0.0, 0.1, 0.04, 0.02))
    numbers = Numbers(mean=mean, std=std, low=low, high=high, dtypes=("uint8",))
    folder.mkdir()
    save_bundle(folder, model, replace(card, numbers=numbers))
    return folder
