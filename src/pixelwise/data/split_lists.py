"""Lists of splits beside the images: train.txt and val.txt, VOC's ImageSets, a JSON of splits, a CSV of names and splits."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixelwise.data.classes import CLASSES_NAME
from pixelwise.data.image_files import relative, walk
from pixelwise.data.names import IMAGE_DIRS, MASK_DIRS
from pixelwise.data.pairs import Pair, Problem, composed, counted, first_of, split_of, split_of_list
from pixelwise.data.tables import folds_question, read_table, read_text, tables_in
from pixelwise.errors import DataError
from pixelwise.files import read_json, read_yaml
from pixelwise.formats import SOURCE_SUFFIXES
from pixelwise.formats.registry import stem_of

_TREES = (".json", ".yaml", ".yml")
_MOST_FILES = 50  # in a folder of lists
_DEPTH = 3  # folders below the data folder in which lists are looked for
_MAX_BYTES = 16_000_000  # of a JSON file that may hold splits


@dataclass(frozen=True, kw_only=True)
class SplitLists:
    """Names of images with their splits."""

    files: tuple[Path, ...]
    entries: tuple[tuple[str, str, Path], ...]  # (name, split, the list that says it)

    @property
    def is_complete(self) -> bool:
        """Whether they speak of all splits: a train.txt alone only says what may be trained on."""
        return len(self.files) > 1 or self.files[0].suffix.lower() == ".json" or not split_of_list(self.files[0].stem)


def find_split_lists(root: Path, pair_lists: Collection[Path] = ()) -> SplitLists | None:
    """The lists of splits in a data folder besides its lists of pairs, or None.

    Raises:
        DataError: there are lists of several kinds, or one whose splits cannot be used.
    """
    found = [*_text_lists(root, pair_lists), *_json_lists(root), *_table_lists(root, pair_lists)]
    if len(found) > 1:
        names = "; ".join(", ".join(relative(path, root) for path in lists.files) for lists in found)
        raise DataError(
            f"{root}: several lists of splits are there ({names}). Keep one of them, or list pairs in a CSV file."
        )
    return found[0] if found else None


def _text_lists(root: Path, pair_lists: Collection[Path]) -> Iterator[SplitLists]:
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for here, folders, names in walk(root):
        if len(here.relative_to(root).parts) >= _DEPTH:
            folders.clear()
        if here == root:
            folders[:] = [name for name in folders if name.casefold() not in (*IMAGE_DIRS, *MASK_DIRS)]
        for name in (name for name in sorted(names) if split_of_list(Path(name).stem)):  # others may be large
            is_list = name.lower().endswith((".txt", ".lst", ".csv", ".tsv")) and here / name not in pair_lists
            is_list = is_list or (name.lower().endswith(_TREES) and _is_names(_tree(here / name)))
            if is_list:
                by_folder[here].append(here / name)
    for_masks = [folder for folder in by_folder if "segmentation" in folder.name.casefold()]  # VOC has others for boxes
    for folder in for_masks or by_folder:
        files = sorted(by_folder[folder])
        yield SplitLists(files=tuple(files), entries=tuple(entry for path in files for entry in _lines(path)))


def _lines(path: Path) -> Iterator[tuple[str, str, Path]]:
    if path.suffix.lower() in (".csv", ".tsv") and "image" in (table := read_table(path)).columns:
        yield from ((table.cell(cells, "image"), split_of_list(path.stem), path) for _, cells in table.rows)
        return
    if path.suffix.lower() in _TREES:
        yield from ((name, split_of_list(path.stem), path) for name in _tree(path))
        return
    for line in read_text(path)[0].splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.strip(), split_of_list(path.stem), path


def _places(root: Path) -> Iterator[Path]:
    """The data folder, and the folders in it that hold few files, as those of lists do."""
    for here, folders, names in walk(root):
        if len(here.relative_to(root).parts) >= _DEPTH:
            folders.clear()
        if here == root:
            folders[:] = [name for name in folders if name.casefold() not in (*IMAGE_DIRS, *MASK_DIRS)]
        if here == root or len(names) <= _MOST_FILES:
            yield here


def _tree(path: Path) -> Any:
    """The content of a JSON or YAML file; None if it is none that may hold a split."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES or path.name == CLASSES_NAME:
            return None
        return read_json(path) if path.suffix.lower() == ".json" else read_yaml(path)
    except (OSError, DataError):
        return None


def _is_names(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(item, str) for item in content)


def _json_lists(root: Path) -> Iterator[SplitLists]:
    for path in sorted(path for place in _places(root) for path in place.iterdir() if path.suffix.lower() in _TREES):
        content = _tree(path)
        # Ultralytics lists folders. Unlike Path.is_dir, this bears any name.
        named = ((name, split, path) for name, split in _json_entries(path, content))
        if entries := [entry for entry in named if not os.path.isdir(path.parent / entry[0])]:  # noqa: PTH112
            yield SplitLists(files=(path,), entries=tuple(entries))


def _json_entries(path: Path, content: Any) -> Iterator[tuple[str, str]]:
    """From {"train": [names], …}, {name: "train", …} or [{"image": name, "split": "train"}, …]."""
    several = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    folds = [item for item in several if isinstance(item, dict) and any(map(split_of, map(str, item)))]
    if folds and all(isinstance(value, list) for item in folds for value in item.values()):
        raise DataError(
            f'{path}: holds {len(folds)} ways to split (folds). Write one of them as {{"train": [names], "val": [names]}}.'
        )
    if isinstance(content, dict) and all(isinstance(value, str) and split_of(value) for value in content.values()):
        yield from ((name, split_of(split)) for name, split in content.items())
    elif isinstance(content, dict):
        for key, value in content.items():
            if split_of(key) and isinstance(value, list):
                yield from ((name, split_of(key)) for item in value if (name := _json_name(item)))
    elif isinstance(content, list):
        for item in content:
            if isinstance(item, dict) and split_of(str(item.get("split", ""))) and _json_name(item):
                yield _json_name(item), split_of(str(item["split"]))


def _json_name(item: Any) -> str:
    """A name as it is, or that of the image of a pair."""
    if isinstance(item, dict):
        item = next((item[key] for key in ("image", "file_name", "filename", "img", "name") if key in item), "")
    return item if isinstance(item, str) else ""


def _table_lists(root: Path, pair_lists: Collection[Path]) -> Iterator[SplitLists]:
    """CSV files that name images and splits, but no masks."""
    for table in (table for place in _places(root) for table in tables_in(place)):
        if (
            table.path in pair_lists
            or split_of_list(table.path.stem)
            or "image" not in table.columns
            or "split" not in table.columns
        ):
            continue
        values = {table.cell(cells, "split") for _, cells in table.rows if len(cells) == len(table.header)}
        title = table.header[table.columns["split"]].casefold()
        if not any(map(split_of, values)) and title not in ("split", "fold"):
            continue
        if values and all(value.lstrip("-").isdigit() for value in values):
            raise DataError(f"{table.path}: {folds_question(title)}")
        entries = []
        for line, cells in table.rows:
            if len(cells) != len(table.header):
                raise DataError(
                    f"{table.path}, line {line}: {len(cells)} cells, but there are {len(table.header)} columns."
                )
            given = table.cell(cells, "split")
            if not split_of(given):
                raise DataError(f"{table.path}, line {line}: split {given!r} is not one of train, val, test.")
            entries.append((table.cell(cells, "image"), split_of(given), table.path))
        yield SplitLists(files=(table.path,), entries=tuple(entries))


def apply_split_lists(lists: SplitLists, pairs: Sequence[Pair], root: Path) -> tuple[list[Pair], list[Problem]]:
    """The pairs that are listed, with the splits that the lists give them, and what does not fit."""
    by_name: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        by_name[_parts(_listed_as(pair))[-1]].append(index)
    paths = [_parts(relative(pair.image.with_name(_listed_as(pair)), root)) for pair in pairs]
    given: dict[int, set[str]] = defaultdict(set)
    unknown: dict[Path, list[str]] = defaultdict(list)
    for name, split, path in lists.entries:
        place = _find(name, by_name, paths)
        if place is None:
            unknown[path].append(name)
        else:
            given[place].add(split)
    kept = [replace(pairs[index], split=min(splits)) for index, splits in sorted(given.items())]
    kept = kept or list(
        pairs
    )  # none of the names fits, which is fatal: the rest of the check goes on without the lists
    return kept, [*_disagreements(lists, pairs, given, root), *_left_over(lists, pairs, given, unknown, root)]


def _listed_as(pair: Pair) -> str:
    """The name under which lists know an image: that of its file, or of all files of its channels."""
    return pair.image.name if pair.channel_files == 1 else pair.name.rpartition("/")[2]


def _find(name: str, by_name: dict[str, list[int]], paths: list[tuple[str, ...]]) -> int | None:
    """The image that a line names: by its name, and where several have it, by the folders around it."""
    for text in (name, *re.split(r"[\s,;]+", name)[:1]):
        parts = _parts(text)
        there = by_name.get(parts[-1], [])
        if len(there) == 1:
            return there[0]
        if there:
            shared = {index: _shared_end(parts, paths[index]) for index in there}
            best = [index for index, count in shared.items() if count == max(shared.values())]
            return best[0] if len(best) == 1 else None
    return None


def _shared_end(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """How many parts of two paths are equal, from their ends."""
    count = 0
    for first, second in zip(reversed(one), reversed(other), strict=False):
        if first != second:
            break
        count += 1
    return count


def _parts(text: str) -> tuple[str, ...]:
    """A path as its parts, the last one without the suffix of an image; whatever system wrote it."""
    *folders, name = [part for part in composed(text).casefold().replace("\\", "/").split("/") if part] or [""]
    return (*folders, stem_of(name) if name.endswith(SOURCE_SUFFIXES) else name)


def _disagreements(
    lists: SplitLists, pairs: Sequence[Pair], given: dict[int, set[str]], root: Path
) -> Iterator[Problem]:
    for index, splits in given.items():
        own = pairs[index].split
        if len(splits) > 1 or (own and splits != {own}):
            name, names = relative(pairs[index].image, root), ", ".join(path.name for path in lists.files)
            where = f"lies in {own} but is listed as {' and '.join(splits)}" if own else f"is in {' and '.join(splits)}"
            yield Problem("fatal", f"{names}: {name} {where}. Give each image one split.", (name,))
            return


def _left_over(
    lists: SplitLists, pairs: Sequence[Pair], given: dict[int, set[str]], unknown: dict[Path, list[str]], root: Path
) -> Iterator[Problem]:
    total = Counter(path for _, _, path in lists.entries)
    for path, names in unknown.items():
        count = counted(len(names), "line", "names", "name")
        message = f"{relative(path, root)}: {count} no image that is there, of {total[path]:,}: {first_of(names, 3)}."
        is_all = len(names) == total[path]
        yield Problem("fatal" if is_all else "warning", message + " Correct the list, or remove it." * is_all)
    rest = tuple(relative(pair.image, root) for index, pair in enumerate(pairs) if index not in given)
    if rest and given:
        count = counted(len(rest), "image", "is", "are")
        yield Problem("warning", f"{count} in no list of a split and not used: {first_of(rest, 3)}.", rest)
