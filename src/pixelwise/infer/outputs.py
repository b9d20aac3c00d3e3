"""The outputs of a prediction: written from its store into a folder, on a disk or in an object store.

For each output a provenance record is kept in the hidden folder `.pixelwise` beside: network, input and options that it
was made with, and its size, time and checksum. The record alone tells what is finished, and which files are ours.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.files import cannot_write, hidden_name, remove_leftovers, short_name
from pixelwise.formats.base import LABELS, Result, Writer
from pixelwise.formats.local import is_url, local_path
from pixelwise.formats.remote import RemoteStamp, check_writable, exists, publish, read_small, write_small
from pixelwise.formats.urls import check_package
from pixelwise.infer.cleanup import remove_small
from pixelwise.infer.pipeline import Pipeline
from pixelwise.infer.store import DiskStore, Store, store_folder, stores_in
from pixelwise.ops.streaming.memory import return_freed_memory

Location = Path | str
"""A path, or a URL as text."""
Rows = Callable[[int, int, int], NDArray[Any]]
"""(plane, top, bottom) -> (bottom - top, W)."""

RECORDS = ".pixelwise"
_COMPARED = ("model", "input", "statistics", "options")


class OutFolder:
    """A folder for outputs.

    Args:
        out: a path, or a URL of an object store.

    Raises:
        UsageError: nothing can be written there, or the package that could is not installed.
    """

    def __init__(self, out: str | Path) -> None:
        path = out if isinstance(out, Path) or not is_url(out) else local_path(out)
        self.is_remote = path is None
        if path is None:
            check_writable(str(out))
            check_package(str(out))
        self.out: Location = str(out).rstrip("/") if path is None else Path(path)
        self._stores: dict[Path, dict[str, list[Path]]] = {}  # that lay in the folders when they were first looked at

    def at(self, name: str | PurePath) -> Location:
        """Where the output of this name goes."""
        return self.out / PurePath(name) if isinstance(self.out, Path) else f"{self.out}/{PurePath(name).as_posix()}"

    def name(self, output: Location) -> PurePath:
        """The name of an output below the folder."""
        if isinstance(output, Path):
            return output.relative_to(self.out)
        return PurePath(output.removeprefix(f"{self.out}/"))

    def stage(self, output: Location) -> Path:
        """Where an output is written at first: its own place, or one on this disk from where it is sent."""
        if isinstance(output, Path):
            return output
        # What is sent must outlive a restart until then, so it lies in no temporary folder.
        cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
        place = hashlib.sha256(str(self.out).encode()).hexdigest()[:16]
        return Path(cache) / "pixelwise" / place / self.name(output)

    def write(
        self,
        pipeline: Pipeline,
        store: Store,
        outputs: Mapping[str, Location],
        writers: Mapping[str, Writer],
        provenance: Mapping[str, Any],
    ) -> None:
        """Write all outputs of an image, send those of an object store to their places, and record them as finished."""
        record = self._record(outputs)
        self._write_record(record, outputs, {}, stamps=False)  # these names are ours before anything has them
        targets = {kind: (self.stage(place), writers[kind]) for kind, place in outputs.items()}
        write_outputs(pipeline, store, targets, provenance)
        for _, output in sorted(outputs.items(), key=lambda item: item[0] == LABELS):
            if not isinstance(output, Path):
                staged = self.stage(output)
                publish(staged, output)
                shutil.rmtree(staged, ignore_errors=True) if staged.is_dir() else staged.unlink(missing_ok=True)
        self._write_record(record, outputs, provenance, stamps=True)

    def is_finished(self, outputs: Mapping[str, Location], provenance: Mapping[str, Any]) -> bool:
        """Whether all outputs are there, with this provenance (network, input, options)."""
        record, wanted, finished = self._record(outputs), json.loads(json.dumps(provenance)), True
        for output in outputs.values():
            known = record.get(self.name(output).as_posix())
            is_there = os.path.lexists(output) if isinstance(output, Path) else exists(output)
            is_same = is_there and known is not None and self._is_same(output, known["stamp"])
            if is_there and not is_same and (known is None or known["stamp"] is not None):
                raise DataError(
                    f"{output}: exists and was not written by pixelwise, or was changed since, so it is kept. Choose "
                    "another --out folder, or pass --overwrite to replace it."
                )
            made_of = known["provenance"] if known and is_same else {}
            finished &= bool(made_of) and all(made_of.get(key) == wanted.get(key) for key in _COMPARED)
        return finished

    def tidy(self, output: Location, *, is_finished: bool) -> None:
        """Remove what killed calls have left beside an output; of one that is finished its store too."""
        staged = self.stage(output)
        if staged.parent not in self._stores:
            records = self._record_place({LABELS: output})
            remove_leftovers(staged.parent, *([records.parent] if isinstance(records, Path) else []))
            self._stores[staged.parent] = stores_in(staged.parent)
        if is_finished:
            for folder in self._stores[staged.parent].get(store_folder(staged, "").name, ()):
                shutil.rmtree(folder, ignore_errors=True)

    def _record_place(self, outputs: Mapping[str, Location]) -> Location:
        name = self.name(outputs[LABELS])
        return self.at(PurePath(RECORDS) / name.with_name(short_name(name.name, 250) + ".json"))

    def _record(self, outputs: Mapping[str, Location]) -> dict[str, Any]:
        """What is known of outputs, by name; nothing if the record is missing or damaged."""
        try:
            place = self._record_place(outputs)
            content = place.read_bytes() if isinstance(place, Path) else read_small(place)
            record = json.loads(content) if content else {}
        except (OSError, DataError, ValueError, RecursionError):
            return {}
        return {name: known for name, known in record.items() if _is_sound(known)} if isinstance(record, dict) else {}

    def _write_record(
        self, record: dict[str, Any], outputs: Mapping[str, Location], provenance: Mapping[str, Any], *, stamps: bool
    ) -> None:
        for output in outputs.values():
            stamp = self._stamp(output) if stamps else None
            record[self.name(output).as_posix()] = {"stamp": stamp, "provenance": dict(provenance)}
        place, content = self._record_place(outputs), json.dumps(record, sort_keys=True, indent=1).encode()
        if not isinstance(place, Path):
            return write_small(place, content)
        part = hidden_name(place, "part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            part.replace(place)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise cannot_write(place, error) from error

    def _stamp(self, output: Location) -> list[Any]:
        """What differs when a file, or one in a folder, was changed: on a disk its size, time and checksum."""
        if isinstance(output, Path):
            return [*_size_and_time(output), _checksum(output)]
        try:
            return [str(value) for value in vars(RemoteStamp.of(output)).values()]
        except PixelwiseError:
            return ["folder"]  # an object store has no stamp for it

    def _is_same(self, output: Location, stamp: list[Any] | None) -> bool:
        """Whether an output is the one that was recorded; one that was copied has another time."""
        if stamp is None or not isinstance(output, Path):
            return stamp is not None and stamp == self._stamp(output)
        try:
            found = _size_and_time(output)
            return stamp[:2] == found or (stamp[:1] == found[:1] and stamp[2:] == [_checksum(output)])
        except OSError:
            return False


def write_outputs(
    pipeline: Pipeline, store: Store, outputs: Mapping[str, tuple[Path, Writer]], provenance: Mapping[str, Any]
) -> None:
    """Write outputs from a finished store; the labels come last, so where they are, all are."""
    if isinstance(store, DiskStore):  # small images were read at once
        with pipeline.dropping_damaged(store):
            return_freed_memory()
    labels = _label_rows(pipeline, store)
    for kind, (path, write) in sorted(outputs.items(), key=lambda item: item[0] == LABELS):
        write(path, _result(pipeline, store, kind, provenance, labels))


def _label_rows(pipeline: Pipeline, store: Store) -> Rows:
    """(plane, top, bottom) -> the final labels; small areas are looked for once, when a plane is first asked for."""
    if pipeline.options.min_area_px <= 1:
        return partial(store.rows, LABELS)

    @lru_cache(1)  # one plane at a time
    def cleaned(plane: int) -> Callable[[int, int], NDArray[Any]]:
        return remove_small(
            partial(store.rows, LABELS, plane), store.height, store.width, pipeline.options.min_area_px,
            nodata=pipeline.nodata, folder=store.folder if isinstance(store, DiskStore) else None,
        )  # fmt: skip

    return lambda plane, top, bottom: cleaned(plane)(top, bottom)


def _result(pipeline: Pipeline, store: Store, kind: str, provenance: Mapping[str, Any], labels: Rows) -> Result:
    """What a writer takes; pictures and polygons are made of the labels."""
    info, spec = pipeline.source.info, pipeline.network.labels
    is_float = kind == "probabilities" or kind in pipeline.options.maps
    rows: Rows = partial(store.rows, kind) if is_float else labels
    if kind == "probabilities":  # its planes are the classes of the first plane, then those of the next
        info = replace(info, planes=info.planes * spec.num_classes)

        def rows(plane: int, top: int, bottom: int) -> NDArray[Any]:
            return store.rows(f"p{plane % spec.num_classes}", plane // spec.num_classes, top, bottom)

    return Result(
        kind=kind if is_float else LABELS,
        spec=spec,
        source=info,
        dtype=np.dtype(np.float32 if is_float else np.uint8),
        rows=rows,
        nodata=None if is_float else pipeline.nodata,
        metadata=pipeline.source.metadata,
        mark=provenance,
    )


def _is_sound(known: Any) -> bool:
    """Whether an entry of a record can be used."""
    if not isinstance(known, dict) or not isinstance(known.get("provenance"), dict):
        return False
    return "stamp" in known and (known["stamp"] is None or isinstance(known["stamp"], list))


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _size_and_time(path: Path) -> list[int]:
    found = [file.stat() for file in _files(path)]
    return [sum(item.st_size for item in found), max((item.st_mtime_ns for item in found), default=0)]


def _checksum(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder with their names."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digests = [(file.relative_to(path).as_posix(), _checksum(file)) for file in _files(path)]
    return hashlib.sha256(repr(digests).encode()).hexdigest()
