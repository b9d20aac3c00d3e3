"""One network in this process; while it works on one image, threads decode the next and write the one before.

Threads, not processes: Pillow, tifffile's codecs and zlib decode and compress without Python's lock, so threads keep all
cores busy, and no pixels have to be copied from one process to another, which for JPEG takes longer than to decode them.
Images are not batched: on a CPU photos of 512 px are slower in batches, and the labels could differ by rounding.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

from pixelwise.errors import PixelwiseError
from pixelwise.infer.engines.base import Job, Labeller, Outcome, OutputError, Task

Item = TypeVar("Item")
Found = TypeVar("Found")

MOST_THREADS = 8


def run(labeller: Labeller, *, jobs: Sequence[Job] | None = None, threads: int | None = None) -> Iterator[Outcome]:
    """Label the images of a batch one after the other, one outcome each, in their order.

    Args:
        labeller: the network and the work.
        jobs: other jobs than those of its batch.
        threads: that open and decode images, and as many that write; None takes as many as there are cores, at most 8.

    Raises:
        OutputError: an output cannot be written (disk full, no permission). Nothing half-written stays.
    """
    count = threads or min(MOST_THREADS, os.cpu_count() or 1)
    jobs = labeller.batch.jobs if jobs is None else jobs
    writing: deque[tuple[Job, Future[Outcome]]] = deque()
    pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="pixelwise-results")
    try:
        with closing(prefetch(labeller.prepare, jobs, threads=count, discard=_close)) as coming:
            for job, future in coming:
                writing.append((job, _scored(labeller, job, future, pool)))
                while writing and (len(writing) > count or writing[0][1].done()):
                    yield writing.popleft()[1].result()
            while writing:
                yield writing.popleft()[1].result()
    finally:
        pool.shutdown()  # what was computed is written


def _close(task: Task | None) -> None:
    if task is not None:
        task.image.source.close()


def _scored(
    labeller: Labeller, job: Job, prepared: "Future[Task | None]", pool: ThreadPoolExecutor
) -> "Future[Outcome]":
    """Label an image when it is prepared; its outcome is there when its outputs are."""
    known: Future[Outcome] = Future()
    try:
        task = prepared.result()
        if task is not None:
            return pool.submit(_written, job, labeller.score(task))
        known.set_result(Outcome(job.path, "skipped"))
    except OutputError:
        raise
    except PixelwiseError as error:
        known.set_result(Outcome(job.path, "failed", str(error)))
    return known


def _written(job: Job, rest: Callable[[], None]) -> Outcome:
    try:
        rest()
    except OutputError:
        raise
    except PixelwiseError as error:
        return Outcome(job.path, "failed", str(error))
    return Outcome(job.path, "done")


def prefetch(
    function: Callable[[Item], Found],
    items: Iterable[Item],
    *,
    threads: int = 1,
    discard: Callable[[Found], None] | None = None,
) -> Generator[tuple[Item, "Future[Found]"], None, None]:
    """Apply `function` to each item in background threads, each always one item ahead of whoever iterates.

    Args:
        function: of an item.
        items: may be endless.
        threads: how many.
        discard: called with the results that nobody came to take.

    Example:
        >>> [(item, future.result()) for item, future in prefetch(abs, [-1, 2])]
        [(-1, 1), (2, 2)]
    """
    pending: deque[tuple[Item, Future[Found]]] = deque()
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pixelwise-read")
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) == threads + 1:
                yield pending.popleft()
        while pending:  # not all at once: who has iterated to the end should not keep what was read
            yield pending.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
        for _, future in pending:
            if discard is not None and not future.cancelled() and future.exception() is None:
                discard(future.result())
