"""Too little time or memory: how far a plan is met is said, and a run takes what fits."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pixelwise import machine
from pixelwise.cli.progress import TrainingProgress
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.train import make_config, plan, timing, train
from pixelwise.train.folder import read_history
from pixelwise.train.loop import TrainingLoop

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
