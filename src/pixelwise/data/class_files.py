"""Class names that tools write beside masks: one table of the files that are known, and whether they fit the masks."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pixelwise.data.image_files import relative
from pixelwise.data.labels import Color, LabelSpec, Value, distinct_colors, pack_value, value_name
from pixelwise.data.pairs import Pair, Problem, first_of
from pixelwise.data.palettes import common_palette, palettes_differ
from pixelwise.data.scan import MaskScan, in_threads, scan_mask
from pixelwise.data.tables import read_text
from pixelwise.errors import DataError

_BACKGROUND = re.compile(r"_?(?:back ?ground|bg|other|none|unlabell?ed|void)_?", re.IGNORECASE)
_IGNORE = "__ignore__"
_VOID_NAME = re.compile(r"void|ignored?|unlabell?ed|don'?t.?care", re.IGNORECASE)
_SHOWN = 6
_IGNORED_AS = (-1, 255)  # what labelme2voc writes for __ignore__, in .npy and in .png

_Names = list[tuple[Value, str]]


@dataclass(frozen=True, kw_only=True)
class ClassFile:
    """What a file says that the values of masks mean: all numbers, or all colours."""

    path: Path
    names: Mapping[Value, str] = field(default_factory=dict)
    void: tuple[Value, ...] = ()
    doubt: str = ""  # why it is not followed, whatever the masks hold

    @property
    def has_colors(self) -> bool:
        """Whether it names colours."""
        return any(isinstance(value, tuple) for value in self.names)

    @property
    def values(self) -> set[Value]:
        """All values that it names, void too."""
        return {*self.names, *self.void}


def find_class_files(root: Path, pairs: Sequence[Pair]) -> list[ClassFile]:
    """The files of class names in the folders around images and masks, up to the data folder, as they stand in the table.

    Of equal ones, as Roboflow writes for each split, there is one; those that differ or cannot be read are in doubt.
    """
    base = root if root.is_dir() else root.parent
    above = {parent for pair in pairs for path in (pair.image, pair.mask) if path for parent in path.parents}
    folders = sorted(folder for folder in {base, *above} if folder.is_relative_to(base))
    found: list[ClassFile] = []
    for name, reader in _READERS.items():
        there = [path for folder in folders if (path := folder / name).is_file()]
        read = [known for path in there if (known := _read(path, reader)) is not None]
        if any((one.names, one.void) != (read[0].names, read[0].void) for one in read):
            shown = first_of([relative(one.path, base) for one in read], 3)
            read = [ClassFile(path=read[0].path, doubt=f"{shown} differ")]
        found += read[:1]
    return found


def follow(
    known: ClassFile,
    root: Path,
    masks: Sequence[tuple[Pair, MaskScan]],
    propose: Callable[[], tuple[LabelSpec, list[Problem]]],
    ignore: Sequence[int],
) -> tuple[LabelSpec, list[Problem]]:
    """The classes that a file names, and what must be told or asked about them.

    A class that occurs in no mask is one too. Where masks hold other values, it depends on what is proposed for these: void
    and strays are asked about as ever, and ranges of values get the name of the one value in them that the file knows.

    Raises:
        DataError: why the file does not fit the masks.
    """
    if known.doubt:
        raise DataError(known.doubt)
    scans = _as_named(masks, known)
    greys = scans[0].kind == "rgb" and not known.has_colors
    labels = _labels(known, common_palette(scans), greys, ignore)
    found = {_plain(value, greys) for scan in scans for value in scan.counts}
    unknown = {value for value in found - known.values if _plain(value, True) not in ignore}
    if not unknown:
        return labels, _void_names(known, root)
    proposed, problems = propose()
    if unknown & {_plain(value, greys) for values in proposed.values for value in values}:
        named = _renamed(proposed, known, greys)
        if named is None:
            shown = [value_name(value) for value in sorted(unknown, key=pack_value)]
            raise DataError(f"the masks hold values that it does not name: {first_of(shown, _SHOWN)}")
        return named, problems
    void = [value for value in proposed.ignore_values if labels.class_of(value) is None]
    labels = replace(labels, ignore_values=(*labels.ignore_values, *void))
    return labels, [*problems, *_void_names(known, root)]


def not_used(known: ClassFile, root: Path, why: str) -> Problem:
    """What is said of a file that is not followed."""
    return Problem("warning", f"class names in {relative(known.path, root)} are not used: {why.rstrip('.')}.")


def _as_named(masks: Sequence[tuple[Pair, MaskScan]], known: ClassFile) -> list[MaskScan]:
    """What the masks hold, those with a palette by its colours if the file names colours."""
    kind = Counter(scan.kind for _, scan in masks).most_common(1)[0][0]
    if not known.has_colors:
        scans = [scan for _, scan in masks if scan.kind == kind]
        if any(len(set(value)) > 1 for scan in scans for value in scan.counts if isinstance(value, tuple)):
            raise DataError("it names numbers, but the masks hold colours")
        if palettes_differ(scans):
            raise DataError("it names numbers, whose colours differ from mask to mask")
        return scans
    if any(scan.kind == kind == "index" and scan.palette is None for _, scan in masks):
        raise DataError("it names colours, but the masks hold numbers")
    by_color = in_threads(lambda one: scan_mask(one[0], by_color=True) if one[1].palette else one[1], masks)
    return [scan for scan in by_color if scan.kind == "rgb"]


def _labels(known: ClassFile, palette: Sequence[Color] | None, greys: bool, ignore: Collection[int]) -> LabelSpec:
    """The classes, without the values that the user calls void; numbers as greys where masks are RGB."""

    def shown(value: Value) -> Value:
        return (value, value, value) if isinstance(value, int) and (greys or known.has_colors) else value

    values: dict[str, list[Value]] = {}
    for value, name in known.names.items():
        if _plain(value, known.has_colors) not in ignore:
            values.setdefault(name, []).append(value)
    firsts = [there[0] for there in values.values()]
    numbers = [value for value in firsts if isinstance(value, int)]
    colors = tuple(value for value in firsts if isinstance(value, tuple)) or distinct_colors(len(values))
    if palette and numbers and 0 <= min(numbers) <= max(numbers) < len(palette):
        colors = tuple(palette[value] for value in numbers)
    void = [value for value in (*known.void, *ignore) if shown(value) == value or _is_byte(value)]
    return LabelSpec(
        names=tuple(values),
        colors=colors,
        values=tuple(tuple(map(shown, there)) for there in values.values()),
        ignore_values=tuple(dict.fromkeys(map(shown, void))),
        kind="rgb" if greys or known.has_colors else "index",
    )


def _plain(value: Value, greys: bool) -> Value:
    """A grey as its number, if greys mean numbers."""
    return value[0] if greys and isinstance(value, tuple) and len(set(value)) == 1 else value


def _is_byte(value: Value) -> bool:
    return isinstance(value, int) and 0 <= value < 256


def _renamed(labels: LabelSpec, known: ClassFile, greys: bool) -> LabelSpec | None:
    """Proposed classes with the names of a file, if it knows exactly one value of each."""
    names = []
    for values in labels.values:
        there = {known.names[plain] for value in values if (plain := _plain(value, greys)) in known.names}
        names += list(there) if len(there) == 1 else [""]
    return replace(labels, names=tuple(names)) if all(names) and len(set(names)) == len(names) else None


def _void_names(known: ClassFile, root: Path) -> list[Problem]:
    """A name such as Void is a class, unless the user says otherwise."""
    named = {value: name for value, name in known.names.items() if _VOID_NAME.fullmatch(name.strip("_ "))}
    if not named:
        return []
    words = first_of([f"{name!r} ({value_name(value)})" for value, name in named.items()], 3)
    how = "pass --ignore with its value, or write ignore_index in a classes.yaml (--write-classes)"
    return [
        Problem("warning", f"{relative(known.path, root)} names {words}, a class like others; if it is void, {how}.")
    ]


def _read(path: Path, reader: Callable[[str], ClassFile | _Names | None]) -> ClassFile | None:
    try:
        content = reader(read_text(path)[0])
    except (DataError, ValueError, LookupError, TypeError, RecursionError, csv.Error) as error:
        return ClassFile(path=path, doubt=f"it is not written as files of this name are ({str(error)[:200]})")
    if content is None:
        return None
    if not isinstance(content, ClassFile):
        is_twice = len(dict(content)) < len(content)
        content = ClassFile(path=path, names=dict(content), doubt="it names a value twice" if is_twice else "")
    names = {value: name.strip("_") if _BACKGROUND.fullmatch(name) else name for value, name in content.names.items()}
    return replace(content, path=path, names=names, doubt=content.doubt or ("" if names else "it names nothing"))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("#", "//"))]


def _labelmap(text: str) -> _Names:
    """CVAT: `label:r,g,b:parts:actions`."""
    rows = [line.rsplit(":", 3) for line in _lines(text)]
    return [(_color(row[1].split(",")), row[0].strip()) for row in rows]


def _label_colors(text: str) -> _Names:
    """CamVid: `r g b name`."""
    rows = [re.split(r"[\s,]+", line, maxsplit=3) for line in _lines(text)]
    return [(_color(row[:3]), row[3].strip()) for row in rows]


def _values_csv(text: str) -> _Names:
    """Roboflow: `Pixel Value, Class`."""
    return [(int(row[0]), row[1].strip()) for row in list(_rows(text))[1:]]


def _colors_csv(text: str) -> _Names:
    """`name,r,g,b`, as copies of CamVid and DeepGlobe on Kaggle have it."""
    return [(_color(row[1:4]), row[0].strip()) for row in list(_rows(text))[1:]]


def _numbered_lines(text: str) -> ClassFile:
    """labelme: the number of a line is the value; a list without background, as for boxes, does not say where it begins."""
    lines = _lines(text)
    ignored = lines[:1] == [_IGNORE]
    names = lines[ignored:]
    if not names or not _BACKGROUND.fullmatch(names[0]):
        first = repr(names[0]) if names else "nothing"
        why = f"it begins with {first}, not with a background, so it does not say which value each name has"
        return ClassFile(path=Path(), doubt=why)
    return ClassFile(path=Path(), names=dict(enumerate(names)), void=_IGNORED_AS if ignored else ())


def _codes(text: str) -> _Names:
    """fastai: the number of a line is the value."""
    return list(enumerate(_lines(text)))


def _dataset_json(text: str) -> ClassFile | None:
    """nnU-Net: names and numbers in `labels`, in version 1 the other way round; "ignore" is void."""
    content = json.loads(text)
    labels: Any = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict):
        return None
    if all(re.fullmatch(r"\d+", key) for key in labels):
        labels = {str(name): int(number) for number, name in labels.items()}
    if any(isinstance(value, list) for value in labels.values()):
        return ClassFile(path=Path(), doubt="its labels are regions that overlap, but a pixel has one class here")
    void = tuple(int(number) for name, number in labels.items() if name == "ignore")
    names = {int(number): str(name) for name, number in labels.items() if name != "ignore"}
    return ClassFile(path=Path(), names=dict(sorted(names.items())), void=void)


_READERS: dict[str, Callable[[str], ClassFile | _Names | None]] = {
    "labelmap.txt": _labelmap,
    "_classes.csv": _values_csv,
    "class_names.txt": _numbered_lines,
    "dataset.json": _dataset_json,
    "label_colors.txt": _label_colors,
    "class_dict.csv": _colors_csv,
    "labels_class_dict.csv": _colors_csv,
    "codes.txt": _codes,
    "classes.txt": _numbered_lines,
    "labels.txt": _numbered_lines,
}


def _rows(text: str) -> Iterator[list[str]]:
    return (row for row in csv.reader(text.splitlines(), skipinitialspace=True) if any(map(str.strip, row)))


def _color(cells: Sequence[str]) -> Color:
    red, green, blue = (int(cell) for cell in cells)
    return red, green, blue
