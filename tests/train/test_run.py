"""Training as a whole: it learns, it repeats itself bit for bit, and nothing is lost whatever happens to it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pixelwise
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.infer.bundle import load_card
from pixelwise.train import RunConfig, make_config, train
from pixelwise.train import folder as run_folder
from pixelwise.train.folder import read_history
from pixelwise.train.module import SegmentationModule

TINY = {
    "model": "unet",
    "options": {"widths": [4, 6, 8], "batch_norm": True, "dropout": 0.3},
    "crop_px": 32,
    "batch_size": 4,
    "lr": 0.01,
    "workers": 0,
    "precision": "float32",
}


def tiny(**values: object) -> RunConfig:
    return make_config({**TINY, **values})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def last_state(run: Path) -> dict:
    return run_folder.read_checkpoint(run / "checkpoints" / run_folder.LAST_NAME)


def test_a_run_learns_and_its_folder_is_enough_to_predict_with(toy_data: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run = train(toy_data, tiny(epochs=20), out=tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before  # Lightning would go on to swallow it
    assert run.interrupted is None and run.steps == 60
    assert run.best_miou is not None and run.best_miou > 0.85
    scores = pixelwise.evaluate(run.folder, toy_data, split="test").scores
    assert scores.miou > 0.85
    (tmp_path / "elsewhere").mkdir()
    for name in ("model.safetensors", "model.json"):
        (tmp_path / "elsewhere" / name).write_bytes((run.folder / name).read_bytes())
    prediction = pixelwise.load(tmp_path / "elsewhere").predict(torch.rand(3, 17, 23))
    assert prediction.labels.shape == (17, 23)
    assert prediction.probabilities.shape == (2, 17, 23)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "bias_lr": 2, "schedule": "constant"},
        {"optimizer": "rmsprop", "schedule": "exponential", "decay": 0.9, "weight_decay": 1e-4, "warmup": 0},
        {"optimizer": "adam", "lr": 0.02},
        # A sum over the 4096 pixels of a batch: as a mean with a rate 4096 times as high, and not clipped.
        {"optimizer": "sgd", "lr": 0.1 / 4096, "reduction": "sum", "class_weights": [1.0, 3.0]},
    ],
    ids=["sgd", "rmsprop", "adam", "sum"],
)
def test_every_optimiser_learns(toy_data: Path, tmp_path: Path, options: dict[str, object]) -> None:
    run = train(
        toy_data, tiny(epochs=10, options={"widths": [4, 6, 8], "batch_norm": True}, **options), out=tmp_path / "run"
    )
    assert run.best_miou is not None and run.best_miou > 0.7


def test_the_learning_rates_of_fcn_are_taken_and_recorded(toy_data: Path, tmp_path: Path) -> None:
    options = {
        "lr": 1e-10,
        "optimizer": "sgd",
        "reduction": "sum",
        "schedule": "exponential",
        "decay": 0.5,
        "warmup": 0,
    }
    run = train(toy_data, tiny(steps=12, **options), out=tmp_path / "run")
    rows = {row["step"]: float(row["lr"]) for row in read_history(run.folder / "metrics.csv")}
    assert rows["3"] == pytest.approx(0.5e-10) and rows["9"] == pytest.approx(0.125e-10)


def test_the_run_folder_says_what_was_done(toy_data: Path, tmp_path: Path) -> None:
    run = train(toy_data, tiny(steps=12), out=tmp_path / "run", command=["pixelwise", "train"])
    card = load_card(run.folder)
    assert card.labels.names == ("background", "foreground")
    assert card.data["fingerprint"] == run.plan.data["fingerprint"]
    assert 0 <= card.scores["val"]["miou"] <= 1
    rows = read_history(run.folder / "metrics.csv")
    assert [row["step"] for row in rows if row["val_miou"]] == ["3", "6", "9", "12"]
    assert any(row["train_loss"] for row in rows)
    state = json.loads((run.folder / "environment.json").read_text())
    assert state["finished"] is True and state["command"] == ["pixelwise", "train"]
    assert list((run.folder / "tensorboard").glob("events*"))
    assert not [path for path in run.folder.rglob("*") if path.suffix in (".pt", ".pth", ".ckpt", ".pkl")]


def test_the_same_seed_gives_the_same_weights_with_and_without_workers(toy_data: Path, tmp_path: Path) -> None:
    train(toy_data, tiny(steps=6), out=tmp_path / "a")
    train(toy_data, tiny(steps=6, workers=2), out=tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    train(toy_data, tiny(steps=6, seed=1), out=tmp_path / "c")
    assert not torch.equal(weights(tmp_path / "a")["score.weight"], weights(tmp_path / "c")["score.weight"])


COMMON = ("--model", "unet", "--steps", "40", "--set", "options.widths=[4,6,8]", "--set", "options.dropout=0.3")
MORE = ("--set", "crop_px=32", "--set", "batch_size=4", "--set", "checkpoint_minutes=0", "--set", "validate_every=2")


def start(data: Path, run: Path, *options: str) -> subprocess.Popen[str]:
    code = "import sys; from pixelwise.cli import main; main(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", str(data), "--out", str(run), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "300"},
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until the checkpoint has seen `step` steps; the test's own time limit ends a wait that is in vain."""
    path = run / "checkpoints" / run_folder.LAST_NAME
    while not path.exists() or run_folder.checkpoint_step(Path(shutil.copy(path, run))) < step:  # it is being replaced
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def stop_at(data: Path, run: Path, step: int, how: signal.Signals, options: Sequence[str]) -> tuple[int, str]:
    process = start(data, run, *options)
    wait_for_step(process, run, step)
    process.send_signal(how)
    out, err = process.communicate()
    assert "Traceback" not in err, err
    return process.returncode, out


def test_a_run_that_is_killed_asked_to_stop_and_interrupted_ends_with_the_weights_of_one_that_was_not(
    toy_data: Path, tmp_path: Path
) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole_process = start(toy_data, whole, *COMMON, *MORE)
    assert whole_process.communicate() and whole_process.returncode == 0
    code, _ = stop_at(toy_data, torn, 5, signal.SIGKILL, (*COMMON, *MORE))
    assert code == -signal.SIGKILL
    code, out = stop_at(toy_data, torn, 12, signal.SIGTERM, ("--resume",))
    assert code == 130 and "Continue with --resume" in out
    code, _ = stop_at(toy_data, torn, 20, signal.SIGINT, ("--resume",))
    assert code == 130
    last = start(toy_data, torn, "--resume")
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert_same_weights(whole, torn)
    one, other = last_state(whole), last_state(torn)
    assert one["global_step"] == other["global_step"] == 40
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    rows = [row["step"] for row in read_history(torn / "metrics.csv") if row["val_miou"]]
    assert rows == [row["step"] for row in read_history(whole / "metrics.csv") if row["val_miou"]]


def test_resuming_refuses_other_options_and_other_data_and_knows_a_finished_run(toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(toy_data, tiny(steps=3), out=out)
    before = weights(out)
    assert train(toy_data, out=out, resume=True).steps == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    with pytest.raises(UsageError, match=r"lr=0.5 \(the run: 0.01\)"):
        train(toy_data, tiny(steps=3, lr=0.5), out=out, resume=True)
    with pytest.raises(UsageError, match="holds a run already"):
        train(toy_data, tiny(steps=3), out=out)
    with pytest.raises(UsageError, match="no run to continue"):
        train(toy_data, out=tmp_path / "nothing", resume=True)
    other = tmp_path / "other"
    for path in toy_data.rglob("*.png"):
        target = other / path.relative_to(toy_data)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name not in ("train_0.png",):
            target.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="another fingerprint"):
        train(other, out=out, resume=True)
    turned = pixelwise.open_data(toy_data, classes=write_classes(tmp_path / "turned.yaml", {"one": 1, "zero": 0}))
    with pytest.raises(DataError, match="mask values mean other classes"):
        train(turned, out=out, resume=True)


def write_classes(path: Path, values: dict[str, int]) -> Path:
    lines = [f"  - {{name: {name}, values: {value}}}\n" for name, value in values.items()]
    path.write_text("classes:\n" + "".join(lines))
    return path


def test_a_full_disk_is_told_and_keeps_the_last_checkpoint(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = run_folder.save_file, []

    def full_after_two(*args: object, **kwargs: object) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args, **kwargs)

    monkeypatch.setattr(run_folder, "save_file", full_after_two)
    out = tmp_path / "run"
    with pytest.raises(PixelwiseError, match=r"No space left on device.*--resume"):
        train(toy_data, tiny(steps=12, checkpoint_minutes=0, validate_every=10), out=out)
    assert last_state(out)["global_step"] == 2
    monkeypatch.setattr(run_folder, "save_file", real)
    assert train(toy_data, out=out, resume=True).steps == 12
    train(toy_data, tiny(steps=12, checkpoint_minutes=0, validate_every=10), out=tmp_path / "whole")
    assert_same_weights(out, tmp_path / "whole")


def test_running_out_of_memory_says_what_to_change(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixelwise.train.module import SegmentationModule

    real = SegmentationModule.training_step

    def hungry(self: SegmentationModule, batch: object, index: int) -> object:
        if self.global_step == 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(self, batch, index)

    monkeypatch.setattr(SegmentationModule, "training_step", hungry)
    with pytest.raises(PixelwiseError, match=r"memory ran out with batch_size=4.*batch_size=2.*is kept"):
        train(toy_data, tiny(steps=12, checkpoint_minutes=0), out=tmp_path / "run")
    assert last_state(tmp_path / "run")["global_step"] == 2


def test_divergence_is_told(toy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(PixelwiseError, match="diverged") as found:
        train(toy_data, tiny(steps=30, lr=1e6, clip=0, warmup=0, options={"widths": [4, 6]}), out=tmp_path / "run")
    text = str(found.value)
    assert "another --out" in text and "lr=1e+05" in text and "--set clip=1" in text and "No weights were kept" in text
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_divergence_after_a_validation_names_the_weights_that_are_kept(toy_data, tmp_path, monkeypatch) -> None:
    real = SegmentationModule.training_step

    def bursting(self, batch, index):
        if self.global_step == 3:  # the loss of this step is finite, the scores after it are not
            next(self.model.parameters()).data.fill_(torch.nan)
            return sum(parameter.sum() * 0 for parameter in list(self.model.parameters())[1:])
        return real(self, batch, index)

    monkeypatch.setattr(SegmentationModule, "training_step", bursting)
    with pytest.raises(PixelwiseError, match=r"scores overflow at step 4.*diverged.*another --out.*of step 2 are kept"):
        train(toy_data, tiny(steps=9, batch_size=6, validate_every=1, ema=0), out=tmp_path / "run")
    assert load_card(tmp_path / "run").scores["step"] == 2


def test_a_time_budget_ends_with_the_learning_rate_at_zero(toy_data: Path, tmp_path: Path) -> None:
    run = train(toy_data, tiny(minutes=0.08), out=tmp_path / "run")
    rows = read_history(run.folder / "metrics.csv")
    assert run.steps > 0
    assert float(rows[-1]["lr"]) == 0.0
    assert float(rows[-1]["elapsed_s"]) >= 0.08 * 60 - run.plan.validation_s - 1
    assert rows[-1]["val_miou"]


def test_early_stopping_waits_for_patience(toy_data: Path, tmp_path: Path) -> None:
    run = train(
        toy_data, tiny(epochs=50, lr=1e-12, ema=0, patience=2, options={"widths": [4, 6]}), out=tmp_path / "run"
    )
    assert run.steps == 9  # three validations: the first is the best, two are stale


def test_nothing_is_written_when_the_data_or_the_options_do_not_fit(toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"no option 'widhts'.*widths"):
        train(toy_data, tiny(steps=1, options={"widhts": [2, 3]}), out=out)
    with pytest.raises(UsageError, match="disagrees with the data"):
        train(toy_data, tiny(steps=1, options={"num_classes": 5}), out=out)
    with pytest.raises(UsageError, match="3 numbers were given, but there are 2 classes"):
        train(toy_data, tiny(steps=1, class_weights=[1, 2, 3]), out=out)
    with pytest.raises(UsageError, match="no such file"):
        train(toy_data, tiny(steps=1, pretrained="nowhere.pth"), out=out)
    assert not out.exists()


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channel_counts_and_depths_train(channels: int, tmp_path: Path) -> None:
    import numpy as np
    import tifffile

    draws = np.random.default_rng(0)
    for index in range(10):
        for kind, array in (
            ("images", draws.integers(0, 4000, (40, 50, channels), dtype=np.uint16)),
            ("masks", draws.integers(0, 2, (40, 50), dtype=np.uint8)),
        ):
            path = tmp_path / "data" / kind / f"{index}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, array.squeeze())
    run = train(
        tmp_path / "data", tiny(steps=2, class_weights="enet", dice=1.0, label_smoothing=0.1), out=tmp_path / "run"
    )
    assert run.plan.config["in_channels"] == channels
    assert pixelwise.load(run.folder).predict(tmp_path / "data" / "images" / "0.tif").labels.shape == (40, 50)


def test_a_batch_too_small_for_batch_norm_is_told(toy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one value per channel"):
        train(
            toy_data,
            tiny(steps=1, batch_size=1, crop_px=16, options={"widths": [2] * 5, "batch_norm": True}),
            out=tmp_path / "run",
        )


def test_resuming_from_a_damaged_folder_is_told(toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(toy_data, tiny(steps=2), out=out)
    plan = (out / "plan.json").read_text()
    for damaged in ("[]", "{}", '{"data": 3}'):
        (out / "plan.json").write_text(damaged)
        with pytest.raises(DataError, match="fingerprint"):
            train(toy_data, out=out, resume=True)
    (out / "plan.json").write_text(plan)
    (out / "config.yaml").write_text("model: [")
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        train(toy_data, out=out, resume=True)
