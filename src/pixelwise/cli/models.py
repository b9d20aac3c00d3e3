"""`pixelwise models`: the networks with paper, parameters, cost and stride, or with their receptive fields."""

import fnmatch
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from pixelwise.cli import options
from pixelwise.errors import UsageError

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
    rows = {row["name"]: row for row in json.loads((files("pixelwise") / "models" / "table.json").read_text("utf-8"))}
    if "pixelwise.models" in sys.modules:  # somebody may have registered networks of their own
        from pixelwise.models import list_models
    else:  # nobody has, and torch is not waited for

        def list_models(pattern: str = "*") -> list[str]:
            return sorted(fnmatch.filter(rows, pattern))

    names = list_models(pattern)
    if not names:
        raise UsageError(f"no model matches {pattern!r}. The models are {', '.join(list_models())}.")
    if receptive_field:
        _show_fields(names)
    else:
        _show_costs(names, rows)


def _show_costs(names: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of parameters, cost, stride and paper, from `rows` or measured now."""
    table = Table("name", "parameters", "GMAC", "stride", "paper", box=SIMPLE)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name in names:
        row = rows[name] if name in rows else _measure(name)
        cost = f"{row['multiply_adds'] / 1e9:.1f}"
        table.add_row(name, f"{row['parameters']:,}", cost, str(row["stride"]), row["paper"])
    options.table_console().print(table)


def _measure(name: str) -> dict[str, Any]:
    from pixelwise.models import describe_model

    return describe_model(name)


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
