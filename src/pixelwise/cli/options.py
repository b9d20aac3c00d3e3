"""Options that several commands share, and how results are printed."""

import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pixelwise.errors import UsageError

_FLAGS = {
    "--pretrained": (".pth", ".pt", ".bin", ".tar", ".safetensors", ".ckpt"),
    "--write-classes": (".yaml", ".yml"),
}
"""Options whose value, a file with one of these suffixes, may be left out."""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder of a trained network.", show_default=False)]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", help="A folder of images and masks, or a CSV file that lists them.", show_default=False
    ),
]
Classes = Annotated[Path | None, typer.Option(metavar="FILE", help="A classes.yaml, instead of the one in DATA.")]


def _mask_value(text: str | int) -> int:
    """A whole number, or "nan", which a mask of floats may hold."""
    from pixelwise.formats.base import NAN_VALUE

    return NAN_VALUE if str(text).lower() == "nan" else int(text)


Ignore = Annotated[
    list[int] | None,
    typer.Option(metavar="VALUE", parser=_mask_value, help="A mask value to ignore, or nan; repeatable."),
]
GroupBy = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Regular expression: images with the same group 1 stay in one split. Or a column of a CSV file.",
    ),
]
Masks = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The folder of masks, where several beside the images hold labels; or how the names of masks end, where each "
        "image has several; or 'all', which joins the masks of each image.",
    ),
]
Region = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The folder, or column of a CSV file, of masks that are 0 where pixels do not count: a field of view.",
    ),
]
Bands = Annotated[
    str | None,
    typer.Option(metavar="N,…", help="The bands of each image to use, counted from 1, in this order: 4,3,2."),
]
Axis = Annotated[int | None, typer.Option(help="NIfTI: voxel axis that slices are cut along; 2.")]
Axes = Annotated[
    str | None,
    typer.Option(
        metavar="zyx", help="Zarr, .npy: a letter for each axis; y rows, x columns, c channels, others planes."
    ),
]
NanIsNodata = Annotated[
    bool, typer.Option("--nan-is-nodata", help="NIfTI: voxels that are NaN or infinite hold no data, and get no label.")
]
Level = Annotated[int | None, typer.Option(help="Slides, COG, OME-Zarr: level of the pyramid; 0 is the finest.")]
Series = Annotated[
    str | None, typer.Option(help="DICOM: SeriesInstanceUID; TIFF, OME-Zarr: number of the image, from 0.")
]
Intensity = Annotated[str | None, typer.Option(help="NIfTI, DICOM: auto, type or LOW,HIGH that become 0 and 1.")]
AllowNoAffine = Annotated[bool, typer.Option("--allow-no-affine", help="NIfTI: accept volumes without an affine.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="auto, bf16 or float32.")]
Accelerate = Annotated[
    str,
    typer.Option(help="fold (batch norm into convolutions), none, int8 (see quantize), or auto: fold in bf16 on CPUs."),
]
BatchStatistics = Annotated[
    bool,
    typer.Option("--batch-statistics", help="Batch norm by the batch at hand, not by the training's averages."),
]


def reading_options(
    bands: str | None,
    axis: int | None,
    axes: str | None,
    nan_is_nodata: bool,
    level: int | None,
    series: str | None,
    intensity: str | None,
    allow_no_affine: bool,
) -> dict[str, Any]:
    """What was typed of how images are read.

    Raises:
        UsageError: bands are no numbers from 1 on, or the intensity is neither auto, type nor two numbers.
    """
    if bands is not None and not re.fullmatch(r"\s*0*[1-9]\d{0,5}\s*(,\s*0*[1-9]\d{0,5}\s*)*", bands, re.ASCII):
        raise UsageError(f"--bands {bands}: write the numbers of the bands, counted from 1, such as 4,3,2.")
    given: dict[str, Any] = {
        "bands": None if bands is None else tuple(map(int, bands.split(","))),
        "axis": axis,
        "axes": axes,
        "nan_is_nodata": nan_is_nodata or None,
        "level": level,
        "series": int(series) if series is not None and series.isascii() and series.isdigit() else series,
        "intensity": intensity,
        "allow_no_affine": allow_no_affine or None,
    }
    if intensity not in (None, "auto", "type"):
        try:
            low, high = map(float, str(intensity).split(","))
        except ValueError as error:
            raise UsageError(f"--intensity {intensity}: write auto, type, or LOW,HIGH such as -100,300.") from error
        given["intensity"] = low, high
    return {key: value for key, value in given.items() if value is not None}


def with_flag_value(arguments: list[str]) -> list[str]:
    """Flags that may stand alone with their value spelt out: "auto", if no file of the right kind follows."""
    out = []
    for index, argument in enumerate(arguments):
        out.append(argument)
        if argument in _FLAGS:
            following = arguments[index + 1] if index + 1 < len(arguments) else "--"
            if following != "auto" and not following.lower().endswith(_FLAGS[argument]):
                out[-1] = f"{argument}=auto"
    return out


def print_plain(text: str) -> None:
    """Print a line of a result: names are no markup, and nothing is wrapped, so that paths can be copied."""
    Console().print(for_terminal(text), markup=False, highlight=False, soft_wrap=True)


def for_terminal(text: str, *, kept: str = "") -> str:
    """File names need not be valid text, and may hold control characters (those in `kept` are no harm) for a terminal."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(one if _is_harmless(one) or one in kept else "\N{REPLACEMENT CHARACTER}" for one in text)


def _is_harmless(char: str) -> bool:
    """Letters, the joiners within words of some scripts, and all kinds of space, as names of macOS's screenshots have."""
    return char.isprintable() or char in "\u200c\u200d" or unicodedata.category(char) == "Zs"


def table_console() -> Console:
    """Where tables are printed: neither a log, which has no width, nor a terminal of a few columns may cut them."""
    console = Console()
    return Console(width=max(console.width, 80 if console.is_terminal else 200))
