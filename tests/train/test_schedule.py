from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixelwise.train.schedule import Budget, lr_factor

schedules = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(["poly", "onecycle"]),
        "warmup": st.floats(0, 0.9),
        "power": st.floats(0.5, 2),
    }
)


@given(options=schedules)
def test_the_rate_ends_at_zero_with_the_budget(options):
    assert lr_factor(1.0, **options) == pytest.approx(0, abs=1e-12)


@given(options=schedules, progress=st.floats(0, 1))
def test_the_rate_is_a_share_of_its_peak(options, progress):
    assert 0 <= lr_factor(progress, **options) <= 1


@given(options=schedules)
def test_the_peak_stands_at_the_end_of_the_warm_up(options):
    assert lr_factor(options["warmup"], **options) == pytest.approx(1)


@given(options=schedules)
def test_it_rises_then_falls_without_a_jump(options):
    points = [index / 2000 for index in range(2001)]
    values = [lr_factor(point, **options) for point in points]
    for point, before, after in zip(points[1:], values, values[1:], strict=False):
        assert after >= before if point < options["warmup"] else True
        assert after <= before if point - 1 / 2000 >= options["warmup"] else True
    gentle = options["warmup"] >= 0.05 and options["power"] >= 1
    assert not gentle or max(abs(a - b) for a, b in pairwise(values)) < 0.05


@pytest.mark.parametrize("schedule", ["poly", "onecycle"])
def test_the_first_step_of_a_time_budget_is_not_wasted(schedule):
    assert lr_factor(0.0, schedule=schedule, warmup=0.1, power=0.9) == 0.01
    assert lr_factor(0.0, schedule=schedule, warmup=0.0, power=0.9) == 1


def test_values_by_hand():
    poly = {"schedule": "poly", "warmup": 0.2, "power": 2.0}
    assert lr_factor(0.1, **poly) == pytest.approx(0.5)
    assert lr_factor(0.6, **poly) == pytest.approx(0.25)
    cosine = {"schedule": "onecycle", "warmup": 0.2, "power": 2.0}
    assert lr_factor(0.1, **cosine) == pytest.approx(0.5)
    assert lr_factor(0.6, **cosine) == pytest.approx(0.5)
    assert lr_factor(0.4, **cosine) == pytest.approx(0.8536, abs=1e-4)


def test_progress_in_steps_and_in_seconds():
    assert Budget(steps=8).progress(step=2, elapsed_s=1e9) == 0.25
    assert Budget(steps=8).progress(step=9, elapsed_s=0) == 1
    assert Budget(seconds=60).progress(step=10**9, elapsed_s=15) == 0.25
    assert Budget(seconds=60).progress(step=0, elapsed_s=61) == 1


def test_a_constant_rate_stays():
    for progress in (0.1, 0.5, 1.0):
        assert lr_factor(progress, schedule="constant", warmup=0.1, power=1) == 1
    assert lr_factor(0.05, schedule="constant", warmup=0.1, power=1) == pytest.approx(0.5)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 46])
def test_an_exponential_rate_falls_after_each_epoch(steps_per_epoch):
    options = {"schedule": "exponential", "warmup": 0.0, "power": 1.0, "decay": 0.5}
    for step in range(4 * steps_per_epoch):
        factor = lr_factor(0.5, epoch=step / steps_per_epoch, **options)
        assert factor == 0.5 ** (step // steps_per_epoch)
        every_second = lr_factor(0.5, epoch=step / steps_per_epoch, decay_epochs=2, **options)
        assert every_second == 0.5 ** (step // (2 * steps_per_epoch))


def test_a_tenth_of_an_epoch_is_counted_exactly():
    options = {"schedule": "exponential", "warmup": 0.0, "power": 1.0, "decay": 0.5, "decay_epochs": 0.1}
    assert [lr_factor(0.5, epoch=tenths / 10, **options) for tenths in range(1, 11)] == [0.5**n for n in range(1, 11)]
