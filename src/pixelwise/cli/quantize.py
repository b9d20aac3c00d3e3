"""`pixelwise quantize`: a trained network in 8 bits, and what that costs."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from pixelwise.cli import options


def quantize(
    run: options.Run,
    data: options.Data,
    split: Annotated[str, typer.Option(help="Which split to score.")] = "val",
    calibration_images: Annotated[
        int, typer.Option(metavar="N", min=1, max=10_000, help="Training images that ranges are found on.")
    ] = 32,
    force: Annotated[bool, typer.Option("--force", help="Keep it even if it costs more than a point.")] = False,
    classes: options.Classes = None,
    ignore: options.Ignore = None,
    group_by: options.GroupBy = None,
    masks: options.Masks = None,
    region: options.Region = None,
) -> None:
    """Make a trained network ready to compute in 8 bits on CPUs (AVX512-VNNI, AMX), and say what that costs.

    The ranges of maps are found on training images; then the network is scored with and without 8 bits. If that costs at
    most one point of mIoU, int8.json is written into the run folder, and `predict` and `evaluate` take --accelerate int8.

    Example: pixelwise quantize runs/street data/camvid
    """
    from pixelwise.infer.evaluate import open_for
    from pixelwise.infer.int8 import quantize_run

    how: dict[str, Any] = {"group_by": group_by, "masks": masks, "region": region}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        found = quantize_run(
            run,
            lambda predictor: open_for(predictor, data, classes=classes, ignore=ignore or (), **how),
            split=split,
            calibration_images=calibration_images,
            on_progress=show,
        )
    name = found.int8.headline.name
    for label, scored in (("bf16", found.folded), ("int8", found.int8)):
        miou = "" if name == "mIoU" else f"mIoU {100 * scored.scores.miou:.2f}; "
        options.print_plain(f"{label}: {miou}{scored.headline.text}")
    costs = {"mIoU": found.cost["miou"], name: found.cost["headline"]}  # which may be the same
    told = ", ".join(f"{points:.2f} points of {what}" for what, points in costs.items())
    options.print_plain(f"cost: {told}, on {found.int8.images:,} images of {split}")
    many = f"{len(found.ranges):,} convolutions in 8 bits, calibrated on {found.calibration_images:,} images"
    options.print_plain(f"speed: {found.speed:.2f} times that of bf16, on one image ({many})")
    path = found.save(run, force=force)
    options.print_plain(f"written: {path}; use it with --accelerate int8")
