"""The report of a run: one HTML file that needs nothing else, no network and no script."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import pixelwise
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import remove_leftovers, write_bytes
from pixelwise.metrics.headline import worst_of
from pixelwise.report import formatting
from pixelwise.report.figures import Line, Points, plot_histogram, plot_lines
from pixelwise.report.pictures import ERROR_RGB, read_examples
from pixelwise.report.run_folder import (
    DataFile,
    EvaluationFile,
    ImageScore,
    check_run,
    evaluated_splits,
    kept_step,
    metrics_stride,
    read_classes,
    read_mapping,
    read_metrics,
    read_model,
)

REPORT_NAME = "report.html"
LOWEST = 8
LARGEST = 8
MAX_SIZES = 6
FINGERPRINT = 16  # hex digits shown, of 64


class Section(NamedTuple):
    """The content of a section, or a note that says why it is missing."""

    content: Any = None
    note: str = ""


def section(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Section:
    """What `build` returns, or the message of its DataError as a note."""
    try:
        return Section(build(*args, **kwargs))
    except DataError as error:
        return Section(note=str(error))


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


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run as one self-contained HTML file.

    A section whose file is missing or damaged says so in one sentence. The same run folder gives the same bytes.

    Args:
        run: a run folder that `pixelwise train` wrote.
        out: the file to write; by default `report.html` in the run folder.

    Returns:
        The path of the file.

    Raises:
        DataError: `run` is not a run folder.
        UsageError: `out` is a folder.
        PixelwiseError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> _ = (run / "metrics.csv").write_text("step,train_loss\\n1,2.3\\n2,1.9\\n")
        >>> write_report(run).name
        'report.html'
    """
    run = Path(run)
    check_run(run)
    target = run / REPORT_NAME if out is None else Path(out)
    if target.is_dir():
        raise UsageError(f"{target}: is a folder. Give the name of a file, such as {target / REPORT_NAME}.")
    html = render_report(run)
    remove_leftovers(target.parent)
    try:
        # File names may hold bytes that are not valid text: they are shown as question marks.
        write_bytes(target, html.encode("utf-8", "replace"))
    except OSError as error:
        raise PixelwiseError(
            f"{target}: the report cannot be written ({error.strerror or error}). Name another file: --out FILE."
        ) from error
    return target


def render_report(run: Path) -> str:
    """The HTML text of the report of a run folder."""
    # Names of classes and files are not trusted: everything is escaped except what the filter `svg` passes.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": formatting.percent,
        "share": formatting.share,
        "count": formatting.count,
        "plural": formatting.plural,
        "css": lambda color: "#{:02x}{:02x}{:02x}".format(*color),
        "svg": Markup,  # the output of figures.py, which holds no text of the user
    }
    return environment.get_template("report.html.j2").render(_context(run))


def _context(run: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    evaluations, broken = read_evaluations(run)
    first = evaluations[0] if evaluations else None
    classes = read_classes(run, first.names if first else ())
    data = section(read_model, run, "data.json", DataFile)
    hidden = () if data.content is None else ("data", "classes")  # of the plan, where data.json says more of them
    models = (section(read_mapping, run, name).content or {} for name in ("model.json", "plan.json"))
    context: dict[str, Any] = {
        "title": run.resolve().name or "run",
        "version": pixelwise.__version__,
        "network": next((values["model"] for values in models if isinstance(values.get("model"), str)), ""),
        "evaluations": evaluations,
        "broken": broken,
        "first": first,
        "validation": best_validation((section(read_metrics, run).content or {}).get("val_miou", []), kept_step(run)),
        "curves": section(training_curves, run),
        "data": data,
        "data_facts": data_facts(data.content) if data.content else [],
        "data_classes": classes.fit(data.content.num_classes) if data.content else classes,
        "plan": section(lambda: formatting.describe(read_mapping(run, "plan.json"), hidden)),
        "config": section(lambda: formatting.flatten(read_mapping(run, "config.yaml"))),
        "environment": section(environment, run),
    }
    if first:
        known = classes.fit(len(first.matrix))
        context |= {
            "classes": known,
            "tiles": headline_tiles(first, known.names),
            "error_color": ERROR_RGB,
            "undefined": any(map(math.isnan, first.scores.precision + first.scores.recall)),
            "confusions": largest_confusions(first.matrix),
            "image_scores": section(image_scores, first),
            "examples": section(read_examples, run, first, known),
        }
    return context


def read_evaluations(run: Path) -> tuple[list[EvaluationFile], list[str]]:
    """The evaluations of the run, test first, and a sentence on each that cannot be shown."""
    found = {
        split: section(read_model, run, f"evaluation-{split}.json", EvaluationFile) for split in evaluated_splits(run)
    }
    # The split is the one in the file's name: what stands inside the file could point anywhere.
    shown = [item.content.model_copy(update={"split": split}) for split, item in found.items() if item.content]
    return shown, [item.note for item in found.values() if not item.content]


def headline_tiles(file: EvaluationFile, names: Sequence[str]) -> list[tuple[str, float]]:
    """Label and value of the first tiles: of a background and another class the other's scores, else mIoU and the worst."""
    scores, index = file.scores, file.foreground
    if index is not None:
        apart = (f"{names[1 - index]} IoU", scores.iou[1 - index])
        tiles = [(f"{names[index]} IoU, {file.split}", scores.iou[index]), (f"{names[index]} Dice", scores.dice[index])]
        return [*tiles, apart, ("mIoU", scores.miou), ("Pixel accuracy", scores.global_accuracy)]
    tiles = [(f"mIoU, {file.split}", scores.miou)]
    if worst := worst_of(scores, names):
        tiles.append((f"Worst: {worst[1]} IoU", worst[0]))
    return [
        *tiles,
        ("Mean Dice", scores.mean_dice),
        ("Pixel accuracy", scores.global_accuracy),
        ("Mean class accuracy", scores.class_accuracy),
    ]


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
    stride = metrics_stride(run)
    remark = f" Of the rows of metrics.csv one in {stride:,} is shown, and those of validations." if stride > 1 else ""
    return _summary(columns, kept_step(run)) + remark, curves


def _summary(columns: dict[str, Any], kept: int | None) -> str:
    """One sentence: steps, epochs, time and the validation of the weights that are kept."""
    text = formatting.plural(max(points[-1][0] for points in columns.values() if points), "step")
    if columns["epoch"]:
        text += f", {formatting.plural(round(columns['epoch'][-1][1]), 'epoch')}"
    if columns["elapsed_s"]:
        text += f", {formatting.duration(columns['elapsed_s'][-1][1])}"
    if best := best_validation(columns["val_miou"], kept):
        text += f". Validation mIoU of the weights that are kept: {formatting.percent(best[1])} % at step {best[0]:,}"
    return text + "."


def best_validation(points: Points, kept: int | None = None) -> tuple[int, float] | None:
    """The validation at step `kept`; else the one with the highest value, the last of equals."""
    return next((point for point in points if point[0] == kept), None) or max(
        points, key=lambda point: (point[1], point[0]), default=None
    )


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


def environment(run: Path) -> tuple[str, formatting.Facts]:
    """The command line, and the machine and versions it ran with."""
    content = read_mapping(run, "environment.json")
    command = content.pop("command", None)
    if "seconds" in content:
        content["duration_s"] = content.pop("seconds")
    return formatting.command_line(command) if command else "", formatting.describe(content)
