"""The way of every image: source -> windows -> network -> decide (labels, maps) -> store -> outputs.

Reading, computing and writing overlap. What is finished lies in the store until the outputs are in place, so a run that
was killed goes on where it was; the outputs appear whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats.base import LABELS, Source
from pixelwise.infer import estimates
from pixelwise.infer.network import Network, Region, Scorer, Scores, is_out_of_memory
from pixelwise.infer.options import Decision, JobOptions, Tiling
from pixelwise.infer.prefetch import ONE_PASS_PX, WindowReader
from pixelwise.infer.store import DiskStore, Store, store_folder

LOGITS = "logits"
Note = Callable[[str], None]
Progress = Callable[[int, int], None]
"""(pixels done, pixels in all)."""

_LEAST_MEMORY = 32 << 20  # a network that needs more for its smallest window does not fit
_LEAST_TILE_PX = 8
_PLAIN = Tiling()


def choose_scorer(network: Network, height: int, width: int, tiling: Tiling, note: Note) -> Scorer:
    """The strategy for images of a size; the search for it is imported when an image is large enough to need it."""
    from pixelwise.infer.tiling import plan

    return plan.choose_scorer(network, height, width, tiling, note)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One open image on its way through a network.

    Attributes:
        network: the network.
        source: the image.
        options: how it is computed, and what is wanted.
        decision: how scores become labels and maps; None follows from the options.
        with_logits: whether the class scores are kept as well, for images in memory.
        note: takes what the user should know, one line each.
        state: takes the statement of way, cost and memory before the start.
        progress: takes the pixels that are done, and how many there are.
    """

    network: Network
    source: Source
    options: JobOptions = field(default_factory=JobOptions)
    decision: Decision | None = None
    with_logits: bool = False
    note: Note = lambda text: None
    state: Note = lambda text: None
    progress: Progress = lambda done, total: None

    def __post_init__(self) -> None:
        self.network.check_channels(self.source.info.channels, self.source.info.location)

    @cached_property
    def decide(self) -> Decision:
        """How scores become labels and maps."""
        return self.decision or Decision.of(self.network.labels, self.options, self.network.precision)

    @property
    def is_small(self) -> bool:
        """Whether the results are kept in memory."""
        info = self.source.info
        return info.planes == 1 and info.height * info.width <= ONE_PASS_PX

    @property
    def kinds(self) -> dict[str, np.dtype[Any]]:
        """What is computed for every pixel."""
        floats = [*self.options.maps, *self._probabilities, *([LOGITS] if self.with_logits else [])]
        return {LABELS: np.dtype(np.uint8)} | {kind: np.dtype(np.float32) for kind in floats}

    @property
    def _probabilities(self) -> list[str]:
        return [f"p{index}" for index in range(self.network.labels.num_classes)] if self.options.probabilities else []

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
        info = self.source.info
        return Store(info.height, info.width, info.planes, self.kinds)

    def store_on_disk(self, folder: str | Path, only: tuple[int, Region] | None = None) -> DiskStore:
        """The store in a folder, or what it holds near a rectangle of a plane."""
        info = self.source.info
        return DiskStore(folder, info.height, info.width, info.planes, self.kinds, only=only)

    def store_for(self, output: Path, provenance: Mapping[str, Any]) -> Store:
        """The store of an image that becomes `output`: in memory if it is small."""
        if self.is_small:
            return self.store()
        return self.store_on_disk(store_folder(output, self.key(provenance)))

    def key(self, provenance: Mapping[str, Any]) -> str:
        """Hexadecimal text that differs where windows must not be mixed: network, input, options, precision."""
        settings = {
            "mark": {key: value for key, value in provenance.items() if key != "with"},
            "options": self.options.changes() | {"min_area_px": 0},  # the clean-up comes after the store
            "maps": [*sorted(self.options.maps), self.options.probabilities],
            "how": [self.network.precision, self.network.batch_statistics],
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def label(self, store: Store, folder: Path | None = None) -> None:
        """Compute what is missing; what was computed of an image that is damaged or has changed is dropped."""
        if not store.is_on_disk:
            self.compute(store)
            return self.source.check_unchanged()
        with self.dropping_damaged(store):
            if folder is not None:
                each = sum(dtype.itemsize for dtype in self.kinds.values())
                missing, outputs = (self.total_px - store.done_px) * each, self.total_px * each
                estimates.refuse_without_room(self.source.info.location, folder, missing, outputs)
            self.compute(store)

    def compute(
        self, store: Store, *, plane: int | None = None, region: Region | None = None, in_windows: bool = False
    ) -> None:
        """Compute what is missing, of all planes or of a region of one, and add it to the store.

        Where memory runs out, half of it is tried from then on, and the user is told.
        """
        planes = range(self.source.info.planes) if plane is None else [plane]
        if not any(store.missing(number, region) for number in planes):
            return
        tiling, is_retry = self._tiling(store), False
        if self.is_small and tiling == _PLAIN and not in_windows:
            try:
                _one_pass([self], [store])
                return self.progress(self.total_px, self.total_px)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            tiling, is_retry = self._halved(tiling, None), True
        while True:
            scorer = None
            try:
                scorer = self._scorer(tiling, in_windows=in_windows)
                self._tell(scorer, is_retry)
                for number in planes:
                    self._score(store, scorer, number, region)
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # The traceback, which holds the tensors of the pass, is gone by here.
            tiling, is_retry = self._halved(tiling, scorer), True

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
                f"need {scorer.way}. Give more --memory, or leave batch statistics out."
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
        with WindowReader(self.source, plane) as reader, store.adding(plane) as add, torch.inference_mode():

            def read(top: int, left: int, height: int, width: int) -> Tensor:
                return self.network.window(reader.read(top, left, height, width))

            for window in store.missing(plane, region):
                for scores in scorer.score(read, window):
                    add(scores.region, self.arrays(scores, plane))
                    done += scores.region.height * scores.region.width
                    self.progress(done, total)

    def arrays(self, scores: Scores, plane: int = 0) -> dict[str, NDArray[Any]]:
        """What the scores of a window become, by kind."""
        found = scores.region
        try:
            arrays = self.decide(scores, self.source.valid(found.top, found.left, found.height, found.width, plane))
        except DataError:
            raise
        except PixelwiseError as error:  # scores that overflow: the file is not to be blamed, but must be named
            raise PixelwiseError(f"{self.source.info.location}: {error}") from error
        if self.options.probabilities:
            shares = scores.values.softmax(dim=0).cpu().numpy()
            arrays |= dict(zip(self._probabilities, shares, strict=True))
        if self.with_logits:
            arrays[LOGITS] = scores.values.cpu().numpy()  # (K, height, width)
        return arrays

    def _halved(self, tiling: Tiling, scorer: Scorer | None) -> Tiling:
        limit = tiling.memory_bytes or (scorer.memory_bytes if scorer else 0)
        if not limit:
            from pixelwise.infer.tiling.plan import default_budget

            limit = default_budget(self.network.device)
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
    windows = [network.window(pipeline.source.read(0, 0, info.height, info.width)) for pipeline in pipelines]
    values = network.scores(torch.stack(windows))  # (N, K, H, W)
    whole = Region(0, 0, info.height, info.width)
    for pipeline, store, scores in zip(pipelines, stores, values, strict=True):
        store.add(0, whole, pipeline.arrays(Scores(whole, scores)))
