"""Classes for masks that come without `classes.yaml`, and the questions that only the author of the masks can answer."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

from pixelwise.data.class_files import ClassFile, find_class_files, follow, not_used
from pixelwise.data.classes import CLASSES_NAME, load_labels, propose_labels
from pixelwise.data.instances import find_instances
from pixelwise.data.labels import (
    CAMVID_COLORS,
    CAMVID_NAMES,
    MAX_CLASSES,
    Color,
    LabelSpec,
    Value,
    distinct_colors,
    value_name,
)
from pixelwise.data.pairs import Pair, Problem, counted, first_of
from pixelwise.data.palettes import common_palette, palettes_differ
from pixelwise.data.photographs import check_areas, looks_swapped
from pixelwise.data.scan import MaskScan, in_threads, scan_mask
from pixelwise.data.soft import find_soft, find_soft_colors, soft_labels, soft_question
from pixelwise.errors import DataError
from pixelwise.formats.base import NAN_VALUE

Masks = Sequence[tuple[Pair, MaskScan]]

_STRAY_PX, _STRAY_SHARE, _STRAY_MASKS = 100, 1e-3, 0.1
_ALWAYS_FEW_PX, _TINY_PX = 16, 2048  # whatever the share, unless all masks together are tiny
_MOST_STRAYS = 3  # as many values in few pixels each are no accident
_ONE_HOT: tuple[Color, ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
_ANSWER = "`pixelwise inspect DATA --write-classes` writes it to a classes.yaml that you can change"


def find_labels(
    root: Path,
    pairs: Sequence[Pair],
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (),
    labels: LabelSpec | None = None,
    camvid: bool = False,
) -> tuple[LabelSpec, list[Problem], Path | None]:
    """The classes of a data folder, with the arguments of `open_data`: known ones, those of a file, or proposed ones.

    Returns:
        The classes, what must be told or asked about them, and the file of a tool that names them, if one does.

    Raises:
        DataError: a file of classes cannot be used, or no classes can be found.
        UsageError: a value of `ignore` means a class.
    """
    beside = classes_beside(root)
    if labels is not None:
        return labels.with_ignored(ignore), [], None
    files = find_class_files(root, pairs)
    if classes is not None or os.path.lexists(beside):
        labels = load_labels(classes or beside)
        why = f"{Path(classes or beside).name} gives the classes"
        return labels.with_ignored(ignore), [not_used(known, beside.parent, why) for known in files], None
    labelled = [pair for pair in pairs if pair.mask]
    found_or_not = in_threads(_scan_or_error, labelled)
    masks = [(pair, scan) for pair, scan in zip(labelled, found_or_not, strict=True) if isinstance(scan, MaskScan)]
    try:
        if not masks:
            raise DataError(f"none of its masks can be read, for example {found_or_not[0]}")
        proposed = cache(lambda: propose_from_masks(masks, camvid=camvid, ignore=ignore))
        return _named(beside.parent, masks, files, proposed, ignore)
    except DataError as error:
        raise DataError(f"{root}: {looks_swapped(labelled) or error}") from error


def _named(
    root: Path,
    masks: Masks,
    files: Sequence[ClassFile],
    propose: Callable[[], tuple[LabelSpec, list[Problem]]],
    ignore: Sequence[int],
) -> tuple[LabelSpec, list[Problem], Path | None]:
    """The classes of the first file that fits the masks, else proposed ones; every other file is named."""
    found: tuple[LabelSpec, list[Problem]] | None = None
    used: Path | None = None
    problems = []
    for known in files:
        try:
            if used is not None:
                raise DataError(f"{used.name} gives the names")
            found, used = follow(known, root, masks, propose, ignore), known.path
        except DataError as error:
            problems.append(not_used(known, root, str(error)))
    labels, told = found or propose()
    return labels, [*told, *problems], used


def classes_beside(root: Path) -> Path:
    """The `classes.yaml` in a data folder or beside a CSV file, whether there is one or not."""
    return (root if root.is_dir() else root.parent) / CLASSES_NAME


def _scan_or_error(pair: Pair) -> MaskScan | DataError:
    """A file that cannot be read is told when the data are checked."""
    try:
        return scan_mask(pair)
    except DataError as error:
        return error


def propose_from_masks(
    masks: Masks, *, camvid: bool = False, ignore: Sequence[int] = ()
) -> tuple[LabelSpec, list[Problem]]:
    """Classes for the values that the masks hold, and what must be told or asked about them.

    Values that are left out of the classes (strays, and numbers that by custom mean void) are asked about by the check.

    Args:
        masks: pairs, and what their masks hold.
        camvid: whether the folder has the layout of SegNet's CamVid copy.
        ignore: values the user calls void.

    Raises:
        DataError: the masks hold no classes.
        UsageError: `ignore` cannot apply.
    """
    problems: list[Problem] = []
    if palettes_differ([scan for _, scan in masks]):
        masks = [(pair, scan if scan.palette is None else scan_mask(pair, by_color=True)) for pair, scan in masks]
        message = "the palettes of the masks differ from file to file, so the masks are read by their colours."
        problems.append(Problem("warning", message))
    kind = Counter(scan.kind for _, scan in masks).most_common(1)[0][0]
    masks = [(pair, scan) for pair, scan in masks if scan.kind == kind]
    colors = {value for _, scan in masks for value in scan.counts if isinstance(value, tuple)}
    if any(len(set(color)) > 1 for color in colors):
        labels, found = _propose_colors(masks, ignore)
    else:
        numbers = [(pair, _as_numbers(scan)) for pair, scan in masks] if colors else masks
        labels, found = _propose_numbers(numbers, camvid, tuple(ignore))
        if colors:
            labels = _as_greys(labels)
    return labels, problems + found


def with_unknown_ignored(labels: LabelSpec, pairs: Iterable[Pair]) -> LabelSpec:
    """The same classes, with every value of the masks that is no class counted as void: a first answer to all questions."""
    unknown: set[Value] = set()
    for pair in pairs:
        if pair.mask is not None:
            try:
                scan = scan_mask(pair, by_color=labels.kind == "rgb")
            except DataError:
                continue  # told by the check
            if scan.kind == labels.kind:
                unknown.update(value for value in scan.counts if labels.class_of(value) is None)
    return replace(labels, ignore_values=(*labels.ignore_values, *sorted(unknown)))


def _as_numbers(scan: MaskScan) -> MaskScan:
    """A mask of greys as if it were stored with one channel."""

    def plain(counts: Mapping[Value, int]) -> dict[Value, int]:
        return {value[0]: count for value, count in counts.items() if isinstance(value, tuple)}

    return replace(scan, counts=plain(scan.counts), solid=plain(scan.solid))


def _as_greys(labels: LabelSpec) -> LabelSpec:
    def greys(values: Iterable[Value]) -> tuple[Value, ...]:
        return tuple((value, value, value) for value in values if isinstance(value, int) and 0 <= value < 256)

    values = tuple(greys(there) for there in labels.values)
    return replace(labels, values=values, ignore_values=greys(labels.ignore_values), kind="rgb")


def _propose_colors(masks: Masks, ignore: Sequence[int]) -> tuple[LabelSpec, list[Problem]]:
    counts = _total(scan.counts for _, scan in masks)
    if known := _own_palette({value for value in counts if isinstance(value, tuple)}):
        shown = first_of(known.names, 3)
        message = f"the colours of the masks are those that pixelwise itself paints: they are read as {shown}"
        void = "; black is void" if known.ignore_values else ""
        return known.with_ignored(ignore), [Problem("warning", f"{message}{void}. Give a classes.yaml if not.")]
    if set(counts) <= {(0, 0, 0), *_ONE_HOT} and len(set(counts) & set(_ONE_HOT)) > 1:
        values = tuple((color,) for color in ((0, 0, 0), *_ONE_HOT) if color in counts)
        names = tuple(f"channel {value.index(1) + 1}" if any(value) else "no channel" for (value,) in values)
        spec = LabelSpec(names=names, colors=distinct_colors(len(names)), values=values, kind="rgb")
        message = (
            "the masks are one-hot, it seems: each channel of 0 and 1 is read as a class. Give a classes.yaml if not."
        )
        return spec.with_ignored(ignore), [Problem("warning", message)]
    strays = _strays(masks, counts)
    few = strays if len(strays) <= _MOST_STRAYS else set()
    colors = {value: n for value, n in counts.items() if isinstance(value, tuple)}
    solid = cast("Counter[Color]", _total(scan.solid for _, scan in masks))
    if find_soft_colors({value: n for value, n in colors.items() if value not in few}, solid) and (
        soft := find_soft_colors(colors, solid)
    ):
        return soft_labels(soft).with_ignored(ignore), [Problem("fatal", soft_question(soft, _ANSWER))]
    check_areas(colors, solid)
    return propose_labels({value: n for value, n in counts.items() if value not in strays}, ignore=ignore), []


def _own_palette(colors: set[Color]) -> LabelSpec | None:
    """The classes whose colours pixelwise's own pictures have; black, if it is no class there, is void."""
    black: Color = (0, 0, 0)
    own = distinct_colors(MAX_CLASSES)
    if colors == {black, (230, 60, 60)}:
        spec = propose_labels({0: 1, 1: 1})
        return replace(spec, values=tuple((color,) for color in spec.colors), kind="rgb")
    if colors - {black} <= set(CAMVID_COLORS) and len(colors) > 8:  # a few of its colours are VOC's too
        names, painted = tuple[str, ...](CAMVID_NAMES), CAMVID_COLORS
    elif len(colors - {black}) > 1 and colors - {black} <= set(own):
        painted = own[: 1 + max(own.index(color) for color in colors - {black})]
        names = tuple(f"class {index}" for index in range(len(painted)))
    else:
        return None
    void = (black,) if black in colors else ()
    values = tuple((color,) for color in painted)
    return LabelSpec(names=names, colors=painted, values=values, ignore_values=void, kind="rgb")


def _propose_numbers(masks: Masks, camvid: bool, ignore: tuple[int, ...]) -> tuple[LabelSpec, list[Problem]]:
    void, problems = _declared(masks, ignore)
    ignore += tuple(value for value in void if value not in ignore)
    counts = Counter(
        {value: n for value, n in _numbers(scan.counts for _, scan in masks).items() if value not in ignore}
    )
    if instances := find_instances(masks, ignore):
        question = instances.question(_ANSWER)
        if instances.is_sure:
            return instances.labels(ignore), [*problems, Problem("fatal", question)]
        problems.append(Problem("warning", question))
    strays = _strays(masks, counts)
    few = strays if len(strays) <= _MOST_STRAYS else set()
    is_lossy = any(scan.format in ("jpeg", "mpo") for _, scan in masks)
    solid = _numbers(scan.solid for _, scan in masks)
    if find_soft({value: n for value, n in counts.items() if value not in few}, solid, is_lossy) and (
        soft := find_soft(counts, solid, is_lossy)
    ):
        return soft_labels(soft, ignore), [*problems, Problem("fatal", soft_question(soft, _ANSWER))]
    if is_lossy and len(counts) > 2:
        raise DataError(
            f"its masks are JPEG, which blurs values: {len(counts):,} different ones are found. "
            "Save the masks as PNG, or say in classes.yaml which values mean which class."
        )
    check_areas(counts, solid)
    if largest := _two_ways(masks, counts):
        spec = propose_labels({0: 1, 1: 1}, ignore=ignore)
        problems.append(Problem("fatal", _two_ways_question(masks, largest)))
        return replace(spec, values=((0,), (1, largest))), problems
    found: dict[Value, int] = {value: count for value, count in counts.items() if value not in strays}
    return propose_labels(
        found, palette=common_palette([scan for _, scan in masks]), camvid=camvid, ignore=ignore
    ), problems


def _declared(masks: Masks, ignore: Sequence[int]) -> tuple[list[int], list[Problem]]:
    """The numbers that mask files declare to be no data and do hold: void, where at least two others are left."""
    holders: Counter[int] = Counter()
    for _, scan in masks:
        if scan.nodata is not None:
            is_number = math.isfinite(scan.nodata) and float(scan.nodata).is_integer() and abs(scan.nodata) < 1e30
            value = int(scan.nodata) if is_number else NAN_VALUE
            holders[value] += value in scan.counts and value not in ignore
    void, problems = [], []
    values = {value for _, scan in masks for value in scan.counts if value not in ignore}
    for value in sorted(value for value, count in holders.items() if count):
        what = f"{counted(holders[value], 'mask', 'declares', 'declare')} {value_name(value)} as nodata"
        if value == 0 and len(values) > 2:
            how = "Pass --ignore 0 if it is void. If it is a class (background), the classes with it are proposed; "
            problems.append(Problem("fatal", f"{what}, which may mean void or background. {how}{_ANSWER}."))
        elif len(values) > 2:
            void.append(value)
            problems.append(Problem("warning", f"{what}: it is void, not a class."))
        else:
            problems.append(Problem("warning", f"{what}, but without it one value is left; it is taken as a class."))
    return void, problems


def _strays(masks: Masks, counts: Counter[int] | Counter[Value]) -> set[Value]:
    """Values in a few pixels of a few masks, where at least two others are left."""
    total = sum(counts.values())
    most = max(1, _STRAY_MASKS * len(masks))
    few = max(_ALWAYS_FEW_PX if total > _TINY_PX else 0, min(_STRAY_PX, _STRAY_SHARE * total))
    strays: set[Value] = {
        value
        for value, count in counts.items()
        if count <= few and sum(value in scan.counts for _, scan in masks) <= most
    }
    return strays if len(counts) - len(strays) >= 2 else set()


def _two_ways(masks: Masks, counts: Counter[int]) -> int | None:
    """255 (or 65535), if some masks are 0 and 1 and others 0 and that number, and none has both."""
    values = set(counts)
    for largest in (255, 65_535):
        ways = [set(scan.counts) & {1, largest} for _, scan in masks]
        is_binary = values == {0, 1, largest} and {1, largest} not in ways
        if is_binary and any(set(scan.counts) >= {0, largest} for _, scan in masks):
            return largest
    return None


def _two_ways_question(masks: Masks, largest: int) -> str:
    names = {
        value: [pair.mask.name for pair, scan in masks if pair.mask and value in scan.counts] for value in (1, largest)
    }
    said = [f"{value} in {len(there):,} ({first_of(there, 2)})" for value, there in names.items()]
    return (
        f"the masks write one class in two ways, it seems: beside 0 there is {said[0]} and {said[1]}, never both. Proposed "
        f"is one class of 1 and {largest}; {_ANSWER}. If {largest} is void, pass --ignore {largest}."
    )


def _total(counts: Iterable[object]) -> Counter[Value]:
    added: Counter[Value] = Counter()
    for there in counts:
        added.update(cast("dict[Value, int]", there))
    return added


def _numbers(counts: Iterable[object]) -> Counter[int]:
    return cast("Counter[int]", _total(counts))
