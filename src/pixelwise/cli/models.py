"""`pixelwise models`: the networks, with paper, parameters, cost and stride."""

from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def models(
    pattern: Annotated[str, typer.Argument(help="Names to show; may hold * and ?.")] = "*",
) -> None:
    """List the networks: name, trainable parameters, cost, coarsest stride, paper.

    Parameters and cost are those for 3 channels and 11 classes, the cost in billions of multiply-adds for one image of 360 x
    480 px (GMAC); the stride is in pixels.

    Example: pixelwise models "unet*"
    """
    from pixelwise.errors import UsageError
    from pixelwise.models import describe_model, list_models

    names = list_models(pattern)
    if not names:
        raise UsageError(f"no model matches {pattern!r}. The models are {', '.join(list_models())}.")
    table = Table("name", "parameters", "GMAC", "stride", "paper", box=SIMPLE)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name in names:
        row = describe_model(name)
        cost = f"{row['multiply_adds'] / 1e9:.1f}"
        table.add_row(name, f"{row['parameters']:,}", cost, str(row["stride"]), row["paper"])
    console = Console()
    if not console.is_terminal:  # a pipe has no width: a line for each network
        console = Console(width=200)
    console.print(table)
