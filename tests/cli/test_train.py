"""`pixelwise train` and `demo` as a user types them."""

import importlib
import os
import shutil
import stat
from pathlib import Path

import pytest
from PIL import Image

from pixelwise.cli import main

SMALL = ("--model", "unet", "--set", "options.widths=[4,6,8]", "--set", "crop_px=32", "--set", "batch_size=4")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def test_training_prints_its_plan_and_its_scores_and_writes_the_report(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "run"
    assert run("train", toy_data, "--out", out, *SMALL, "--steps", "6") == 0
    text = capsys.readouterr().out
    for word in (
        "data",
        "classes",
        "2: background, foreground",
        "unet",
        "parameters",
        "random",
        "32 x 32 px",
        "a step",
        "expected",
    ):
        assert word in text
    assert "val: mIoU" in text and "test: mIoU" in text
    assert (out / "report.html").stat().st_size > 10_000
    assert "Traceback" not in text
    assert run("train", toy_data, "--out", out, *SMALL) == 2
    assert "holds a run already. Continue it with --resume" in capsys.readouterr().err
    assert run("train", toy_data, "--out", out, "--resume") == 0


def test_options_come_from_a_file_and_what_is_typed_wins(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.yaml").write_text(
        "model: unet\noptions: {widths: [4, 6]}\ncrop_px: 48\nbatch_size: 2\nsteps: 1\n"
    )
    out = tmp_path / "run"
    assert run("train", toy_data, "--out", out, "--config", tmp_path / "options.yaml", "--set", "crop_px=32") == 0
    assert "batch_size 2" not in capsys.readouterr().out
    text = (out / "config.yaml").read_text()
    assert "crop_px: 32" in text and "batch_size: 2" in text


def test_explain_says_why_and_from_where(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run("train", toy_data, "--out", tmp_path / "run", *SMALL, "--steps", "1", "--explain") == 0
    text = capsys.readouterr().out
    assert "batch_size 4: given" in text and "s a step (median of" in text and "timed now" in text
    assert "workers" in text and ": by default" in text


def test_stages_and_a_start_from_another_run(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run("train", toy_data, "--out", tmp_path / "a", *SMALL, "--steps", "2", "--stages", "unet") == 0
    text = capsys.readouterr().out
    assert "1 of 2: unet" in text and "2 of 2: unet" in text and "unet of " in text and "val: mIoU" in text
    assert (tmp_path / "a" / "report.html").exists() and (tmp_path / "a" / "stages" / "1-unet" / "model.json").exists()
    assert run("train", toy_data, "--out", tmp_path / "b", *SMALL, "--steps", "1", "--init", tmp_path / "a") == 0
    assert f"unet of {tmp_path / 'a'}" in capsys.readouterr().out


def test_windows_and_gaps_are_in_the_plan(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    small = ("--set", "options.widths=[4, 4]", "--set", "options.kernels=[4, 2]", "--set", "options.pools=[2, 2]")
    arguments = ("--model", "patch_classifier", *small, "--set", "options.window=9", "--steps", "1")
    assert run("train", toy_data, "--out", tmp_path / "a", *arguments) == 0
    text = capsys.readouterr().out
    assert "windows" in text and "9 x 9 px, 128 a batch" in text
    assert run("train", toy_data, "--out", tmp_path / "b", *SMALL, "--steps", "1", "--set", "separation=10") == 0
    assert "between the connected regions of the masks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "bacth_size=3"), "Did you mean batch_size"),
        (("--model", "unett"), "Did you mean unet"),
        (("--backbone", "resnet81"), "Did you mean"),
        (("--minutes", "1", "--steps", "2"), "minutes and steps are budgets"),
        (("--pretrained", "nowhere.pth"), "there is no such file"),
        (("--model", "unet", "--pretrained"), "this network has none of its own"),
        (("--config", "nowhere.yaml"), "cannot be read as YAML"),
        (("--set", "lr"), "write it as key=value"),
        (("--set", "precision=bf17"), "precision"),
        (("--set", "device=tpu"), "cannot be used here"),
        (("--resume",), "no run to continue"),
        (("--init", "nowhere"), "--init nowhere: is neither a run folder"),
        (("--init", "vgg16", "--pretrained"), "init and pretrained both name the weights to start from"),
        (("--model", "unet", "--init", "resnet18"), "this network starts from no classifier"),
        (("--init", "resnet34"), "the encoder is resnet18"),
        (("--model", "unet", "--stages", "unett"), "Did you mean unet"),
        (("--model", "unet", "--stages", "segnet"), "unet cannot start from the stage before it"),
        (("--model", "unet", "--set", "class_weights=[1, 2, 3]", "--set", "crop_px=32"), "there are 2 classes"),
        (("--set", "momentum=0.99"), "momentum means nothing without optimizer=sgd"),
        (("--model", "patch_classifier", "--set", "crop_px=32"), "is trained on windows of 65 px, not on crops"),
    ],
)
def test_mistakes_are_told_in_one_paragraph(
    arguments: tuple[str, ...], message: str, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", toy_data, "--out", tmp_path / "run", *arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_pretrained_without_network_or_cache_is_told_before_anything_starts(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    assert run("train", toy_data, "--out", tmp_path / "run", "--backbone", "resnet10t", "--pretrained") == 2
    assert "could not fetch them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fatal_data_problems_are_listed_at_once_and_nothing_is_written(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    (data / "train" / "images" / "train_1.png").write_bytes(b"not an image")
    Image.new("L", (5, 5)).save(data / "train" / "masks" / "train_2.png")
    assert run("train", data, "--out", tmp_path / "run", *SMALL, "--steps", "1") == 2
    err = capsys.readouterr().err
    assert "train_1.png" in err and "train_2.png" in err
    assert not (tmp_path / "run").exists()


def test_a_test_split_without_masks_is_not_scored_and_the_choice_of_masks_is_remembered(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(toy_data, data)
    shutil.rmtree(data / "test" / "masks")
    for split in ("train", "val"):
        shutil.copytree(data / split / "masks", data / split / "labels")
        for number, path in enumerate(sorted((data / split / "labels").iterdir())):
            with Image.open(path) as mask:
                size = mask.size
            Image.new("L", size, number % 2).save(path)
    assert run("train", data, "--out", out, *SMALL, "--steps", "1") == 2
    assert "Say which with --masks NAME" in capsys.readouterr().err
    assert run("train", data, "--out", out, *SMALL, "--steps", "1", "--masks", "masks") == 0
    text = capsys.readouterr().out
    assert "val: mIoU" in text
    assert "test: not scored, 4 of its 4 images have no mask." in text
    assert (out / "report.html").exists()
    assert run("evaluate", out, data, "--split", "val") == 0
    assert run("evaluate", out, data, "--split", "test") == 2
    assert "have no mask" in capsys.readouterr().err


def test_training_on_everything_keeps_the_last_weights(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    images = sorted((toy_data / "train" / "images").iterdir())
    lines = [f"{path},{path.parent.parent / 'masks' / path.name},train" for path in images]
    (tmp_path / "all.csv").write_text("\n".join(["image,mask,split", *lines]))
    out = tmp_path / "run"
    assert run("train", tmp_path / "all.csv", "--out", out, *SMALL, "--steps", "2") == 0
    text = capsys.readouterr().out
    assert f"{len(images)} train" in text
    assert "the last weights are kept, not the best" in text
    assert (out / "model.safetensors").exists()


def test_the_demo_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module("pixelwise.cli.demo"), "SCENES", {"train": 4, "val": 2, "test": 2})
    out = tmp_path / "demo"
    assert run("demo", "--out", out, "--minutes", "0.05") == 0
    assert (out / "report.html").exists()
    assert len(list((out / "labels").glob("*.png"))) == 12  # six scenes, each with its overlay
    text = " ".join(capsys.readouterr().out.split())
    assert " of 1,000 planned steps were done: the time was up" in text and "On a quiet machine with two cores" in text
    assert run("demo", "--out", out) == 0  # goes on where it was: everything is there already


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
@pytest.mark.parametrize("mask", [0o027, 0o002], ids=oct)
def test_everything_that_is_written_has_the_permissions_of_the_umask(toy_data: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        out, images = tmp_path / "run", toy_data / "test" / "images"
        assert run("train", toy_data, "--out", out, *SMALL, "--set", "workers=0", "--steps", "1") == 0
        assert run("evaluate", out, toy_data, "--split", "test") == 0
        assert run("inspect", toy_data, "--write-classes", tmp_path / "new" / "classes.yaml") == 0
        for kind in ("png", "tiff", "npy", "ome-zarr"):
            more = ("--maps", "entropy", "--overlay") if kind == "tiff" else ()
            more += ("--geojson", "--coco") if kind == "png" else ()
            given = ("predict", out, images, "--out", tmp_path / kind, "--format", kind, *more)
            assert run(*given) == 0
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
