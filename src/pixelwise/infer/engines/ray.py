"""The workers of a Ray cluster: each holds the network once, and takes images or pieces of huge ones.

Rows of a Ray Dataset say what is to do. Workers write outputs and parts in the shared folder of the results; a part has
its name when it is complete, so whatever is done twice is done once. This process puts the outputs of a spread image in
place when its parts are there. A worker that is killed is replaced and its row is given to another.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.files import extra
from pixelwise.infer.engines.base import Batch, Job, Labeller, Outcome, OutputError
from pixelwise.infer.engines.pieces import pieces
from pixelwise.infer.engines.shared import SharedParts
from pixelwise.infer.inputs import Location
from pixelwise.infer.job import compute
from pixelwise.infer.predictor import load
from pixelwise.infer.tiling import Region
from pixelwise.infer.tools import Tools

SPREAD_BYTES = 16 << 20
"""Files from this size on are opened before the start, to see whether their image is worth spreading."""

_RETRIES = 3
_STORE_BYTES = 100 << 20  # rows are small


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a worker needs to load the network and to know its work."""

    folder: str
    device: str
    precision: str
    batch_statistics: bool
    batch: Batch  # without its jobs
    overwrite: bool
    tools: Tools


class Worker:
    """Does one row of the dataset at a time, with one network."""

    def __init__(self, network: Network) -> None:
        self._notes: list[str] = []
        predictor = load(
            network.folder,
            device=network.device,
            precision=network.precision,
            batch_statistics=network.batch_statistics,
        )
        self._labeller = Labeller(
            predictor=predictor,
            batch=network.batch,
            tools=network.tools,
            overwrite=network.overwrite,
            note=self._notes.append,
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Label the image of a row, or compute the piece it tells; gives the row's number and what became of it."""
        message = ""
        try:
            status = self._done(row)
        except OutputError as error:
            status, message = "stopped", str(error)
        except PixelwiseError as error:
            status, message = "failed", str(error)
        notes, self._notes[:] = json.dumps(self._notes), []
        return {"index": row["index"], "piece": row["piece"], "status": status, "message": message, "notes": notes}

    def _done(self, row: dict[str, Any]) -> str:
        job = _job_of(row)
        digest = row["digest"] or None
        task = self._labeller.prepare(job, digest=digest)
        if task is None:
            return "skipped"
        if digest is None:
            self._labeller.label(task)
            return "done"
        with task.image.source:
            piece = row["plane"], Region(row["top"], row["left"], row["height"], row["width"])
            folder = self._labeller.parts_folder(task)
            parts, shared = task.image.parts(folder, only=piece), SharedParts(self._labeller.folder.out, folder)
            shared.fetch(parts, near=piece)
            compute(task.image, parts, plane=piece[0], region=piece[1])
            shared.send(parts, near=piece)
        return "done"


@dataclass
class _Spread:
    """An image whose pieces are spread: what is left of them, and what went wrong."""

    job: Job
    digest: str
    sizes: dict[int, int] = field(default_factory=dict)  # pixels of each open piece
    total_px: int = 0
    message: str = ""


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
        PixelwiseError: the cluster cannot be reached, or its workers fail for good.
    """
    if labeller.predictor.folder is None:
        raise UsageError("engine ray: every worker loads the network itself; load it from a run folder.")
    with _started(address, workers) as (ray, count, gpus):
        rows, spread = [], dict[int, _Spread]()
        for index, job in enumerate(labeller.batch.jobs):
            try:
                found = _rows_of(labeller, index, job, count, piece_px, spread_bytes, spread)
            except PixelwiseError as error:
                yield Outcome(job.path, "failed", str(error))
                continue
            if found is None:
                yield Outcome(job.path, "skipped")
            rows += found or []
        if rows:
            labeller.note(f"{len(rows):,} pieces of work for {count} workers of Ray")
            yield from _outcomes(labeller, _results(ray, labeller, rows, count, gpus), spread)


def _rows_of(
    labeller: Labeller,
    index: int,
    job: Job,
    workers: int,
    piece_px: int | None,
    spread_bytes: int,
    spread: dict[int, _Spread],
) -> list[dict[str, Any]] | None:
    """What is to do for an image: one row, or one for each piece; None if it is finished."""
    if not _may_be_huge(job.path, spread_bytes):
        return [_row(index, job)]
    task = labeller.prepare(job)
    if task is None:
        return None
    with task.image.source as source:
        info = source.info
    found = pieces(info.height, info.width, info.planes, workers, piece_px)
    if len(found) == 1 or task.pixels is not None:
        return [_row(index, job)]
    digest = task.mark["input"]
    sizes = {number: region.height * region.width for number, (_, region) in enumerate(found)}
    spread[index] = _Spread(job, digest, sizes, sum(sizes.values()))
    return [_row(index, job, number, digest, plane, region) for number, (plane, region) in enumerate(found)]


def _row(
    index: int, job: Job, piece: int = 0, digest: str = "", plane: int = 0, region: Region | None = None
) -> dict[str, Any]:
    region = region or Region(0, 0, 0, 0)
    outputs = {kind: (isinstance(place, Path), str(place)) for kind, place in job.outputs.items()}
    return {
        "index": index,
        "piece": piece,
        "path": json.dumps((isinstance(job.path, Path), str(job.path))),
        "outputs": json.dumps(outputs),
        "digest": digest,
        "plane": plane,
        "top": region.top,
        "left": region.left,
        "height": region.height,
        "width": region.width,
    }


def _job_of(row: dict[str, Any]) -> Job:
    outputs = {kind: _location(*place) for kind, place in json.loads(row["outputs"]).items()}
    return Job(_location(*json.loads(row["path"])), outputs)


def _location(is_path: bool, text: str) -> Location:
    return Path(text) if is_path else text


def _may_be_huge(path: Location, spread_bytes: int) -> bool:
    """Whether it is worth to open an image in this process; a million photos are not."""
    if isinstance(path, str):
        return True
    try:
        return path.is_dir() or path.stat().st_size >= spread_bytes
    except OSError:
        return False


def _outcomes(labeller: Labeller, results: Iterable[dict[str, Any]], spread: dict[int, _Spread]) -> Iterator[Outcome]:
    """One outcome for each image, when all its rows are done."""
    jobs = labeller.batch.jobs
    for result in results:
        for text in json.loads(result["notes"]):
            labeller.note(text)
        if result["status"] == "stopped":
            raise OutputError(result["message"])
        whole = spread.get(result["index"])
        if whole is None:
            yield Outcome(jobs[result["index"]].path, result["status"], result["message"])
            continue
        whole.message = whole.message or result["message"]
        whole.sizes.pop(result["piece"], None)
        if not whole.sizes:
            del spread[result["index"]]
            yield _finished(labeller, whole)
        left = sum(sum(item.sizes.values()) / item.total_px for item in spread.values())
        labeller.progress(round(1000 * (len(spread) - left)), 1000)


def _finished(labeller: Labeller, whole: _Spread) -> Outcome:
    """Put the outputs of an image in place; should a part be damaged, it is computed here."""
    path = whole.job.path
    if whole.message:
        return Outcome(path, "failed", whole.message)
    try:
        task = labeller.prepare(whole.job)
        if task is None:
            return Outcome(path, "skipped")
        if task.mark["input"] != whole.digest:
            task.image.source.close()
            return Outcome(
                path, "failed", f"{path}: the file changed while it was read. Run again when nothing writes to it."
            )
        folder = labeller.parts_folder(task)
        shared = SharedParts(labeller.folder.out, folder)
        shared.fetch(task.image.parts(folder))
        labeller.label(task)
        shared.remove()
    except PixelwiseError as error:
        return Outcome(path, "failed", str(error))
    return Outcome(path, "done")


def _results(
    ray: ModuleType, labeller: Labeller, rows: Sequence[dict[str, Any]], workers: int, gpus: float
) -> Iterator[dict[str, Any]]:
    """The rows as they were done, in the order in which they end."""
    predictor, batch = labeller.predictor, labeller.batch
    network = Network(
        folder=str(predictor.folder),
        device="cuda" if gpus else "cpu",
        precision=predictor.precision,
        batch_statistics=predictor.batch_statistics,
        batch=Batch((), (), batch.out, batch.options),
        overwrite=labeller.overwrite,
        tools=labeller.tools,
    )
    with _quiet():
        dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_args=(network,),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows)), max_tasks_in_flight_per_actor=2),
            num_cpus=1,
            num_gpus=gpus or None,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        found = iter(dataset.iter_rows())
    try:
        while True:
            with _quiet():
                row = next(found, None)
            if row is None:
                return
            yield row
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[-500:]
        raise PixelwiseError(
            f"engine ray: the workers failed ({reason}). The run folder, the images and --out must be seen by all of them; "
            "what is finished is kept."
        ) from error


@contextmanager
def _started(address: str | None, workers: int | None) -> Iterator[tuple[ModuleType, int, float]]:
    """Ray, how many workers hold the network, and the GPUs of each; a Ray that was not started here is left running."""
    # Read when Ray is imported: nothing phones home, and its own log stays off the terminal.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _quiet():
        ray, _ = extra("ray", "cluster", "--engine ray"), extra("ray.data", "cluster", "--engine ray")
        is_ours = not ray.is_initialized()
        if is_ours:
            _connect(ray, address, workers)
        ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        resources = ray.cluster_resources()
        graphics = int(resources.get("GPU", 0))
        cores = int(resources.get("CPU", 1))
        count = workers or graphics or (cores if is_ours and address is None else max(1, cores // 2))
        yield ray, count, 1.0 if graphics >= count else 0.0
    finally:
        if is_ours:
            ray.shutdown()


def _connect(ray: ModuleType, address: str | None, workers: int | None) -> None:
    if address is None:
        ray.init(
            num_cpus=workers or max(1, (os.cpu_count() or 1) // 2),  # one for each process that holds the network
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_STORE_BYTES,
            _node_ip_address="127.0.0.1",  # nobody else is to connect
        )
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PixelwiseError(f"--address {address}: no Ray cluster answers there ({error}).") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray warns of its own obsolete settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
