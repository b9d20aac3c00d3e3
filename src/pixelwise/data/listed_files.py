"""The files that a list names, found whatever system wrote the list, and also where they have moved."""

import os
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from pixelwise.data.pairs import composed
from pixelwise.formats import SOURCE_SUFFIXES
from pixelwise.formats.registry import stem_of


class ListedFiles:
    """Finds the files that a list names, whatever system wrote the names; `moved` counts absolute paths found elsewhere."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.moved: list[tuple[str, Path]] = []
        self.beside: list[tuple[str, Path]] = []

    def find(self, text: str, folders: Sequence[str]) -> tuple[Path, str]:
        """The file and the name that it has in the data: its path below the list without suffix, or its absolute path."""
        drive = re.match(r"[A-Za-z]:[\\/]|\\\\", text)
        exists = os.path.lexists(self.base / text)
        parts = PureWindowsPath(text).parts if not exists and (drive or "\\" in text) else PurePosixPath(text).parts
        named = Path(*parts[1:]) if drive else Path(*parts)
        if not drive and (found := _on_disk(self.base / named)):
            inside = named.is_absolute() and named.resolve().is_relative_to(self.base.resolve())
            return found, without_suffix(named.resolve().relative_to(self.base.resolve()) if inside else named)
        if drive or named.is_absolute():
            rest = named.parts if drive else named.parts[1:]
            for start in range(len(rest)):
                below = Path(*rest[start:])
                if found := _on_disk(self.base / below):
                    self.moved.append((text, found))
                    return found, without_suffix(below)
        elif len(named.parts) == 1:  # a bare name, of a file in images/ or masks/
            for folder in sorted(path for path in self.base.iterdir() if path.name.casefold() in folders):
                if found := _on_disk(folder / named):
                    self.beside.append((text, found))
                    return found, without_suffix(named)
        return self.base / named, without_suffix(named)


def without_suffix(path: Path) -> str:
    return path.with_name(stem_of(path.name)).as_posix()


def _on_disk(path: Path) -> Path | None:
    """The file of this name, also if the disk holds its name in the other Unicode form."""
    if path.exists():
        return path
    if path.parent.is_dir() and not path.name.lower().endswith(SOURCE_SUFFIXES):  # a list of names without suffixes
        named = _files_by_stem(path.parent, path.parent.stat().st_mtime_ns).get(path.name, [])
        return path.with_name(named[0]) if len(named) == 1 else None
    if path.as_posix().isascii():
        return None
    for form in ("NFC", "NFD"):
        other = Path(unicodedata.normalize(form, str(path)))
        if other.exists():
            return other
    if not path.parent.is_dir():
        return None
    found = _names_in(path.parent, path.parent.stat().st_mtime_ns).get(composed(path.name))
    return path.with_name(found) if found else None


@lru_cache(maxsize=256)
def _files_by_stem(folder: Path, _mtime_ns: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in folder.iterdir():
        if path.name.lower().endswith(SOURCE_SUFFIXES):
            found.setdefault(stem_of(path.name), []).append(path.name)
    return found


@lru_cache(maxsize=256)
def _names_in(folder: Path, _mtime_ns: int) -> dict[str, str]:
    return {composed(path.name): path.name for path in folder.iterdir()}
