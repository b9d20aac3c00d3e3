"""Pairs listed in a CSV file with the columns `image,mask[,split]`; paths are relative to the file."""

import csv
from collections.abc import Iterator
from pathlib import Path

from pixelwise.data.matching import Match, relative
from pixelwise.data.pairs import Problem
from pixelwise.data.splits import SPLIT_ALIASES
from pixelwise.errors import DataError

_NEEDED = {"image", "mask"}


def find_csv(root: Path) -> list[Path]:
    """The CSV files that list pairs: `root` itself, or those directly in it with an image and a mask column."""
    if root.is_file():
        return [root]
    found = [path for path in sorted(root.glob("*.csv")) if path.is_file() and _columns(path) >= _NEEDED]
    if len(found) > 1 and not all(path.stem.lower() in SPLIT_ALIASES for path in found):
        names = ", ".join(path.name for path in found)
        raise DataError(f"{root}: several CSV files list pairs ({names}). Give the one to use instead of the folder.")
    return found


def read_csv(path: Path) -> tuple[list[Match], list[Problem]]:
    """Read one list of pairs. A file named train.csv, val.csv or test.csv needs no column for the split.

    Raises:
        DataError: the file is no such list; the message names the line.
    """
    own = SPLIT_ALIASES.get(path.stem.lower())
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            matches = [_match(path, line, row, own) for line, row in _rows(path, csv.reader(file, strict=True))]
    except (OSError, csv.Error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as CSV ({error}).") from error
    if not matches:
        raise DataError(f"{path}: lists no pairs; below the line `image,mask` one line for each pair is wanted.")
    if len({match.split is None for match in matches}) > 1:
        raise DataError(f"{path}: some lines give a split and some do not. Give one for all of them or for none.")
    return matches, _problems(path, matches)


def _rows(path: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, dict[str, str]]]:
    header = [name.strip().lower() for name in next(reader, [])]
    if not set(header) >= _NEEDED:
        shown = ", ".join(header)[:200] or "nothing"
        raise DataError(
            f"{path}: the first line must name the columns image and mask (and perhaps split); it has {shown}."
        )
    for line, cells in enumerate(reader, start=2):
        if any(cell.strip() for cell in cells):
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(cells)} cells, but the first line names {len(header)} columns."
                )
            yield line, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}


def _match(path: Path, line: int, row: dict[str, str], own_split: str | None) -> Match:
    if not row["image"]:
        raise DataError(f"{path}, line {line}: no image is named.")
    given = row.get("split", "")
    split = SPLIT_ALIASES.get(given.lower()) if given else own_split
    if given and split is None:
        raise DataError(f"{path}, line {line}: split {given!r} is not one of train, val, test.")
    image = path.parent / row["image"]
    key = Path(row["image"]).with_suffix("").as_posix()
    return Match(split=split, image=image, mask=path.parent / row["mask"] if row["mask"] else None, key=key)


def _problems(path: Path, matches: list[Match]) -> list[Problem]:
    problems, seen = [], set()
    for match in matches:
        name = relative(match.image, path.parent)
        if (match.split, match.key) in seen:
            message = f"{path.name}: {name} stands in two lines (suffixes do not count). Keep one of them."
            problems.append(Problem("fatal", message, (name,)))
        seen.add((match.split, match.key))
    lonely = [relative(match.image, path.parent) for match in matches if match.mask is None]
    if lonely:
        count = f"{len(lonely):,} images have no mask" if len(lonely) > 1 else "1 image has no mask"
        message = f"{path.name}: {count}, the first is {lonely[0]}. Name a mask for each, or take the lines out."
        problems.append(Problem("fatal", message, tuple(lonely)))
    return problems


def _columns(path: Path) -> set[str]:
    """The names in the first line; none for a file that is no CSV."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return {name.strip().lower() for name in next(csv.reader(file), [])}
    except (OSError, csv.Error, ValueError):
        return set()
