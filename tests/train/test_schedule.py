from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pixelwise.train import make_config
from pixelwise.train.module import SegmentationModule, lr_factor

schedules = st.one_of(
    st.fixed_dictionaries({"schedule": st.just("poly"), "warmup": st.floats(0, 0.9), "poly_power": st.floats(0.5, 2)}),
    st.fixed_dictionaries({"schedule": st.just("onecycle"), "warmup": st.floats(0, 0.9)}),
)


@given(options=schedules)
def test_the_rate_ends_at_zero_with_the_budget(options):
    assert lr_factor(make_config(options), 1.0) == pytest.approx(0, abs=1e-12)


@given(options=schedules, progress=st.floats(0, 1))
def test_the_rate_is_a_share_of_its_peak(options, progress):
    assert 0 <= lr_factor(make_config(options), progress) <= 1


@given(options=schedules)
def test_the_peak_stands_at_the_end_of_the_warm_up(options):
    assert lr_factor(make_config(options), options["warmup"]) == pytest.approx(1)


@given(options=schedules)
def test_it_rises_then_falls_without_a_jump(options):
    points = [index / 2000 for index in range(2001)]
    config = make_config(options)
    values = [lr_factor(config, point) for point in points]
    for point, before, after in zip(points[1:], values, values[1:], strict=False):
        assert after >= before if point < options["warmup"] else True
        assert after <= before if point - 1 / 2000 >= options["warmup"] else True
    gentle = options["warmup"] >= 0.05 and options.get("poly_power", 1) >= 1
    assert not gentle or max(abs(a - b) for a, b in pairwise(values)) < 0.05


@pytest.mark.parametrize("schedule", ["poly", "onecycle"])
def test_the_first_step_of_a_time_budget_is_not_wasted(schedule):
    assert lr_factor(make_config({"schedule": schedule, "warmup": 0.1}), 0.0) == 0.01
    assert lr_factor(make_config({"schedule": schedule, "warmup": 0.0}), 0.0) == 1


def test_values_by_hand():
    poly = make_config({"schedule": "poly", "warmup": 0.2, "poly_power": 2.0})
    assert lr_factor(poly, 0.1) == pytest.approx(0.5)
    assert lr_factor(poly, 0.6) == pytest.approx(0.25)
    cosine = make_config({"schedule": "onecycle", "warmup": 0.2})
    assert lr_factor(cosine, 0.1) == pytest.approx(0.5)
    assert lr_factor(cosine, 0.6) == pytest.approx(0.5)
    assert lr_factor(cosine, 0.4) == pytest.approx(0.8536, abs=1e-4)


def test_progress_in_steps_and_in_seconds(monkeypatch):
    def spent(step, elapsed_s, **options):
        plan = SimpleNamespace(mean=(0.0,), std=(1.0,), steps=8, steps_per_epoch=1, validation_s=30)
        module = SegmentationModule(nn.Conv2d(1, 2, 1), make_config({"ema": 0, **options}), plan, None)
        monkeypatch.setattr(SegmentationModule, "global_step", step)
        module.progress.elapsed_s = elapsed_s
        return module.spent()

    assert spent(2, 1e9) == 0.25
    assert spent(9, 0) == 1
    assert spent(10**9, 15, minutes=1.5) == 0.25  # half a minute is left for the last validation
    assert spent(0, 61, minutes=1.5) == 1


def test_a_constant_rate_stays():
    constant = make_config({"schedule": "constant", "warmup": 0.1})
    for progress in (0.1, 0.5, 1.0):
        assert lr_factor(constant, progress) == 1
    assert lr_factor(constant, 0.05) == pytest.approx(0.5)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 46])
def test_an_exponential_rate_falls_after_each_epoch(steps_per_epoch):
    options = {"schedule": "exponential", "warmup": 0.0, "decay": 0.5}
    for step in range(4 * steps_per_epoch):
        factor = lr_factor(make_config(options), 0.5, step / steps_per_epoch)
        assert factor == 0.5 ** (step // steps_per_epoch)
        every_second = lr_factor(make_config({**options, "decay_epochs": 2}), 0.5, step / steps_per_epoch)
        assert every_second == 0.5 ** (step // (2 * steps_per_epoch))


def test_a_tenth_of_an_epoch_is_counted_exactly():
    options = {"schedule": "exponential", "warmup": 0.0, "decay": 0.5, "decay_epochs": 0.1}
    config = make_config(options)
    assert [lr_factor(config, 0.5, tenths / 10) for tenths in range(1, 11)] == [0.5**n for n in range(1, 11)]
