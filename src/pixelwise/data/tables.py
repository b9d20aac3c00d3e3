"""Lists of pairs as CSV files, as spreadsheets and programs of any system write them."""

import csv
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pixelwise.data.image_files import relative
from pixelwise.data.listed_files import ListedFiles
from pixelwise.data.names import IMAGE_DIRS, MASK_DIRS
from pixelwise.data.pairs import Pair, Problem, counted, first_of, split_of
from pixelwise.errors import DataError, UsageError
from pixelwise.files import read_regular
from pixelwise.formats import SOURCE_SUFFIXES
from pixelwise.formats.local import printable

_COLUMNS = {
    "image": (
        "image", "images", "img", "filename", "file_name", "file", "image_path", "img_path", "image_file", "image_name",
        "path", "file_path", "filepath", "image_id", "name", "id",
    ),
    "mask": (
        "mask", "masks", "label", "labels", "mask_path", "label_path", "mask_file", "mask_name", "annotation",
        "annotation_path", "segmentation", "gt", "ground_truth", "mask_id",
    ),
    "split": ("split", "subset", "partition", "set", "usage", "phase", "fold"),
}  # fmt: skip
"""The columns of a list and the names they may have, the best first."""

MAX_BYTES = 256 << 20
"""Of a list; one of a million pairs has less than half of it."""

_GROUP = re.compile(
    r"(patient|pat|case|subject|sub|participant|person|donor|animal|mouse|group|cluster|scene|site|study|exam|session|drive"
    r"|video|clip|sequence|seq|slide|series|volume|vol|scan|plate|well|specimen|sample|farm|plot|location|place|city|region"
    r"|area|flight|mission|orthophoto|tile|camera|hospital|cent(?:er|re))(id|ids|no|nr|number|name|key|uid|index)?s?"
)
_FEWEST_GROUPS = 3

_SPLITTING = re.compile(
    r"(?<![a-z])k?folds?(?![a-z])|split|subset|^(is_?)?(train|val|valid|validation|test)(ing)?$", re.IGNORECASE
)
_DELIMITERS = ",;\t|"
_WANTED = "The first line must name the columns image and mask (and perhaps split)"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A CSV file; `columns` are the places of image, mask and split among the cells, as far as the first line names them."""

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]  # (line, cells)
    columns: dict[str, int]
    encoding: str

    def may_say_splits(self) -> bool:
        """Whether one of its columns holds nothing but names of splits, or is called so."""
        return bool(self.split_columns()) or any(map(_SPLITTING.search, self.header))

    def split_columns(self) -> list[int]:
        """The columns that hold nothing but names of splits."""
        rows = [cells for _, cells in self.rows if len(cells) == len(self.header)]
        return [place for place, column in enumerate(zip(*rows, strict=True)) if all(map(split_of, column))]

    def place(self, title: str | None) -> int | None:
        """The place of a column by its title as it is, whatever its case; None if there is none."""
        wanted = (title or "").strip().casefold()
        return next((place for place, name in enumerate(self.header) if name.casefold() == wanted and wanted), None)

    def cell(self, cells: Sequence[str], column: str) -> str:
        """The cell of a column, "" if there is no such column."""
        return cells[self.columns[column]].strip() if column in self.columns else ""


def read_text(path: Path) -> tuple[str, str]:
    """The text of a file with its encoding: UTF-8 or UTF-16, and else Windows' cp1252.

    Raises:
        DataError: it cannot be read, is no text, or larger than any list.
    """
    try:
        content = read_regular(path, MAX_BYTES)
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return content.decode("utf-16"), "utf-16"
        try:
            return content.decode("utf-8-sig"), "utf-8"
        except UnicodeDecodeError:
            return content.decode("cp1252"), "cp1252"
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}).") from error


def read_table(path: Path) -> Table:
    """Read a CSV file; its delimiter is the one with which its first line names the most of the known columns.

    Raises:
        DataError: it is no CSV file.
    """
    text, encoding = read_text(path)
    lines = text.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    first = lines[start] if start < len(lines) else ""
    delimiter = max(_DELIMITERS, key=lambda mark: len(_columns(first.split(mark))))
    try:
        reader = csv.reader(lines[start:], delimiter=delimiter, strict=True)
        header = tuple(name.strip() for name in next(reader, []))
        rows = tuple((start + reader.line_num, tuple(cells)) for cells in reader if any(map(str.strip, cells)))
    except (csv.Error, ValueError) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}).") from error
    table = Table(path=path, header=header, rows=rows, columns=_columns(header), encoding=encoding)
    by_cells = [place for place in table.split_columns() if place not in table.columns.values()]
    if "split" not in table.columns and by_cells:
        return replace(table, columns=table.columns | {"split": by_cells[0]})
    return table


def folds_question(column: str) -> str:
    """What is asked about a column of numbers of folds, and the like."""
    return (
        f"the column {column!r} numbers folds or says a split in words that are not known, and nothing says which images to "
        "validate on. Write a column split with val for these and train for the others."
    )


def _columns(header: Sequence[str]) -> dict[str, int]:
    names = [re.sub(r"[ \-]+", "_", name.strip().strip('"').casefold()) for name in header]
    found = {
        role: next((names.index(name) for name in known if name in names), None) for role, known in _COLUMNS.items()
    }
    return {role: place for role, place in found.items() if place is not None}


def tables_in(root: Path) -> list[Table]:
    """The CSV files directly in a folder that can be read."""
    found = []
    for path in sorted(root.iterdir()):
        if path.suffix.lower() in (".csv", ".tsv") and path.is_file() and not path.name.startswith("."):
            try:
                found.append(read_table(path))
            except DataError:
                continue
    return found


def find_tables(root: Path) -> list[Table]:
    """The lists of pairs: `root` itself, or the CSV files directly in it that name an image and a mask in each line."""
    if root.is_file():
        return [read_table(root)]
    found = [table for table in tables_in(root) if _lists_pairs(table)]
    if len(found) > 1 and not all(split_of(table.path.stem) for table in found):
        names = ", ".join(table.path.name for table in found)
        raise DataError(f"{root}: several CSV files list pairs ({names}). Give the one to use instead of the folder.")
    return found


def _lists_pairs(table: Table) -> bool:
    """Whether a table is meant as a list of pairs: `filename,label` may also name the class of a whole image."""
    if not {"image", "mask"} <= set(table.columns):
        return False
    if {"image", "mask"} <= {name.casefold() for name in table.header}:
        return True
    cells = [table.cell(row, "mask") for _, row in table.rows[:20] if len(row) == len(table.header)]
    return any(cell.lower().endswith(SOURCE_SUFFIXES) for cell in cells)


def read_pairs(
    table: Table, region: str | None = None, group_by: str | None = None
) -> tuple[list[Pair], list[Problem]]:
    """The pairs of a list, with the regions and the groups that the columns of these titles name.

    A file named train.csv, val.csv or test.csv needs no column for the split.
    """
    path = table.path
    if not {"image", "mask"} <= set(table.columns):
        shown = ", ".join(table.header)[:200] or "nothing"
        raise DataError(f"{path}: {_WANTED[0].lower()}{_WANTED[1:]}; it has {shown}.")
    further = {"region": region, "group": group_by}
    for role, title in further.items():
        if title is not None and table.place(title) is None:
            raise UsageError(f"--{role if role == 'region' else 'group-by'} {title}: {path} has no such column; it has "
                             f"{', '.join(table.header)[:200]}.")  # fmt: skip
    named = {role: place for role, title in further.items() if (place := table.place(title)) is not None}
    table = replace(table, columns=table.columns | named)
    places = ListedFiles(path.parent)
    pairs = [_pair(table, line, cells, places) for line, cells in _complete_rows(table)]
    if not pairs:
        raise DataError(f"{path}: lists no pairs; below the line `image,mask` one line for each pair is wanted.")
    if len({bool(pair.split) for pair in pairs}) > 1:
        raise DataError(f"{path}: some lines give a split and some do not. Give one for all of them or for none.")
    pairs = _named_below(pairs)
    pairs, joined = _joined(pairs, path)
    return pairs, [*joined, *_problems(path, pairs), *_notes(table, places)]


def _complete_rows(table: Table) -> Iterator[tuple[int, tuple[str, ...]]]:
    width = len(table.header)
    for line, cells in table.rows:
        if len(cells) < width or any(map(str.strip, cells[width:])):
            raise DataError(f"{table.path}, line {line}: {len(cells)} cells, but the first line names {width} columns.")
        yield line, cells[:width]


def _pair(table: Table, line: int, cells: Sequence[str], places: ListedFiles) -> Pair:
    named, mask, given = (table.cell(cells, column) for column in ("image", "mask", "split"))
    where = f"{table.path}, line {line}"
    if not named:
        raise DataError(f"{where}: no image is named.")
    split = split_of(given or table.path.stem)
    if given and not split:
        column = table.header[table.columns["split"]]
        message = f"{where}: split {given!r} is not one of train, val, test."
        if given.lstrip("-").isdigit():
            message += f" If the column {column!r} numbers folds, write val for the one to validate on, else train."
        raise DataError(message)
    image, name = places.find(named, IMAGE_DIRS)
    region, group = table.cell(cells, "region"), table.cell(cells, "group")
    for role, cell in (("region", region), ("group", group)):
        if role in table.columns and not cell:
            raise DataError(
                f"{where}: the column {table.header[table.columns[role]]!r} is empty; fill it in each line."
            )
    return Pair(
        image=image,
        mask=places.find(mask, MASK_DIRS)[0] if mask else None,
        split=split,
        name=name,
        group=group,
        region=places.find(region, MASK_DIRS)[0] if region else None,
    )


def _named_below(pairs: list[Pair]) -> list[Pair]:
    """Names of files outside of the list's folder, given by absolute paths, do not depend on where they lie."""
    outside = [pair for pair in pairs if Path(pair.name).is_absolute()]
    if not outside:
        return pairs
    above = os.path.commonpath([path.parent for pair in outside for path in (pair.image, pair.mask or pair.image)])
    return [
        replace(pair, name=os.path.relpath(pair.name, above)) if Path(pair.name).is_absolute() else pair
        for pair in pairs
    ]


def _joined(pairs: list[Pair], path: Path) -> tuple[list[Pair], list[Problem]]:
    """Lines that give one image several masks, as one pair."""
    found: dict[tuple[Path, str], list[Pair]] = {}
    for pair in pairs:
        found.setdefault((pair.image, pair.split), []).append(pair)
    several = [there for there in found.values() if len({pair.mask for pair in there} - {None}) == len(there) > 1]
    if not several:
        return pairs, []
    for there in several:
        if len({(pair.region, pair.group) for pair in there}) > 1:
            name = relative(there[0].image, path.parent)
            raise DataError(f"{path}: the lines of {name} name several regions or groups. An image has one of each.")
    first = {id(there[0]): tuple(pair.mask for pair in there[1:] if pair.mask) for there in several}
    rest = {id(pair) for there in several for pair in there[1:]}
    kept = [replace(pair, more_masks=first.get(id(pair), ())) for pair in pairs if id(pair) not in rest]
    count = counted(len(several), "image", "has", "have")
    name = relative(several[0][0].image, path.parent)
    message = (
        f"{path.name}: {count} several masks, which are joined (a pixel is what any of them marks), such as {name}."
    )
    return kept, [Problem("warning", message)]


def _problems(path: Path, pairs: list[Pair]) -> Iterator[Problem]:
    seen = set()
    for pair in pairs:
        name = relative(pair.image, path.parent)
        if (pair.split, pair.name) in seen:
            message = f"{path.name}: {name} stands in two lines (suffixes do not count). Keep one of them."
            yield Problem("fatal", message, (name,))
        seen.add((pair.split, pair.name))
    test = [pair for pair in pairs if pair.split == "test"]
    if test and not any(pair.mask for pair in test):
        files = tuple(relative(pair.image, path.parent) for pair in test)
        yield Problem(
            "warning", f"test: none of the {len(test):,} images has a mask, so it cannot be evaluated.", files
        )
        pairs = [pair for pair in pairs if pair.split != "test"]
    lonely = [relative(pair.image, path.parent) for pair in pairs if pair.mask is None]
    if lonely:
        count = counted(len(lonely), "image", "has no mask", "have no mask")
        message = f"{path.name}: {count}, the first is {lonely[0]}. Name a mask for each, or take the lines out."
        yield Problem("fatal", message, tuple(lonely))


def _notes(table: Table, places: ListedFiles) -> Iterator[Problem]:
    """What was read in another way than its author may have meant, and what was not used."""
    name = table.path.name
    if table.encoding == "cp1252":
        yield Problem("warning", f"{name}: is not UTF-8; it was read as cp1252 (Windows, western Europe).")
    for moved, what in ((places.moved, "do not lie at the paths"), (places.beside, "do not lie beside the list as")):
        if moved:
            text, found = moved[0]
            count = counted(len(moved), "file", "was", "were")
            yield Problem("warning", f"{name}: {count} taken from below the list; they {what} given, for example "
                          f"{printable(text)} is {relative(found, table.path.parent)}.")  # fmt: skip
    known = set(table.columns.values())
    spare = [title for place, title in enumerate(table.header) if place not in known and title]
    doubtful = [title for title in spare if _SPLITTING.search(title)] if "split" not in table.columns else []
    for title in doubtful[:1]:
        yield Problem("fatal", f"{name}: no split was found, but {folds_question(title)} Or take the column out.")
    if spare:
        advice = " ".join(_advice(table, title) for title in spare)
        yield Problem(
            "warning", f"{name}: columns that are not used: {printable(first_of(spare, 8))}. {advice}".strip()
        )


def _advice(table: Table, title: str) -> str:
    """What a column that is not used may be for: it names groups, or files."""
    place = table.place(title)
    rows = [(cells[place].strip(), cells) for _, cells in table.rows if place is not None]
    groups: dict[str, set[str]] = {}
    for value, cells in rows:
        groups.setdefault(value, set()).add(split_of(table.cell(cells, "split")))
    if all(value.lower().endswith(SOURCE_SUFFIXES) for value in groups):
        option = f"--region {shlex.quote(title)}"
        return f"{title!r} names files: if they are masks of what counts, such as a field of view, pass {option}."
    is_group = _GROUP.fullmatch(re.sub(r"[_\- ]", "", title.casefold()))
    if not is_group or not _FEWEST_GROUPS <= len(groups) < len(rows) or "" in groups:
        return ""
    what = f"{title!r} looks like {len(groups):,} groups of images"
    if "split" not in table.columns:
        return f"{what}: --group-by {shlex.quote(title)} keeps each in one split."
    divided = sum(len(there) > 1 for there in groups.values())
    return f"{what}; {divided:,} are in several splits, which flatters the scores." if divided else ""
