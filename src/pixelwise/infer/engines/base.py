"""What all engines share: the work of one call, and what is done for one image of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import Source, SourceInfo
from pixelwise.formats.npy import write_probabilities
from pixelwise.formats.sinks import LABELS, MAPS, Result
from pixelwise.infer.inputs import Location, real, stem_of
from pixelwise.infer.job import ImageJob, Note, Output, Progress, has_nodata, job_key, label_source, silent, uncounted
from pixelwise.infer.options import JobOptions
from pixelwise.infer.outfolder import OutFolder
from pixelwise.infer.overlay import write_overlay
from pixelwise.infer.parts import parts_folder
from pixelwise.infer.predictor import ONE_PASS_PX, Prediction, Predictor
from pixelwise.infer.tools import Tools

ENDINGS = {
    "overlay": "_overlay.png",
    "probabilities": "_probabilities.npy",
    "geojson": ".geojson",
    "coco": "_coco.json",
}


class OutputError(PixelwiseError):
    """An output cannot be written, so those of the next images could not be either."""


@dataclass(frozen=True)
class Job:
    """One input and the files it becomes.

    Attributes:
        path: the image.
        outputs: "labels", and the others that were asked for; the content of the image may change their suffixes.
    """

    path: Location
    outputs: dict[str, Location]


@dataclass(frozen=True)
class Outcome:
    """What became of one input: "done", "skipped" (it was finished before) or "failed" (`message` says why)."""

    path: Location
    status: Literal["done", "skipped", "failed"]
    message: str = ""


@dataclass(frozen=True)
class Batch:
    """All the work of one call: the jobs, the inputs that do not exist, where the results go and what they are."""

    jobs: tuple[Job, ...]
    missing: tuple[Outcome, ...] = ()
    out: Location = Path()
    options: JobOptions = field(default_factory=JobOptions)


@dataclass(frozen=True, kw_only=True)
class Task:
    """An open image that is to be labelled; `pixels` if it is small enough for one pass."""

    job: Job
    image: ImageJob
    outputs: Mapping[str, Location]
    writers: Mapping[str, Callable[[Path, Result], None]]
    mark: Mapping[str, Any]
    pixels: NDArray[Any] | None = None


@dataclass(kw_only=True)
class Labeller:
    """Labels the images of a batch with one network; `prepare` may run in other threads than `label`.

    Attributes:
        predictor: the network.
        batch: the work.
        tools: who opens, scores, decides and writes.
        overwrite: do finished images again, and replace whatever has the name of an output.
        note: takes what the user should know.
        progress: told the pixels done of the present image, and how many it has.
    """

    predictor: Predictor
    batch: Batch
    tools: Tools
    overwrite: bool = False
    note: Note = silent
    progress: Progress = uncounted

    def __post_init__(self) -> None:
        self.options = self.batch.options
        self.folder = OutFolder(self.batch.out)
        self._decide = self.tools.decision(self.predictor, self.options)
        self._stated: set[tuple[int, int]] = set()
        self._told: set[str] = set()

    def prepare(self, job: Job, *, digest: str | None = None) -> Task | None:
        """Open an image, and read it if it is small; None if its outputs are finished.

        Args:
            job: the image and its outputs.
            digest: its fingerprint, from who has looked already that it is not finished; None looks.

        Raises:
            PixelwiseError: it cannot be used, or an output is somebody else's file.
        """
        reading = {"channels": self.predictor.card.in_channels, **dict(self.options.reading)}
        source = self.tools.open_source(job.path if isinstance(job.path, str) else str(job.path), **reading)
        try:
            task = self._task(job, source, digest)
        except BaseException:
            source.close()
            raise
        if task is None:
            source.close()
        return task

    def label(self, task: Task) -> None:
        """Label a prepared image and put its outputs in place.

        Raises:
            OutputError: the outputs of a small image cannot be written.
            PixelwiseError: it cannot be labelled, or there is no room for it.
        """
        self.score(task)()

    def score(self, task: Task) -> Callable[[], None]:
        """Label a prepared image; what is left to do, to write the outputs of a small one, may run in another thread.

        Raises:
            PixelwiseError: as `label`, from here or from what is left.
        """
        with ExitStack() as stack:
            stack.enter_context(task.image.source)
            if task.pixels is None:
                with self._placed(task) as outputs:
                    label_source(task.image, outputs, task.mark)
                return _nothing
            image = self.predictor.read(task.pixels)
            name, wanted = task.image.source.info.location, self.options.probabilities
            prediction = self.predictor.label(image, name=name, probabilities=wanted)
            return partial(self._write_small, task, prediction, stack.pop_all())

    def parts_folder(self, task: Task) -> Path:
        """Where the finished pieces of an image lie until its outputs are in place."""
        key = job_key(task.mark, self.options, self.predictor)
        return parts_folder(self.folder.stage(task.outputs[LABELS]), key)

    def outputs(self, job: Job, source: Source) -> tuple[dict[str, Location], dict[str, Any]]:
        """Where the outputs of an image go, and what writes them."""
        places, writers = {}, {}
        for kind, planned in job.outputs.items():
            places[kind] = planned
            if kind in (LABELS, *MAPS):
                suffix, writers[kind] = self.tools.choose_writer(
                    source.info, kind, self.options.format, source.metadata
                )
                name = self.folder.name(planned)
                places[kind] = self.folder.at(name.with_name(stem_of(name.name) + suffix))
                _refuse_input(job, places[kind])
            else:
                writers[kind] = _vector_writer(kind)
        return places, writers

    def _task(self, job: Job, source: Source, digest: str | None) -> Task | None:
        image = ImageJob(
            predictor=self.predictor,
            source=source,
            options=self.options,
            choose=self.tools.choose_scorer,
            decide=self._decide,
            note=self._tell,
            state=self._state(source.info),
            progress=self.progress,
        )
        outputs, writers = self.outputs(job, source)
        if "overlay" in writers:
            writers["overlay"] = partial(write_overlay, source=source)
        mark = self._mark(digest or source.fingerprint(), outputs)
        if digest is None and not self.overwrite:
            if self.folder.is_finished(outputs, mark):
                return None
            self.folder.refuse_foreign(outputs)
        if digest is None:
            for warning in source.metadata.get("warnings", ()):
                self.note(f"{source.info.location}: {warning}.")
        task = Task(job=job, image=image, outputs=outputs, writers=writers, mark=mark)
        info = source.info
        is_small = info.planes == 1 and info.height * info.width <= ONE_PASS_PX
        if digest is not None or not is_small or not self.options.is_plain or has_nodata(source):
            return task
        return replace(task, pixels=source.read(0, 0, info.height, info.width))

    def _mark(self, digest: str, outputs: Mapping[str, Location]) -> dict[str, Any]:
        """What a label file says of its origin: the network, the input, how, and what was written with it."""
        mark: dict[str, Any] = {"model": self.predictor.card.weights_sha256, "input": digest, "with": sorted(outputs)}
        if self.predictor.batch_statistics:
            mark["statistics"] = "batch"
        if changes := self.options.changes():
            mark["options"] = changes
        return mark

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

    def _write_small(self, task: Task, prediction: Prediction, stack: ExitStack) -> None:
        with stack:  # closes the image, which an overlay still needs
            task.image.source.check_unchanged()
            arrays: dict[str, NDArray[Any]] = {LABELS: prediction.labels[None]}
            if self.options.probabilities:
                arrays["probabilities"] = prediction.probabilities
            try:
                with self._placed(task) as outputs:
                    for kind, output in sorted(outputs.items(), key=lambda item: item[0] == LABELS):
                        array = arrays.get(kind, arrays[LABELS])
                        output.write(output.path, _in_memory(task.image, kind, array, task.mark))
            except DataError:
                raise
            except PixelwiseError as error:
                raise OutputError(str(error)) from error

    @contextmanager
    def _placed(self, task: Task) -> Iterator[dict[str, Output]]:
        """The outputs as local files; afterwards they are at their places and recorded."""
        self.folder.begin(task.outputs)
        staged = {kind: self.folder.stage(place) for kind, place in task.outputs.items()}
        yield {kind: Output(path, task.writers[kind]) for kind, path in staged.items()}
        for kind in sorted(task.outputs, key=lambda kind: kind == LABELS):
            self.folder.publish(task.outputs[kind])
        self.folder.end(task.outputs, task.mark)


def _nothing() -> None:
    """What is left of an image whose outputs are in place."""


def _refuse_input(job: Job, output: Location) -> None:
    """The content of an image may change the suffix of its output, so this is known only now."""
    same = job.path == output
    if isinstance(job.path, Path) and isinstance(output, Path):
        same = real(job.path) == real(output)
    if same:
        raise UsageError(f"the result of {job.path} would replace it. Choose another --out folder.")


def _in_memory(image: ImageJob, kind: str, array: NDArray[Any], mark: Mapping[str, Any]) -> Result:
    info = replace(image.source.info, planes=len(array))
    kind = kind if kind == "probabilities" else LABELS
    return Result(
        kind=kind, spec=image.predictor.labels, source=info, dtype=array.dtype, metadata=image.source.metadata,
        mark=mark, rows=lambda plane, top, bottom: array[plane, top:bottom],
    )  # fmt: skip


def _vector_writer(kind: str) -> Callable[[Path, Result], None]:
    if kind == "probabilities":
        return write_probabilities
    from pixelwise.formats.vector import write_coco, write_geojson

    return write_coco if kind == "coco" else write_geojson
