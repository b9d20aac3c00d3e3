"""`pixelwise predict`: a label for every pixel of new images."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pixelwise.cli import options
from pixelwise.errors import UsageError

if TYPE_CHECKING:
    from pixelwise.infer.batch import Outcome

MANY = 10  # images, from which on it is told how the network computes
LOG_S = 60  # in a log, which has no bar, progress is told so often
_MAPS = "entropy, mutual_information, max_probability, with commas between: also write NAME_MAP."


def predict(
    run: options.Run,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUTS...",
            help="Images: files, folders (read recursively), quoted globs, URLs (s3://, gs://, hf://, https://).",
            show_default=False,
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", help="The folder for the labels, or its URL (s3://).", show_default=False)
    ],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write NAME_overlay.png, colours over the first plane.")
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Also write NAME_probabilities.npy, float32 (classes, height, width)."),
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(
            help="png, tiff, ome-tiff, geotiff, cog, nifti, dicom-seg, zarr, ome-zarr or npy; by default that of the image."
        ),
    ] = None,
    geojson: Annotated[bool, typer.Option("--geojson", help="Also write NAME.geojson, polygons.")] = False,
    background: Annotated[
        bool, typer.Option("--background", help="Polygons also of the class that is called background.")
    ] = False,
    coco: Annotated[bool, typer.Option("--coco", help="Also write NAME_coco.json, run lengths.")] = False,
    min_area: Annotated[
        int, typer.Option(metavar="PX", help="Smaller connected areas take the label around them.")
    ] = 0,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS=P", help="Give a class where it is at least so probable; repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do finished images again; replace any file.")] = False,
    tile: Annotated[
        int | None, typer.Option(metavar="PX", help="Side of the tiles; by default chosen by memory.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What it may take beside the weights, such as 2GiB.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Cut the halo where a pixel's influence is smaller (0.001); 0 is exact.")
    ] = 0.0,
    blend: Annotated[
        str | None, typer.Option(help="gaussian, cosine or uniform: blend overlapping tiles instead.")
    ] = None,
    overlap: Annotated[float | None, typer.Option(help="Share of a blended tile that the next repeats; 0.25.")] = None,
    tta: Annotated[str | None, typer.Option(help="flips, d4 or scales: average over transformed images.")] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Average N passes with dropout.")] = 1,
    seed: Annotated[int, typer.Option(help="Dropout seed.")] = 0,
    maps: Annotated[list[str] | None, typer.Option(metavar="A,B", help=_MAPS)] = None,
    bands: options.Bands = None,
    axis: options.Axis = None,
    axes: options.Axes = None,
    nan_is_nodata: options.NanIsNodata = False,
    level: options.Level = None,
    series: options.Series = None,
    intensity: options.Intensity = None,
    allow_no_affine: options.AllowNoAffine = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    accelerate: options.Accelerate = "auto",
    batch_statistics: options.BatchStatistics = False,
    engine: Annotated[str, typer.Option(help="local, or ray: the workers of a cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; by default Ray starts here.")] = None,
    workers: Annotated[int | None, typer.Option(help="Networks on Ray; locally, threads that decode.")] = None,
) -> None:
    """Label every pixel of images of any size, each at its own size, in the format of its file.

    Photos become indexed PNG with the class palette; TIFF, GeoTIFF, NIfTI, Zarr stay what they are, with their metadata.
    Sub-folders of a folder are kept below --out. Images that are finished are skipped on a second run, unless the
    network, the image or the options have changed; a run that was killed goes on where it was. An image that cannot be
    read is reported and the others go on (exit code 1).

    Example: pixelwise predict runs/street holiday/ "more/*.jpg" --out labels --overlay

    Example: pixelwise predict runs/land scene.tif --out labels --memory 2GiB --maps entropy --geojson
    """
    _check_engine(engine, address, workers)
    reading = options.reading_options(bands, axis, axes, nan_is_nodata, level, series, intensity, allow_no_affine)
    if overlap is not None and blend is None:
        raise UsageError("--overlap is that of blended tiles; add --blend gaussian, or leave it out.")
    if seed and samples == 1:
        raise UsageError("--seed is the dropout seed of --samples; add --samples 20, or leave it out.")
    tiling: dict[str, Any] = {
        "tile_px": tile,
        "blend": blend,
        "overlap": 0.25 if overlap is None else overlap,
        "tolerance": tolerance,
        "memory_bytes": None if memory is None else _parse_bytes(memory),
        "tta": tta,
        "samples": samples,
        "seed": seed,
    }
    outputs: dict[str, Any] = {
        "maps": _parse_list(maps or ()),
        "thresholds": tuple(_parse_threshold(text) for text in threshold or ()),
        "min_area_px": min_area,
        "format": format,
        "geojson": geojson,
        "background": background,
        "coco": coco,
        "overlay": overlay,
        "probabilities": probabilities,
        "reading": tuple(reading.items()),
    }
    _start_decoder(inputs)
    from pixelwise.infer.batch import plan_batch
    from pixelwise.infer.options import JobOptions, Tiling
    from pixelwise.infer.predictor import load

    batch = plan_batch(inputs, out, options=JobOptions(tiling=Tiling(**tiling), **outputs))
    how: dict[str, Any] = {"precision": precision, "accelerate": accelerate, "batch_statistics": batch_statistics}
    predictor = load(run, device=device, **how)
    outcomes = _label(predictor, batch, overwrite=overwrite, engine=engine, address=address, workers=workers)
    _summarise(outcomes, str(out))


def _parse_bytes(text: str) -> int:
    """A size such as 2GiB (1,024³ bytes each), 2G (the same), 500MB (1,000² each) or a number of bytes.

    Raises:
        UsageError: it is none of these, or less than 1 MiB, as "2" is where 2 GiB are meant.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) *(?:([kmgt])(i?b)?|b)?", text.strip().lower())
    if match is None:
        raise UsageError(f"--memory {text}: write a size such as 2GiB, 500MB or a number of bytes.")
    number, prefix, ending = match.groups()
    size = int(float(number) * (1000 if ending == "b" else 1024) ** " kmgt".index(prefix or " "))
    if size < 2**20:
        raise UsageError(f"--memory {text} is {size:,} bytes, too little for any network; write 2GiB or 500MB.")
    return size


def _parse_threshold(text: str) -> tuple[str, float]:
    """CLASS=P as the name of the class and the probability; the name may hold "=".

    Raises:
        UsageError: it has another form.
    """
    name, sign, number = text.rpartition("=")
    try:
        share = float(number)
    except ValueError:
        share = float("nan")
    if not sign or not name.strip() or not 0 < share <= 1:
        raise UsageError(
            f"--threshold {text}: write CLASS=P with the name of a class and a probability above 0 and at most 1, such as "
            "tumour=0.3."
        )
    return name.strip(), share


def _parse_list(texts: Sequence[str]) -> tuple[str, ...]:
    """Names with commas between them, from an option that may be repeated; each once."""
    names = [name.strip().replace("-", "_") for text in texts for name in text.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def _check_engine(engine: str, address: str | None, workers: int | None) -> None:
    """Raise `UsageError` for an unknown engine, or options of the other one."""
    if engine not in ("local", "ray"):
        raise UsageError(f"--engine {engine}: there are local (this process) and ray (workers of a cluster).")
    if engine == "local" and address is not None:
        raise UsageError("--address is that of a Ray cluster; add --engine ray, or leave it out.")
    most = 10_000 if address is not None else 256  # a process or thread each: of a cluster, or of this machine
    if workers is not None and not 1 <= workers <= most:
        raise UsageError(f"--workers must be at least 1 and at most {most:,}, not {workers}.")


def _start_decoder(inputs: Sequence[str]) -> None:
    """Start the process that decodes, if it will be needed, while this one imports torch."""
    from pixelwise.formats.registry import SOURCE_SUFFIXES, is_picture

    if any(name.lower().endswith(SOURCE_SUFFIXES) and not is_picture(name) for name in inputs):
        from pixelwise.formats import decoding

        decoding.start()


def _label(predictor: Any, batch: Any, **how: Any) -> "list[Outcome]":
    """Label the batch below one bar; what goes wrong, and what is to be known, stands above it."""
    from pixelwise.infer.engines.local import run_batch

    batch = batch.with_channels(predictor.card.reading.get("channel_files", 1))  # so that images are counted, not files
    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("labelling", total=len(batch.tasks) + len(batch.missing))

        def show(text: str) -> None:
            progress.console.print(options.for_terminal(text), markup=False, highlight=False, soft_wrap=True)

        if len(batch.tasks) >= MANY or predictor.accelerate in ("fold", "int8") or predictor.acceleration.is_refused:
            show(predictor.computing)
        said = time.monotonic()

        def advance(done: int, total: int) -> None:
            nonlocal said
            progress.update(task, completed=len(outcomes) + done / total)
            if not console.is_terminal and time.monotonic() - said > LOG_S:
                said = time.monotonic()
                show(f"{len(outcomes):,} of {len(batch.tasks):,} images done, and {done / total:.0%} of the next")

        try:
            for outcome in run_batch(predictor, batch, note=show, progress=advance, **how):
                outcomes.append(outcome)
                progress.update(task, completed=len(outcomes))
                if outcome.status == "failed":
                    show(f"failed: {outcome.message}")
        except KeyboardInterrupt:
            show("stopped: what was done is kept, and the same command goes on with the rest.")
            raise typer.Exit(130) from None
    return outcomes


def _summarise(outcomes: "list[Outcome]", out: str) -> None:
    counts = Counter[str](outcome.status for outcome in outcomes)
    parts = [f"{counts['done']:,} labelled"]
    for status, words in (("skipped", "finished before"), ("failed", "failed")):
        parts += [f"{counts[status]:,} {words}"] if counts[status] else []
    options.print_plain(f"{', '.join(parts)}: {out}")
    if counts["failed"]:
        raise typer.Exit(1)
