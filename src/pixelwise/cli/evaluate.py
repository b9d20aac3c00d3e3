"""`pixelwise evaluate`: the score of a trained network on labelled images."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from pixelwise.cli import options

if TYPE_CHECKING:
    from pixelwise.infer.evaluate import Evaluation


def evaluate(
    run: options.Run,
    data: options.Data,
    split: Annotated[str, typer.Option(help="Which split to score.")] = "test",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all results there; - prints them instead.")
    ] = None,
    classes: options.Classes = None,
    ignore: options.Ignore = None,
    group_by: options.GroupBy = None,
    masks: options.Masks = None,
    region: options.Region = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    accelerate: options.Accelerate = "auto",
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=65_536, help="Images in a pass, of equal size; 1, or 10 with --batch-statistics."),
    ] = None,
    batch_statistics: options.BatchStatistics = False,
) -> None:
    """Score a trained network: one exact confusion matrix over all pixels of a split, at full resolution.

    Writes evaluation-SPLIT.json and the best, median and worst images into the run folder, where that may be written.

    Example: pixelwise evaluate runs/street data/camvid --split test
    """
    from pixelwise import infer
    from pixelwise.infer.evaluate import open_for, place_of_results, write_evaluation

    computing: dict[str, Any] = {"precision": precision, "accelerate": accelerate}
    predictor = infer.load(run, device=device, batch_statistics=batch_statistics, **computing)
    how: dict[str, Any] = {"group_by": group_by, "masks": masks, "region": region}
    folder = open_for(predictor, data, classes=classes, ignore=ignore or (), **how)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"scoring {split}", total=None)
        evaluation = infer.evaluate(
            predictor,
            folder,
            split=split,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            batch=batch,
            note=lambda text: progress.console.print(text, markup=False, highlight=False, soft_wrap=True),
        )
    if place_of_results(predictor) is None:
        text = f"{run}: nothing may be written there, so evaluation-{split}.json and the pictures are left out; --json FILE"
        Console(stderr=True).print(options.for_terminal(f"{text} writes the results."), markup=False, soft_wrap=True)
    if str(json_file) == "-":
        typer.echo(json.dumps(evaluation.to_dict(), indent=2))
        return
    if json_file is not None:
        write_evaluation(evaluation, json_file)
    _print(evaluation)


def _print(evaluation: "Evaluation") -> None:
    scores = evaluation.scores
    truth = [sum(row) for row in evaluation.matrix]
    table = Table(
        "class", title=f"{evaluation.split}: {evaluation.images:,} images, {scores.pixels:,} labelled pixels; percent"
    )
    for heading in ("IoU", "Dice", "precision", "recall", "pixels"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, name in enumerate(evaluation.names):
        values = (scores.iou[index], scores.dice[index], scores.precision[index], scores.recall[index])
        table.add_row(Text(name), *map(_percent, values), f"{truth[index]:,}")
    options.table_console().print(table)
    options.print_plain(f"{evaluation.headline.text}, over {evaluation.images:,} images")
    totals = {
        "mIoU": scores.miou,
        "mean Dice": scores.mean_dice,
        "frequency-weighted IoU": scores.fwiou,
        "global accuracy": scores.global_accuracy,
        "class accuracy": scores.class_accuracy,
    }
    options.print_plain(", ".join(f"{name} {_percent(value)}" for name, value in totals.items()))
    if evaluation.statistics == "batch":
        options.print_plain(f"Batch norm by the statistics of each batch, of up to {evaluation.batch} images.")
    if scores.absent:
        absent = ", ".join(evaluation.names[index] for index in scores.absent)
        options.print_plain(f"In neither truth nor prediction, so left out of the means: {absent}.")


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
