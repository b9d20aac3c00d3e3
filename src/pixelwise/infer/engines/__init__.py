"""Who labels the images of a batch: this process (`local`), or the workers of a Ray cluster (`ray`)."""

from collections.abc import Iterator

from pixelwise.errors import UsageError
from pixelwise.infer.batch import Batch, Outcome
from pixelwise.infer.engines.local import Labeller, run_local
from pixelwise.infer.engines.ray import run_on_ray
from pixelwise.infer.network import Network
from pixelwise.infer.pipeline import Note, Progress


def run_batch(
    network: Network,
    batch: Batch,
    *,
    overwrite: bool = False,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    note: Note = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> Iterator[Outcome]:
    """Label every image of the batch, one outcome each; while one is computed the next is decoded.

    An output that is finished is skipped: it was written by the same network from an input with the same content. One
    from another network or input is made again. A file that pixelwise did not write is never replaced. A run that was
    killed goes on where it was.

    Args:
        network: The predictor.
        batch: From `plan_batch`.
        overwrite: Do everything again, and replace whatever has the name of an output.
        engine: "local" (this process) or "ray" (workers of a cluster, or of this machine).
        address: of the Ray cluster; None starts Ray in this process.
        workers: of Ray; for the local engine, threads that decode. None chooses.
        note: Takes what the user should know, one line each.
        progress: Takes (pixels done, pixels in all) of large images.

    Raises:
        UsageError: there is no such engine, or its package is not installed; samples of a network without dropout.
        PixelwiseError: an output cannot be written (disk full, no permission). Nothing half-written stays.
    """
    labeller = Labeller(network=network, batch=batch, overwrite=overwrite, note=note, progress=progress)
    yield from batch.missing
    if engine == "local":
        yield from run_local(labeller, batch.tasks, threads=workers)
    elif engine == "ray":
        yield from run_on_ray(labeller, address=address, workers=workers)
    else:
        raise UsageError(f"there is no engine {engine!r}; there are local and ray.")
