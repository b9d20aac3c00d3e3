"""The folder of the results, on a disk or in an object store: what is in it, whose it is, and what is finished.

A label PNG says itself what it was made of. Of every other output a record is kept in the hidden folder `.pixelwise`:
network, input, options, and size and time of each file, so what somebody else wrote is known from what is ours. Most
formats hold the same in themselves; where the record is missing it tells what is finished, but nothing is replaced by it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.files import write_bytes
from pixelwise.formats.remote import (
    RemoteStamp,
    check_package,
    check_writable,
    exists,
    is_url,
    publish,
    read_small,
    write_small,
)
from pixelwise.formats.sinks import LABELS
from pixelwise.formats.sinks.marks import mark_of
from pixelwise.formats.writers import read_mark
from pixelwise.infer.inputs import Location

RECORDS = ".pixelwise"
_MARKED = {"labels": ".png", "overlay": ".png", "probabilities": ".npy"}  # what a label PNG vouches for
_COMPARED = ("model", "input", "statistics", "options")


class OutFolder:
    """A folder for results.

    Args:
        out: a path, or a URL of an object store.

    Raises:
        UsageError: nothing can be written there, or the package that could is not installed.

    Example:
        >>> OutFolder("labels").at("night/a.png").as_posix()
        'labels/night/a.png'
        >>> OutFolder("memory://labels/").at("night/a.png")
        'memory://labels/night/a.png'
    """

    def __init__(self, out: str | Path) -> None:
        self.is_remote = is_url(out)
        if self.is_remote:
            check_writable(str(out))
            check_package(str(out))
        self.out: Location = str(out).rstrip("/") if self.is_remote else Path(out)

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
        place = hashlib.sha256(str(self.out).encode()).hexdigest()[:16]
        return _cache_folder() / place / self.name(output)

    def publish(self, output: Location) -> None:
        """Send a staged output to its place; nothing is to do for a folder on the disk.

        Raises:
            PixelwiseError: it cannot be sent.
        """
        if isinstance(output, Path):
            return
        staged = self.stage(output)
        publish(staged, output)
        _remove(staged)

    def refuse_foreign(self, outputs: Mapping[str, Location]) -> None:
        """Raise `DataError` if one of the outputs is there and was not written by pixelwise."""
        record = self._record(outputs)
        ours = record.get("outputs", {})
        for kind, output in outputs.items():
            if not self._exists(output):
                continue
            if _is_marked(kind, outputs[LABELS]) and not self.is_remote:
                if kind == "probabilities" or (isinstance(output, Path) and read_mark(output) is not None):
                    continue
            elif kind in ours and ours[kind] in (None, self._stamp(output)):
                continue
            raise DataError(
                f"{output}: exists and was not written by pixelwise, or was changed since, so it is kept. Choose another "
                "--out folder, or pass --overwrite to replace it."
            )

    def is_finished(self, outputs: Mapping[str, Location], mark: Mapping[str, Any]) -> bool:
        """Whether all outputs are there, made as `mark` says (network, input, options).

        The record tells, or, where a folder was copied without it or its times have changed, the files themselves.
        """
        labels, record = outputs[LABELS], self._record(outputs)
        wanted = json.loads(json.dumps(mark))  # as it was read again: a pair has become a list
        trusted = record["outputs"] if _agree(record.get("mark"), wanted) else {}
        for kind, output in outputs.items():
            if not self._exists(output):
                return False
            if _is_marked(kind, labels) and isinstance(labels, Path):
                if not _vouches(read_mark(labels), wanted, kind):
                    return False
                continue
            stamp = self._stamp(output)
            if kind in trusted and trusted[kind] == stamp:
                continue
            if not isinstance(output, Path) or not _may_be(record.get("outputs", {}).get(kind), stamp):
                return False
            # arrays have no place for a mark; that of the labels, which are written last, stands for them
            if not _vouches(mark_of(Path(labels if kind == "probabilities" else output)), wanted, kind):
                return False
        return True

    def begin(self, outputs: Mapping[str, Location]) -> None:
        """Note that these names are ours from now on, before anything has them."""
        if self._needs_record(outputs):
            known = {kind: stamp for kind, stamp in self._record(outputs).get("outputs", {}).items() if kind in outputs}
            self._write_record(outputs, {"mark": {}, "outputs": known | dict.fromkeys(outputs)})

    def end(self, outputs: Mapping[str, Location], mark: Mapping[str, Any]) -> None:
        """Note that the outputs are finished."""
        if self._needs_record(outputs):
            stamps = {kind: self._stamp(output) for kind, output in outputs.items()}
            self._write_record(outputs, {"mark": dict(mark), "outputs": stamps})

    def _needs_record(self, outputs: Mapping[str, Location]) -> bool:
        return self.is_remote or not all(_is_marked(kind, outputs[LABELS]) for kind in outputs)

    def _record_place(self, outputs: Mapping[str, Location]) -> Location:
        name = self.name(outputs[LABELS])
        return self.at(PurePath(RECORDS) / name.with_name(name.name + ".json"))

    def _record(self, outputs: Mapping[str, Location]) -> dict[str, Any]:
        try:
            content = read_small(str(self._record_place(outputs)))
            record = json.loads(content) if content else {}
        except (DataError, ValueError, RecursionError):
            return {}
        is_one = isinstance(record, dict) and isinstance(record.get("outputs"), dict)
        return record if is_one and isinstance(record.get("mark"), dict) else {}

    def _write_record(self, outputs: Mapping[str, Location], record: Mapping[str, Any]) -> None:
        place, content = self._record_place(outputs), json.dumps(record, sort_keys=True).encode()
        if isinstance(place, Path):
            try:
                write_bytes(place, content)
            except OSError as error:
                raise PixelwiseError(f"{place}: cannot be written ({error.strerror or error}).") from error
        else:
            write_small(place, content)

    def _exists(self, output: Location) -> bool:
        return os.path.lexists(output) if isinstance(output, Path) else exists(output)

    def _stamp(self, output: Location) -> list[Any] | None:
        """What differs when a file, or one in a folder, was changed."""
        if isinstance(output, Path):
            return _local_stamp(output)
        try:
            stamp = RemoteStamp.of(output)
        except PixelwiseError:
            return ["folder"]  # an object store has none of its own
        return [str(value) for value in vars(stamp).values()]


def _may_be(known: Any, stamp: list[Any] | None) -> bool:
    """Whether a file may be the one that was recorded: nothing is known of it, or only its time differs."""
    return known is None or (isinstance(known, list) and stamp is not None and known[:1] == stamp[:1])


def _vouches(found: Any, wanted: Mapping[str, Any], kind: str) -> bool:
    """Whether the mark of a file says that it, and the output of a kind with it, was made as is wanted."""
    made = found.get("with") if isinstance(found, dict) else None
    return isinstance(made, list) and kind in made and _agree(found, wanted)


def _agree(found: Any, wanted: Mapping[str, Any]) -> bool:
    return isinstance(found, dict) and all(found.get(key) == wanted.get(key) for key in _COMPARED)


def _is_marked(kind: str, labels: Location) -> bool:
    """Whether the label file vouches for this output itself."""
    return kind in _MARKED and str(labels).lower().endswith(".png")


def _local_stamp(path: Path) -> list[Any] | None:
    try:
        if not path.is_dir():
            status = path.stat()
            return [status.st_size, status.st_mtime_ns]
        found = [file.stat() for file in path.rglob("*") if file.is_file()]
        return [sum(item.st_size for item in found), max((item.st_mtime_ns for item in found), default=0), len(found)]
    except OSError:
        return None


def _cache_folder() -> Path:
    """Where work for other places lies meanwhile; it must outlive a restart, so it is no temporary folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "pixelwise"


def _remove(staged: Path) -> None:
    if staged.is_dir():
        shutil.rmtree(staged, ignore_errors=True)
    else:
        staged.unlink(missing_ok=True)
