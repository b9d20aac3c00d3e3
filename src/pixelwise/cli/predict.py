"""`pixelwise predict`: a label for every pixel of new images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from pixelwise.infer.batch import Outcome


def predict(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The run folder of a trained network.", show_default=False)
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUTS...", help="Images: files, folders (read recursively) or quoted globs.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder for the labels.", show_default=False)],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write NAME_overlay.png, colours over image.")
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Also write NAME_probabilities.npy, float32 (classes, height, width)."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, bf16 or float32.")] = "auto",
    batch_statistics: Annotated[
        bool, typer.Option("--batch-statistics", help="Batch norm by each image, not by the training's averages.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do finished images again; replace any file.")] = False,
) -> None:
    """Label every pixel of images, each at its own size, as indexed PNG with the class palette.

    Sub-folders of a folder are kept below --out. Images that are finished are skipped on a second run, unless the
    network or the image has changed. An image that cannot be read is reported and the others go on (exit code 1).

    Example: pixelwise predict runs/street holiday/ "more/*.jpg" --out labels --overlay
    """
    from pixelwise.infer.batch import plan_batch, run_batch
    from pixelwise.infer.predictor import load

    batch = plan_batch(inputs, out, overlay=overlay, probabilities=probabilities)
    predictor = load(run, device=device, precision=precision, batch_statistics=batch_statistics)
    outcomes = []
    with _progress() as progress:
        task = progress.add_task("labelling", total=len(batch.jobs) + len(batch.missing))
        for outcome in run_batch(predictor, batch, overwrite=overwrite):
            outcomes.append(outcome)
            progress.advance(task)
            if outcome.status == "failed":
                text = _printable(f"failed: {outcome.message}")
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
    _summarise(outcomes, out)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _summarise(outcomes: "list[Outcome]", out: Path) -> None:
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in ("done", "skipped", "failed")}
    parts = [f"{counts['done']:,} labelled"]
    if counts["skipped"]:
        parts.append(f"{counts['skipped']:,} finished before")
    if counts["failed"]:
        parts.append(f"{counts['failed']:,} failed")
    text = _printable(f"{', '.join(parts)}: {out}")
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if counts["failed"]:
        raise typer.Exit(1)


def _printable(text: str) -> str:
    """File names need not be valid text, and may hold control characters; a terminal must survive both."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
