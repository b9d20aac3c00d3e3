"""Too little time or memory: how far a plan is met is said, and a run takes what fits."""

import io
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from pixelwise import machine
from pixelwise.cli.progress import TrainingProgress
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.train import make_config, plan, timing, train
from pixelwise.train.folder import read_history
from pixelwise.train.loop import TrainingLoop
from pixelwise.train.module import SegmentationModule

TINY = {"model": "unet", "options": {"widths": [4, 6]}, "crop_px": 32, "workers": 0, "precision": "float32"}
OUT_OF_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def test_a_cap_in_minutes_ends_a_budget_in_steps_with_a_falling_rate_and_says_how_far_it_came(
    toy_data: Path, tmp_path: Path
) -> None:
    text = io.StringIO()
    with TrainingProgress(Console(file=text, width=200)) as progress:
        config = make_config({**TINY, "steps": 1_000_000, "max_minutes": 0.03})
        run = train(toy_data, config, out=tmp_path / "run", report=progress.update)
    assert run.is_short and 0 < run.steps < 900_000
    assert float(read_history(run.folder / "metrics.csv")[-1]["lr"]) == 0.0
    assert "slower than planned, about" in text.getvalue() and "of 1,000,000 steps" in text.getvalue()
    assert train(toy_data, out=run.folder, resume=True).is_short  # a finished run still knows it


def test_a_cap_that_is_not_reached_changes_nothing_and_needs_another_budget(toy_data: Path, tmp_path: Path) -> None:
    rates = []
    for name, more in (("free", {}), ("capped", {"max_minutes": 60})):
        run = train(toy_data, make_config({**TINY, "steps": 6, **more}), out=tmp_path / name)
        assert run.steps == 6 and not run.is_short
        rates.append([row["lr"] for row in read_history(run.folder / "metrics.csv")])
    assert rates[0] == rates[1]
    with pytest.raises(UsageError, match="max_minutes caps a budget in epochs or steps"):
        make_config({"minutes": 1, "max_minutes": 2})


def test_a_batch_that_was_left_open_is_halved_until_it_fits(toy_data: Path, tmp_path: Path, monkeypatch) -> None:
    real = timing.time_steps

    def small(config, model, shape, *rest):
        if shape[0] > 3:
            raise OUT_OF_MEMORY
        return real(config, model, shape, *rest)

    monkeypatch.setattr(timing, "time_steps", small)
    run = train(toy_data, make_config({**TINY, "steps": 1}), out=tmp_path / "run")
    assert run.plan.batch_size == 2 and run.plan.steps_per_epoch == 6
    assert "batch_size=8 does not fit into memory, so it is 2" in run.plan.notes[0]
    with pytest.raises(UsageError, match=r"batch_size=8 .* does not fit into memory.* Use a smaller --set batch_size"):
        train(toy_data, make_config({**TINY, "steps": 1, "batch_size": 8}), out=tmp_path / "other")


def test_a_container_refuses_a_step_too_large_by_name_instead_of_being_killed(toy_data, tmp_path, monkeypatch) -> None:
    small = machine.Room(700 << 20, "the 0.7 GiB of this container or job (cgroup)")
    monkeypatch.setattr(machine, "_free_of_cgroups", lambda: iter([small]))
    given = {**TINY, "crop_px": 64, "steps": 1, "batch_size": 8192}
    with pytest.raises(UsageError, match=r"batch_size=8192 .* does not fit.*of this container or job .cgroup.*smaller"):
        train(toy_data, make_config(given), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_trial_of_a_validation_takes_a_smaller_image_where_memory_is_short(toy_data, tmp_path, monkeypatch) -> None:
    real, sides = plan._pass_s, []
    monkeypatch.setattr(plan, "LARGEST_TRIAL_PX", 256)

    def small(trial, shape, *rest):
        sides.append(shape[2])
        if len(sides) == 1:
            raise OUT_OF_MEMORY
        return real(trial, shape, *rest)

    monkeypatch.setattr(plan, "_pass_s", small)
    assert train(toy_data, make_config({**TINY, "steps": 1, "batch_size": 2}), out=tmp_path / "run").steps == 1
    assert len(sides) == 2


def test_a_validation_without_memory_is_not_blamed_on_the_batch(toy_data: Path, tmp_path: Path, monkeypatch) -> None:
    def hungry(_self):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(TrainingLoop, "_val_folder", hungry)
    with pytest.raises(PixelwiseError, match=r"while the val images were scored.*max_val_images.*is kept"):
        train(toy_data, make_config({**TINY, "steps": 2, "batch_size": 4, "validate_every": 0.3}), out=tmp_path / "run")


def outlook(
    step: int, steps_s: list[float], *, steps: int = 1000, minutes: float | None = None, elapsed_s: float = 0.0
):
    """What a loop says after `step`, where the plan had 0.1 s a step and a validation of 2 s every 100."""
    known = SimpleNamespace(
        plan=SimpleNamespace(steps=steps, step_s=0.1, validate_every_steps=100, device="cpu", warm_px=0),
        module=SimpleNamespace(
            seconds=minutes and minutes * 60,
            config=SimpleNamespace(minutes=minutes),
            progress=SimpleNamespace(elapsed_s=elapsed_s),
        ),
        _steps_s=steps_s,
        _validation_s=2.0,
    )
    return {"step": step, "spent": step / steps, "elapsed_s": elapsed_s, **TrainingLoop._outlook(known, step)}


def test_what_is_left_goes_by_the_last_steps_and_the_plan_before_there_are_enough() -> None:
    quiet, busy = [0.1] * 20, [9.0, *[0.3] * 19]  # of which one was held up
    assert outlook(500, [9.0])["left_s"] == pytest.approx(500 * 0.12) and outlook(500, [9.0])["step_s"] is None
    assert outlook(500, quiet)["left_s"] == pytest.approx(500 * 0.12)
    assert outlook(500, busy)["left_s"] == pytest.approx(500 * 0.32) and outlook(500, busy)["expected_steps"] == 1000
    in_time = outlook(500, busy, minutes=2, elapsed_s=60)
    assert in_time["left_s"] == 60 and in_time["expected_steps"] == 500 + round(60 / 0.32)
    assert outlook(900, quiet, minutes=2, elapsed_s=60)["expected_steps"] == 1400  # faster than planned


@pytest.mark.parametrize(
    ("event", "told", "line"),
    [
        (outlook(500, [0.1] * 20), "", "1.0 min left"),
        (outlook(500, [0.125] * 20), "", "1.2 min left"),
        (outlook(500, [0.3] * 20), "step 500: slower than planned, about 2.7 min left (0.3 s a step, 0.1 s in the plan)",
         "2.7 min left"),
        (outlook(950, [0.3] * 20), "", "0.3 min left"),  # not worth a line
        (outlook(500, [0.3] * 20, minutes=2, elapsed_s=60), "slower than planned, about 688 of 1,000 steps in this time (",
         "688 of 1,000 steps expected, 1.0 min left"),
    ],
)  # fmt: skip
def test_a_busy_machine_is_told_once_and_corrects_every_line(event, told: str, line: str, monkeypatch) -> None:
    monkeypatch.setattr("pixelwise.cli.progress.LINE_EVERY_S", 0.0)
    text = io.StringIO()
    with TrainingProgress(Console(file=text, width=200)) as progress:
        for _ in range(2):
            progress.update(event)
    assert text.getvalue().count("slower than planned") == bool(told) and told in text.getvalue()
    assert all(row.endswith(line) for row in text.getvalue().splitlines() if "slower" not in row)


def test_the_wait_for_crops_and_slow_steps_are_seen_and_validations_are_not(toy_data, tmp_path, monkeypatch) -> None:
    real, seen = SegmentationModule.training_step, []

    def slow(self, batch, index):
        time.sleep(0.02)
        return real(self, batch, index)

    monkeypatch.setattr(SegmentationModule, "training_step", slow)
    monkeypatch.setattr(TrainingLoop, "_validate", lambda _self, _trainer: time.sleep(0.2))
    monkeypatch.setattr("pixelwise.train.loop.RECENT", 5)
    config = make_config({**TINY, "steps": 8, "batch_size": 2, "validate_every": 0.1})  # after every step
    train(toy_data, config, out=tmp_path / "run", report=lambda event: seen.append(event.get("step_s")))
    measured = [seconds for seconds in seen if seconds is not None]
    assert measured and all(0.02 < seconds < 0.2 for seconds in measured)
