"""What the benchmarks share: turns and ratios, what counts as a regression, and the README's tables. No peer is needed."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from pixelwise.files import write_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the scripts is where they look for each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("measure", "tables", "bench", "accuracy"):
        sys.modules.pop(name, None)


def row(**changes: object) -> dict:
    import measure

    values = {"race": "step", "case": "small", "peer": "smp", "unit": "images/s", "ours": 4.0, "theirs": 2.0}
    return measure.Row(**values | {"ratios": (1.5, 2.0, 2.5), "goal": 1.8} | changes).to_dict()


def test_contestants_take_turns_and_the_first_turn_is_not_counted() -> None:
    import measure

    order: list[str] = []
    clock = itertools.count(1)

    def turn(name: str):
        return lambda: order.append(name) or float(next(clock))

    seconds = measure.interleave({"a": turn("a"), "b": turn("b")}, 3)
    assert order == ["a", "b"] * 4
    assert seconds == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
    order.clear()
    measure.interleave({"a": turn("a"), "b": turn("b")}, 1, warm_up=False)
    assert order == ["a", "b"]


def test_a_turn_repeats_short_steps_and_tells_the_seconds_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import measure

    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def step() -> None:
        now[0] += 0.25

    assert measure.timed(step, least_s=1.0)() == pytest.approx(0.25)
    assert now[0] == 1.0
    assert measure.timed(step, least_s=0.0)() == pytest.approx(0.25)


def test_ratios_are_taken_within_rounds() -> None:
    import measure

    seconds = {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 4.0], "slow": [9.0, 9.0, 9.0]}
    found = measure.compare(seconds, "ours", "peer", amount=8, race="r", case="c", unit="images/s", goal=2.0)
    assert found.ratios == (3.0, 2.0, 1.0)
    assert (found.ratio, found.ours, found.theirs, found.is_met) == (2.0, 4.0, 2.0, True)
    assert found.to_dict()["lowest"] == 1.0 and found.to_dict()["highest"] == 3.0
    assert measure.fastest(seconds, "peer", "slow") == "peer"


def test_a_goal_that_is_missed_by_little_is_missed() -> None:
    assert row(goal=2.0)["met"] is True
    assert row(goal=2.01)["met"] is False
    assert row(goal=None)["met"] is None


def test_labels_are_compared() -> None:
    import measure

    assert measure.equal_share(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == "75.000% of labels equal"
    with pytest.raises(ValueError, match="cannot be compared"):
        measure.equal_share(np.zeros((1, 4)), np.zeros(4))


@pytest.mark.parametrize(
    ("ratios", "is_slower"),
    [
        ((2.0, 2.1), False),
        ((1.6, 1.7), False),  # within what was recorded
        ((1.2, 1.3), True),
        ((1.0, 2.6), False),  # too noisy to tell
        ((1.1, 1.1, 2.2), False),  # likewise: a round was as fast as ever
    ],
)
def test_a_regression_is_more_than_the_spread_of_both_runs(ratios: tuple[float, ...], is_slower: bool) -> None:
    import measure

    found = measure.regressions([row(ratios=ratios)], [row()])
    assert bool(found) == is_slower
    assert not found or "recorded 2.00 (1.50 to 2.50)" in found[0]


def test_comparing_nothing_is_an_error() -> None:
    import measure

    assert measure.regressions([row()], [row(), row(race="other")]) == []
    with pytest.raises(ValueError, match="nothing was compared"):
        measure.regressions([row(peer="monai")], [row()])


def test_rounds_are_fewer_on_request() -> None:
    import measure

    here = Path()
    rounds = [measure.Setup(scratch=here, **how).rounds(9) for how in ({}, {"few": True}, {"small": True})]
    assert rounds == [9, 3, 1]
    assert measure.Setup(scratch=here, few=True).rounds(3) == 2


def test_a_result_tells_the_machine_without_its_name_or_a_path() -> None:
    import platform

    import measure

    told = str(measure.machine()) + str(measure.versions())
    assert measure.machine()["cores"] >= 1 and "torch" in measure.versions()
    assert platform.node() not in told and str(ROOT) not in told and "/home" not in told


def test_the_check_compares_with_the_newest_recorded_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench
    import measure

    cpu = {"machine": {"cpu": "one"}}
    assert bench.check({"rows": [row()], **cpu}, measure.newest(tmp_path, "bench")) == 1
    write_json(tmp_path / "2026-01-02-bench.json", {"rows": [row(ratios=(9.0, 9.1))], **cpu})
    write_json(tmp_path / "2026-01-03-bench.json", {"rows": [row()], **cpu})
    newest = measure.newest(tmp_path, "bench")
    assert bench.check({"rows": [row()], **cpu}, newest) == 0
    assert bench.check({"rows": [row(ratios=(1.0,))], "machine": {"cpu": "other"}}, newest) == 1
    assert "step, small, against smp: 1.00" in capsys.readouterr().out


def test_the_readme_holds_the_tables_of_the_newest_results() -> None:
    import tables

    text = (ROOT / "README.md").read_text()
    assert text == tables.with_tables(text, ROOT / "benchmarks" / "results"), "run: python benchmarks/tables.py"


def test_tables_tell_ratio_spread_and_goal(tmp_path: Path) -> None:
    import tables

    share = row(race=tables.SHARES, case="enet, inference", ratios=(0.05,), goal=None, note="enet: aten::prelu 50%")
    limit = row(race=tables.LIMITS, case="matrix product", ours=1234.5, unit="GFLOP/s", goal=None)
    text = tables.markdown([row(), row(goal=3.0), share, limit])
    assert "| step | small | smp | 4.00 images/s | 2.00 images/s | **2.00** (1.50 to 2.50) | 1.80: met |" in text
    assert "3.00: not met" in text
    assert "| enet, inference | 4.00 | 0.05 |  | aten::prelu 50% |" in text
    assert "| matrix product | 1,234 GFLOP/s |" in text  # half to even
    page = f"# x\n{tables.BEGIN}\nold\n{tables.END}\nrest\n"
    assert "not run yet" in tables.with_tables(page, tmp_path) and "rest" in tables.with_tables(page, tmp_path)
    with pytest.raises(ValueError, match="needs the two comments"):
        tables.with_tables("# x", tmp_path)


def test_accuracy_goes_on_where_it_was_and_tells_intervals(tmp_path: Path) -> None:
    import argparse

    import accuracy
    import tables

    args = argparse.Namespace(only=["nuclei"], seeds=[0, 1], work=tmp_path)
    assert accuracy.missing(args) == [("nuclei", seed, who) for seed in (0, 1) for who in ("pixelwise", "smp")]
    for (_, seed, who), value in zip(accuracy.missing(args), (0.90, 0.88, 0.92, 0.86), strict=True):
        found = {"value": value, "minutes": 10, "steps": 5}
        write_json(accuracy.result_of(tmp_path, "nuclei", seed, who), found)
    assert accuracy.missing(args) == []
    (found,) = accuracy.summarise(tmp_path, ["nuclei", "scenes"], [0, 1])
    assert found["ahead"] == pytest.approx(0.04) and found["pixelwise"]["values"] == [0.90, 0.92]
    # Two values a and b: the t of one degree of freedom, 12.706, times half their distance.
    assert found["ahead_interval"] == pytest.approx(12.706 * 0.02, rel=1e-3)
    assert "| nuclei, Dice | 10 | 91.00 ± 12.71 | 87.00 ± 12.71 | +4.00 ± 25.41 | 2 |" in tables.accuracy(
        {"sets": [found]}
    )
