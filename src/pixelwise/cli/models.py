"""`pixelwise models`: the networks, with paper, parameters and stride."""

from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def models(
    pattern: Annotated[str, typer.Argument(help="Names to show; may hold * and ?.")] = "*",
) -> None:
    """List the networks: name, paper, trainable parameters (3 channels, 11 classes) and coarsest stride in pixels.

    Example: pixelwise models "unet*"
    """
    from pixelwise.errors import UsageError
    from pixelwise.models import describe_model, list_models

    names = list_models(pattern)
    if not names:
        raise UsageError(f"no model matches {pattern!r}. The models are {', '.join(list_models())}.")
    table = Table("name", "parameters", "stride", "paper", box=SIMPLE)
    for name in names:
        row = describe_model(name)
        table.add_row(name, f"{row['parameters']:,}", str(row["stride"]), row["paper"])
    Console().print(table)
