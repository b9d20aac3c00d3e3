"""One network in this process; while it works on one image, threads decode the next and write the one before.

Threads, not processes: Pillow, tifffile's codecs and zlib decode and compress without Python's lock, so threads keep all
cores busy, and no pixels have to be copied from one process to another, which for JPEG takes longer than to decode them.
Images are not batched: on a CPU photos of 512 px are slower in batches, and the labels could differ by rounding.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats.base import LABELS, MAPS, Source, Writer
from pixelwise.formats.npy import write_probabilities
from pixelwise.formats.registry import choose_writer, stem_of, suffix_of
from pixelwise.infer.batch import Batch, Outcome, OutputError, Task, real
from pixelwise.infer.options import Decision
from pixelwise.infer.outputs import Location
from pixelwise.infer.overlay import write_overlay
from pixelwise.infer.pipeline import Pipeline, Progress, in_memory
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.remarks import Remarks, told_if_large
from pixelwise.infer.store import DiskStore, Store
from pixelwise.infer.tiling import Note
from pixelwise.ops.dropout import with_spatial_dropout

MOST_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A task whose image is open, with what the content says about its outputs."""

    pipeline: Pipeline
    staged: Path  # where the labels are written at first, and their store beside
    outputs: Mapping[str, Location]
    writers: Mapping[str, Writer]
    provenance: Mapping[str, Any]


@dataclass(kw_only=True)
class Labeller:
    """Labels the images of a batch with one network; `prepare` may run in other threads than `label`."""

    network: Predictor
    batch: Batch
    overwrite: bool = False  # do finished images again, and replace whatever has the name of an output
    note: Note = lambda text: None  # takes what the user should know
    progress: Progress = lambda done, total: None  # of the present image

    def __post_init__(self) -> None:
        self.options, trained = self.batch.options, self.network.card.reading
        if trained:
            reading = trained | dict(self.options.reading)
            self.options = replace(self.options, reading=tuple(sorted(reading.items())))
        self.folder = self.batch.folder
        self.changes = self.options.changes()
        self._remarks = Remarks(self.note)
        # An unknown class, and a network without dropout, is an error once, not for each image.
        Decision.of(self.network.labels, self.options, self.network.precision)
        if self.options.tiling.samples > 1:
            with_spatial_dropout(self.network.model, self.options.tiling.seed)

    def prepare(self, task: Task, *, fingerprint: str | None = None) -> Opened | None:
        """Open an image, and read it if it is small; None if its outputs are finished."""
        source = self.network.open(str(task.path), dict(self.batch.options.reading))
        with ExitStack() as stack:
            stack.callback(source.close)
            outputs, writers = self._outputs(task, source)
            provenance: dict[str, Any] = {
                "model": self.network.card.weights_sha256, "input": fingerprint or source.fingerprint(),
                "with": sorted(outputs),
            }  # fmt: skip
            if self.network.batch_statistics:
                provenance["statistics"] = "batch"
            if self.changes:
                provenance["options"] = self.changes
            if fingerprint is None:
                is_finished = not self.overwrite and self.folder.is_finished(outputs, provenance)
                self.folder.tidy(outputs[LABELS], is_finished=is_finished)
                if is_finished:
                    return None
            staged = self.folder.stage(outputs[LABELS])
            if text := told_if_large(source) if fingerprint is None else "":
                self._remarks.tell(text)
            small, info = in_memory(source), source.info
            if fingerprint is None:
                self._remarks.look(small, self.network.card, all_bands=True)
            if "overlay" in writers:
                writers["overlay"] = partial(write_overlay, source=small)
            pipeline = Pipeline(
                network=self.network, source=small, options=self.options, progress=self.progress,
                note=self._remarks.tell, state=partial(self._remarks.tell, key=(info.height, info.width)),
            )  # fmt: skip
            stack.pop_all()
        return Opened(pipeline=pipeline, staged=staged, outputs=outputs, writers=writers, provenance=provenance)

    def label(self, opened: Opened) -> Callable[[], None]:
        """Label an open image; gives what is left to do, to put its outputs in place, which another thread may do."""
        with ExitStack() as stack:
            stack.callback(opened.pipeline.source.close)
            store = opened.pipeline.store_for(opened.staged, opened.provenance)
            opened.pipeline.label(store)
            finish = partial(self._finish, opened, store, stack.pop_all())
        if not isinstance(store, DiskStore):
            return finish
        finish()  # it may take as much memory as the labelling
        return lambda: None

    def _finish(self, opened: Opened, store: Store, stack: ExitStack) -> None:
        with stack:  # closes the image, which an overlay still needs
            try:
                self.folder.write(opened.pipeline, store, opened.outputs, opened.writers, opened.provenance)
            except (DataError, UsageError):
                raise
            except PixelwiseError as error:
                raise OutputError(str(error)) from error
            if isinstance(store, DiskStore):
                store.remove()

    def _outputs(self, task: Task, source: Source) -> tuple[dict[str, Location], dict[str, Writer]]:
        """Where the outputs of an image go, and what writes them."""
        places, writers = {}, {}
        for kind, planned in task.outputs.items():
            places[kind] = planned
            if kind in (LABELS, *MAPS):
                suffix, writers[kind] = choose_writer(source.info, kind, self.options.format, source.metadata)
                if suffix_of(str(planned)) != suffix:  # the content decides, so it is known only now
                    name = self.folder.name(planned)
                    places[kind] = self.folder.at(name.with_name(stem_of(name.name) + suffix))
                    if real(places[kind]) == real(task.path):
                        raise UsageError(f"the result of {task.path} would replace it. Choose another --out folder.")
            else:
                writers[kind] = _writer(kind, self.options.background)
        return places, writers


def run_batch(
    network: Predictor,
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
    batch = batch.with_channels(network.card.reading.get("channel_files", 1))
    labeller = Labeller(network=network, batch=batch, overwrite=overwrite, note=note, progress=progress)
    if batch.passed_over:
        note(batch.passed_over)
    yield from batch.missing
    if engine == "local":
        yield from run_local(labeller, batch.tasks, threads=workers)
    elif engine == "ray":
        from pixelwise.infer.engines.ray import run_on_ray  # which builds on this module

        yield from run_on_ray(labeller, address=address, workers=workers)
    else:
        raise UsageError(f"there is no engine {engine!r}; there are local and ray.")


def run_local(labeller: Labeller, tasks: Sequence[Task], *, threads: int | None = None) -> Iterator[Outcome]:
    """Label images one after the other, one outcome each, in their order."""
    count = threads or min(MOST_THREADS, os.cpu_count() or 1)
    waiting = iter(tasks)
    reading: deque[tuple[Task, Future[Opened | None]]] = deque()  # each reader has one image, and one is ready
    writing: deque[Future[Outcome]] = deque()
    readers = ThreadPoolExecutor(count, thread_name_prefix="pixelwise-read")
    writers = ThreadPoolExecutor(count, thread_name_prefix="pixelwise-results")
    try:
        while True:
            for task in islice(waiting, count + 1 - len(reading)):
                reading.append((task, readers.submit(labeller.prepare, task)))
            if not reading:
                break
            writing.append(_labelled(labeller, *reading.popleft(), writers))
            while writing and (len(writing) > count or writing[0].done()):
                yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()
    finally:
        readers.shutdown(cancel_futures=True)
        for _, future in reading:
            if not future.cancelled() and future.exception() is None and (opened := future.result()) is not None:
                opened.pipeline.source.close()
        writers.shutdown()  # what was computed is written


def _labelled(
    labeller: Labeller, task: Task, opened: "Future[Opened | None]", writers: ThreadPoolExecutor
) -> "Future[Outcome]":
    """Label an image when it is open; its outcome is there when its outputs are."""
    try:
        found = opened.result()
        finish = None if found is None else labeller.label(found)
    except OutputError:
        raise
    except PixelwiseError as error:
        return writers.submit(Outcome, task.path, "failed", str(error))
    return writers.submit(_finished, task, finish)


def _finished(task: Task, finish: Callable[[], None] | None) -> Outcome:
    if finish is None:
        return Outcome(task.path, "skipped")
    try:
        finish()
    except OutputError:
        raise
    except PixelwiseError as error:
        return Outcome(task.path, "failed", str(error))
    return Outcome(task.path, "done")


def _writer(kind: str, background: bool) -> Writer:
    if kind == "probabilities":
        return write_probabilities
    from pixelwise.formats.coco import write_coco  # which need packages of their own
    from pixelwise.formats.geojson import write_geojson

    return write_coco if kind == "coco" else partial(write_geojson, background=background)
