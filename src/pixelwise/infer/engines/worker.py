"""What runs on the machines of a Ray cluster: workers, each of which holds the network once, and blocks of large images."""

import math
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.formats.base import SourceInfo
from pixelwise.infer.batch import Batch, Outcome, OutputError, Task
from pixelwise.infer.engines.local import Labeller, run_local
from pixelwise.infer.outputs import RECORDS
from pixelwise.infer.predictor import load
from pixelwise.infer.store import Arrays, Store
from pixelwise.infer.tiling import Region

LEAST_PX, MOST_PX = 4 << 20, 64 << 20
"""Smaller blocks would repeat too much of their surroundings; of larger ones too much is lost with a worker."""

_LEAST_ROWS = 256
_STRIP_ROWS = 2048  # of blocks of files that are stored in rows: each block decodes the rows of its neighbours too
_ROUND = 64  # block borders on multiples of this suit the strides of networks and the blocks of files


class Block(NamedTuple):
    """A rectangle of one plane, or of several that follow each other."""

    plane: int
    planes: int
    region: Region


@dataclass(kw_only=True)
class Job:
    """What one worker does at a time: some images, or a block of one."""

    tasks: list[Task]
    block: Block | None = None  # of the only image; None for all of it
    fingerprint: str = ""  # of the image when its blocks were planned
    deaths: int = 0  # workers that died at it


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a worker needs to load the network and to know its work; `token` names a file in the records of the outputs."""

    folder: str
    options: dict[str, Any]  # of `load`
    weights_sha256: str
    batch: Batch
    overwrite: bool
    token: str
    threads: int


@dataclass(kw_only=True)
class Found:
    """What became of a job."""

    outcomes: list[Outcome] = field(default_factory=list)  # of the images; of a block only if it failed
    windows: list[tuple[int, Region, Arrays]] = field(default_factory=list)  # of a block, for the driver
    unseen: list[Path] = field(default_factory=list)  # images that this machine does not see
    notes: list[str] = field(default_factory=list)  # for the user
    stopped: str = ""  # why no job can be done any more


class BlockStore(Store):
    """Keeps windows as they come, to be sent to the driver."""

    def __init__(self, info: SourceInfo, kinds: Any) -> None:
        super().__init__(info, kinds)
        self.windows: list[tuple[int, Region, Arrays]] = []

    def add(self, plane: int, region: Region, arrays: Arrays) -> None:
        """Take a window."""
        self.windows.append((plane, region, {kind: arrays[kind] for kind in self.kinds}))
        self._note(plane, region)


class Worker:
    """Runs on the machines of the cluster, with one network."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.notes, self.refusal = setting, list[str](), ""
        try:
            self.labeller = self._loaded(setting)
        except PixelwiseError as error:
            self.refusal = str(error)  # not raised: Ray would take the worker for dead

    def _loaded(self, setting: Setting) -> Labeller:
        here = f"the worker on {platform.node()}"
        try:
            predictor = load(setting.folder, **setting.options)
        except DataError as error:
            text = f"{here} cannot load the network: {error} All workers must see the run folder."
            raise PixelwiseError(text) from None
        if predictor.card.weights_sha256 != setting.weights_sha256:
            raise PixelwiseError(
                f"{here} finds another network in {setting.folder}. All workers must see the same run folder."
            )
        out = setting.batch.folder.out
        if isinstance(out, Path) and not (out / RECORDS / setting.token).exists():
            raise PixelwiseError(
                f"--out {out}: is not seen by {here}. Name a folder that all machines share, or a place in an object "
                "store (s3://, gs://, az://)."
            )
        return Labeller(network=predictor, batch=setting.batch, overwrite=setting.overwrite, note=self.notes.append)

    def run(self, job: Job) -> Found:
        """Label the images of a job, or compute its block."""
        found = Found(stopped=self.refusal)
        if found.stopped:
            return found
        try:
            if job.block is None:
                found.outcomes += run_local(self.labeller, job.tasks, threads=self.setting.threads)
            else:
                found.windows += self._block(job, job.block)
        except OutputError as error:
            found.stopped = str(error)
        except PixelwiseError as error:
            found.outcomes.append(Outcome(job.tasks[0].path, "failed", str(error)))
        failed = [outcome.path for outcome in found.outcomes if outcome.status == "failed"]
        found.unseen += [path for path in failed if isinstance(path, Path) and not os.path.lexists(path)]
        found.notes, self.notes[:] = list(self.notes), []
        return found

    def _block(self, job: Job, block: Block) -> list[tuple[int, Region, Arrays]]:
        opened = self.labeller.prepare(job.tasks[0], fingerprint=job.fingerprint)
        if opened is None:
            return []
        pipeline, info = opened.pipeline, opened.pipeline.source.info
        with pipeline.source as source:
            if source.fingerprint() != job.fingerprint:  # who assembles the image will find it changed
                return []
            store: Store = BlockStore(info, pipeline.kinds)
            if not self.labeller.folder.is_remote:
                only = (block.plane, block.region) if block.planes == 1 else None
                store = pipeline.store_on_disk(opened.staged, opened.provenance, only)
            is_part = (block.region.height, block.region.width) != (info.height, info.width)
            for plane in range(block.plane, block.plane + block.planes):
                pipeline.compute(store, plane=plane, region=block.region, in_windows=is_part)
            return store.windows if isinstance(store, BlockStore) else []


def blocks_of(
    height: int,
    width: int,
    planes: int,
    workers: int,
    block_px: int | None = None,
    stored_px: tuple[int, int] = (_ROUND, _ROUND),
) -> list[Block]:
    """Rectangles that cover every plane once, about three for each worker; of small planes several together.

    Neighbours compute what surrounds a block again; squares have the least of it, so blocks are as square as the file,
    which stores `stored_px` rows and columns together, allows. `block_px` pixels each, if that is given.
    """
    share = block_px or min(MOST_PX, max(LEAST_PX, height * width * planes // (3 * workers)))
    rows = math.sqrt(share)
    if stored_px[1] >= width:
        rows = max(share / width, _STRIP_ROWS)
    down = max(1, round(height / max(rows, min(_LEAST_ROWS, share / width))))
    rows = min(height, _rounded(height / down))
    columns = min(width, _rounded(width / max(1, round(rows * width / share))))
    together = max(1, share // (height * width)) if (rows, columns) == (height, width) else 1
    whole = Region(0, 0, height, width)
    return [
        Block(plane, min(together, planes - plane), Region(top, left, rows, columns).overlap(whole))
        for plane in range(0, planes, together)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]


def _rounded(length: float) -> int:
    return max(_ROUND, math.ceil(length / _ROUND) * _ROUND)
