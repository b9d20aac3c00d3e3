"""What is chosen by timing before a training: not by chance, kept by machine and network, and without a trace."""

import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelwise.infer import devices
from pixelwise.machine import cache_folder
from pixelwise.models import create_model
from pixelwise.train import make_config, plan, probe, timing, train
from pixelwise.train.network import Start
from pixelwise.train.probe import choose_workers, probe_steps

SHAPE, CPU = (2, 3, 32), torch.device("cpu")
TINY = {"model": "unet", "options": {"widths": [4, 6]}, "crop_px": 32, "batch_size": 2}


def endless(_batch: int, _step_s: float) -> float:
    """Seconds of a training that a probe may take its 20 s of."""
    return 1e6


def start(**options) -> Start:
    kwargs = {"num_classes": 2, "widths": (4, 6), **options}
    return Start(model=create_model("unet", **kwargs), kwargs=kwargs, loaded=None, mean=(0.5,) * 3, std=(0.2,) * 3)


class Machine:
    """A clock that only the steps move, each by the seconds of its precision; and how many steps were done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.now, self.seconds, self.steps, self.largest = 0.0, {"bf16": 0.2, "float32": 0.2}, [], 2**16
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        for module in (devices, probe):
            monkeypatch.setattr(module, "computes_in_bf16", lambda _device: True)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(timing, "_Trial", self.trial)

    def trial(self, _config, _model, shape, _device) -> SimpleNamespace:
        if shape[0] > self.largest:
            raise RuntimeError("not enough memory: you tried to allocate")

        def step(precision: str) -> float:
            self.steps.append(precision)
            seconds = self.seconds[precision] * (1 + 0.01 * (len(self.steps) % 3))
            self.now += seconds
            return seconds

        return SimpleNamespace(step=step)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path / "cache")


@pytest.mark.parametrize(
    ("bf16", "float32", "chosen"),
    [(0.2, 0.2, "bf16"), (0.2, 0.196, "bf16"), (0.2, 0.15, "float32"), (0.1, 0.3, "bf16")],
)
def test_float32_is_taken_only_where_it_is_clearly_faster(machine, bf16, float32, chosen) -> None:
    machine.seconds = {"bf16": bf16, "float32": float32}
    found = probe_steps(make_config(TINY), start(), SHAPE, CPU, endless)
    assert found.precision == chosen and found.step_s == pytest.approx(machine.seconds[chosen], rel=0.03)
    assert "bf16 0." in found.reasons[0] and "float32 0." in found.reasons[0] and "timed now" in found.reasons[0]
    asked = probe_steps(make_config({**TINY, "precision": "float32"}), start(), SHAPE, CPU, endless)
    assert asked.precision == "float32" and "given" in asked.reasons[0] and "bf16" not in asked.reasons[0]


def test_the_times_are_kept_by_network_and_tried_with_two_steps_the_next_time(machine) -> None:
    machine.seconds["float32"] = 0.1
    first = probe_steps(make_config(TINY), start(), SHAPE, CPU, endless)
    done = len(machine.steps)
    again = probe_steps(make_config(TINY), start(), SHAPE, CPU, endless)
    assert machine.steps[done:] == ["float32", "float32"]
    assert (again.precision, again.step_s) == (first.precision, first.step_s)
    assert "timed before a former run" in again.reasons[0]
    for other in ({"model": start(widths=(4, 8))}, {"shape": (2, 3, 64)}, {"config": make_config({**TINY, "clip": 0})}):
        asked = {"config": make_config(TINY), "model": start(), "shape": SHAPE} | other
        assert "timed now" in probe_steps(*asked.values(), CPU, endless).reasons[0]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"key": 1}', '{"seconds": {"bf16": [0.1]}}', "huge", "negative", "text", "other precision"],
)
def test_a_damaged_file_of_the_cache_counts_as_none_and_is_written_anew(machine, content) -> None:
    probe_steps(make_config(TINY), start(), SHAPE, CPU, endless)
    (path,) = (cache_folder() / "probe").iterdir()
    whole = json.loads(path.read_text())
    damages = {"huge": 1e300, "negative": -0.1, "text": "0.1"}
    if content in damages:
        whole["seconds"]["bf16"][0] = damages[content]
        content = json.dumps(whole)
    elif content == "other precision":
        content = json.dumps(whole | {"seconds": {"float32": whole["seconds"]["float32"]}})
    path.write_text(content)
    assert "timed now" in probe_steps(make_config(TINY), start(), SHAPE, CPU, endless).reasons[0]
    assert set(json.loads(path.read_text())["seconds"]) == {"bf16", "float32"}


def test_times_of_a_busier_hour_are_measured_anew_and_those_of_a_quieter_one_kept(machine) -> None:
    machine.seconds = {"bf16": 0.6, "float32": 0.9}
    assert probe_steps(make_config(TINY), start(), SHAPE, CPU, endless).step_s > 0.5
    machine.seconds = {"bf16": 0.2, "float32": 0.3}
    assert probe_steps(make_config(TINY), start(), SHAPE, CPU, endless).step_s < 0.3
    machine.seconds = {"bf16": 0.6, "float32": 0.9}
    busy = probe_steps(make_config(TINY), start(), SHAPE, CPU, endless)
    assert busy.step_s < 0.3 and "timed before a former run" in busy.reasons[0]


def test_a_cache_that_cannot_be_written_is_told_and_ends_nothing(machine, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    found = probe_steps(make_config(TINY), start(), SHAPE, CPU, endless)
    assert "not kept, since the cache folder cannot be written" in found.reasons[0]


@settings(deadline=None, max_examples=30)
@given(step_s=st.floats(0.001, 60), ratio=st.floats(0.3, 3.5), length_s=st.floats(0.1, 1e5))
def test_a_probe_takes_20_s_or_a_tenth_of_the_training_or_two_steps(step_s, ratio, length_s) -> None:
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, Path("/dev/null/nowhere"))
        machine.seconds = {"bf16": step_s, "float32": step_s * ratio}
        probe_steps(make_config(TINY), start(), SHAPE, CPU, lambda _batch, _step_s: length_s)
    assert machine.now <= max(min(20.0, 0.1 * length_s) + 2.1 * max(ratio, 1) * step_s, 2.1 * step_s)


@pytest.mark.parametrize(("steps", "compared"), [(299, False), (301, True)])
def test_precisions_are_compared_by_the_length_of_the_training_alone_and_then_kept(machine, steps, compared) -> None:
    """Else the same command would train in one precision today and in another tomorrow."""
    machine.seconds = {"bf16": 0.02, "float32": 0.01}
    found = probe_steps(make_config(TINY), start(), SHAPE, CPU, lambda _batch, step_s: steps * step_s)
    assert found.precision == ("float32" if compared else "bf16")
    assert machine.steps.count("float32") >= 6 * compared and cache_folder().exists() == compared


def test_a_short_training_is_not_held_up_and_keeps_nothing(machine) -> None:
    found = probe_steps(make_config(TINY), start(), SHAPE, CPU, lambda _batch, step_s: 6 * step_s)
    assert machine.steps == ["bf16", "bf16"] and found.precision == "bf16"
    assert "float32 was not timed" in found.reasons[0] and not cache_folder().exists()


def test_a_batch_is_smaller_for_want_of_memory_and_larger_on_a_gpu_with_a_budget_in_time_alone(machine, monkeypatch):
    machine.largest = 3
    config = make_config({**TINY, "batch_size": None})
    small = probe_steps(config, start(), (8, 3, 32), CPU, endless)
    assert small.batch_size == 2 and "8 does not fit into memory" in small.reasons[1] and len(small.notes) == 1
    machine.largest = 2**16  # steps take as long whatever the batch is, so a larger one is faster for each crop
    assert probe_steps(config, start(), (8, 3, 32), CPU, endless).batch_size == 8
    cuda = torch.device("cuda")
    monkeypatch.setattr(timing, "_key", lambda *_given: {"precisions": ["bf16"]})
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.no_grad())
    for more, wanted in (({"minutes": 5}, 32), ({"steps": 5}, 8), ({"minutes": 5, "batch_size": 8}, 8)):
        monkeypatch.setattr(timing, "recall", lambda _key: None)
        found = probe_steps(make_config({**TINY, "batch_size": None, **more}), start(), (8, 3, 32), cuda, endless)
        assert found.batch_size == wanted
        assert ("the learning rate is not changed" in "".join(found.notes)) == (wanted == 32)


def test_timing_leaves_the_network_and_every_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = start(dropout=0.5, batch_norm=True)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = timing.time_steps(make_config(TINY), made.model, SHAPE, CPU, ("float32", "bf16"), lambda _step_s: 2.0)
    assert all(times and all(seconds > 0 for seconds in times) for times in found.values()) and len(found) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


# -- workers --

seconds = st.floats(1e-4, 10)


@settings(deadline=None)
@given(batch_s=seconds, step_s=seconds, cores=st.one_of(st.none(), st.integers(1, 16)), most=st.integers(0, 8))
def test_the_fewest_processes_are_taken_that_cost_next_to_nothing(batch_s, step_s, cores, most) -> None:
    chosen, reason = choose_workers(batch_s, step_s, cores=cores, most=most)
    assert 0 <= chosen <= most and reason.startswith(f"workers {chosen}: ") and reason.count("with ") == most + 1
    if cores is None and chosen < most:  # a GPU waits for its crops for less than 3 % of a step
        waits = batch_s if chosen == 0 else max(0.0, batch_s / chosen - step_s)
        assert waits <= 0.03 * step_s + 1e-9


@pytest.mark.parametrize(("batch_s", "wanted"), [(0.002, 0), (0.005, 1), (0.1, 1), (0.38, 1), (1.2, 2)])
def test_beside_a_network_on_two_cores_there_is_one_process_unless_crops_are_free_or_dear(batch_s, wanted) -> None:
    assert choose_workers(batch_s, 0.4, cores=2, most=2)[0] == wanted


def test_crops_are_timed_for_a_long_training_whose_workers_are_left_open(toy_data, tmp_path, monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(plan, "time_crops", lambda _dataset, images: asked.append(images) or 1e-9)
    monkeypatch.setattr(plan, "most_workers", lambda _kind: 2)
    short = {**TINY, "steps": 1, "precision": "float32"}
    for name, more, wanted in (("short", {}, None), ("given", {"workers": 1}, 1), ("open", {}, 0)):
        if name != "short":
            monkeypatch.setattr(plan, "CROPS_S", 0.0)
        run = train(toy_data, make_config({**short, **more}), out=tmp_path / name)
        assert wanted is None or run.plan.workers == wanted
    assert asked == [12]
    assert run.plan.reasons[-1].startswith("workers 0: the crops of a step take")


def test_crops_are_timed_in_one_thread_over_all_images() -> None:
    class Crops:
        def __init__(self) -> None:
            self.drawn: list[tuple[int, int, int]] = []

        def __getitem__(self, key: tuple[int, int]) -> None:
            self.drawn.append((*key, torch.get_num_threads()))

    crops, threads = Crops(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert 0 < timing.time_crops(crops, 5) < 0.1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert {index for index, _, _ in crops.drawn} == set(range(5))
    assert [position for _, position, _ in crops.drawn] == list(range(33))
    assert {count for _, _, count in crops.drawn} == {1}


def test_a_run_that_goes_on_times_nothing(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(event: dict) -> None:
        if event.get("step") == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = make_config({**TINY, "steps": 4, "workers": 0, "precision": "float32"})
    begun = train(toy_data, config, out=tmp_path / "run", report=stop)
    assert begun.interrupted == "SIGTERM"
    for name in ("time_steps", "time_crops"):
        monkeypatch.setattr(timing, name, None)
    monkeypatch.setattr(plan, "time_crops", None)
    ended = train(toy_data, out=tmp_path / "run", resume=True)
    assert ended.steps == 4 and ended.plan.reasons == begun.plan.reasons and ended.plan.step_s == begun.plan.step_s
