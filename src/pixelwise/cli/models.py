"""`pixelwise models`: the networks with paper, parameters, cost and stride, or with their receptive fields."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from pixelwise.cli import options

TILE_PX = 1024  # of the tiles whose cost is given


def models(
    pattern: Annotated[str, typer.Argument(help="Pattern of the names to list, with * and ? as wildcards.")] = "*",
    receptive_field: Annotated[
        bool, typer.Option("--receptive-field", help="Measure the receptive fields instead; some take a minute.")
    ] = False,
) -> None:
    """List the networks: name, trainable parameters, cost, coarsest stride, paper.

    Parameters and cost are those for 3 channels and 11 classes, the cost in billions of multiply-adds for one image of 360 x
    480 px (GMAC); the stride is in pixels.

    With --receptive-field: the stride to which exact tiles are aligned, the receptive field in pixels above, below, left and
    right of a pixel, and the cost of exact tiles of 1,024 px with a halo of that size relative to one pass.

    Example: pixelwise models "unet*"
    """
    from pixelwise.errors import UsageError
    from pixelwise.models import list_models

    names = list_models(pattern)
    if not names:
        raise UsageError(f"no model matches {pattern!r}. The models are {', '.join(list_models())}.")
    if receptive_field:
        _show_fields(names)
    else:
        _show_costs(names)


def _show_costs(names: Sequence[str]) -> None:
    """Print a table of parameters, cost, stride and paper."""
    from pixelwise.models import describe_model

    table = Table("name", "parameters", "GMAC", "stride", "paper", box=SIMPLE)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name in names:
        row = describe_model(name)
        cost = f"{row['multiply_adds'] / 1e9:.1f}"
        table.add_row(name, f"{row['parameters']:,}", cost, str(row["stride"]), row["paper"])
    options.table_console().print(table)


def _show_fields(names: Sequence[str]) -> None:
    """Print one line for each network as soon as it is measured."""
    import torch

    from pixelwise.models import create_model
    from pixelwise.ops.receptive_field import receptive_field

    wide = max(map(len, names))
    typer.echo(f"{'name':{wide}}  stride  above  below   left  right  tiles of {TILE_PX:,} px cost")
    for name in names:
        with torch.device("meta"):  # the receptive field does not depend on the weights
            model = create_model(name, num_classes=11)
        field = receptive_field(model)
        if field.radius_px is None:
            typer.echo(f"{name:{wide}}  the whole image")
            continue
        sides = "  ".join(f"{px:5}" for px in field.radius_px)
        typer.echo(f"{name:{wide}}  {field.stride:6}  {sides}  {field.tile_cost(TILE_PX):.2f}x")
