"""Training in stages: each from the one before, and as safe against interruptions as a single run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pixelwise.cli import main
from pixelwise.cli.progress import TrainingProgress
from pixelwise.errors import DataError, UsageError
from pixelwise.train import RunConfig, make_config, train
from pixelwise.train import folder as run_folder
from pixelwise.train.folder import CONFIG_NAME, read_history
from pixelwise.train.run import plan_stages

TINY = {
    "model": "unet",
    "options": {"widths": [4, 6], "dropout": 0.3},
    "crop_px": 32,
    "batch_size": 4,
    "lr": 0.01,
    "workers": 0,
    "precision": "float32",
}
FCN = {"widths": [4, 4, 4, 4, 4], "head_width": 8}


def tiny(**values: object) -> RunConfig:
    return make_config({**TINY, **values})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# -- the plan of the stages --


def test_without_stages_there_is_one_training_with_the_very_options():
    config = RunConfig()
    (only,) = plan_stages(config, Path("run"))
    assert only.config == config and only.recorded is config and only.folder == Path("run") and not only.words


def test_each_stage_starts_from_the_one_before_with_its_learning_rate():
    config = tiny(stages="segnet, bayesian_segnet", init="vgg16", lr=1.0, stage_lr=0.1, epochs=3)
    assert config.stages == ("segnet", "bayesian_segnet")
    first, second, last = plan_stages(config, Path("run"))
    assert [stage.config.model for stage in (first, second, last)] == ["segnet", "bayesian_segnet", "unet"]
    assert [stage.config.lr for stage in (first, second, last)] == pytest.approx([1, 0.1, 0.01])
    assert [stage.config.init for stage in (first, second, last)] == ["vgg16", str(first.folder), str(second.folder)]
    assert all(stage.config.budget == ("epochs", 3) for stage in (first, second, last))
    assert first.recorded.stages == second.recorded.stages == () and last.recorded is config
    assert last.folder == Path("run") and second.folder == Path("run/stages/2-bayesian_segnet")


def test_the_file_of_weights_is_for_the_first_stage():
    first, last = plan_stages(tiny(stages=["unet"], pretrained="a.pth"), Path("run"))
    assert (first.config.pretrained, first.config.init) == ("a.pth", None)
    assert (last.config.pretrained, last.config.init) == (None, str(first.folder))


def test_options_that_a_stage_does_not_know_are_left_out_and_said():
    config = tiny(model="bayesian_segnet", stages=["segnet"], options={"dropout": 0.1, "widths": [4] * 5})
    first, last = plan_stages(config, Path("run"))
    assert first.config.options == {"widths": [4] * 5} and last.config.options == config.options
    assert first.words == "1 of 2: segnet, in run/stages/1-segnet; left out, since it has no such option: dropout"
    assert last.words == "2 of 2: bayesian_segnet, in run"


def test_stages_are_checked_before_the_first_begins(toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"no model called 'unett'.*unet"):
        train(toy_data, tiny(steps=1, stages=["unett"]), out=out)
    with pytest.raises(UsageError, match="no option 'widhts'"):
        train(toy_data, tiny(steps=1, stages=["unet"], options={"widhts": [4, 6]}), out=out)
    with pytest.raises(UsageError, match=r"unet cannot start from the stage before it: .* 0 tensors fit"):
        train(toy_data, tiny(steps=1, stages=["segnet"], options={}), out=out)
    with pytest.raises(UsageError, match="neither a run folder"):
        train(toy_data, tiny(steps=1, stages=["unet"], init="no/such/run"), out=out)
    with pytest.raises(UsageError, match="3 numbers were given, but there are 2 classes"):
        train(toy_data, tiny(steps=1, stages=["unet"], class_weights=[1, 2, 3]), out=out)
    assert not out.exists()


# -- whole runs --


def test_a_staged_run_is_its_stages_one_after_the_other(toy_data: Path, tmp_path: Path) -> None:
    out, pages = tmp_path / "run", []
    run = train(
        toy_data,
        tiny(steps=4, stages=["unet"], stage_lr=0.5),
        out=out,
        on_plan=lambda plan, _inspection: pages.append(plan),
    )
    first = out / "stages" / "1-unet"
    assert run.folder == out and run.steps == 4
    assert [plan.stage for plan in pages] == [f"1 of 2: unet, in {first}", f"2 of 2: unet, in {out}"]
    assert pages[0].pretrained is None and pages[1].pretrained.startswith(f"unet of {first}: ")
    assert yaml.safe_load((out / CONFIG_NAME).read_text())["stages"] == ["unet"]
    assert float(read_history(out / "metrics.csv")[-1]["lr"]) == 0
    # By hand: the first alone, then the second from it.
    train(toy_data, tiny(steps=4), out=tmp_path / "one")
    train(toy_data, tiny(steps=4, lr=0.005, init=str(tmp_path / "one")), out=tmp_path / "two")
    assert_same_weights(first, tmp_path / "one")
    assert_same_weights(out, tmp_path / "two")
    assert not torch.equal(weights(first)["score.weight"], weights(out)["score.weight"])


def test_a_finished_staged_run_is_known_and_other_data_are_refused(toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(toy_data, tiny(steps=2, stages=["unet"]), out=out)
    before = weights(out)
    assert train(toy_data, out=out, resume=True).steps == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    with pytest.raises(UsageError, match="holds a run already"):
        train(toy_data, tiny(steps=2, stages=["unet"]), out=out)
    with pytest.raises(UsageError, match=r"stages=\(\) \(the run: \('unet',\)\)"):
        train(toy_data, tiny(steps=2, stages=[]), out=out, resume=True)
    (out / "stages" / "1-unet" / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="fingerprint"):
        train(toy_data, out=out, resume=True)


def test_fcn_in_three_stages(toy_data: Path, tmp_path: Path) -> None:
    config = tiny(model="fcn8s", stages="fcn32s,fcn16s", options=FCN, steps=2, batch_size=2, ema=0, stage_lr=0.1)
    run = train(toy_data, config, out=tmp_path / "run")
    folders = [tmp_path / "run" / "stages" / "1-fcn32s", tmp_path / "run" / "stages" / "2-fcn16s", tmp_path / "run"]
    for folder, missing in zip(folders[1:], ("score_pool4.weight", "score_pool3.weight"), strict=True):
        said = json.loads((folder / "plan.json").read_text())["pretrained"]
        assert "2 missing: " in said and missing in said
    rates = [max(float(row["lr"]) for row in read_history(folder / "metrics.csv")) for folder in folders]
    assert run.plan.model == "fcn8s" and rates == sorted(rates, reverse=True)
    assert "score_pool3.weight" in weights(run.folder)


# -- interruptions --

OPTIONS = ("--model", "unet", "--stages", "unet", "--steps", "16", "--set", "options.widths=[4,6]", "--set")
MORE = ("options.dropout=0.3", "--set", "crop_px=32", "--set", "batch_size=4", "--set", "checkpoint_minutes=0")


def start(data: Path, run: Path, *options: str) -> subprocess.Popen[str]:
    code = "import sys; from pixelwise.cli import main; main(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", str(data), "--out", str(run), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "300"},
    )


def stop_at(process: subprocess.Popen[str], folder: Path, step: int, how: signal.Signals) -> tuple[int, str]:
    path = folder / "checkpoints" / run_folder.LAST_NAME
    while (
        not path.exists() or run_folder.checkpoint_step(Path(shutil.copy(path, folder))) < step
    ):  # it is being replaced
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(how)
    out, err = process.communicate()
    assert "Traceback" not in err, err
    return process.returncode, out


def test_killed_in_any_stage_it_goes_on_and_ends_with_the_same_weights(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train(toy_data, make_config({**TINY, "lr": 1e-3, "steps": 16, "stages": ["unet"], "precision": "auto"}), out=whole)
    first = torn / "stages" / "1-unet"
    code, _ = stop_at(start(toy_data, torn, *OPTIONS, *MORE), first, 5, signal.SIGKILL)
    assert code == -signal.SIGKILL and not (torn / "model.json").exists()

    def asked_to_stop(_progress: TrainingProgress, event: dict[str, Any]) -> None:
        if event.get("step") == 7 and (torn / "plan.json").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("COLUMNS", "200")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as done:
        patch.setattr(TrainingProgress, "update", asked_to_stop)
        main(["train", str(toy_data), "--out", str(torn), "--resume"])
    out = capsys.readouterr().out
    assert done.value.code == 130 and "at step 7 of stage 2 of 2: unet; the checkpoint is written" in out
    assert "1 of 2: unet" in out and "2 of 2: unet" in out
    assert train(toy_data, out=torn, resume=True).steps == 16
    assert_same_weights(whole / "stages" / "1-unet", first)
    assert_same_weights(whole, torn)


def test_killed_before_the_first_checkpoint_of_a_stage_it_begins_that_stage_again(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixelwise.train import job as job_module

    whole, torn, real = tmp_path / "whole", tmp_path / "torn", job_module.SegmentationModule
    train(toy_data, tiny(steps=3, stages=["unet"]), out=whole)

    def dies_in_the_second(model: object, config: RunConfig, *args: object) -> object:
        if config.init:
            raise KeyboardInterrupt
        return real(model, config, *args)

    monkeypatch.setattr(job_module, "SegmentationModule", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(toy_data, tiny(steps=3, stages=["unet"]), out=torn)
    monkeypatch.setattr(job_module, "SegmentationModule", real)
    moved = torn.rename(tmp_path / "moved")  # what a stage starts from is found where the run lies now
    train(toy_data, out=moved, resume=True)
    assert_same_weights(whole, moved)
