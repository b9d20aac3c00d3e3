"""Label many files: find the inputs, refuse what cannot end well, skip what is finished, go on past what is broken."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, TypeVar

from PIL import Image
from torch import Tensor

from pixelwise.data.readers import IMAGE_SUFFIXES
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.infer.predictor import Prediction, Predictor
from pixelwise.infer.writers import label_image, read_mark, write_array, write_png

Item = TypeVar("Item")
Result = TypeVar("Result")
_ENDINGS: dict[str, str] = {"labels": ".png", "overlay": "_overlay.png", "probabilities": "_probabilities.npy"}


@dataclass(frozen=True)
class Job:
    """One input file and the files it becomes.

    Attributes:
        path: The image.
        outputs: "labels", and "overlay" and "probabilities" where asked for.
    """

    path: Path
    outputs: dict[str, Path]


@dataclass(frozen=True)
class Outcome:
    """What became of one input: "done", "skipped" (it was finished before) or "failed" (`message` says why)."""

    path: Path
    status: Literal["done", "skipped", "failed"]
    message: str = ""


@dataclass(frozen=True)
class Batch:
    """All the work of one call: the jobs, and the inputs that do not exist."""

    jobs: tuple[Job, ...]
    missing: tuple[Outcome, ...] = ()


def plan_batch(
    inputs: Sequence[str | Path], out: str | Path, *, overlay: bool = False, probabilities: bool = False
) -> Batch:
    """Find the images and the names of their outputs; nothing is read or written yet.

    A file is taken whatever its suffix. A folder is read recursively for image suffixes (hidden files, links to folders
    and `out` itself are left out), a glob such as `scans/**/*.tif` is expanded; both keep their sub-folders in `out`.

    Raises:
        UsageError: there is no input at all, two inputs would become the same file, or an output is also an input.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "day").mkdir()
        >>> (folder / "day" / "a.jpg").touch()
        >>> batch = plan_batch([folder], "labels")
        >>> batch.jobs[0].outputs["labels"].as_posix()
        'labels/day/a.png'
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file. Name a folder for the results.")
    finder = _Finder(out)
    for given in inputs:
        finder.add(str(given))
    if not finder.found:
        reasons = " ".join(outcome.message for outcome in finder.missing[:5])
        raise UsageError(f"no images to label. {reasons}".strip())
    asked = {"labels": True, "overlay": overlay, "probabilities": probabilities}
    kinds = [kind for kind, wanted in asked.items() if wanted]
    jobs = [
        Job(path, {kind: out / name.with_name(name.name + _ENDINGS[kind]) for kind in kinds})
        for (_, name), path in finder.found.items()
    ]
    _refuse_clashes(jobs)
    return Batch(tuple(jobs), tuple(finder.missing))


def run_batch(predictor: Predictor, batch: Batch, *, overwrite: bool = False) -> Iterator[Outcome]:
    """Label every image of the batch, one outcome each; while one is computed the next is decoded.

    An output that is finished is skipped: it was written by the same network from an input with the same content. One
    from another network or input is made again. A file that pixelwise did not write is never replaced.

    Args:
        predictor: The network.
        batch: From `plan_batch`.
        overwrite: Do everything again, and replace whatever has the name of an output.

    Raises:
        PixelwiseError: an output cannot be written (disk full, no permission). Nothing half-written stays.

    Example:
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.infer.bundle import ModelCard
        >>> from pixelwise.models import create_model
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
    yield from batch.missing

    def prepare(job: Job) -> tuple[str, Tensor | None]:
        digest = _content_sha256(job.path)
        if not overwrite and _is_finished(job, _mark(job, predictor, digest)):
            return digest, None
        return digest, predictor.read(job.path)

    for job, future in prefetch(prepare, batch.jobs):
        try:
            digest, source = future.result()
            if source is None:
                yield Outcome(job.path, "skipped")
                continue
            prediction = predictor.label(source, name=str(job.path), probabilities="probabilities" in job.outputs)
        except PixelwiseError as error:
            yield Outcome(job.path, "failed", str(error))
            continue
        _write(job, prediction, _mark(job, predictor, digest))
        yield Outcome(job.path, "done")


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, "Future[Result]"]]:
    """Apply `function` to each item in one background thread, always one item ahead of whoever iterates.

    Example:
        >>> [(item, future.result()) for item, future in prefetch(abs, [-1, 2])]
        [(-1, 1), (2, 2)]
    """
    pending: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixelwise-read")
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) == 2:
                yield pending.popleft()
        yield from pending
    finally:
        pool.shutdown(cancel_futures=True)


class _Finder:
    """Collects the files that the arguments mean, each known by its real path and its name below the output folder."""

    def __init__(self, out: Path) -> None:
        self.out = _real(out)
        self.found: dict[tuple[Path, PurePath], Path] = {}  # in the order of the arguments, no file twice
        self.missing: list[Outcome] = []

    def add(self, given: str) -> None:
        try:
            self._add(Path(given))
        except OSError as error:
            self._miss(given, f"cannot be read ({error.strerror}).")

    def _add(self, path: Path) -> None:
        before = len(self.found)
        if path.is_dir():
            self._add_folder(path, path)
            if len(self.found) == before:
                self._miss(path, f"holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        elif os.path.lexists(path):
            self._add_file(path, path.parent)
        elif set(str(path)) & set("*?["):
            self._add_glob(path)
        else:
            self._miss(path, "there is no such file or folder.")

    def _add_glob(self, pattern: Path) -> None:
        parts = pattern.parts
        first = next(index for index, part in enumerate(parts) if set(part) & set("*?["))
        base = Path(*parts[:first])
        try:
            matches = sorted(base.glob(str(PurePath(*parts[first:]))))
        except (ValueError, NotImplementedError) as error:
            return self._miss(pattern, f"is not a glob that can be used ({error}).")
        if not matches:
            self._miss(pattern, "no file matches.")
        for match in matches:
            if match.is_dir():
                self._add_folder(match, base)
            elif not match.name.startswith("."):
                self._add_file(match, base)

    def _add_folder(self, folder: Path, base: Path) -> None:
        if _real(folder) == self.out:
            raise UsageError(f"--out {self.out}: is also an input. Choose another folder for the results.")
        for parent, folders, names in os.walk(folder, onerror=self._unreadable):
            inner = (name for name in sorted(folders) if not name.startswith("."))
            folders[:] = [name for name in inner if _real(Path(parent, name)) != self.out]
            for name in sorted(names):
                if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                    self._add_file(Path(parent, name), base)

    def _add_file(self, path: Path, base: Path) -> None:
        self.found.setdefault((_real(path), PurePath(path.relative_to(base)).with_suffix("")), path)

    def _unreadable(self, error: OSError) -> None:
        self._miss(error.filename, f"cannot be read ({error.strerror}).")

    def _miss(self, path: str | Path, message: str) -> None:
        self.missing.append(Outcome(Path(path), "failed", f"{path}: {message}"))


def _refuse_clashes(jobs: Sequence[Job]) -> None:
    owners: dict[Path, Path] = {}
    clashes = []
    for job in jobs:
        for output in job.outputs.values():
            first = owners.setdefault(output, job.path)
            if first != job.path:
                clashes.append(f"{first} and {job.path} would both become {output}")
    if clashes:
        more = f", and {len(clashes) - 5:,} more" if len(clashes) > 5 else ""
        listed = "; ".join(clashes[:5])
        raise UsageError(f"{listed}{more}. Rename one, or label them in two calls with different --out folders.")
    inputs = {_real(job.path) for job in jobs}
    for output, path in owners.items():
        if _real(output) in inputs:
            raise UsageError(f"the result of {path} would replace the input {output}. Choose another --out folder.")


def _mark(job: Job, predictor: Predictor, digest: str) -> dict[str, object]:
    """What a label file says of its origin: the network, the input and what was written with it."""
    mark: dict[str, object] = {"model": predictor.card.weights_sha256, "input": digest, "with": sorted(job.outputs)}
    return mark | ({"statistics": "batch"} if predictor.batch_statistics else {})


def _is_finished(job: Job, wanted: dict[str, object]) -> bool:
    """Whether all outputs of the job are there, made by this network in this way from this input.

    The label file is written last and names what was written with it, so it vouches for the other files.
    """
    for output in job.outputs.values():
        if output.suffix == ".png" and output.exists() and read_mark(output) is None:
            raise DataError(
                f"{output}: exists and was not written by pixelwise, so it is kept. Choose another --out folder, or "
                "pass --overwrite to replace it."
            )
    mark = read_mark(job.outputs["labels"]) or {}
    made = mark.get("with")
    return (
        all(mark.get(key) == wanted.get(key) for key in ("model", "input", "statistics"))
        and isinstance(made, list)
        and all(kind in made for kind in job.outputs)
        and all(output.is_file() for output in job.outputs.values())
    )


def _write(job: Job, prediction: Prediction, mark: dict[str, object]) -> None:
    if "probabilities" in job.outputs:
        write_array(job.outputs["probabilities"], prediction.probabilities)
    pictures: dict[str, Callable[[], Image.Image]] = {
        "overlay": prediction.overlay,
        "labels": lambda: label_image(prediction.labels, prediction.spec),
    }
    for kind, picture in pictures.items():
        if kind in job.outputs:
            write_png(job.outputs[kind], picture(), mark)


def _content_sha256(path: Path) -> str:
    if not path.is_file():  # a pipe or a device would be read for ever
        raise DataError(f"{path}: is not a file that can be read.")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _real(path: Path) -> Path:
    """`path` without links; unlike `Path.resolve` this survives a loop of links."""
    return Path(os.path.realpath(path))
