"""Which weights are kept: by a score that can see what is looked for; and the headline that is told of them."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelwise.infer.bundle import load_card
from pixelwise.infer.evaluate import evaluate
from pixelwise.metrics import ConfusionMatrix
from pixelwise.metrics.headline import foreground_of, headline, standard_error
from pixelwise.train import make_config, train
from pixelwise.train.selection import MARGIN, Choice, Progress, keep

CONFIG = {"model": "unet", "options": {"widths": [4, 6, 8], "batch_norm": True}, "crop_px": 32, "batch_size": 4}
CONFIG |= {"lr": 0.01, "workers": 0, "precision": "float32", "steps": 40, "validate_every": 1}


def squares(root: Path, *, in_val: bool, seed: int = 0) -> Path:
    """Bright squares on a dark ground; val holds them or not."""
    draws = np.random.default_rng(seed)
    for split, count in (("train", 16), ("val", 3), ("test", 3)):
        for index in range(count):
            mask = np.zeros((40, 40), np.uint8)
            if split != "val" or in_val:
                top, left = draws.integers(2, 24, 2)
                mask[top : top + 12, left : left + 12] = 1
            image = np.clip(60 + 120 * mask[..., None] + draws.normal(0, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
            for kind, array in (("images", image), ("masks", mask)):
                path = root / split / kind / f"{split}{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


def test_a_val_split_without_the_object_keeps_the_newest_weights_and_says_so(tmp_path: Path) -> None:
    data, events = squares(tmp_path / "data", in_val=False), []
    run = train(data, make_config(CONFIG), out=tmp_path / "run", report=events.append)
    card = load_card(run.folder)
    assert card.scores["step"] == 40 and "val holds no pixel of foreground" in card.scores["chosen"]
    notes = [event["note"] for event in events if "validated" in event]
    assert len(notes) == 10 and all("the newest are kept" in note for note in notes)
    found = evaluate(run.folder, data)
    assert found.foreground == 1 and found.headline.name == "foreground IoU"
    assert found.headline.value == found.scores.iou[1] > 0.7
    assert 0 < found.standard_error < 0.3
    assert found.to_dict()["foreground"] == 1


def test_patience_waits_where_val_cannot_choose(tmp_path: Path) -> None:
    run = train(squares(tmp_path / "data", in_val=False), make_config(CONFIG | {"patience": 2}), out=tmp_path / "run")
    assert run.steps == 40


def choices(*scores: float, **more: object) -> tuple[list[bool], Progress]:
    progress = Progress()
    kept = [keep(progress, Choice(score, **more), step, score, score) for step, score in enumerate(scores)]
    return kept, progress


def test_of_equal_weights_the_newer_are_kept_but_they_are_no_progress() -> None:
    kept, progress = choices(0.5, 0.5, 0.4, 0.5)
    assert kept == [True, True, False, True]
    assert (progress.best_step, progress.stale, progress.peak) == (3, 3, 0.5)


def test_where_a_class_is_missing_newer_weights_may_be_a_little_worse() -> None:
    kept, progress = choices(0.9, 0.88, 0.86, 0.84, 0.2, margin=MARGIN)
    assert kept == [True, True, True, False, False] and progress.best_step == 2
    assert progress.best_miou == 0.86 and progress.peak == 0.9  # no slow slide: the highest is what counts


def test_a_choice_is_by_the_classes_of_the_truth() -> None:
    names, matrix = ("ground", "tree", "car"), ((90, 10, 0), (0, 50, 0), (0, 0, 0))
    choice = Choice.of(matrix, (0.9, 50 / 60, math.nan), (5, 5, 5), names)
    assert choice.score == pytest.approx((0.9 + 50 / 60) / 2) and choice.margin == MARGIN
    assert "no pixel of car" in choice.note and choice.can_choose
    # A car that is predicted where there is none counts as a mistake in what is there, not as a class of IoU 0.
    found = ((80, 10, 10), (0, 50, 0), (0, 0, 0))
    assert Choice.of(found, (0.8, 50 / 60, 0.0), (5, 5, 5), names).score > 0.8
    assert Choice.of(matrix, (0.9, 50 / 60, math.nan), (5, 5, 0), names).note == ""  # nobody trains on cars
    only = Choice.of(((90, 10, 0), (0, 0, 0), (0, 0, 0)), (0.9, 0.0, math.nan), (5, 5, 5), names)
    assert not only.can_choose and "tree, car" in only.note


@pytest.mark.parametrize(
    ("names", "values", "foreground"),
    [
        (("background", "road"), ((0,), (1,)), 1),
        (("road", "Background"), ((1,), (0,)), 0),
        (("tumour", "tissue"), ((1,), (0,)), 0),
        (("tissue", "tumour"), (((0, 0, 0),), ((255, 0, 0),)), 1),
        (("grass", "road"), ((1,), (2,)), None),
        (("background", "road", "car"), ((0,), (1,), (2,)), None),
    ],
)
def test_the_foreground_is_the_class_that_is_no_background(names, values, foreground) -> None:
    assert foreground_of(names, values) == foreground


def test_the_headline_of_an_object_is_its_own_score() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(np.zeros(100, int), np.array([0] * 98 + [1] * 2))  # finds nothing, and has an accuracy of 98 %
    found = headline(confusion.scores(), ("background", "crack"), 1)
    assert found.value == 0 and found.text == "crack: IoU 0.00, Dice 0.00 (background: IoU 98.00)"
    empty = ConfusionMatrix(2)
    empty.update(np.zeros(9, int), np.zeros(9, int))
    assert "crack: IoU undefined, since no image holds it" in headline(empty.scores(), ("background", "crack"), 1).text


def test_the_standard_error_of_a_mean_is_the_textbook_one() -> None:
    draws = np.random.default_rng(0)
    parts, shares = [], []
    for _ in range(12):
        right, part = int(draws.integers(0, 100)), ConfusionMatrix(2)
        part.update(np.array([0] * right + [1] * (100 - right)), np.zeros(100, int))
        parts.append(part)
        shares.append(right / 100)
    wanted = np.std(shares, ddof=1) / math.sqrt(12)
    assert standard_error(parts, lambda scores: scores.global_accuracy) == pytest.approx(wanted)
    assert math.isnan(standard_error(parts[:1], lambda scores: scores.global_accuracy))
