"""One image of any size, from its source to its outputs: read, score, decide, store in parts, and write at the end.

Reading, computing and writing overlap. What is finished lies in `parts` until the outputs are in place, so a job that
was killed goes on where it was; the outputs appear whole or not at all.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import Source
from pixelwise.formats.sinks import LABELS, Result, Writer
from pixelwise.infer.cleanup import remove_small
from pixelwise.infer.collect import Collector
from pixelwise.infer.devices import is_out_of_memory
from pixelwise.infer.estimates import (
    free_bytes,
    more_than_wished,
    pipeline_bytes,
    refuse_without_room,
    room_for_maps,
    told_memory,
)
from pixelwise.infer.options import JobOptions
from pixelwise.infer.parts import Parts, parts_folder, stale_folders
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.reading import AheadReader
from pixelwise.infer.tiling import Region, Scorer, Scores
from pixelwise.infer.tiling.options import Tiling
from pixelwise.ops.streaming.allocator import return_freed_memory

Note = Callable[[str], None]
Progress = Callable[[int, int], None]
"""(pixels done, pixels in all)."""
Choose = Callable[[Predictor, int, int, Tiling, Note], Scorer]
Decide = Callable[[Scores, NDArray[np.bool_] | None], Mapping[str, NDArray[Any]]]

Rows = Callable[[int, int, int], NDArray[Any]]
"""(plane, top, bottom) -> (bottom - top, W)."""

_LEAST_MEMORY = 32 << 20  # a network that needs more for its smallest piece does not fit


def silent(_: str) -> None:
    """A note to nobody."""


def uncounted(_: int, __: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """All that labelling one open image takes.

    Attributes:
        predictor: the network.
        source: the image.
        options: the user's wishes.
        choose: finds the way to score an image of a size.
        decide: turns scores into labels and maps.
        note: takes what the user should know, one line each.
        state: takes the statement of way, cost and memory before the start.
        progress: told the pixels that are done, and how many there are.
    """

    predictor: Predictor
    source: Source
    options: JobOptions
    choose: Choose
    decide: Decide
    note: Note = silent
    state: Note = silent
    progress: Progress = uncounted

    def __post_init__(self) -> None:
        self.predictor.check_channels(self.source.info.channels, self.source.info.location)

    @property
    def kinds(self) -> dict[str, np.dtype[Any]]:
        """What is computed for every pixel."""
        floats = [*self.options.maps, *self._probabilities]
        return {LABELS: np.dtype(np.uint8)} | {kind: np.dtype(np.float32) for kind in floats}

    @property
    def _probabilities(self) -> list[str]:
        return [f"p{index}" for index in range(self.predictor.labels.num_classes)] if self.options.probabilities else []

    def arrays(self, scores: Scores, valid: NDArray[np.bool_] | None) -> dict[str, NDArray[Any]]:
        """What the scores of a window become, (height, width) each."""
        found = self.decide(scores, valid)
        arrays = {kind: found[kind] for kind in self.kinds if kind in found}
        if self.options.probabilities:
            shares = scores.values.softmax(dim=0).cpu().numpy()
            arrays |= dict(zip(self._probabilities, shares, strict=True))
        return arrays

    @property
    def total_px(self) -> int:
        """Pixels of all planes."""
        info = self.source.info
        return info.height * info.width * info.planes

    def parts(self, folder: str | Path, only: tuple[int, Region] | None = None) -> Parts:
        """The pieces of this job that lie in a folder, or those near a rectangle of a plane."""
        info = self.source.info
        return Parts(folder, info.height, info.width, info.planes, self.kinds, only=only)


def job_key(mark: Mapping[str, Any], options: JobOptions, predictor: Predictor) -> str:
    """Hexadecimal text that differs where parts must not be mixed: network, input, options, precision.

    Args:
        mark: JSON-able values that tell the network and the content of the input.
        options: the wishes.
        predictor: the network.
    """
    settings = {
        "mark": {key: value for key, value in mark.items() if key != "with"},
        "options": options.changes() | {"min_area_px": 0},  # parts come before the clean-up
        "maps": [*sorted(options.maps), options.probabilities],
        "how": [predictor.precision, predictor.batch_statistics],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def compute(job: ImageJob, parts: Parts, *, plane: int | None = None, region: Region | None = None) -> None:
    """Compute what is missing, of all planes or of a region of one, and store it in `parts`.

    Where memory runs out, half of it is tried from then on, and the user is told.

    Raises:
        DataError: the image cannot be read; the message names it.
        PixelwiseError: it does not fit into memory, the scores overflow, or a part cannot be written.
    """
    planes = range(job.source.info.planes) if plane is None else [plane]
    if not any(parts.missing(plane, region) for plane in planes):
        return
    tiling = job.options.tiling
    if tiling.memory_bytes is None and job.predictor.device.type == "cpu":
        tiling = replace(tiling, memory_bytes=room_for_maps(job.source))
    if tiling.scratch is None:
        _, folder = free_bytes(parts.folder.parent)  # that of the outputs; the parts' own comes and goes
        tiling = replace(tiling, scratch=str(folder))
    scorer = _scorer(job, tiling)
    job.state(statement(job, scorer))
    for number in planes:
        while not _attempt(job, parts, scorer, number, region):
            tiling = _halved(job, tiling, scorer)
            scorer = _scorer(job, tiling)
            job.note(f"{job.source.info.location}: out of memory; going on with half of it ({scorer.way}).")


def _scorer(job: ImageJob, tiling: Tiling) -> Scorer:
    info = job.source.info
    scorer = job.choose(job.predictor, info.height, info.width, tiling, job.note)
    if job.predictor.batch_statistics and scorer.way != "whole image":
        raise UsageError(
            f"{info.location}: batch statistics are those of the whole image, but {info.width} x {info.height} px need "
            f"{scorer.way}. Give more --memory, or leave batch statistics out."
        )
    if text := more_than_wished(info.location, job.options.tiling, scorer):
        job.note(text)
    if hasattr(scorer, "beside_bytes"):
        scorer.beside_bytes = pipeline_bytes(job.source)
    return scorer


def _attempt(job: ImageJob, parts: Parts, scorer: Scorer, plane: int, region: Region | None) -> bool:
    """Compute what is missing of a plane; False if memory ran out, after storing what was done."""
    try:
        with AheadReader(job.source, plane) as reader, Collector(parts, plane) as collector:

            def read(top: int, left: int, height: int, width: int) -> Tensor:
                return job.predictor.window(reader.read(top, left, height, width))

            done = parts.done_px
            for window in parts.missing(plane, region):
                for found, arrays in _results(job, scorer, read, plane, window):
                    collector.add(found, arrays)
                    done += found.height * found.width
                    job.progress(done, job.total_px)
        return True
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return False


def _results(
    job: ImageJob, scorer: Scorer, read: Callable[[int, int, int, int], Tensor], plane: int, window: Region
) -> Iterator[tuple[Region, Mapping[str, NDArray[Any]]]]:
    with torch.inference_mode():
        for scores in scorer.score(read, window):
            found = scores.region
            valid = job.source.valid(found.top, found.left, found.height, found.width, plane)
            try:
                yield found, job.arrays(scores, valid)
            except DataError:
                raise
            except PixelwiseError as error:  # scores that overflow: the file is not to be blamed, but must be named
                raise PixelwiseError(f"{job.source.info.location}: {error}") from error


def _halved(job: ImageJob, tiling: Tiling, scorer: Scorer) -> Tiling:
    memory = (tiling.memory_bytes or scorer.memory_bytes) // 2
    if memory < _LEAST_MEMORY:
        info = job.source.info
        raise PixelwiseError(
            f"{info.location}: {info.width} x {info.height} px with {info.channels} channels does not fit into memory, not "
            "even in small pieces. Use a machine or device with more memory."
        )
    if job.predictor.device.type == "cuda":
        torch.cuda.empty_cache()
    half = None if tiling.tile_px is None else max(1, tiling.tile_px // 2)
    return replace(tiling, memory_bytes=memory, tile_px=tiling.tile_px if tiling.blend else half)


def statement(job: ImageJob, scorer: Scorer) -> str:
    """What the user should know before it starts: the way, its cost, and the memory it takes at most."""
    memory = told_memory(job.source, job.options, scorer, on_cpu=job.predictor.device.type == "cpu")
    name = job.source.info.location
    return f"{name}: {scorer.way}, {scorer.cost:.2f}x the multiply-adds of one pass, at most {memory}"


def check_room(job: ImageJob, parts: Parts, folder: Path) -> None:
    """Raise `PixelwiseError` if the disk of `folder` has no room for what is missing and for the outputs."""
    each = sum(dtype.itemsize for dtype in job.kinds.values())
    missing, outputs = (job.total_px - parts.done_px) * each, job.total_px * each
    refuse_without_room(job.source.info.location, folder, missing, outputs)


def has_nodata(source: Source) -> bool:
    """Whether a source may have pixels without data."""
    return source.valid(0, 0, 1, 1) is not None


def nodata_of(job: ImageJob) -> int | None:
    """The label of pixels without data; None if there are none."""
    return IGNORE_INDEX if has_nodata(job.source) else None


@dataclass(frozen=True)
class Output:
    """A file to be made: where, and by what. Polygons and run lengths are made of the labels."""

    path: Path
    write: Writer


def label_source(job: ImageJob, outputs: Mapping[str, Output], mark: Mapping[str, Any]) -> None:
    """Label an image of any size and put its outputs in place; a second call after a kill computes what is missing.

    Args:
        job: the image, the network, the wishes.
        outputs: by kind: "labels" (at least), maps, "geojson", "coco".
        mark: JSON-able values on the origin, kept in the files; the network and the input must be told by them.

    Raises:
        DataError: the image cannot be read, or has changed meanwhile; no output is written.
        PixelwiseError: there is too little memory or room on the disk; what is finished is kept for the next call.
    """
    key = job_key(mark, job.options, job.predictor)
    parts = job.parts(parts_folder(outputs[LABELS].path, key))
    with _blaming_changes(job.source, parts):
        check_room(job, parts, outputs[LABELS].path.parent)
        compute(job, parts)
    finish(job, parts, outputs, mark)
    for folder in stale_folders(outputs[LABELS].path, key):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _blaming_changes(source: Source, parts: Parts) -> Iterator[None]:
    """Drop the parts of an image that is damaged; if it has changed since it was opened, that is the error to tell."""
    try:
        yield
        source.check_unchanged()
    except DataError:
        parts.remove()
        source.check_unchanged()
        raise


def finish(job: ImageJob, parts: Parts, outputs: Mapping[str, Output], mark: Mapping[str, Any]) -> None:
    """Write the outputs of finished parts and remove these; the labels come last, so they vouch for the rest.

    Raises:
        DataError: the image has changed since it was opened; nothing is written.
        PixelwiseError: an output cannot be written; the parts are kept.
    """
    with _blaming_changes(job.source, parts):
        pass
    return_freed_memory()
    labels = _label_rows(job, parts)
    for kind, output in sorted(outputs.items(), key=lambda item: item[0] == LABELS):
        output.write(output.path, result_of(job, parts, kind, mark, labels))
    parts.remove()


def _label_rows(job: ImageJob, parts: Parts) -> Rows:
    """(plane, top, bottom) -> the final labels; small areas are looked for once, when a plane is first asked for."""
    if job.options.min_area_px <= 1:
        return partial(parts.rows, LABELS)
    info, clean = job.source.info, dict[int, Callable[[int, int], NDArray[Any]]]()

    def rows(plane: int, top: int, bottom: int) -> NDArray[Any]:
        if plane not in clean:
            clean.clear()  # one plane at a time
            clean[plane] = remove_small(
                partial(parts.rows, LABELS, plane),
                info.height,
                info.width,
                job.options.min_area_px,
                nodata=nodata_of(job),
                folder=parts.folder,
            )
        return clean[plane](top, bottom)

    return rows


def result_of(job: ImageJob, parts: Parts, kind: str, mark: Mapping[str, Any], labels: Rows) -> Result:
    """What a writer needs to know of a finished output; pictures and polygons are made of the labels."""
    info, classes = job.source.info, job.predictor.labels.num_classes
    rows: Rows = partial(parts.rows, kind) if kind in job.options.maps else labels
    if kind == "probabilities":  # its planes are the classes of the first plane, then those of the next
        info = replace(info, planes=info.planes * classes)

        def rows(plane: int, top: int, bottom: int) -> NDArray[Any]:
            return parts.rows(f"p{plane % classes}", plane // classes, top, bottom)

    is_float = kind == "probabilities" or kind in job.options.maps
    return Result(
        kind=kind if is_float else LABELS,
        spec=job.predictor.labels,
        source=info,
        dtype=np.dtype(np.float32 if is_float else np.uint8),
        rows=rows,
        nodata=None if is_float else nodata_of(job),
        metadata=job.source.metadata,
        mark=mark,
    )
