"""Training on two devices: two processes of this CPU stand for two GPUs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixelwise.data.layouts import DataFolder, open_data
from pixelwise.errors import UsageError
from pixelwise.train import make_config, train
from pixelwise.train.folder import LAST_NAME, checkpoint_step, read_history, settle_config, write_config

CODE = "import sys; from pixelwise.cli import main; main(sys.argv[1:])"
OPTIONS = ("options.widths=[4,6]", "crop_px=32", "batch_size=2", "devices=2", "device=cpu", "precision=float32",
           "workers=0", "checkpoint_minutes=0", "validate_every=2")  # fmt: skip


def start(data: Path, out: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "train", str(data), "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )


def options(*more: str) -> tuple[str, ...]:
    return ("--model", "unet", *(word for setting in (*OPTIONS, *more) for word in ("--set", setting)))


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return out


def step_of(run: Path) -> int:
    """The step of the last checkpoint; -1 if there is none, or another takes its place while it is read."""
    try:
        return checkpoint_step(run / "checkpoints" / LAST_NAME)
    except RuntimeError:
        return -1


def test_two_devices_train_and_go_on_after_a_kill_to_the_same_weights(toy_data: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole" / "run", tmp_path / "torn" / "run"
    text = finish(start(toy_data, whole, "--steps", "12", *options()))
    assert text.count("Report: ") == 1 and text.count("val: mIoU") == 1  # one process reports
    rows = [row["step"] for row in read_history(whole / "metrics.csv") if row["val_miou"]]
    assert rows == ["6", "12"]  # 12 images, 2 crops on each of 2 devices: 3 steps an epoch
    process = start(toy_data, torn, "--steps", "12", *options())
    while step_of(torn) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(start(toy_data, torn, "--resume"))
    one, other = (load_file(run / "model.safetensors") for run in (whole, torn))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert [row["step"] for row in read_history(torn / "metrics.csv") if row["val_miou"]] == rows


@pytest.fixture
def uneven_data(tmp_path: Path) -> DataFolder:
    """7 training images, of which each has more unlabelled pixels than the one before: no batch fits an epoch."""
    draws = np.random.default_rng(0)
    for split, count in {"train": 7, "val": 2}.items():
        for index in range(count):
            mask = draws.integers(0, 2, (48, 48)).astype(np.uint8)
            mask[: 6 * index] = 255
            image = draws.integers(0, 90, (48, 48, 3)) + 130 * (mask[:, :, None] == 1)
            for kind, array in (("images", image.astype(np.uint8)), ("masks", mask)):
                path = tmp_path / "data" / split / kind / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return open_data(tmp_path / "data", ignore=(255,))


def test_two_devices_learn_as_one_and_a_run_goes_on_over_more_or_fewer(uneven_data: DataFolder, tmp_path: Path) -> None:
    """The same crops in each step, weighted by classes and unevenly labelled: the same losses and weights, to rounding."""
    given = {"model": "unet", "options": {"widths": [4, 6]}, "crop_px": 32, "workers": 0, "precision": "float32"}
    given |= {"device": "cpu", "optimizer": "sgd", "lr": 0.1, "ema": 0, "steps": 20, "validate_every": 100}

    def stop(event: dict[str, Any]) -> None:
        if event.get("step") == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    ended = []
    for devices, later in ((1, 1), (1, 2), (2, 1)):
        out, plans = tmp_path / f"{devices}-{later}", []
        config = make_config({**given, "batch_size": 4 // devices, "devices": devices})
        assert train(uneven_data, config, out=out, report=stop).steps == 10
        again = None if later == devices else make_config({"devices": later})
        run = train(uneven_data, again, out=out, resume=True, on_plan=lambda plan, _: plans.append(plan))  # noqa: B023
        assert run.steps == 20 and run.plan.batch_size * later == 4
        told = f"devices={later}, and {devices} before: a step still takes 4 crops, {4 // later} on each device"
        assert any(told in note for note in plans[0].notes) == (later != devices)
        losses = [float(row["train_loss"]) for row in read_history(out / "metrics.csv") if row["train_loss"]]
        ended.append((losses, load_file(out / "model.safetensors")))
    (losses, weights), *others = ended
    assert len(losses) == 2
    for other_losses, other in others:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        assert all(torch.allclose(tensor, other[name], atol=1e-5) for name, tensor in weights.items())
    assert "LOCAL_RANK" not in os.environ and not torch.distributed.is_initialized()


def test_a_number_of_devices_that_a_run_cannot_go_on_with_is_refused(uneven_data: DataFolder, tmp_path: Path) -> None:
    small = {"model": "unet", "options": {"widths": [4, 6]}, "crop_px": 32, "steps": 1, "workers": 0}
    run, staged = tmp_path / "run", tmp_path / "staged"
    train(uneven_data, make_config({**small, "batch_size": 6}), out=run)
    with pytest.raises(UsageError, match=r"takes 6 crops, which are not shared out evenly. Choose one of 1, 2, 3, 6\."):
        settle_config(run, make_config({"devices": 4}), True)
    assert settle_config(run, make_config({"devices": 3}), True).batch_size == 2
    assert settle_config(run, make_config({"workers": 1}), True).batch_size == 6
    staged.mkdir()
    write_config(staged, make_config({**small, "stages": ("unet",)}))
    with pytest.raises(UsageError, match="a run in stages goes on with the devices=1 that it began with"):
        settle_config(staged, make_config({"devices": 2}), True)


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(toy_data: Path, tmp_path: Path) -> None:
    process = start(toy_data, tmp_path / "run", "--steps", "3000", *options("validate_every=1000"))
    while step_of(tmp_path / "run") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "Continue with --resume" in finish(process, 130)


def test_a_device_that_ends_before_the_training_begins_ends_all(toy_data: Path, tmp_path: Path) -> None:
    """Lightning would wait for it for half an hour."""
    (tmp_path / "fail.py").write_text("def further(job, rank):\n    raise MemoryError('none is left')\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import fail; from pixelwise.train import job\n"
        "job._further = fail.further\n"
        "from pixelwise.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "train", str(toy_data), "--out", str(tmp_path / "run"), *options()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)])},
    )
    assert done.returncode == 2 and "the process of device 1 ended with exit code 1" in done.stderr, done.stderr


def test_torchrun_and_options_that_mean_nothing_are_refused(toy_data: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="sync_batch_norm means nothing"):
        make_config({"sync_batch_norm": True})
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = make_config({"model": "unet", "options": {"widths": [4, 6]}, "steps": 1, "devices": 2, "device": "cpu"})
    with pytest.raises(UsageError, match="without torchrun"):
        train(toy_data, config, out=tmp_path / "run")
