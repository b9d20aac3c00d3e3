"""One network in this process; while it works on one image, threads decode the next.

Threads, not processes: Pillow, tifffile's codecs and zlib decode without Python's lock, so threads keep all cores busy,
and no pixels have to be copied from one process to another, which for JPEG takes longer than to decode them.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

from pixelwise.errors import PixelwiseError
from pixelwise.infer.engines.base import Job, Labeller, Outcome, OutputError, Task

Item = TypeVar("Item")
Found = TypeVar("Found")

MOST_THREADS = 8


def run(labeller: Labeller, *, threads: int | None = None) -> Iterator[Outcome]:
    """Label the images of a batch one after the other, one outcome each, in their order.

    Args:
        labeller: the network and the work.
        threads: that open and decode images; None takes as many as there are cores, at most 8.

    Raises:
        OutputError: an output cannot be written (disk full, no permission). Nothing half-written stays.
    """
    count = threads or min(MOST_THREADS, os.cpu_count() or 1)
    jobs = labeller.batch.jobs
    with closing(prefetch(labeller.prepare, jobs, threads=count, discard=_close)) as coming:
        for job, future in coming:
            yield _outcome(labeller, job, future)


def _close(task: Task | None) -> None:
    if task is not None:
        task.image.source.close()


def _outcome(labeller: Labeller, job: Job, future: "Future[Task | None]") -> Outcome:
    try:
        task = future.result()
        if task is None:
            return Outcome(job.path, "skipped")
        labeller.label(task)
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
