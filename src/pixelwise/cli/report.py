"""`pixelwise report`: write the HTML report of a run."""

from pathlib import Path
from typing import Annotated

import typer

from pixelwise.cli import options


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The run folder that pixelwise train wrote.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The HTML file to write; by default RUN/report.html.")
    ] = None,
) -> None:
    """Write the report of a run: scores, pictures, curves, data and settings on one self-contained HTML page.

    Example: pixelwise report runs/street
    """
    from pixelwise.report import write_report

    options.print_plain(f"report: {write_report(run, out)}")
