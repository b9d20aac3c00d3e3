"""What runs on the machines of a Ray cluster: workers, each of which holds the network once."""

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.formats.base import LABELS
from pixelwise.infer.batch import Batch, Outcome, OutputError, Task
from pixelwise.infer.engines.local import Labeller, run_local
from pixelwise.infer.network import Region
from pixelwise.infer.outputs import RECORDS
from pixelwise.infer.predictor import load
from pixelwise.infer.regions import Arrays, Block
from pixelwise.infer.store import Store, store_folder


@dataclass(kw_only=True)
class Job:
    """What one worker does at a time: some images, or a block of one.

    Attributes:
        tasks: the images.
        block: of the only image; None for all of it.
        fingerprint: of the image when its blocks were planned.
        deaths: workers that died at it.
    """

    tasks: list[Task]
    block: Block | None = None
    fingerprint: str = ""
    deaths: int = 0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a worker needs to load the network and to know its work; `token` names a file in the records of the outputs."""

    folder: str
    weights_sha256: str
    device: str
    precision: str
    batch_statistics: bool
    batch: Batch
    overwrite: bool
    token: str
    threads: int


@dataclass(kw_only=True)
class Found:
    """What became of a job.

    Attributes:
        outcomes: of the images; of a block only if it failed.
        windows: of a block, for the driver.
        unseen: images that this machine does not see.
        notes: for the user.
        stopped: why no job can be done any more.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    windows: list[tuple[int, Region, Arrays]] = field(default_factory=list)
    unseen: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: str = ""


class BlockStore(Store):
    """Keeps windows as they come, to be sent to the driver."""

    def __init__(self, height: int, width: int, planes: int, kinds: Any) -> None:
        super().__init__(height, width, planes, kinds)
        self.windows: list[tuple[int, Region, Arrays]] = []

    def add(self, plane: int, region: Region, arrays: Arrays) -> None:
        """Take a window."""
        self.windows.append((plane, region, {kind: arrays[kind] for kind in self.kinds}))
        self._note(plane, region)


class Worker:
    """Runs on the machines of the cluster, with one network.

    Args:
        setting: what to load.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.notes, self.refusal = setting, list[str](), ""
        try:
            self.labeller = self._loaded(setting)
        except PixelwiseError as error:
            self.refusal = str(error)  # not raised: Ray would take the worker for dead

    def _loaded(self, setting: Setting) -> Labeller:
        here = f"the worker on {platform.node()}"
        try:
            predictor = load(
                setting.folder, device=setting.device, precision=setting.precision,
                batch_statistics=setting.batch_statistics,
            )  # fmt: skip
        except DataError as error:
            raise PixelwiseError(
                f"{here} cannot load the network: {error} All workers must see the run folder."
            ) from None
        if predictor.card.weights_sha256 != setting.weights_sha256:
            raise PixelwiseError(
                f"{here} finds another network in {setting.folder}. All workers must see the same run folder."
            )
        out = setting.batch.out
        if isinstance(out, Path) and not (out / RECORDS / setting.token).exists():
            raise PixelwiseError(
                f"--out {out}: is not seen by {here}. Name a folder that all machines share, or a place in an object "
                "store (s3://, gs://, az://)."
            )
        return Labeller(network=predictor, batch=setting.batch, overwrite=setting.overwrite, note=self.notes.append)

    def run(self, job: Job) -> Found:
        """Label the images of a job, or compute its block."""
        found = Found(stopped=self.refusal)
        try:
            if found.stopped:
                return found
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
            store: Store = BlockStore(info.height, info.width, info.planes, pipeline.kinds)
            if isinstance(self.labeller.batch.out, Path):
                folder = store_folder(Path(opened.outputs[LABELS]), pipeline.key(opened.provenance))
                store = pipeline.store_on_disk(folder, (block.plane, block.region) if block.planes == 1 else None)
            is_part = (block.region.height, block.region.width) != (info.height, info.width)
            for plane in range(block.plane, block.plane + block.planes):
                pipeline.compute(store, plane=plane, region=block.region, in_windows=is_part)
            return store.windows if isinstance(store, BlockStore) else []
