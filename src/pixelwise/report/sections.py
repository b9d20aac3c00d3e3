"""What each section of the report shows, computed from the files of the run; no HTML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

from pixelwise.errors import DataError
from pixelwise.metrics import Scores
from pixelwise.report import formatting
from pixelwise.report.figures import Line, Points, plot_histogram, plot_lines
from pixelwise.report.run_folder import (
    DataFile,
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
LARGEST = 8
MAX_SIZES = 6
FINGERPRINT = 16  # hex digits shown, of 64


@dataclass(frozen=True, kw_only=True)
class Section(Generic[Content]):
    """The content of a section, or a note that says why it is missing."""

    content: Content | None = None
    note: str = ""


def section(build: Callable[Arguments, Content], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Section[Content]:
    """What `build` returns, or the message of its DataError as a note."""
    try:
        return Section(content=build(*args, **kwargs))
    except DataError as error:
        return Section(note=str(error))


class Evaluated(NamedTuple):
    """One evaluation of the run with its scores."""

    split: str
    file: EvaluationFile
    scores: Scores


class Confusion(NamedTuple):
    """Pixels of class `truth` that were labelled `prediction`; the shares are fractions in 0..1."""

    truth: int
    prediction: int
    pixels: int
    share_of_class: float
    share_of_errors: float


class Curve(NamedTuple):
    """One plot: its title, its legend (colour variable and text), and its SVG."""

    title: str
    legend: tuple[tuple[str, str], ...]
    svg: str


def read_evaluations(run: Path) -> tuple[list[Evaluated], list[str]]:
    """The evaluations of the run, test first, and a sentence on each that cannot be shown."""
    evaluated, notes = [], []
    for split in evaluated_splits(run):
        found = section(read_model, run, f"evaluation-{split}.json", EvaluationFile)
        if found.content is None:
            notes.append(found.note)
            continue
        # The split is the one in the file's name: what stands inside the file could point anywhere.
        file = found.content.model_copy(update={"split": split})
        evaluated.append(Evaluated(split, file, Scores.from_dict(file.scores)))
    return evaluated, notes


def largest_confusions(matrix: Sequence[Sequence[int]], count: int = LARGEST) -> list[Confusion]:
    """The pairs of classes with the most wrong pixels, largest first."""
    totals = [sum(row) for row in matrix]
    errors = sum(totals) - sum(matrix[index][index] for index in range(len(matrix)))
    pairs = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return [Confusion(i, j, n, n / totals[i], n / errors) for n, i, j in pairs[:count]]


def image_scores(file: EvaluationFile) -> tuple[str, list[ImageScore]]:
    """The histogram of the images' mIoU, and the images that scored lowest."""
    scored = [image for image in file.per_image if image.miou is not None]
    if not scored:
        raise DataError("The evaluation holds no scores of single images.")
    scored.sort(key=lambda image: (image.miou or 0.0, image.name))
    return plot_histogram([image.miou or 0.0 for image in scored]), scored[:LOWEST]


def training_curves(run: Path) -> tuple[str, list[Curve]]:
    """A sentence on the training, and the plots of metrics.csv."""
    columns = read_metrics(run)

    def line(label: str, column: str, smooth: bool = False) -> Line:
        return Line(label=label, points=columns[column], smooth=smooth)

    plots = {
        "Loss": (line("training", "train_loss", smooth=True),),
        "Validation, %": (line("mIoU", "val_miou"), line("pixel accuracy", "val_global_accuracy")),
        "Learning rate": (line("", "lr"),),
        "Images per second": (line("", "images_per_s"),),
    }
    curves = []
    for title, lines in plots.items():
        if any(line.points for line in lines):
            named = ((f"--series-{index}", line) for index, line in enumerate(lines, 1))
            legend = tuple((color, line.label) for color, line in named if line.points and line.label)
            curves.append(Curve(title, legend, plot_lines(lines, percent="%" in title)))
    return _summary(columns), curves


def _summary(columns: dict[str, Any]) -> str:
    """One sentence: steps, epochs, time and the best validation."""
    text = formatting.plural(max(points[-1][0] for points in columns.values() if points), "step")
    if columns["epoch"]:
        text += f", {formatting.plural(round(columns['epoch'][-1][1]), 'epoch')}"
    if columns["elapsed_s"]:
        text += f", {formatting.duration(columns['elapsed_s'][-1][1])}"
    if best := best_validation(columns["val_miou"]):
        text += f". Best validation mIoU: {formatting.percent(best[1])} % at step {best[0]:,}"
    return text + "."


def best_validation(points: Points) -> tuple[int, float] | None:
    """The step with the highest value, the first of equals."""
    return max(points, key=lambda point: (point[1], -point[0])) if points else None


def data_facts(data: DataFile) -> formatting.Facts:
    """What the network was trained on."""
    sizes = sorted(data.sizes.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{size.replace('x', ' × ')} ({number:,})" for size, number in sizes[:MAX_SIZES])
    more = f" and {formatting.plural(len(sizes) - MAX_SIZES, 'other size')}" if len(sizes) > MAX_SIZES else ""
    mean, std = (
        ", ".join(formatting.DASH if value is None else f"{value:.3f}" for value in values)
        for values in (data.mean, data.std)
    )
    facts = [
        ("Folder", data.root),
        ("Layout", data.layout),
        ("Images", f"{sum(split.images for split in data.splits.values()):,}"),
        ("Sizes, px", shown + more),
        ("Channels", str(data.channels)),
        ("Pixel type", ", ".join(data.dtypes)),
        ("Mean", mean),
        ("Standard deviation", std),
        ("Fingerprint", data.fingerprint[:FINGERPRINT]),
    ]
    return [(key, value) for key, value in facts if value]


def plan_facts(run: Path, *, with_data: bool) -> formatting.Facts:
    """The plan that was printed before the training; `with_data` also what it says of the data."""
    plan = read_mapping(run, "plan.json")
    hidden = () if with_data else ("data", "classes")
    return formatting.describe({key: value for key, value in plan.items() if key not in hidden})


def config_facts(run: Path) -> formatting.Facts:
    """The resolved configuration with the keys that `--set` takes."""
    return formatting.flatten(read_mapping(run, "config.yaml"))


def environment(run: Path) -> tuple[str, formatting.Facts]:
    """The command line, and the machine and versions it ran with."""
    content = read_mapping(run, "environment.json")
    command = content.pop("command", None)
    if "seconds" in content:
        content["duration_s"] = content.pop("seconds")
    return formatting.command_line(command) if command else "", formatting.describe(content)
