"""The way of every image: source -> windows -> network -> decide (labels, maps) -> store -> outputs.

Reading, computing and writing overlap. What is finished lies in the store until the outputs are in place, so a run that
was killed goes on where it was; the outputs appear whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats.base import LABELS, Source, SourceInfo
from pixelwise.infer import estimates
from pixelwise.infer.options import Decision, JobOptions, OverflowingScores, Tiling
from pixelwise.infer.prefetch import WindowReader
from pixelwise.infer.store import DiskStore, Store, store_folder
from pixelwise.infer.tiling import Note, Region, Scorer, Scores, choose_scorer, default_budget
from pixelwise.machine import is_out_of_memory

if TYPE_CHECKING:
    from pixelwise.infer.predictor import Predictor

ONE_PASS_PX = 1 << 20
"""Images of no more pixels are labelled in one pass, and kept in memory."""

LOGITS = "logits"
Progress = Callable[[int, int], None]
"""(pixels done, pixels in all)."""

_LEAST_MEMORY = 32 << 20  # a network that needs more for its smallest window does not fit
_LEAST_TILE_PX = 8
_PLAIN = Tiling()


class ArraySource(Source):
    """An image in memory; of a small file that was read as a whole, with what else the file knows (it may change now).

    Args:
        pixels: (H, W, C).
        origin: the open file that they are from, which is closed with this.
        name: for errors, where there is no file.
        valid: where there is data, (H, W); None is everywhere.
        metadata: of the file, where it is closed.
    """

    pixels_in_memory = True

    def __init__(
        self,
        pixels: NDArray[Any],
        origin: Source | None = None,
        *,
        name: str = "the image",
        valid: NDArray[np.bool_] | None = None,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        height, width, channels = pixels.shape
        self.pixels, self.origin, self._valid = pixels, origin, valid
        self.info = origin.info if origin else SourceInfo(
            location=name, format="array", height=height, width=width, channels=channels, dtype=pixels.dtype.name
        )  # fmt: skip
        self.metadata = origin.metadata if origin else metadata

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        return self.pixels[top : top + height, left : left + width]

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        return None if self._valid is None else self._valid[top : top + height, left : left + width]

    def fingerprint(self) -> str:
        return self.origin.fingerprint() if self.origin else hashlib.sha256(self.pixels.tobytes()).hexdigest()

    def check_unchanged(self) -> None:
        if self.origin:
            self.origin.check_unchanged()

    def close(self) -> None:
        if self.origin:
            self.origin.close()


def in_memory(source: Source) -> Source:
    """The same image, read as a whole if it is small, so that this thread decodes it."""
    if not is_small(source.info):
        return source
    whole = (0, 0, source.info.height, source.info.width)
    return ArraySource(source.read(*whole), source, valid=source.valid(*whole))


def is_small(info: SourceInfo) -> bool:
    """Whether an image is labelled in one pass."""
    return info.planes == 1 and info.height * info.width <= ONE_PASS_PX


def check_channels(info: SourceInfo, wanted: int) -> None:
    """Raise `DataError` if an image does not suit a network for so many channels; one is repeated for three."""
    found = info.channels
    if found != wanted and (found, wanted) != (1, 3):
        text = f"it has {found} channel{'s' * (found != 1)}, but {wanted} are wanted. Only one can be repeated."
        if info.format in ("npy", "zarr") and found > wanted:
            text += " If its axes come in another order, say so: --axes cyx (planes z, rows y, columns x, channels c)."
        elif info.format == "array" and info.height == wanted:
            text += " An array is (H, W, C): transpose it."
        raise DataError(f"{info.location}: {text}")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One open image on its way through a network; how scores become labels and maps follows from the options."""

    network: "Predictor"
    source: Source
    options: JobOptions = field(default_factory=JobOptions)
    with_logits: bool = False  # keep the class scores as well, of images in memory
    note: Note = lambda text: None  # takes what the user should know, one line each
    state: Note = lambda text: None  # takes the statement of way, cost and memory before the start
    progress: Progress = lambda done, total: None

    def __post_init__(self) -> None:
        check_channels(self.source.info, self.network.in_channels)

    @cached_property
    def decide(self) -> Decision:
        """How scores become labels and maps."""
        return Decision.of(self.network.labels, self.options, self.network.precision)

    @property
    def kinds(self) -> dict[str, np.dtype[Any]]:
        """What is computed for every pixel."""
        floats = [*self.options.maps, *self._probabilities, *([LOGITS] if self.with_logits else [])]
        return {LABELS: np.dtype(np.uint8)} | {kind: np.dtype(np.float32) for kind in floats}

    @property
    def _probabilities(self) -> list[str]:
        return [f"p{index}" for index in range(len(self.network.labels.names))] if self.options.probabilities else []

    @property
    def total_px(self) -> int:
        """Pixels of all planes."""
        info = self.source.info
        return info.height * info.width * info.planes

    @property
    def nodata(self) -> int | None:
        """The label of pixels without data; None if there are none."""
        return None if self.source.valid(0, 0, 1, 1) is None else IGNORE_INDEX

    def store(self) -> Store:
        """A store in memory."""
        return Store(self.source.info, self.kinds)

    def store_on_disk(
        self, output: Path, provenance: Mapping[str, Any], only: tuple[int, Region] | None = None
    ) -> DiskStore:
        """The store of an image that becomes `output`, or what it holds near a rectangle of a plane."""
        return DiskStore(store_folder(output, self.key(provenance)), self.source.info, self.kinds, only)

    def store_for(self, output: Path, provenance: Mapping[str, Any]) -> Store:
        """The store of an image that becomes `output`: in memory if it is small."""
        return self.store() if is_small(self.source.info) else self.store_on_disk(output, provenance)

    def key(self, provenance: Mapping[str, Any]) -> str:
        """Hexadecimal text that differs where windows must not be mixed: network, input, options, precision."""
        settings = {
            "mark": {key: value for key, value in provenance.items() if key != "with"},
            "options": self.options.changes() | {"min_area_px": 0},  # the clean-up comes after the store
            "maps": [*sorted(self.options.maps), self.options.probabilities],
            "how": [self.network.precision, self.network.batch_statistics, self.network.acceleration.kind],
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def label(self, store: Store) -> None:
        """Compute what is missing; what was computed of an image that is damaged or has changed is dropped."""
        if not isinstance(store, DiskStore):
            self.compute(store)
            return self.source.check_unchanged()
        with self.dropping_damaged(store):
            each = sum(dtype.itemsize for dtype in self.kinds.values())
            missing, outputs = (self.total_px - store.done_px) * each, self.total_px * each
            estimates.refuse_without_room(self.source.info.location, store.folder.parent, missing, outputs)
            self.compute(store)

    def compute(
        self, store: Store, *, plane: int | None = None, region: Region | None = None, in_windows: bool = False
    ) -> None:
        """Compute what is missing, of all planes or of a region of one, and add it to the store.

        Where memory runs out, half of it is tried from then on, and the user is told.
        """
        planes = range(self.source.info.planes) if plane is None else [plane]
        tiling, is_retry, total = self._tiling(store), False, self.total_px
        in_one_pass = is_small(self.source.info) and tiling == _PLAIN and not in_windows
        if not in_one_pass and not any(store.missing(number, region) for number in planes):
            return
        while True:
            scorer = None
            try:
                if in_one_pass:
                    _one_pass([self], [store])
                    return self.progress(total, total)
                scorer = self._scorer(tiling, in_windows=in_windows)
                self._tell(scorer, is_retry)
                for number in planes:
                    self._score(store, scorer, number, region)
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # The traceback, which holds the tensors of the pass, is gone by here.
            tiling, is_retry, in_one_pass = self._halved(tiling, scorer), True, False

    def _tiling(self, store: Store) -> Tiling:
        tiling = self.options.tiling
        if not isinstance(store, DiskStore):
            return tiling
        if tiling.memory_bytes is None and self.network.device.type == "cpu":
            tiling = replace(tiling, memory_bytes=estimates.room_for_maps(self.source))
        if tiling.scratch is None:
            _, folder = estimates.free_bytes(store.folder.parent)  # the store's own folder comes and goes
            tiling = replace(tiling, scratch=str(folder))
        return tiling

    def _scorer(self, tiling: Tiling, *, in_windows: bool) -> Scorer:
        info, network = self.source.info, self.network
        scorer = choose_scorer(network, info.height, info.width, tiling, self.note)
        if in_windows and scorer.is_whole:
            less = replace(tiling, memory_bytes=max(1, scorer.memory_bytes - 1))
            scorer = choose_scorer(network, info.height, info.width, less, self.note)
        if network.batch_statistics and not scorer.is_whole:
            raise UsageError(
                f"{info.location}: batch statistics are those of the whole image, but {info.width} x {info.height} px "
                f"need {scorer.way}. Give more --memory and no --tile, or leave batch statistics out."
            )
        return scorer

    def _tell(self, scorer: Scorer, is_retry: bool) -> None:
        name = self.source.info.location
        if is_retry:
            differ = ", and labels may differ from those made with enough memory" * bool(self.options.tiling.blend)
            self.note(f"{name}: out of memory; going on with half of it ({scorer.way}){differ}.")
        if text := estimates.more_than_wished(name, self.options.tiling, scorer):
            self.note(text)
        scorer.beside_bytes = estimates.pipeline_bytes(self.source)
        if not is_retry:
            self.state(f"{name}: {estimates.statement(self.source, self.options, scorer, self.network.device)}")

    def _score(self, store: Store, scorer: Scorer, plane: int, region: Region | None) -> None:
        done, total = store.done_px, self.total_px
        reader = WindowReader(self.source, plane)
        with closing(reader), store.adding(plane) as add, torch.inference_mode():

            def read(top: int, left: int, height: int, width: int) -> Tensor:
                valid = self.source.valid(top, left, height, width, plane)
                return self.network.window(reader.read(top, left, height, width), valid)

            for window in store.missing(plane, region):
                for scores in scorer.score(read, window):
                    add(scores.region, self.arrays(scores, plane))
                    done += scores.region.height * scores.region.width
                    self.progress(done, total)

    def arrays(self, scores: Scores, plane: int = 0) -> dict[str, NDArray[Any]]:
        """What the scores of a window become, by kind."""
        valid = self.source.valid(*scores.region, plane)
        try:
            arrays = self.decide(scores, valid)
        except OverflowingScores as error:  # the file is not to be blamed, but must be named
            raise OverflowingScores(f"{self.source.info.location}: {error}") from error
        if self.options.probabilities:
            shares = scores.values.softmax(dim=0).cpu().numpy()
            arrays |= dict(zip(self._probabilities, shares, strict=True))
        if self.with_logits:
            arrays[LOGITS] = scores.values.cpu().numpy()  # (K, height, width)
        return arrays

    def _halved(self, tiling: Tiling, scorer: Scorer | None) -> Tiling:
        limit = tiling.memory_bytes or (scorer and scorer.memory_bytes) or default_budget(self.network.device)
        tile = None if tiling.tile_px is None else tiling.tile_px // 2
        is_least = limit // 2 < _LEAST_MEMORY if tile is None else tile < _LEAST_TILE_PX
        if self.network.batch_statistics or is_least:
            info = self.source.info
            raise PixelwiseError(
                f"{info.location}: {info.width} x {info.height} px with {info.channels} channels does not fit into "
                "memory, not even in small windows. Use a machine or device with more memory."
            )
        if self.network.device.type == "cuda":
            torch.cuda.empty_cache()
        return replace(tiling, memory_bytes=max(limit // 2, _LEAST_MEMORY), tile_px=tile)

    @contextmanager
    def dropping_damaged(self, store: Store) -> Iterator[None]:
        """Drop the results of an image that is damaged; if it has changed since it was opened, that is the error."""
        try:
            yield
            self.source.check_unchanged()
        except DataError:
            store.remove()
            self.source.check_unchanged()
            raise


def compute_together(pipelines: Sequence[Pipeline], stores: Sequence[Store]) -> None:
    """As `Pipeline.compute` of one plane each, for images of one size and type in a single pass."""
    info = pipelines[0].source.info
    try:
        _one_pass(pipelines, stores)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise PixelwiseError(
            f"{info.location} and {len(pipelines) - 1} more: {info.width} x {info.height} px with {info.channels} channels "
            "does not fit into memory. Use a machine or device with more memory, or a smaller batch."
        ) from error


def _one_pass(pipelines: Sequence[Pipeline], stores: Sequence[Store]) -> None:
    """Label whole images of one size in a single pass."""
    network, info = pipelines[0].network, pipelines[0].source.info
    whole = Region(0, 0, info.height, info.width)
    sources = [pipeline.source for pipeline in pipelines]
    windows = [network.window(source.read(*whole), source.valid(*whole)) for source in sources]
    values = network.scores(torch.stack(windows))  # (N, K, H, W)
    for pipeline, store, scores in zip(pipelines, stores, values, strict=True):
        store.add(0, whole, pipeline.arrays(Scores(whole, scores)))
