"""Training on two devices: two processes of this CPU stand for two GPUs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixelwise.errors import UsageError
from pixelwise.train import make_config, train
from pixelwise.train.folder import LAST_NAME, checkpoint_step, read_history

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


def test_two_devices_see_what_one_sees_in_larger_batches(toy_data: Path, tmp_path: Path) -> None:
    """The same crops in a step, each with as many labelled pixels: the mean of two gradients is the gradient of all."""
    given = {"model": "unet", "options": {"widths": [4, 6]}, "crop_px": 32, "workers": 0, "precision": "float32"}
    given |= {"device": "cpu", "class_weights": "none", "optimizer": "sgd", "lr": 0.1, "ema": 0, "scale": (1, 1)}
    one = train(toy_data, make_config({**given, "steps": 3, "batch_size": 4}), out=tmp_path / "one").folder
    two = train(
        toy_data, make_config({**given, "steps": 3, "batch_size": 2, "devices": 2}), out=tmp_path / "two"
    ).folder
    a, b = (load_file(run / "model.safetensors") for run in (one, two))
    assert all(torch.allclose(tensor, b[name], atol=1e-5) for name, tensor in a.items())
    assert "LOCAL_RANK" not in os.environ and not torch.distributed.is_initialized()


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
