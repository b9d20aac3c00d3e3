"""The workers of a Ray cluster: each holds the network once, and takes images or pieces of huge ones.

Rows of a Ray Dataset say what is to do. Workers write outputs and parts in the shared folder of the results; a part has
its name when it is complete, so whatever is done twice is done once. The worker that brings the last piece of an image
puts its outputs in place. A worker that is killed is replaced and its row is given to another.
"""

import logging
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.files import cannot_write, write_bytes
from pixelwise.formats import SourceInfo
from pixelwise.formats.remote import RemoteStamp, is_url
from pixelwise.infer.engines.base import Job, Labeller, Outcome, OutputError
from pixelwise.infer.engines.ledger import Ledger
from pixelwise.infer.engines.local import MOST_THREADS, prefetch
from pixelwise.infer.engines.pieces import pieces
from pixelwise.infer.engines.ray_cluster import Cluster, quiet, started
from pixelwise.infer.engines.ray_worker import Worker, join, network_of
from pixelwise.infer.engines.shared import SharedParts
from pixelwise.infer.engines.work import MOST_IMAGES, row_of_piece, rows_of_images, unpacked
from pixelwise.infer.inputs import Location
from pixelwise.infer.outfolder import RECORDS
from pixelwise.infer.tiling.plan import default_budget, pass_memory

SPREAD_BYTES = 16 << 20
"""Files from this size on are opened before the start, to see whether their image is worth spreading."""

_RETRIES = 3
_LOOKERS = 16  # threads that ask a file system or a server for sizes


@dataclass
class _Spread:
    """An image whose pieces are spread: what is left of them, and what went wrong."""

    job: Job
    digest: str
    folder: Path  # of its parts
    rows: dict[int, dict[str, Any]]
    sizes: dict[int, int]  # pixels of each open piece
    total_px: int
    joined: bool = False
    status: str = "done"
    message: str = ""

    def take(self, found: dict[str, Any]) -> None:
        """Note what became of a piece."""
        self.sizes.pop(found["piece"], None)
        self.joined = self.joined or found["joined"]
        if self.status == "done":
            self.status, self.message = found["status"], found["message"]


@dataclass
class _Work:
    """What is to do and not yet known to be done."""

    images: dict[int, Job] = field(default_factory=dict)
    spread: dict[int, _Spread] = field(default_factory=dict)

    def rows(self, workers: int, most: int = MOST_IMAGES) -> list[dict[str, Any]]:
        """The large ones first, so that small ones fill the end."""
        large = [whole.rows[piece] for whole in self.spread.values() for piece in whole.sizes]
        return large + list(rows_of_images(list(self.images.items()), workers, most))

    @property
    def pieces(self) -> dict[int, int]:
        """How many pieces each spread image has."""
        return {index: len(whole.rows) for index, whole in self.spread.items()}

    @property
    def done_share(self) -> float:
        """Of the images that are spread, in images."""
        left = sum(sum(whole.sizes.values()) / whole.total_px for whole in self.spread.values())
        return len(self.spread) - left


def run(
    labeller: Labeller,
    *,
    address: str | None = None,
    workers: int | None = None,
    piece_px: int | None = None,
    spread_bytes: int = SPREAD_BYTES,
) -> Iterator[Outcome]:
    """Label the images of a batch on the workers of a cluster, one outcome each, in the order in which they end.

    Args:
        labeller: the network, loaded from a run folder that all workers see, and the work.
        address: of the cluster; None starts Ray on this machine, for as long as it takes.
        workers: how many hold the network; None is one for each GPU, or one for two cores.
        piece_px: pixels of a piece of a spread image; None chooses.
        spread_bytes: files from this size on may be spread.

    Raises:
        UsageError: Ray is not installed, or the network was not loaded from a folder.
        OutputError: an output cannot be written.
        PixelwiseError: the cluster cannot be reached, its workers do not see the folders, or they fail for good.
    """
    if labeller.predictor.folder is None:
        raise UsageError("engine ray: every worker loads the network itself; load it from a run folder.")
    use_gpus = labeller.predictor.device.type == "cuda"
    with started(address, workers, use_gpus=use_gpus) as cluster, _token(labeller) as token:
        work = _Work()
        yield from _planned(labeller, cluster.workers, piece_px, spread_bytes, work)
        reasons: list[str] = []
        for attempt in (1, 2):  # rows that no worker survived come a second time, image by image
            if rows := work.rows(cluster.workers, MOST_IMAGES if attempt == 1 else 1):
                if attempt == 1:
                    labeller.note(f"{_counted(work)} for {cluster.workers} worker{'s' * (cluster.workers != 1)} of Ray")
                yield from _outcomes(labeller, _results(cluster, labeller, rows, work, token, reasons), work)
        yield from _lost(work, reasons)


def _counted(work: _Work) -> str:
    """How much there is to do, in words."""
    count = sum(work.pieces.values())
    texts = [f"{len(work.images):,} image{'s' * (len(work.images) != 1)}"] if work.images else []
    texts += [f"{count:,} pieces of {len(work.spread):,} large image{'s' * (len(work.spread) != 1)}"] if count else []
    return " and ".join(texts)


def _planned(
    labeller: Labeller, workers: int, piece_px: int | None, spread_bytes: int, work: _Work
) -> Iterator[Outcome]:
    """Sort the images into those for one worker and those that are spread; outcomes of what needs no work."""

    def look(item: tuple[int, Job]) -> _Spread | Job | None:
        index, job = item
        if not _may_be_huge(job.path, spread_bytes):
            return job
        task = labeller.prepare(job)
        if task is None:
            return None
        with task.image.source as source:
            info = source.info
        found = pieces(info.height, info.width, info.planes, workers, piece_px, info.block_px)
        if len(found) == 1 or _fits(labeller, info):
            return job
        digest = task.mark["input"]
        rows = {number: row_of_piece(index, job, digest, number, piece) for number, piece in enumerate(found)}
        sizes = {number: piece.px for number, piece in enumerate(found)}
        return _Spread(job, digest, labeller.parts_folder(task), rows, sizes, sum(sizes.values()))

    pass_memory(labeller.predictor)  # measured once, not by several threads
    for (index, job), future in prefetch(look, enumerate(labeller.batch.jobs), threads=_LOOKERS):
        try:
            found = future.result()
        except PixelwiseError as error:
            yield Outcome(job.path, "failed", str(error))
            continue
        if found is None:
            yield Outcome(job.path, "skipped")
        elif isinstance(found, _Spread):
            work.spread[index] = found
        else:
            work.images[index] = found


def _fits(labeller: Labeller, info: SourceInfo) -> bool:
    """Whether one pass takes a plane as a whole, which is what one worker does best."""
    predictor, tiling = labeller.predictor, labeller.options.tiling
    budget = tiling.memory_bytes or default_budget(predictor.device)
    return info.planes == 1 and pass_memory(predictor)(1, info.height, info.width) <= budget


def _may_be_huge(path: Location, spread_bytes: int) -> bool:
    """Whether it is worth to open an image in this process; a million photos are not."""
    try:
        if isinstance(path, str):
            return RemoteStamp.of(path).size >= spread_bytes
        return path.is_dir() or path.stat().st_size >= spread_bytes
    except OSError:
        return False
    except PixelwiseError:
        return True  # a folder, such as a Zarr; or opening it tells what is wrong


@contextmanager
def _token(labeller: Labeller) -> Iterator[str]:
    """The name of a file in the folder of the results, for as long as the workers may look for it."""
    name = f"shared-{secrets.token_hex(8)}"
    out = labeller.folder.out
    if isinstance(out, str):
        yield name
        return
    path = out / RECORDS / name
    try:
        write_bytes(path, b"")
    except OSError as error:
        raise OutputError(str(cannot_write(path, error))) from error
    try:
        yield name
    finally:
        path.unlink(missing_ok=True)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def _outcomes(labeller: Labeller, results: Iterator[dict[str, Any]], work: _Work) -> Iterator[Outcome]:
    """One outcome for each image, when all its rows are done."""
    told: set[str] = set()
    for result in results:
        for text in result["notes"]:
            if (key := _meaning(text)) not in told:  # every worker says it
                told.add(key)
                labeller.note(text)
        for found in result["outcomes"]:
            index = found["index"]
            if "piece" not in found:
                job = work.images.pop(index, None)
                if job is not None:
                    yield _seen(job, found)
            elif index in work.spread:
                whole = work.spread[index]
                whole.take(found)
                if not whole.sizes:
                    del work.spread[index]
                    yield _finished(labeller, whole)
        if result["stopped"]:
            raise OutputError(result["stopped"])
        labeller.progress(round(1000 * work.done_share), 1000)


def _meaning(text: str) -> str:
    """A note, or of a statement of way, cost and memory the way and the cost, which are those of all workers."""
    way, is_statement, _ = text.partition("x the multiply-adds of one pass")
    return way.rpartition(": ")[2] if is_statement else text


def _seen(job: Job, found: dict[str, Any]) -> Outcome:
    """The outcome of an image; a worker that does not see what is here would fail them all, quickly."""
    if found["status"] == "unseen" and isinstance(job.path, Path) and job.path.exists():
        raise PixelwiseError(
            f"{job.path}: is not seen by a worker. The images must lie in a folder that all machines share, or in an object "
            "store (s3://, gs://, az://)."
        )
    known: dict[str, Literal["done", "skipped"]] = {"done": "done", "skipped": "skipped"}
    return Outcome(job.path, known.get(found["status"], "failed"), found["message"])


def _finished(labeller: Labeller, whole: _Spread) -> Outcome:
    """The outcome of an image whose pieces are done; if no worker has joined them, this process does."""
    if whole.status == "done" and not whole.joined:
        found = join(labeller, whole.job, whole.digest)
        whole.status, whole.message = found.status, found.message
    if whole.status == "changed" or (whole.status == "damaged" and not is_url(whole.job.path)):
        _forget(labeller, whole)
    if whole.status == "done":
        return Outcome(whole.job.path, "done")
    return Outcome(whole.job.path, "failed", whole.message)


def _forget(labeller: Labeller, whole: _Spread) -> None:
    """Remove the pieces of an image that is not what it was; of a server that failed, they are kept."""
    shutil.rmtree(whole.folder, ignore_errors=True)
    try:
        SharedParts(labeller.folder.out, whole.folder).remove()
    except PixelwiseError as error:
        labeller.note(str(error))


def _lost(work: _Work, reasons: Sequence[str]) -> Iterator[Outcome]:
    """Images whose workers died each time."""
    why = f" ({reasons[-1]})" if reasons else ""
    text = (
        f"each worker that tried it died or failed{why}. It may need more memory than a worker has; try --engine local."
    )
    for job in [*work.images.values(), *(whole.job for whole in work.spread.values())]:
        yield Outcome(job.path, "failed", f"{job.path}: {text}")


def _results(
    cluster: Cluster,
    labeller: Labeller,
    rows: Sequence[dict[str, Any]],
    work: _Work,
    token: str,
    reasons: list[str],
) -> Iterator[dict[str, Any]]:
    """What became of the rows, in the order in which they end; errors of workers go to `reasons`."""
    ray = cluster.ray
    threads = max(1, min(MOST_THREADS, int(cluster.cpus)))
    network = network_of(labeller, device="cuda" if cluster.gpus else "cpu", token=token, threads=threads)
    with _listening(reasons):
        with quiet():
            here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=True
            )
            ledger = ray.remote(Ledger).options(
                num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
            )
            dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
                Worker,
                fn_constructor_args=(network, ledger.remote(work.pieces)),
                compute=ray.data.ActorPoolStrategy(
                    size=min(cluster.workers, len(rows)), max_tasks_in_flight_per_actor=2
                ),
                num_cpus=cluster.cpus,
                num_gpus=cluster.gpus or None,
                max_restarts=-1,
                max_task_retries=_RETRIES,
            )
            found = iter(dataset.iter_rows())
        try:
            while True:
                with quiet():  # not while whoever iterates is at work
                    row = next(found, None)
                if row is None:
                    return
                yield unpacked(row["result"])
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[-500:]
            raise PixelwiseError(
                f"engine ray: the workers failed ({reason}). pixelwise must be installed on all machines, in the same "
                "version; what is finished is kept."
            ) from error
        finally:
            if not cluster.is_ours:  # else Ray itself ends, which does not wait for rows that are half done
                with quiet():
                    found.close()


class _Listener(logging.Handler):
    """Keeps the last error that Ray Data would have written to the terminal."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._reasons = reasons

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self._reasons[:] = [f"{type(error).__name__}: {' '.join(str(error).split())}".partition(". ")[0][:150]]


@contextmanager
def _listening(reasons: list[str]) -> Iterator[None]:
    log, handler = logging.getLogger("ray.data"), _Listener(reasons)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
