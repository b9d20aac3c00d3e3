"""`pixelwise inspect` as a user types it."""

import json

import nibabel
import numpy as np
import pytest
import tifffile
import typer
from PIL import Image
from typer.testing import CliRunner

from pixelwise.cli.inspect import inspect
from pixelwise.data.classes import load_labels
from pixelwise.errors import DataError, UsageError

APP = typer.Typer()
APP.command()(inspect)


@pytest.fixture
def data(tmp_path):
    """Eight pairs with the mask values 0 and 1; a [bracketed] name must not become markup."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for name in "abcdefgh":
        Image.fromarray(rng.integers(0, 256, (6, 8), dtype=np.uint8)).save(tmp_path / f"images/{name}.png")
        Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) % 2).save(tmp_path / f"masks/{name}.png")
    (tmp_path / "classes.yaml").write_text("classes: [ground, '[bold]tree']\n")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(APP, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def test_what_is_there_is_shown_and_nothing_written(data):
    before = sorted(data.rglob("*"))
    result = run(data)
    assert result.exit_code == 0, result.output
    for part in ("images/ + masks/", "8x6 (8)", "uint8 (8)", "ground", "[bold]tree", "192", "50.00%", "No problems"):
        assert part in result.stdout
    assert sorted(data.rglob("*")) == before


def test_json_is_json_alone(data):
    result = run(data, "--json")
    content = json.loads(result.stdout)
    assert content["sizes"] == {"8x6": 8}
    assert content["labels"]["names"] == ["ground", "[bold]tree"]
    assert content["class_weights"]["median_frequency"] == [1.0, 1.0]
    assert sum(split["images"] for split in content["splits"].values()) == 8


def test_fatal_problems_are_shown_and_exit_2(data):
    Image.new("L", (8, 6), 255).save(data / "masks/c.png")
    (data / "images/d.png").write_bytes(b"")
    result = run(data)
    assert result.exit_code == 2
    text = " ".join(result.stdout.split())
    assert "mask c.png holds value 255 (48 px), but there are 2 classes (0..1). Pass --ignore 255" in text
    assert "image d.png cannot be used: the file is empty" in text
    assert "2 problems must be fixed before training." in text
    assert "void" in run(data, "--ignore", "255", "--ignore", "254").stdout


def test_a_class_without_pixels_has_no_weight(data):
    (data / "classes.yaml").write_text("classes: [ground, tree, ghost]\n")
    content = json.loads(run(data, "--json").stdout)
    assert content["class_weights"]["median_frequency"][2] is None
    assert any("ghost" in problem["message"] for problem in content["problems"])


def test_proposed_classes_are_written_when_asked(data, program):
    (data / "classes.yaml").unlink()
    for name in "abcdefgh":
        mask = np.zeros((6, 8), np.int16)
        mask[:, 4:] = 1
        mask[0] = -1
        (data / f"masks/{name}.png").unlink()
        tifffile.imwrite(data / f"masks/{name}.tif", mask)
    asked = program("inspect", data)
    assert asked.code == 2
    assert "Pass --ignore -1" in asked.out
    assert program("inspect", data, "--ignore", "-1").code == 0
    done = program("inspect", data, "--write-classes")
    assert done.code == 0, done.out
    assert f"Wrote {data / 'classes.yaml'}: 2 classes, void values: -1." in done.err
    assert load_labels(data / "classes.yaml").ignore_values == (-1,)
    assert program("inspect", data).code == 0
    again = program("inspect", data, "--write-classes")
    assert again.code == 2
    assert "exists and is kept" in again.err
    assert program("inspect", data, "--write-classes", data / "mine.yaml", "--json").code == 0
    assert load_labels(data / "mine.yaml") == load_labels(data / "classes.yaml")


def test_nan_can_be_ignored(data, program):
    for name in "abcdefgh":
        mask = np.array([[0, 1, np.nan, 1]] * 6, np.float32).repeat(2, axis=1)
        (data / f"masks/{name}.png").unlink()
        np.save(data / f"masks/{name}.npy", mask)
    assert "Pass --ignore nan" in program("inspect", data).out
    assert program("inspect", data, "--ignore", "nan").code == 0
    refused = program("inspect", data, "--ignore", "many")
    assert refused.code == 2


def test_groups_and_classes_are_options(data, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "mine.yaml"
    other.write_text("classes: [x, y]")
    result = run(data, "--classes", other, "--group-by", "(.)")
    assert result.exit_code == 0
    assert "0 x" in result.stdout


@pytest.mark.parametrize("options", [["--group-by", "("], ["--group-by", "zz"], ["--ignore", "1"]])
def test_wrong_options_are_usage_errors(data, options):
    assert isinstance(run(data, *options).exception, UsageError)


def test_a_folder_that_is_not_there(tmp_path):
    result = run(tmp_path / "absent")
    assert isinstance(result.exception, DataError)
    assert "no such folder" in str(result.exception)


def test_help_shows_an_example():
    assert "pixelwise inspect data/camvid" in run("--help").stdout


def test_volumes_and_their_options(tmp_path, program):
    for split in ("train", "val"):
        for kind, top in (("images", 200), ("masks", 2)):
            (tmp_path / split / kind).mkdir(parents=True)
            voxels = np.random.default_rng(len(split)).integers(0, top, (8, 7, 6), dtype=np.uint8)
            nibabel.Nifti1Image(voxels, np.diag([0.5, 0.5, 2, 1])).to_filename(tmp_path / split / kind / "a.nii.gz")
    done = program("inspect", tmp_path, "--axis", 0)
    assert done.code == 0
    for words in ("nifti (2)", "7x6 (2)", "8 (2)", "0.5 x 0.5 x 2 mm (2)", "No problems found"):
        assert words in done.out
