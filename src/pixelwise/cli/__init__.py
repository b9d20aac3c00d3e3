"""The command line: parse, call one function, print. One file a verb; heavy imports wait until a verb runs."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console

from pixelwise.cli.demo import demo
from pixelwise.cli.evaluate import evaluate
from pixelwise.cli.heatmap import heatmap
from pixelwise.cli.inspect import inspect
from pixelwise.cli.models import models
from pixelwise.cli.options import with_flag_value
from pixelwise.cli.predict import predict
from pixelwise.cli.report import report
from pixelwise.cli.train import train
from pixelwise.errors import PixelwiseError
from pixelwise.machine import memory_room, processors

app = typer.Typer(
    name="pixelwise",
    help="Semantic segmentation: a class for every pixel. Start with `pixelwise demo`, or `pixelwise inspect DATA`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (inspect, train, evaluate, predict, models, heatmap, report, demo):
    app.command()(verb)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", help="Show the version.", is_eager=True, callback=lambda on: _version(on)
    ),
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pixelwise {version('pixelwise')}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run the command line; the exit code is 0 (done), 1 (some inputs failed) or 2 (wrong usage or unusable data).

    What a user can cause is told in one paragraph; `--debug` shows where it came from. Ctrl-C ends with 130.
    """
    # Nothing phones home: the libraries below are told so before they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    if processors() < (
        os.cpu_count() or 1
    ):  # torch counts those of the machine, and its threads would wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", str(processors()))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = with_flag_value(arguments)
    try:
        app(arguments, prog_name="pixelwise")
    except BrokenPipeError:  # the reader of a pipe (`| head`) has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  (python flushes it once more at its end)
        sys.exit(0)
    except (PixelwiseError, OSError) as error:  # OSError: the disk is full, a folder may not be written
        if "--debug" in arguments:
            raise
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        from pixelwise.infer.estimates import is_out_of_memory

        if "--debug" in arguments or not is_out_of_memory(error):
            raise
        _fail(
            f"memory ran out ({memory_room() or 'how much is free is not known'}). Use smaller images, or more memory."
        )


def _fail(text: str) -> None:
    """End with an error; no markup and no wrapping at the terminal's width, since paths must stay whole to be copied."""
    Console(stderr=True, soft_wrap=True).print(f"pixelwise: {text}", markup=False, highlight=False)
    sys.exit(2)
