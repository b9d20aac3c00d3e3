"""What lies in a data folder and is not used, named with its count, so that nothing is left out in silence."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from pixelwise.data.image_files import is_zarr, relative, walk
from pixelwise.data.names import channel_file
from pixelwise.data.pairs import Pair, Problem, counted, first_of, split_of_list
from pixelwise.data.tables import tables_in
from pixelwise.formats import SOURCE_SUFFIXES

_LISTS = (".csv", ".tsv", ".txt", ".lst", ".json")


def find_unused(root: Path, pairs: Sequence[Pair], told: Collection[str], lists: Collection[Path]) -> list[Problem]:
    """One warning that names folders, images and lists below `root` that belong to no pair.

    Args:
        root: the data folder.
        pairs: what is used.
        told: files, relative to `root`, of which another problem says that they are not used.
        lists: the lists that were read.
    """
    root = root.absolute()
    masks = [path for pair in pairs for path in (pair.mask, *pair.more_masks, pair.region) if path is not None]
    used = {path.absolute() for path in (*(pair.image for pair in pairs), *masks)}
    several = [pair for pair in pairs if pair.channel_files > 1]
    used |= {Path(channel_file(str(p.image.absolute()), number)) for p in several for number in range(p.channel_files)}
    read = {path.absolute() for path in lists}
    above = {parent for path in used for parent in path.parents}
    images, others, unread = Counter[Path](), Counter[Path](), list[str]()
    for here, folders, names in walk(root):
        if here in used or (here != root and is_zarr(here)):
            folders.clear()
            if here not in used and relative(here, root) not in told:
                images[_highest(here.parent, root, above)] += 1
            continue
        place = _highest(here, root, above)
        for name in names:
            path = here / name
            if name.startswith(".") or path in used or path in read:
                continue
            if name.lower().endswith(SOURCE_SUFFIXES):
                images[place] += relative(path, root) not in told
            elif place != root and place not in above:
                others[place] += 1
            elif _is_list(path):
                unread.append(relative(path, root))
    words = [*_words(root, images, others), *sorted(unread)]
    return [Problem("warning", f"seen and not used: {first_of(words, 10)}.")] if words else []


def _words(root: Path, images: Counter[Path], others: Counter[Path]) -> Iterator[str]:
    for place in sorted({*+images, *+others}):
        name = "right in the folder" if place == root else f"in {relative(place, root)}/"
        if images[place]:
            yield f"{counted(images[place], 'image', '', '').strip()} {name}"
        elif others[place]:
            yield f"{counted(others[place], 'file', '', '').strip()} {name}"


def _highest(folder: Path, root: Path, above: Collection[Path]) -> Path:
    """The highest folder around `folder`, itself included, below which nothing is used; else `folder`."""
    inside = [folder, *folder.parents]
    free = [path for path in inside[: inside.index(root)] if path not in above]
    return free[-1] if free else folder


def unread_lists(root: Path) -> list[Path]:
    """Files right in `root`, or in its folders whose names say so, that list splits by their names or cells."""
    if not root.is_dir():
        return []
    folders = [
        path
        for path in root.iterdir()
        if path.is_dir() and re.search("split|fold|imagesets|lists?$", path.name.lower())
    ]
    files = [path for place in (root, *folders) for path in sorted(place.iterdir())]
    files = [path for path in files if path.suffix.lower() in (*_LISTS, ".yaml", ".yml")]
    tables = {table.path for table in tables_in(root) if table.may_say_splits()}
    return [
        path
        for path in files
        if split_of_list(path.stem) or re.search("split|fold", path.stem.casefold()) or path in tables
    ]


def _is_list(path: Path) -> bool:
    """Whether a file may list images or splits, by its name."""
    name = path.stem.casefold()
    if not path.is_file() or path.suffix.lower() not in _LISTS:
        return False
    return path.suffix.lower() in (".csv", ".tsv") or bool(split_of_list(name)) or "split" in name or "fold" in name
