"""The command line: parse, call one function, print. One file a verb; heavy imports wait until a verb runs."""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import typer
from rich.console import Console

from pixelwise.cli.demo import demo
from pixelwise.cli.evaluate import evaluate
from pixelwise.cli.heatmap import heatmap
from pixelwise.cli.inspect import inspect
from pixelwise.cli.models import models
from pixelwise.cli.options import for_terminal, with_flag_value
from pixelwise.cli.predict import predict
from pixelwise.cli.quantize import quantize
from pixelwise.cli.report import report
from pixelwise.cli.streams import Streams
from pixelwise.cli.train import train
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.machine import processors, refused

app = typer.Typer(
    name="pixelwise",
    help="Semantic segmentation: a class for every pixel. Start with `pixelwise demo`, or `pixelwise inspect DATA`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (inspect, train, evaluate, predict, models, heatmap, quantize, report, demo):
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

    What a user can cause is told in one paragraph; `--debug` shows where it came from. Ctrl-C ends with 130. The work goes
    on when nobody reads what is printed (`| head`); where it cannot be written the exit code is 2 in the end.
    """
    # Nothing phones home: the libraries below are told so before they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    if processors() < (
        os.cpu_count() or 1
    ):  # torch counts those of the machine, and its threads would wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", str(processors()))
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # which Lightning imports; without a HOME it complains
    streams, unwritten = Streams(), ""
    try:
        code = _run(with_flag_value(list(sys.argv[1:] if arguments is None else arguments)))
    finally:
        unwritten = streams.close()
    if unwritten:
        with suppress(OSError):  # stderr may be no better
            _complain(
                f"not all that was to be printed could be written ({unwritten})" + "; all else was done." * (not code)
            )
    sys.exit(code or (2 if unwritten else 0))


def _run(arguments: list[str]) -> int:
    """The exit code of a command line."""
    try:
        if not _is_somewhere():
            raise UsageError("the folder in which this was started was deleted or moved. Change into another one (cd).")
        app(arguments, prog_name="pixelwise")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except (PixelwiseError, OSError, RuntimeError, MemoryError, ImportError, SystemError) as error:
        if "--debug" in arguments:
            raise
        try:
            told = str(error) if isinstance(error, PixelwiseError) else refused(error)
            if told is not None:
                _complain(told)
        except MemoryError:  # there is none left to say it in full
            told = _NO_MEMORY.decode()
            os.write(2, _NO_MEMORY)
        if told is None:
            raise
        return 2
    return 0


_NO_MEMORY = b"pixelwise: memory ran out. Give it more (ulimit -v, or the limit of this container or job).\n"


def _is_somewhere() -> bool:
    """Whether there is a current folder; torch would end the process without one."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return False
    return True


def _complain(text: str) -> None:
    # No markup and no wrapping at the terminal's width: paths must stay whole to be copied.
    text = for_terminal(f"pixelwise: {text}", kept="\n")
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)
