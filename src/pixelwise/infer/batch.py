"""Label many images: find them, refuse what cannot end well, skip what is finished, go on past what is broken."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from pixelwise.errors import UsageError
from pixelwise.files import extra
from pixelwise.formats.remote import is_url, local_path
from pixelwise.formats.sinks import LABELS, WRITERS
from pixelwise.infer.engines.base import ENDINGS, Batch, Job, Labeller, Outcome
from pixelwise.infer.engines.local import prefetch
from pixelwise.infer.engines.local import run as run_local
from pixelwise.infer.inputs import Location, find_images, real, stem_of
from pixelwise.infer.job import Note, Progress, silent, uncounted
from pixelwise.infer.options import JobOptions
from pixelwise.infer.outfolder import OutFolder
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.tools import Tools
from pixelwise.ops.spatial_dropout import with_spatial_dropout

__all__ = ["Batch", "Job", "Outcome", "plan_batch", "prefetch", "run_batch"]

_LIKELY = {".ome.tif": ".ome.tif", ".ome.tiff": ".ome.tif", ".tif": ".tif", ".tiff": ".tif"} | {
    ".nii.gz": ".nii.gz", ".nii": ".nii.gz", ".dcm": ".nii.gz", ".ome.zarr": ".ome.zarr", ".zarr": ".zarr", ".npy": ".npy",
    ".svs": ".ome.tif", ".ndpi": ".ome.tif", ".scn": ".ome.tif", ".bif": ".ome.tif",
}  # fmt: skip


def plan_batch(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    overlay: bool = False,
    probabilities: bool = False,
    options: JobOptions | None = None,
) -> Batch:
    """Find the images and the names of their outputs; nothing is read or written yet.

    A file or URL is taken whatever its suffix. A folder is read recursively for image suffixes (hidden files, links to
    folders and `out` itself are left out), a glob such as `scans/**/*.tif` is expanded; both keep their sub-folders in
    `out`. A Zarr folder, and a folder of DICOM files only, is one image.

    Args:
        inputs: files, folders, globs, URLs.
        out: the folder of the results, or its URL.
        overlay: also write the colours over the image.
        probabilities: also write the probabilities of all classes.
        options: all wishes; the two before are added to them.

    Raises:
        UsageError: there is no input at all, two inputs would become the same file, an output is also an input, or a
            package for what is wanted is not installed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "day").mkdir()
        >>> (folder / "day" / "a.jpg").touch()
        >>> batch = plan_batch([folder], "labels")
        >>> batch.jobs[0].outputs["labels"].as_posix()
        'labels/day/a.png'
    """
    options = options or JobOptions(overlay=overlay, probabilities=probabilities)
    if options.format is not None and options.format not in WRITERS:
        raise UsageError(f"there is no format {options.format!r} for labels; there are {', '.join(WRITERS)}.")
    _check_packages(options)
    out = (local_path(str(out)) if is_url(out) else None) or out
    local = None if is_url(out) else Path(out)
    if local is not None and local.exists() and not local.is_dir():
        raise UsageError(f"--out {out}: is a file. Name a folder for the results.")
    folder = OutFolder(out)
    finder = find_images(inputs, local)
    kinds = [LABELS, *options.maps, *(kind for kind in ENDINGS if getattr(options, kind))]
    jobs = [
        Job(path, {kind: folder.at(_output_name(name, str(path), kind, options.format)) for kind in kinds})
        for (_, name), path in finder.found.items()
    ]
    _refuse_clashes(jobs)
    missing = tuple(Outcome(path, "failed", message) for path, message in finder.missing)
    return Batch(tuple(jobs), missing, folder.out, options)


def run_batch(
    predictor: Predictor,
    batch: Batch,
    *,
    overwrite: bool = False,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    note: Note = silent,
    progress: Progress = uncounted,
    tools: Tools | None = None,
) -> Iterator[Outcome]:
    """Label every image of the batch, one outcome each; while one is computed the next is decoded.

    An output that is finished is skipped: it was written by the same network from an input with the same content. One
    from another network or input is made again. A file that pixelwise did not write is never replaced. A job that was
    killed goes on where it was.

    Args:
        predictor: The network.
        batch: From `plan_batch`.
        overwrite: Do everything again, and replace whatever has the name of an output.
        engine: "local" (this process) or "ray" (workers of a cluster, or of this machine).
        address: of the Ray cluster; None starts Ray in this process.
        workers: of Ray; for the local engine, threads that decode. None chooses.
        note: Takes what the user should know, one line each.
        progress: Told (pixels done, pixels in all) of large images.
        tools: Who opens, scores, decides and writes; None takes those of the package.

    Raises:
        UsageError: there is no such engine, or its package is not installed; samples of a network without dropout.
        PixelwiseError: an output cannot be written (disk full, no permission). Nothing half-written stays.

    Example:
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.infer.bundle import ModelCard
        >>> from pixelwise.models import create_model
        >>> from PIL import Image
        >>> import tempfile
        >>> spec = LabelSpec(names=("sky", "road"), colors=((0, 0, 255), (90, 90, 90)), values=((0,), (1,)))
        >>> config = {"tiny": True, "num_classes": 2, "in_channels": 3}
        >>> card = ModelCard(model="unet", config=config, labels=spec, mean=(0.5,) * 3, std=(0.2,) * 3)
        >>> predictor = Predictor(create_model("unet", **config), card, device="cpu")
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 6)).save(folder / "a.jpg")
        >>> batch = plan_batch([folder / "*.jpg"], folder / "labels")
        >>> [outcome.status for outcome in run_batch(predictor, batch)]
        ['done']
        >>> [outcome.status for outcome in run_batch(predictor, batch)]
        ['skipped']
    """
    if batch.options.tiling.samples > 1:  # a network without dropout is told once, not for each image
        with_spatial_dropout(predictor.model, batch.options.tiling.seed)
    labeller = Labeller(
        predictor=predictor,
        batch=batch,
        tools=tools or Tools.standard(),
        overwrite=overwrite,
        note=note,
        progress=progress,
    )
    yield from batch.missing
    if engine == "local":
        yield from run_local(labeller, threads=workers)
    elif engine == "ray":
        from pixelwise.infer.engines.ray import run as run_on_ray

        yield from run_on_ray(labeller, address=address, workers=workers)
    else:
        raise UsageError(f"there is no engine {engine!r}; there are local and ray.")


def _check_packages(options: JobOptions) -> None:
    """What is missing should be known before the work, not when its result is to be written."""
    package = WRITERS[options.format].package if options.format else None
    if package is not None:
        extra(*package, f"writing {options.format}")
    if options.geojson:
        for name in ("rasterio", "shapely"):
            extra(name, "geo", "GeoJSON")


def _output_name(name: PurePath, path: str, kind: str, wanted: str | None) -> PurePath:
    """The name that an output will have, as far as the name of the image tells; its content decides at the end."""
    if kind in ENDINGS:
        return name.with_name(name.name + ENDINGS[kind])
    name_of_image = path.rstrip("/").lower()
    likely = next((suffix for end, suffix in _LIKELY.items() if name_of_image.endswith(end)), ".png")
    suffix = WRITERS[wanted].suffixes[0] if wanted else likely
    if kind == LABELS:
        return name.with_name(name.name + suffix)
    return name.with_name(f"{name.name}_{kind}{'.tif' if suffix == '.png' else suffix}")


def _refuse_clashes(jobs: Sequence[Job]) -> None:
    """Names are compared without their suffixes, for these may still change."""
    owners: dict[str, tuple[Location, Location]] = {}
    clashes = []
    for job in jobs:
        for output in job.outputs.values():
            first, its = owners.setdefault(_bare(output), (job.path, output))
            if first != job.path:
                result = output if its == output else f"{_bare(output)}, whatever its suffix"
                clashes.append(f"{first} and {job.path} would both become {result}")
    if clashes:
        more = f", and {len(clashes) - 5:,} more" if len(clashes) > 5 else ""
        listed = "; ".join(clashes[:5])
        raise UsageError(f"{listed}{more}. Rename one, or label them in two calls with different --out folders.")
    inputs = {real(job.path) for job in jobs if isinstance(job.path, Path)} | {
        job.path for job in jobs if isinstance(job.path, str)
    }
    for job in jobs:
        for output in job.outputs.values():
            if (real(output) if isinstance(output, Path) else output) in inputs:
                raise UsageError(
                    f"the result of {job.path} would replace the input {output}. Choose another --out folder."
                )


def _bare(output: Location) -> str:
    path = str(output)
    name = PurePath(path).name
    return path[: len(path) - len(name)] + stem_of(name)
