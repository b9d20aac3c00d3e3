"""Workers of a Ray cluster: actors that hold the network and take images, or blocks of large ones.

The driver gives each idle worker the next job and waits with `ray.wait`. A worker that dies is replaced, and its job is
given to another. Blocks land in the store of their image on the disk that all machines share, or come back to the driver
where the outputs go to an object store. An image whose blocks are all there is assembled as any other image.
"""

import os
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.files import cannot_write, write_bytes
from pixelwise.infer.batch import Outcome, OutputError, Task
from pixelwise.infer.engines.cluster import Cluster, started
from pixelwise.infer.engines.local import MOST_THREADS, Labeller, run_local
from pixelwise.infer.engines.worker import Found, Job, Setting, Worker, blocks_of
from pixelwise.infer.outputs import RECORDS, Location, OutFolder
from pixelwise.infer.store import DiskStore
from pixelwise.infer.tiling import default_budget

SPREAD_BYTES = 16 << 20
"""Local files from this size on are opened before the start, to see whether their image is worth to be spread."""

_ATTEMPTS = 3  # workers that may die at a job
_MOST_IMAGES = 64  # of a job


def run_on_ray(
    labeller: Labeller,
    *,
    address: str | None = None,
    workers: int | None = None,
    block_px: int | None = None,
    spread_bytes: int = SPREAD_BYTES,
) -> Iterator[Outcome]:
    """Label the images of a batch on the workers of a cluster, one outcome each, in the order in which they end."""
    if labeller.network.folder is None:
        raise UsageError("engine ray: every worker loads the network itself; load it from a run folder.")
    use_gpus = labeller.network.device.type == "cuda"
    with started(address, workers, use_gpus=use_gpus) as cluster, _token(labeller) as token:
        driver = _Driver(labeller, cluster, token)
        yield from driver.plan(block_px, spread_bytes)
        yield from driver.run()


class _Driver:
    """Gives jobs to workers until all images have an outcome."""

    def __init__(self, labeller: Labeller, cluster: Cluster, token: str) -> None:
        self.labeller, self.cluster = labeller, cluster
        network, batch = labeller.network, labeller.batch
        device = "cuda" if cluster.gpus else "cpu"
        self.setting = Setting(
            folder=str(Path(network.folder or "").absolute()), weights_sha256=network.card.weights_sha256,
            options={
                "device": device, "precision": network.precision, "batch_statistics": network.batch_statistics,
                "accelerate": "none" if network.acceleration.kind == "none" else network.accelerate,
            },
            batch=replace(batch, tasks=(), missing=(), folder=OutFolder(_absolute(batch.folder.out))),
            overwrite=labeller.overwrite, token=token, threads=max(1, min(MOST_THREADS, int(cluster.cpus))),
        )  # fmt: skip
        self.jobs: deque[Job] = deque()
        self.left: dict[int, int] = {}  # blocks of an image, by the identity of its task
        self.stores: dict[int, DiskStore] = {}  # of images whose windows come back
        self.told: set[str] = set()

    def plan(self, block_px: int | None, spread_bytes: int) -> Iterator[Outcome]:
        """Sort the images into those for one worker and those that are spread; outcomes of what needs no work."""
        whole: list[Task] = []
        for task in self.labeller.batch.tasks:
            try:
                jobs = self._spread(task, block_px) if _may_be_large(task, spread_bytes) else []
            except PixelwiseError as error:
                yield Outcome(task.path, "failed", str(error))
                continue
            if jobs is None:
                yield Outcome(task.path, "skipped")
            elif jobs:
                self.jobs += jobs  # first, so that small ones fill the end
            else:
                whole.append(task)
        count = max(1, min(_MOST_IMAGES, -(-len(whole) // (8 * self.cluster.workers))))
        texts = [f"{len(whole):,} image{'s' * (len(whole) != 1)}"] if whole else []
        if spread := len(self.left):
            texts.append(f"{len(self.jobs):,} blocks of {spread:,} large image{'s' * (spread != 1)}")
        self.jobs += [Job(tasks=whole[start : start + count]) for start in range(0, len(whole), count)]
        if self.jobs:
            workers = self.cluster.workers
            self.labeller.note(f"{' and '.join(texts)} for {workers} worker{'s' * (workers != 1)} of Ray")

    def _spread(self, task: Task, block_px: int | None) -> list[Job] | None:
        """The blocks of an image; none if one worker takes it as a whole, None if it is finished."""
        opened = self.labeller.prepare(task)
        if opened is None:
            return None
        with opened.pipeline.source as source:
            info = source.info
            blocks = blocks_of(info.height, info.width, info.planes, self.cluster.workers, block_px, info.block_px)
            network = self.labeller.network
            budget = self.labeller.options.tiling.memory_bytes or default_budget(network.device)
            fits = info.planes == 1 and network.pass_memory(1, info.height, info.width) <= budget
            if len(blocks) == 1 or fits:  # one pass over the whole is what one worker does best
                return []
            if self.labeller.folder.is_remote:
                self.stores[id(task)] = opened.pipeline.store_on_disk(opened.staged, opened.provenance)
            self.left[id(task)] = len(blocks)
            return [Job(tasks=[task], block=block, fingerprint=opened.provenance["input"]) for block in blocks]

    def run(self) -> Iterator[Outcome]:
        """All jobs."""
        ray, total = self.cluster.ray, len(self.jobs)
        idle = [self._worker() for _ in range(min(self.cluster.workers, total))]
        running: dict[Any, tuple[Any, Job]] = {}
        try:
            while self.jobs or running:
                while idle and self.jobs:
                    worker, job = idle.pop(), self.jobs.popleft()
                    sent = [
                        Task(_absolute(task.path), {kind: _absolute(place) for kind, place in task.outputs.items()})
                        for task in job.tasks
                    ]
                    running[worker.run.remote(replace(job, tasks=sent))] = worker, job
                ended, _ = ray.wait(list(running), num_returns=1)
                worker, job = running.pop(ended[0])
                try:
                    found = ray.get(ended[0])
                    idle.append(worker)
                except ray.exceptions.RayActorError as error:
                    yield from self._died(job, error)
                    idle.append(self._worker())
                    continue
                yield from self._take(job, found)
                self.labeller.progress(max(0, total - len(self.jobs) - len(running)), total)
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[-500:]
            raise PixelwiseError(
                f"engine ray: the workers failed ({reason}). pixelwise must be installed on all machines, in the same "
                "version; what is finished is kept."
            ) from error
        finally:
            for worker in [*idle, *(worker for worker, _ in running.values())]:
                ray.kill(worker)

    def _worker(self) -> Any:
        ray, cluster = self.cluster.ray, self.cluster
        return ray.remote(Worker).options(num_cpus=cluster.cpus, num_gpus=cluster.gpus or None).remote(self.setting)

    def _died(self, job: Job, error: Exception) -> Iterator[Outcome]:
        """Give the job of a worker that died to another, images one by one; what kills each worker has failed."""
        if job.block is not None and id(job.tasks[0]) not in self.left:
            return
        if job.deaths + 1 < _ATTEMPTS:
            self.jobs += [replace(job, tasks=[task], deaths=job.deaths + 1) for task in job.tasks]
            return
        reason = " ".join(str(error).split())[:150]
        text = (
            f"each worker that tried it died ({reason}). It may need more memory than a worker has; try --engine local."
        )
        for task in job.tasks:
            self._forget_blocks(task)
            yield Outcome(task.path, "failed", f"{task.path}: {text}")

    def _take(self, job: Job, found: Found) -> Iterator[Outcome]:
        """What became of a job; the last block of an image makes a new job of it, to assemble it."""
        self._tell(found.notes)
        if seen := [path for path in found.unseen if os.path.lexists(path)]:
            raise PixelwiseError(
                f"{seen[0]}: is not seen by a worker. The images must lie in a folder that all machines share, or in an "
                "object store (s3://, gs://, az://)."
            )
        if job.block is None:
            given = {str(_absolute(task.path)): task.path for task in job.tasks}
            yield from (replace(outcome, path=given[str(outcome.path)]) for outcome in found.outcomes)
        elif id(job.tasks[0]) in self.left:
            yield from self._take_block(job.tasks[0], found)
        if found.stopped:
            raise OutputError(found.stopped)

    def _take_block(self, task: Task, found: Found) -> Iterator[Outcome]:
        for plane, region, arrays in found.windows:
            self.stores[id(task)].add(plane, region, arrays)
        self.left[id(task)] -= 1
        if found.outcomes:  # the image is damaged, so its other blocks are of no use; a new job tells what is wrong
            self.left[id(task)] = 0
        if self.left[id(task)]:
            return
        if self._forget_blocks(task):
            yield from run_local(self.labeller, [task])
        else:
            self.jobs.append(Job(tasks=[task]))

    def _forget_blocks(self, task: Task) -> DiskStore | None:
        """Drop what waits of an image's blocks, and let go of its store; None if its windows do not come back."""
        if self.left.pop(id(task), None) is not None:
            self.jobs = deque(job for job in self.jobs if job.block is None or job.tasks[0] is not task)
        return self.stores.pop(id(task), None)

    def _tell(self, notes: Sequence[str]) -> None:
        """Every worker says the same; of statements the way and the cost count, not the memory."""
        for text in notes:
            way, is_statement, _ = text.partition("x the multiply-adds of one pass")
            key = way.rpartition(": ")[2] if is_statement else text
            if key not in self.told:
                self.told.add(key)
                self.labeller.note(text)


def _absolute(place: Location) -> Location:
    """A path for workers, which have other working directories."""
    return place.absolute() if isinstance(place, Path) else place


def _may_be_large(task: Task, spread_bytes: int) -> bool:
    """Whether it is worth to open an image in this process; a million photos are not."""
    if isinstance(task.path, str):
        return True
    try:
        return task.path.is_dir() or task.path.stat().st_size >= spread_bytes
    except OSError:
        return False


@contextmanager
def _token(labeller: Labeller) -> Iterator[str]:
    """The name of a file in the folder of the outputs, for as long as the workers may look for it."""
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
