"""Options that several commands share, and how results are printed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder of a trained network.", show_default=False)]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", help="A folder of images and masks, or a CSV file that lists them.", show_default=False
    ),
]
Classes = Annotated[Path | None, typer.Option(metavar="FILE", help="A classes.yaml, instead of the one in DATA.")]
Ignore = Annotated[list[int] | None, typer.Option(metavar="VALUE", help="A mask value to ignore; repeatable.")]
GroupBy = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="Regular expression: images with the same group 1 stay in one split."),
]
Masks = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The folder of masks, where several beside the images hold labels."),
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
BatchStatistics = Annotated[
    bool,
    typer.Option("--batch-statistics", help="Batch norm by the batch at hand, not by the training's averages."),
]


def print_plain(text: str) -> None:
    """Print a line of a result: names are no markup, and nothing is wrapped, so that paths can be copied."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
