"""One network in this process; while it works on one image, threads decode the next and write the one before.

Threads, not processes: Pillow, tifffile's codecs and zlib decode and compress without Python's lock, so threads keep all
cores busy, and no pixels have to be copied from one process to another, which for JPEG takes longer than to decode them.
Images are not batched: on a CPU photos of 512 px are slower in batches, and the labels could differ by rounding.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats.base import LABELS, MAPS, Source, SourceInfo, Writer
from pixelwise.formats.npy import write_probabilities
from pixelwise.formats.registry import choose_writer, stem_of
from pixelwise.infer.batch import Batch, Outcome, OutputError, Task, real
from pixelwise.infer.decide import Decision
from pixelwise.infer.network import Network
from pixelwise.infer.outputs import Location, OutFolder, write_outputs
from pixelwise.infer.overlay import write_overlay
from pixelwise.infer.pipeline import Note, Pipeline, Progress
from pixelwise.infer.prefetch import in_memory, open_image, prefetch
from pixelwise.infer.store import Store
from pixelwise.ops.spatial_dropout import with_spatial_dropout

MOST_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A task whose image is open, with what the content says about its outputs."""

    task: Task
    pipeline: Pipeline
    outputs: Mapping[str, Location]
    writers: Mapping[str, Writer]
    provenance: Mapping[str, Any]


@dataclass(kw_only=True)
class Labeller:
    """Labels the images of a batch with one network; `prepare` may run in other threads than `label`.

    Attributes:
        network: the network.
        batch: the work.
        overwrite: do finished images again, and replace whatever has the name of an output.
        note: takes what the user should know.
        progress: takes the pixels done of the present image, and how many it has.
    """

    network: Network
    batch: Batch
    overwrite: bool = False
    note: Note = lambda text: None
    progress: Progress = lambda done, total: None

    def __post_init__(self) -> None:
        reading = {**self.network.card.reading, **dict(self.batch.options.reading)}
        self.options = replace(self.batch.options, reading=tuple(sorted(reading.items())))
        self.folder = OutFolder(self.batch.out)
        Decision.of(self.network, self.options)  # an unknown class is an error once, not for each image
        self._stated: set[tuple[int, int]] = set()
        self._told: set[str] = set()
        if self.options.tiling.samples > 1:  # a network without dropout is an error once, not for each image
            with_spatial_dropout(self.network.model, self.options.tiling.seed)

    def prepare(self, task: Task, *, fingerprint: str | None = None) -> Opened | None:
        """Open an image, and read it if it is small; None if its outputs are finished.

        Args:
            task: the image and its outputs.
            fingerprint: of the image, from who has looked already that it is not finished; None looks.

        Raises:
            PixelwiseError: it cannot be used, or an output is somebody else's file.
        """
        source = open_image(str(task.path), self.network.card, dict(self.batch.options.reading))
        with ExitStack() as stack:
            stack.callback(source.close)
            outputs, writers = self._outputs(task, source)
            provenance = self._provenance(fingerprint or source.fingerprint(), outputs)
            if fingerprint is None and not self.overwrite:
                if self.folder.is_finished(outputs, provenance):
                    return None
                self.folder.refuse_foreign(outputs)
            if fingerprint is None:
                for warning in source.metadata.get("warnings", ()):
                    self.note(f"{source.info.location}: {warning}.")
            small = in_memory(source)
            if "overlay" in writers:
                writers["overlay"] = partial(write_overlay, source=small)
            pipeline = Pipeline(
                network=self.network, source=small, options=self.options,
                note=self._tell, state=self._state(source.info), progress=self.progress,
            )  # fmt: skip
            stack.pop_all()
        return Opened(task=task, pipeline=pipeline, outputs=outputs, writers=writers, provenance=provenance)

    def label(self, opened: Opened) -> Callable[[], None]:
        """Label an open image; gives what is left to do, to put its outputs in place, which another thread may do.

        Raises:
            OutputError: an output cannot be written.
            PixelwiseError: it cannot be labelled, or there is no room for it.
        """
        with ExitStack() as stack:
            stack.enter_context(opened.pipeline.source)
            store = opened.pipeline.store_for(self.folder.stage(opened.outputs[LABELS]), opened.provenance)
            opened.pipeline.label(store, self.folder.stage(opened.outputs[LABELS]).parent)
            finish = partial(self._finish, opened, store, stack.pop_all())
        if not store.is_on_disk:
            return finish
        finish()  # it may take as much memory as the labelling
        return lambda: None

    def _finish(self, opened: Opened, store: Store, stack: ExitStack) -> None:
        with stack:  # closes the image, which an overlay still needs
            staged = {kind: self.folder.stage(place) for kind, place in opened.outputs.items()}
            try:
                self.folder.begin(opened.outputs)
                targets = {kind: (path, opened.writers[kind]) for kind, path in staged.items()}
                write_outputs(opened.pipeline, store, targets, opened.provenance)
                self.folder.publish(opened.outputs)
                self.folder.end(opened.outputs, opened.provenance)
            except (DataError, UsageError):
                raise
            except PixelwiseError as error:
                raise OutputError(str(error)) from error
            store.remove()

    def _outputs(self, task: Task, source: Source) -> tuple[dict[str, Location], dict[str, Writer]]:
        """Where the outputs of an image go, and what writes them."""
        places, writers = {}, {}
        for kind, planned in task.outputs.items():
            places[kind] = planned
            if kind in (LABELS, *MAPS):
                suffix, writers[kind] = choose_writer(source.info, kind, self.options.format, source.metadata)
                name = self.folder.name(planned)
                places[kind] = self.folder.at(name.with_name(stem_of(name.name) + suffix))
                _refuse_input(task, places[kind])
            else:
                writers[kind] = _writer(kind)
        return places, writers

    def _provenance(self, fingerprint: str, outputs: Mapping[str, Location]) -> dict[str, Any]:
        """What an output is made of: the network, the input, how, and what was written with it."""
        found: dict[str, Any] = {
            "model": self.network.card.weights_sha256,
            "input": fingerprint,
            "with": sorted(outputs),
        }
        if self.network.batch_statistics:
            found["statistics"] = "batch"
        if changes := self.options.changes():
            found["options"] = changes
        return found

    def _tell(self, text: str) -> None:
        """What holds for the network is said of every image; once is enough."""
        if text not in self._told:
            self._told.add(text)
            self.note(text)

    def _state(self, info: SourceInfo) -> Note:
        """Images of one size are labelled in one way; it is told once."""
        size = (info.height, info.width)

        def state(text: str) -> None:
            if size not in self._stated:
                self._stated.add(size)
                self.note(text)

        return state


def run_local(labeller: Labeller, tasks: Sequence[Task], *, threads: int | None = None) -> Iterator[Outcome]:
    """Label images one after the other, one outcome each, in their order.

    Args:
        labeller: the network and the options.
        tasks: the images.
        threads: that open and decode images, and as many that write; None takes as many as there are cores, at most 8.

    Raises:
        OutputError: an output cannot be written (disk full, no permission). Nothing half-written stays.
    """
    count = threads or min(MOST_THREADS, os.cpu_count() or 1)
    writing: deque[Future[Outcome]] = deque()
    pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="pixelwise-results")
    try:
        with closing(prefetch(labeller.prepare, tasks, threads=count, discard=_close)) as coming:
            for task, opened in coming:
                writing.append(_labelled(labeller, task, opened, pool))
                while writing and (len(writing) > count or writing[0].done()):
                    yield writing.popleft().result()
            while writing:
                yield writing.popleft().result()
    finally:
        pool.shutdown()  # what was computed is written


def _labelled(
    labeller: Labeller, task: Task, opened: "Future[Opened | None]", pool: ThreadPoolExecutor
) -> "Future[Outcome]":
    """Label an image when it is open; its outcome is there when its outputs are."""
    known: Future[Outcome] = Future()
    try:
        found = opened.result()
        if found is not None:
            return pool.submit(_finished, task, labeller.label(found))
        known.set_result(Outcome(task.path, "skipped"))
    except OutputError:
        raise
    except PixelwiseError as error:
        known.set_result(Outcome(task.path, "failed", str(error)))
    return known


def _finished(task: Task, finish: Callable[[], None]) -> Outcome:
    try:
        finish()
    except OutputError:
        raise
    except PixelwiseError as error:
        return Outcome(task.path, "failed", str(error))
    return Outcome(task.path, "done")


def _close(opened: Opened | None) -> None:
    if opened is not None:
        opened.pipeline.source.close()


def _refuse_input(task: Task, output: Location) -> None:
    """The content of an image may change the suffix of its output, so this is known only now."""
    same = task.path == output
    if isinstance(task.path, Path) and isinstance(output, Path):
        same = real(task.path) == real(output)
    if same:
        raise UsageError(f"the result of {task.path} would replace it. Choose another --out folder.")


def _writer(kind: str) -> Writer:
    if kind == "probabilities":
        return write_probabilities
    from pixelwise.formats.coco import write_coco  # which need packages of their own
    from pixelwise.formats.geojson import write_geojson

    return write_coco if kind == "coco" else write_geojson
