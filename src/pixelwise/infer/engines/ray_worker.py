"""What runs on the machines of a Ray cluster: workers, each of which holds the network once."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.files import extra
from pixelwise.infer.engines.base import Batch, Job, Labeller, OutputError
from pixelwise.infer.engines.local import run as run_local
from pixelwise.infer.engines.shared import SharedParts
from pixelwise.infer.engines.work import jobs_of, packed, piece_of, unpacked
from pixelwise.infer.job import ImageJob, Note, compute
from pixelwise.infer.outfolder import RECORDS
from pixelwise.infer.predictor import Predictor, load
from pixelwise.infer.tiling import Region, Scorer
from pixelwise.infer.tiling.options import Tiling
from pixelwise.infer.tools import Tools


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a worker needs to load the network and to know its work.

    Attributes:
        folder: the run folder, its full path.
        weights_sha256: of the network that the driver has loaded from there.
        device: of the worker.
        precision: of the driver, so that all labels are made alike.
        batch_statistics: as for `Predictor`.
        batch: the work, without its jobs.
        overwrite: as for `Labeller`.
        tools: as for `Labeller`.
        token: the name of a file in the records of the results, by which a worker knows that it sees the same folder.
        threads: that decode, and that write.
    """

    folder: str
    weights_sha256: str
    device: str
    precision: str
    batch_statistics: bool
    batch: Batch
    overwrite: bool
    tools: Tools
    token: str
    threads: int

    def labeller(self, note: Callable[[str], None]) -> Labeller:
        """The network on this machine.

        Raises:
            PixelwiseError: this machine does not see the folders that the driver sees.
        """
        here = f"the worker on {platform.node()}"
        try:
            predictor = load(
                self.folder, device=self.device, precision=self.precision, batch_statistics=self.batch_statistics
            )
        except DataError as error:
            raise PixelwiseError(
                f"{here} cannot load the network: {error} All workers must see the run folder."
            ) from None
        if predictor.card.weights_sha256 != self.weights_sha256:
            raise PixelwiseError(
                f"{here} finds another network in {self.folder}. All workers must see the same run folder."
            )
        out = self.batch.out
        if isinstance(out, Path) and not (out / RECORDS / self.token).exists():
            raise PixelwiseError(
                f"--out {out}: is not seen by {here}. Name a folder that all machines share, or a place in an object "
                "store (s3://, gs://, az://)."
            )
        return Labeller(
            predictor=predictor, batch=self.batch, tools=self.tools, overwrite=self.overwrite, note=note
        )  # fmt: skip


class Worker:
    """Does one row of the dataset at a time, with one network.

    Args:
        network: what to load.
        ledger: the handle of the actor `ledger.Ledger`.
    """

    def __init__(self, network: Network, ledger: Any = None) -> None:
        self._network, self._ledger = network, ledger
        self._notes: list[str] = []
        self._refusal = ""
        try:
            self._labeller = network.labeller(self._notes.append)
        except PixelwiseError as error:
            self._refusal = str(error)  # not raised: Ray would bury it under its own words, and try again

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Label the images of a row, or compute the piece it tells; gives what became of each."""
        work, outcomes, stopped = unpacked(row["work"]), list[dict[str, Any]](), self._refusal
        try:
            if not stopped:
                self._piece(work, outcomes) if "piece" in work else self._images(work, outcomes)
        except OutputError as error:
            stopped = str(error)
        notes, self._notes[:] = list(self._notes), []
        return {"result": packed({"outcomes": outcomes, "stopped": stopped, "notes": notes})}

    def _images(self, work: dict[str, Any], outcomes: list[dict[str, Any]]) -> None:
        numbers, jobs = zip(*jobs_of(work), strict=True)
        labelled = run_local(self._labeller, jobs=jobs, threads=self._network.threads)
        for index, outcome in zip(numbers, labelled, strict=True):
            unseen = outcome.status == "failed" and isinstance(outcome.path, Path) and not os.path.lexists(outcome.path)
            status = "unseen" if unseen else outcome.status
            outcomes.append(_told(index, status, outcome.message))

    def _piece(self, work: dict[str, Any], outcomes: list[dict[str, Any]]) -> None:
        ((index, job),) = jobs_of(work)
        told = {"piece": work["piece"], "joined": False}
        try:
            if self._ask(self._ledger.is_closed, index):
                outcomes.append(_told(index, "done") | told)  # by a worker that died before it could say so
                return
            found = self._computed(job, work)
            if found.status == "done" and self._ask(self._ledger.add, index, work["piece"]):
                found, told["joined"] = join(self._labeller, job, work["digest"]), True
                self._ask(self._ledger.close, index)
        except PixelwiseError as error:
            found = Found("failed", str(error))
        outcomes.append(_told(index, found.status, found.message) | told)

    def _ask(self, method: Any, *arguments: int) -> Any:
        return extra("ray", "cluster", "--engine ray").get(method.remote(*arguments))

    def _computed(self, job: Job, work: dict[str, Any]) -> "Found":
        task = self._labeller.prepare(job, digest=work["digest"])
        if task is None:
            return Found("done")
        with task.image.source:
            piece, folder = piece_of(work), self._labeller.parts_folder(task)
            parts, shared = task.image.parts(folder, only=piece.near), SharedParts(self._labeller.folder.out, folder)
            shared.fetch(parts, near=piece.near)
            try:
                for plane in range(piece.plane, piece.plane + piece.planes):
                    compute(_in_parts(task.image, piece.region), parts, plane=plane, region=piece.region)
            except DataError as error:
                return Found("damaged", str(error))
            shared.send(parts, near=piece.near)
        return Found("done")


def _in_parts(image: ImageJob, region: Region) -> ImageJob:
    """The image by a way that computes a part of it alone; one pass, where it fits, would be of all of it each time."""

    def choose(predictor: Predictor, height: int, width: int, tiling: Tiling, note: Note) -> Scorer:
        scorer = image.choose(predictor, height, width, tiling, note)
        if scorer.way.endswith("whole image"):
            less = replace(tiling, memory_bytes=max(1, scorer.memory_bytes - 1))
            scorer = image.choose(predictor, height, width, less, note)
        return scorer

    info = image.source.info
    return image if (region.height, region.width) == (info.height, info.width) else replace(image, choose=choose)


@dataclass(frozen=True)
class Found:
    """What became of a piece or of a joined image: "done", "failed", "damaged" (the image), "changed" (the image)."""

    status: str
    message: str = ""


def join(labeller: Labeller, job: Job, digest: str) -> Found:
    """Put the outputs of an image in place whose pieces are all there; what is damaged or missing is computed here.

    Args:
        labeller: the network and the work.
        job: the image.
        digest: its fingerprint when its pieces were planned.
    """
    try:
        task = labeller.prepare(job)
        if task is None:
            return Found("done")
        if task.mark["input"] != digest:
            task.image.source.close()
            return Found(
                "changed", f"{job.path}: the file changed while it was read. Run again when nothing writes to it."
            )
        folder = labeller.parts_folder(task)
        shared = SharedParts(labeller.folder.out, folder)
        shared.fetch(task.image.parts(folder))
        labeller.label(task)
        shared.remove()
    except PixelwiseError as error:
        return Found("failed", str(error))
    return Found("done")


def network_of(labeller: Labeller, *, device: str, token: str, threads: int) -> Network:
    """What the workers need to know of a labeller."""
    predictor, batch = labeller.predictor, labeller.batch
    out = batch.out.absolute() if isinstance(batch.out, Path) else batch.out
    return Network(
        folder=str(Path(predictor.folder or "").absolute()),
        weights_sha256=predictor.card.weights_sha256,
        device=device,
        precision=predictor.precision,
        batch_statistics=predictor.batch_statistics,
        batch=replace(batch, jobs=(), missing=(), out=out),
        overwrite=labeller.overwrite,
        tools=labeller.tools,
        token=token,
        threads=threads,
    )


def _told(index: int, status: str, message: str = "") -> dict[str, Any]:
    return {"index": index, "status": status, "message": message}
