"""What each section of the report shows, computed from the files of the run; no formatting, no HTML."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from pixelwise.data.labels import Color
from pixelwise.errors import DataError
from pixelwise.metrics import Scores
from pixelwise.report import wording
from pixelwise.report.figures import Line, Points, plot_histogram, plot_lines
from pixelwise.report.reading import (
    Classes,
    EvaluationFile,
    ImageScore,
    evaluated_splits,
    read_mapping,
    read_metrics,
    read_model,
)

Content = TypeVar("Content")
Arguments = ParamSpec("Arguments")

LOWEST = 8


@dataclass(frozen=True, kw_only=True)
class Section(Generic[Content]):
    """The content of a section, or the sentence that says why there is none."""

    content: Content | None = None
    note: str = ""


def section(build: Callable[Arguments, Content], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Section[Content]:
    """What `build` returns, or the message of its DataError as a note."""
    try:
        return Section(content=build(*args, **kwargs))
    except DataError as error:
        return Section(note=str(error))


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation of the run with its scores."""

    split: str
    file: EvaluationFile
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class in the table of scores; `share` is its part of the labelled pixels."""

    name: str
    color: Color
    iou: float
    dice: float
    precision: float
    recall: float
    pixels: int
    share: float
    is_absent: bool


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One plot: its title, its caption's key (colour variable and text), and its SVG."""

    title: str
    keys: tuple[tuple[str, str], ...]
    svg: str


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The plots of the training and one sentence on it."""

    curves: tuple[Curve, ...]
    summary: str


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """How the single images scored: a histogram, and the lowest."""

    svg: str
    lowest: tuple[ImageScore, ...]


def read_evaluations(run: Path) -> tuple[list[Evaluated], list[str]]:
    """The evaluations of the run, the most telling first, and a sentence on each that cannot be shown."""
    evaluated, notes = [], []
    for split in evaluated_splits(run):
        found = section(read_model, run, f"evaluation-{split}.json", EvaluationFile)
        if found.content is None:
            notes.append(found.note)
            continue
        # The split is the one in the file's name: what stands inside the file could point anywhere.
        file = found.content.model_copy(update={"split": split})
        evaluated.append(Evaluated(split=split, file=file, scores=Scores.from_dict(file.scores)))
    return evaluated, notes


def class_rows(evaluated: Evaluated, classes: Classes) -> list[ClassRow]:
    """The table of scores for each class."""
    scores, matrix = evaluated.scores, evaluated.file.matrix
    total = sum(map(sum, matrix))
    return [
        ClassRow(
            name=classes.names[index],
            color=classes.colors[index],
            iou=scores.iou[index],
            dice=scores.dice[index],
            precision=scores.precision[index],
            recall=scores.recall[index],
            pixels=sum(row),
            share=sum(row) / total if total else 0.0,
            is_absent=index in scores.absent,
        )
        for index, row in enumerate(matrix)
    ]


def image_scores(file: EvaluationFile) -> ImageScores:
    """How the single images scored.

    Raises:
        DataError: the evaluation holds no score of a single image.
    """
    scored = [(image.miou, image) for image in file.per_image if image.miou is not None]
    if not scored:
        raise DataError("The evaluation holds no scores of single images.")
    scored.sort(key=lambda pair: (pair[0], pair[1].name))
    return ImageScores(
        svg=plot_histogram([miou for miou, _ in scored]), lowest=tuple(image for _, image in scored[:LOWEST])
    )


def training_curves(run: Path) -> Curves:
    """The plots of metrics.csv.

    Raises:
        DataError: there is nothing to plot.
    """
    columns = read_metrics(run)
    train, val = columns["train_loss"], columns["val_loss"]
    lines = [
        ("Loss", False, (Line(label="training", points=train, smooth=True), Line(label="validation", points=val))),
        (
            "Validation, %",
            True,
            (
                Line(label="mIoU", points=columns["val_miou"]),
                Line(label="global accuracy", points=columns["val_global_accuracy"]),
            ),
        ),
        ("Learning rate", False, (Line(label="", points=columns["lr"]),)),
        ("Images per second", False, (Line(label="", points=columns["images_per_s"]),)),
    ]
    curves = [_curve(title, group, in_percent) for title, in_percent, group in lines]
    return Curves(curves=tuple(curve for curve in curves if curve), summary=_summary(columns))


def _curve(title: str, lines: tuple[Line, ...], in_percent: bool) -> Curve | None:
    if not any(line.points for line in lines):
        return None
    keys = tuple((f"--series-{index}", line.label) for index, line in enumerate(lines, 1) if line.points and line.label)
    return Curve(title=title, keys=keys, svg=plot_lines(lines, percent=in_percent))


def _summary(columns: dict[str, Any]) -> str:
    last = max(points[-1][0] for points in columns.values() if points)
    text = f"{last:,} steps"
    if columns["epoch"]:
        text += f", {columns['epoch'][-1][1]:,.0f} epochs"
    if columns["elapsed_s"]:
        text += f", {wording.duration(columns['elapsed_s'][-1][1])}"
    if best := best_validation(columns["val_miou"]):
        text += f". Best validation mIoU: {wording.percent(best[1])} % at step {best[0]:,}"
    return text + "."


def best_validation(points: Points) -> tuple[int, float] | None:
    """The step with the highest value, the first of equals."""
    return max(points, key=lambda point: (point[1], -point[0])) if points else None


def plan_facts(run: Path, *, with_data: bool) -> wording.Facts:
    """The plan that was printed before the training; `with_data` also what it says of the data.

    Raises:
        DataError: plan.json is missing or of another form.
    """
    plan = read_mapping(run, "plan.json")
    return wording.describe({key: value for key, value in plan.items() if with_data or key not in ("data", "classes")})


def config_facts(run: Path) -> wording.Facts:
    """The resolved configuration with the keys that `--set` takes.

    Raises:
        DataError: config.yaml is missing or of another form.
    """
    return wording.flatten(read_mapping(run, "config.yaml"))


def environment(run: Path) -> tuple[str, wording.Facts]:
    """The command line, and what it ran on.

    Raises:
        DataError: environment.json is missing or of another form.
    """
    content = read_mapping(run, "environment.json")
    command = content.pop("command", None)
    if "seconds" in content:
        content["duration_s"] = content.pop("seconds")
    return wording.command_line(command) if command else "", wording.describe(content)
