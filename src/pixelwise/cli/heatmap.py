"""`pixelwise heatmap`: where in a photo an image classifier sees a class."""

from pathlib import Path
from typing import Annotated

import typer

from pixelwise.cli import options


def heatmap(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The photo.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.", show_default=False)],
    classifier: Annotated[
        str, typer.Option(help="A classifier of timm or torchvision; torchvision/NAME where both have one.")
    ] = "torchvision/mobilenet_v2",
    name: Annotated[
        str | None,
        typer.Option("--class", help="Its name, in any case, or its number; without it, the most certain one."),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="auto (the library's own, downloaded if need be), FILE, or random.")
    ] = "auto",
    dense: Annotated[
        int | None,
        typer.Option(help="Pixels between scores: 16, 8, ... 1. [default: the classifier's own]", show_default=False),
    ] = None,
    scale: Annotated[
        int | None, typer.Option(help="Scale the photo to this shorter side first, in pixels.", show_default=False)
    ] = None,
    cells: Annotated[
        bool, typer.Option("--cells", help="Class activation maps: scores of single cells, not of windows.")
    ] = False,
    device: options.Device = "auto",
) -> None:
    """Draw where in a photo an image classifier sees a class, and list the classes that it is most certain of.

    A window of the classifier's own size is scored around every 32nd pixel (--dense: more of them). It looks for things
    that fill about half its window: use --scale to make them that large.

    Example: pixelwise heatmap cat.jpg --classifier vgg16 --class tabby --out heat.png
    """
    from pixelwise.errors import UsageError
    from pixelwise.formats.image import write_png
    from pixelwise.infer.heatmap import open_classifier

    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: pictures are written as PNG; give a name that ends in .png.")
    if dense is not None and dense < 1:
        raise UsageError(f"--dense must be at least 1 pixel, not {dense}.")
    opened = open_classifier(
        classifier, weights=weights, dense=dense or False, head="cells" if cells else "window", device=device
    )
    labels = opened.classify(image, scale_px=scale)
    best = labels.best()
    chosen = labels.index(name if name is not None else best[0][0])
    write_png(out, labels.overlay(chosen))
    for found, share in best:
        options.print_plain(f"{share:6.1%}  {found}")
    peak = float(labels.heatmap(chosen).max())
    options.print_plain(f"{out}: {labels.names[chosen]}, at most {peak:.1%} (a score every {labels.stride} px)")
