"""`pixelwise inspect`: what is in a data folder, and what is wrong with it."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from pixelwise.cli import options
from pixelwise.errors import UsageError

if TYPE_CHECKING:
    from pixelwise.data.check import Inspection
    from pixelwise.data.pairs import DataFolder

_SCHEMES: tuple[Literal["median_frequency", "enet"], ...] = ("median_frequency", "enet")
_HEADINGS = {"median_frequency": "median freq.", "enet": "ENet"}
_SHOWN = 4


def inspect(
    data: options.Data,
    classes: options.Classes = None,
    ignore: options.Ignore = None,
    group_by: options.GroupBy = None,
    masks: options.Masks = None,
    region: options.Region = None,
    bands: options.Bands = None,
    axis: options.Axis = None,
    axes: options.Axes = None,
    nan_is_nodata: options.NanIsNodata = False,
    level: options.Level = None,
    series: options.Series = None,
    intensity: options.Intensity = None,
    allow_no_affine: options.AllowNoAffine = False,
    write_classes: Annotated[
        str | None,
        typer.Option(
            metavar="[FILE]", help="Write the proposed classes, to change: DATA/classes.yaml, or a .yaml FILE."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    r"""Show what is in a data folder: layout, images, classes, problems, class weights. Writes nothing unasked.

    Images and masks may be of any format that predict reads. Exit code 2 means that something must be fixed before
    training.

    Example: pixelwise inspect data/camvid

    Example: pixelwise inspect data/hearts --group-by '(.*)-IM-'

    Example: pixelwise inspect data/scans --write-classes
    """
    from pixelwise.data.check import inspect_data
    from pixelwise.data.layouts import open_data

    reading = options.reading_options(bands, axis, axes, nan_is_nodata, level, series, intensity, allow_no_affine)
    how: dict[str, Any] = {"group_by": group_by, "masks": masks, "region": region}
    folder = open_data(data, classes=classes, ignore=tuple(ignore or ()), **how)
    if write_classes is not None:
        classes, ignore = _write_classes(folder, write_classes), None
        folder = open_data(data, classes=classes, **how)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Reading", total=len(folder.pairs))
        inspection = inspect_data(folder, lambda done, total: progress.update(task, completed=done), reading=reading)
    weights = _suggested_weights(inspection)
    if as_json:
        typer.echo(json.dumps(inspection.to_dict() | {"class_weights": weights}, indent=2))
    else:
        table = _class_table(inspection, weights)
        options.table_console().print(Group(_facts(inspection), Text(), table, Text(), _problem_list(inspection)))
    if any(problem.severity == "fatal" for problem in inspection.problems):
        raise typer.Exit(2)


def _write_classes(folder: "DataFolder", name: str) -> Path:
    """Write the classes of a folder, all other values of its masks as void, and say so on stderr."""
    from pixelwise.data.classes import save_labels
    from pixelwise.data.labels import as_ranges
    from pixelwise.data.proposals import classes_beside, with_unknown_ignored

    path = classes_beside(folder.root) if name == "auto" else Path(name)
    if os.path.lexists(path):
        raise UsageError(f"{path}: exists and is kept. Name another file: --write-classes my.yaml.")
    labels = with_unknown_ignored(folder.labels, folder.pairs)
    save_labels(path, labels)
    void = ", ".join(map(str, as_ranges(labels.ignore_values))) or "none"
    text = f"Wrote {path}: {labels.num_classes} classes, void values: {void}. Change it where it is wrong."
    Console(stderr=True).print(options.for_terminal(text), markup=False, highlight=False, soft_wrap=True)
    return path


def _suggested_weights(inspection: "Inspection") -> dict[str, list[float | None]]:
    """Weights per class from the training split, by scheme; None where a class has no pixel to derive one from."""
    from pixelwise.losses import class_weights

    train = inspection.splits.get("train")
    if train is None or not sum(train.pixels):
        return {}
    weights = {scheme: class_weights(scheme, train.pixels, train.image_pixels).tolist() for scheme in _SCHEMES}
    return {
        scheme: [weight if count else None for weight, count in zip(found, train.pixels, strict=True)]
        for scheme, found in weights.items()
    }


def _facts(inspection: "Inspection") -> Table:
    folder = inspection.folder
    splits = ", ".join(f"{stats.images:,} {name}" for name, stats in inspection.splits.items())
    told = {key: _counted(counts) for key, counts in inspection.describe_images().items()}
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("Data", str(folder.root)),
        ("Layout", folder.layout),
        ("Images", f"{len(folder.pairs):,} ({splits})"),
        ("Formats", told["formats"]),
        ("Sizes", _counted(inspection.sizes)),
        ("Planes", told["planes"]),
        ("Spacing", told["spacings"]),
        ("CRS", told["crs"]),
        ("Channels", str(inspection.channels)),
        ("Bit depth", _counted(inspection.dtypes)),
        ("Mean", _numbers(inspection.mean)),
        ("Deviation", _numbers(inspection.std)),
        ("Range", _ranges(inspection.numbers.low, inspection.numbers.high)),
        ("Masks", "RGB colours" if folder.labels.kind == "rgb" else "index"),
        ("Fingerprint", inspection.fingerprint[:16]),
    ):
        if value:
            table.add_row(Text(name, style="bold"), Text(value))
    return table


def _class_table(inspection: "Inspection", weights: dict[str, list[float | None]]) -> Table:
    labels = inspection.folder.labels
    title = "Classes, how many images of each split contain them, and suggested weights"
    table = Table("Class", title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("Value", "Pixels", "Share", *inspection.splits, *weights):
        table.add_column(_HEADINGS.get(name, name), justify="right")
    pixels = [sum(stats.pixels[index] for stats in inspection.splits.values()) for index in range(labels.num_classes)]
    labelled = sum(pixels)
    for index, name in enumerate(labels.names):
        red, green, blue = labels.colors[index]
        table.add_row(
            Text.assemble(("■ ", f"rgb({red},{green},{blue})"), f"{index} {name}"),
            _values(labels.values[index]),
            f"{pixels[index]:,}",
            f"{pixels[index] / labelled:.2%}" if labelled else "-",
            *(f"{stats.images_with[index]:,}" for stats in inspection.splits.values()),
            *("-" if of[index] is None else f"{of[index]:.4g}" for of in weights.values()),
        )
    void = sum(stats.void for stats in inspection.splits.values())
    if labels.ignore_values or void:
        table.add_row(Text("  void", style="dim"), _values(labels.ignore_values), f"{void:,}")
    return table


def _problem_list(inspection: "Inspection") -> Text:
    if not inspection.problems:
        return Text("No problems found.", style="green")
    lines = Text()
    for problem in inspection.problems:
        style = "bold red" if problem.severity == "fatal" else "yellow"
        lines.append(f"{problem.severity}: ", style=style).append(f"{problem.message}\n")
    fatal = sum(problem.severity == "fatal" for problem in inspection.problems)
    if fatal:
        lines.append(f"{fatal} {'problem' if fatal == 1 else 'problems'} must be fixed before training.", style="bold")
    return lines


def _counted(counts: dict[str, int]) -> str:
    """ "480x360 (701)", the most frequent first."""
    from pixelwise.data.pairs import first_of

    return first_of([f"{name} ({count:,})" for name, count in counts.items()], _SHOWN)


def _values(values: tuple[Any, ...]) -> str:
    from pixelwise.data.labels import as_ranges

    return ", ".join(map(str, as_ranges(values)))


def _ranges(low: tuple[float, ...], high: tuple[float, ...]) -> str:
    from pixelwise.data.pairs import first_of

    return first_of([f"{one:.4g}..{other:.4g}" for one, other in zip(low, high, strict=True)], 8)


def _numbers(values: tuple[float, ...]) -> str:
    from pixelwise.data.pairs import first_of

    return first_of([f"{value:.4f}" for value in values], 8)
