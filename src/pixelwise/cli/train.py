"""`pixelwise train`: a trained network, an honest score and a page to look at."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pixelwise.cli import options

WAIT = 0.05  # of the time of a training; a larger share in which the network waits for crops is told

if TYPE_CHECKING:
    from pixelwise.data.check import Inspection
    from pixelwise.train.plan import Plan
    from pixelwise.train.run import Run


def train(
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", help="The run folder to write.")],
    model: Annotated[str | None, typer.Option(help="The network; `pixelwise models` lists them.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="The encoder of encoder_decoder: any timm or torchvision name.")
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(metavar="[FILE]", help="Start from pretrained weights: of timm or torchvision, or of a FILE."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|CLASSIFIER", help="Start from another run's weights, or from a classifier such as vgg16."
        ),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(metavar="MODEL,…", help="Networks to train first; each starts from the previous one.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for this many minutes.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Train for this many epochs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for this many steps.")] = None,
    classes: options.Classes = None,
    ignore: options.Ignore = None,
    group_by: options.GroupBy = None,
    masks: options.Masks = None,
    region: options.Region = None,
    bands: options.Bands = None,
    axis: options.Axis = None,
    slices: Annotated[
        int | None, typer.Option(metavar="N", help="Volumes: N neighbouring slices as channels, an odd number; 1.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of options; options of the command line override it.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any training option; options.KEY=VALUE is one of the network."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why this precision, batch size and number of workers were chosen.")
    ] = False,
) -> None:
    """Check the data, print the plan, train, evaluate the best weights and write the report.

    Images and masks may be of any format that predict reads; a volume is trained on slice by slice, a large raster by
    windows. --resume continues an interrupted run. Before the first step precision and worker processes are chosen by
    timing, in 20 seconds at most; --explain shows the times. All options for --set: docs/training.md.

    Example: pixelwise train data/camvid --out runs/camvid --backbone resnet18 --pretrained --minutes 30

    Example: pixelwise train data/camvid --out runs/fcn8s --model fcn8s --init vgg16 --stages fcn32s,fcn16s

    Example: pixelwise train data/cells --model unet --out runs/cells --epochs 100 --set crop_px=256 --set flips=dihedral

    Example: pixelwise train data/livers --model unet --out runs/livers --slices 3 --set intensity=-160,240
    """
    from pixelwise.cli.progress import TrainingProgress
    from pixelwise.data.layouts import open_data
    from pixelwise.infer.evaluate import evaluate
    from pixelwise.report import write_report
    from pixelwise.train import command_line, make_config, merge_options, parse_settings, read_config
    from pixelwise.train import train as train_network
    from pixelwise.train.folder import recorded_choices

    typed: dict[str, Any] = {
        "model": model,
        "pretrained": pretrained,
        "init": init,
        "stages": stages,
        "minutes": minutes,
        "epochs": epochs,
        "steps": steps,
        "bands": bands,
        "axis": axis,
        "slices": slices,
    }
    typed = {key: value for key, value in typed.items() if value is not None}
    if backbone is not None:
        typed["options"] = {"backbone": backbone}
    given = merge_options(read_config(config) if config else {}, parse_settings(settings or []), typed)
    asked = make_config(given) if given or not resume else None
    named = {"group_by": group_by, "masks": masks, "region": region}
    chosen = recorded_choices(out) if resume else {}
    chosen |= {key: value for key, value in named.items() if value is not None}
    folder = open_data(data, classes=classes, ignore=tuple(ignore or ()), **chosen)
    run = None
    with TrainingProgress(Console()) as progress, suppress(KeyboardInterrupt):
        run = train_network(
            folder,
            asked,
            out=out,
            resume=resume,
            command=command_line(),
            on_plan=lambda plan, inspection: options.table_console().print(_page(plan, inspection, explain)),
            report=progress.update,
        )
    if run is None or run.interrupted:
        options.print_plain(_stopped(run, out))
        raise typer.Exit(130)
    for split in ("val", "test"):
        pairs = folder.split(split)
        if unlabelled := sum(pair.mask is None for pair in pairs):
            options.print_plain(f"{split}: not scored, {unlabelled:,} of its {len(pairs):,} images have no mask.")
        elif pairs:
            found = evaluate(out, folder, split=split, check=False, note=options.print_plain)
            options.print_plain(f"{split}, {found.images:,} images: {found.headline.text}")
            means = f"mIoU {100 * found.scores.miou:.2f}, global accuracy {100 * found.scores.global_accuracy:.2f}"
            options.print_plain(f"{split}: {means}")
    _tell_what_was_slow(run)
    options.print_plain(f"{run.steps:,} steps in {run.seconds / 60:.1f} min. Report: {write_report(out)}")


def _tell_what_was_slow(run: "Run") -> None:
    from pixelwise.cli.progress import LINE_EVERY_S

    if run.is_short:
        options.print_plain(
            f"Only {run.steps:,} of {run.plan.steps:,} planned steps were done in the time: the machine was slower than "
            "when the plan was made, or busy. The scores would be higher with more time (--minutes, or max_minutes)."
        )
    if run.wait > WAIT and run.seconds > LINE_EVERY_S:
        options.print_plain(
            f"The network waited {100 * run.wait:.0f} % of the time for its crops: with --set workers=… beyond "
            f"{run.plan.workers} more processes prepare them, where there are cores for them."
        )


def _stopped(run: "Run | None", out: Path) -> str:
    """What to say of a training that was ended early; there is no `run` where it was asked twice, and ended at once."""
    if run is None:
        return f"Stopped at once; if {out} holds a checkpoint, --resume goes on from it."
    stage = f" of stage {run.plan.stage.partition(',')[0]}" if run.plan.stage else ""
    return (
        f"Stopped by {run.interrupted} at step {run.steps:,}{stage}; the checkpoint is written. Continue with --resume."
    )


def _page(plan: "Plan", inspection: "Inspection", explain: bool = False) -> Table:
    table = Table(box=SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(key: str, value: str) -> None:
        table.add_row(key, Text(value))  # names of classes and files are no markup

    images = ", ".join(f"{count:,} {name}" for name, count in plan.data["images"].items())
    if plan.stage:
        row("stage", plan.stage)
    row("data", f"{plan.data['root']}: {plan.data['layout']}; {images}")
    for problem in inspection.problems:
        row("  warning", problem.message)
    for note in plan.notes:
        row("  note", note)
    row("classes", f"{len(plan.classes)}: {', '.join(plan.classes)}")
    options = ", ".join(f"{key}={value}" for key, value in plan.config.items())
    row("network", f"{plan.model} ({options}); {plan.parameters:,} parameters")
    row("weights", plan.pretrained or "random")
    warm = f" ({plan.warm_px} x {plan.warm_px} px in the first half)" if plan.warm_px else ""
    side = f"{plan.crop_px} x {plan.crop_px} px{warm}"
    row(plan.inputs, f"{side}, {plan.batch_size} a batch, {plan.workers} worker processes")
    if plan.separation:
        row("gaps", plan.separation)
    row("computes", f"{plan.precision} on {plan.device}, {plan.step_s:.2f} s a step")
    validation = (
        f"validation every {plan.validate_every_steps:,} steps" if plan.validate_every_steps else "no validation images"
    )
    row("steps", f"about {plan.steps:,}, {plan.steps_per_epoch:,} an epoch; {validation}")
    memory = f", {plan.memory_bytes / 2**30:.1f} GiB of memory" if plan.memory_bytes else ""
    row("expected", f"{plan.expected_s / 60:.1f} min{memory}")
    for reason in plan.reasons if explain else ():
        row("  why", reason)
    return table
