"""What can be wrong with a data set, each as one message that names file, value and count."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

from pixelwise.data.classes import VOID_BY_CUSTOM
from pixelwise.data.groups import propose_groups
from pixelwise.data.image_files import relative
from pixelwise.data.labels import IGNORE_INDEX, LabelSpec, Value, as_ranges, value_name
from pixelwise.data.orientation import turned_masks
from pixelwise.data.pairs import NO_VALIDATION, SPLITS, DataFolder, Problem, counted, first_of
from pixelwise.data.photographs import fills_areas, looks_swapped
from pixelwise.data.samples import Reading
from pixelwise.data.scan import PairScan, place_of
from pixelwise.data.soft import find_soft, soft_question
from pixelwise.formats.local import printable

_STRAY_PX, _PLACES = 100, 5  # values in at most so many pixels are shown with their place, so many of them
_FRAME = 0.9  # of the pixels on the frame
_LISTED = 20
"""Of more problems of one kind in one split, the rest is told in one message."""


def find_problems(folder: DataFolder, scans: Sequence[PairScan], reading: Reading | None = None) -> tuple[Problem, ...]:
    """All problems of a folder whose images are read so, fatal ones first: those of the names, then those of the files."""
    problems = [*folder.problems, *_missing_parts(folder), *file_problems(folder, scans, reading)]
    for split in folder.splits:
        problems += _left_out(split, [scan for scan in scans if scan.pair.split == split], folder)
    problems += [*_opacity(folder, scans), *_shared_images(folder, scans)]
    return fatal_first([*problems, *_divided_groups(folder), *propose_groups(folder)])


def fatal_first(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """The same problems, in the order in which they are told."""
    return tuple(sorted(problems, key=lambda problem: problem.severity != "fatal"))


def file_problems(folder: DataFolder, scans: Sequence[PairScan], reading: Reading | None = None) -> list[Problem]:
    """What is wrong with images and masks as such, whatever they are used for."""
    problems: list[Problem] = []
    by_split = {name: [scan for scan in scans if scan.pair.split == name] for name in folder.splits}
    per_split: tuple[Callable[[str, list[PairScan], DataFolder], Iterable[Problem]], ...] = (
        _unreadable,
        _size_mismatches,
        _other_kind,
        _empty_masks,
        _missing_classes,
    )
    for check in per_split:
        for split, there in by_split.items():
            problems += check(split, there, folder) if there else ()
    problems += _unknown_values(scans, folder, reading)
    problems += [*_swapped(scans, folder), *_inverted(scans, folder), *turned_masks(scans)]
    return [*problems, *_mixed_images(folder, scans)]


def _missing_parts(folder: DataFolder) -> Iterator[Problem]:
    if folder.labels.num_classes < 2:
        values = folder.labels.describe_values()
        yield Problem("fatal", f"the masks hold only {values}: with one class there is nothing to learn.")
    if not folder.split("train"):
        yield Problem("fatal", "there are no training images.")
    elif not folder.split("val") and folder.layout.endswith(NO_VALIDATION):
        message = (
            "there are no validation images, since a list calls everything train: the last weights are kept, not the best, "
            "and nothing will say how good they are."
        )
        yield Problem("warning", message)
    elif not folder.split("val"):
        yield Problem("fatal", "there are no validation images: more than one image (or group) is needed.")


def _unreadable(split: str, scans: list[PairScan], folder: DataFolder) -> list[Problem]:
    problems = []
    for scan in scans:
        pair = scan.pair
        for what, path, error in (("image", pair.image, scan.image_error), ("mask", pair.mask, scan.mask_error)):
            if error is not None and path is not None:
                message = f"{split}: {what} {printable(path.name)} cannot be used: {error}"
                problems.append(Problem("fatal", message, (relative(path, folder.root),)))
    return _capped(problems, f"{split}: {{}} more files cannot be used")


def _size_mismatches(split: str, scans: list[PairScan], folder: DataFolder) -> list[Problem]:
    problems = []
    for scan in scans:
        if scan.image and scan.mask and (difference := scan.mask.grid.difference(scan.image.grid)):
            names = tuple(relative(path, folder.root) for path in (scan.pair.image, scan.pair.mask) if path)
            message = f"{split}: mask {names[-1]} {difference.format(names[0])}{_one_hot(scan)}"
            problems.append(Problem("fatal", message, names))
    return _capped(problems, f"{split}: {{}} more masks differ in size or place from their images")


def _one_hot(scan: PairScan) -> str:
    """What a mask of more planes than its image seems to be."""
    if not scan.mask or not scan.image or scan.image.grid.planes > 1 or scan.mask.grid.planes == 1:
        return ""
    if len(scan.mask.counts) > 2 or 0 not in scan.mask.counts:
        return ""
    return (
        f" It holds two values only, so it seems to be one-hot: one of its {scan.mask.grid.planes} planes for each class. "
        "Save the number of the plane that is set instead: numpy.argmax(mask, axis=0)."
    )


def _other_kind(split: str, scans: list[PairScan], folder: DataFolder) -> Iterator[Problem]:
    other = [scan for scan in scans if scan.mask and scan.mask.kind != folder.labels.kind]
    known = folder.labels.class_of
    painted = [scan for scan in other if scan.mask and all(known(value) is not None for value in scan.mask.counts)]
    wrong = [scan for scan in other if scan not in painted]
    if wrong:
        message = folder.labels.kind_mismatch("rgb" if folder.labels.kind == "index" else "index")
        yield Problem("fatal", f"{split}: {_masks(wrong)} {message}", _mask_files(folder, wrong))
    if painted:
        count = counted(len(painted), "mask", "is painted", "are painted")
        message = f"{split}: {count} in the RGB colours of the classes, and read by them."
        yield Problem("warning", message, _mask_files(folder, painted))


def _unknown_values(scans: Sequence[PairScan], folder: DataFolder, reading: Reading | None) -> Iterator[Problem]:
    """One question for all splits."""
    wrong, unknown, pixels = list[PairScan](), Counter[Value](), Counter[str]()
    for scan in scans:
        counts = scan.mask.counts if scan.mask and scan.mask.kind == folder.labels.kind else {}
        here = {value: count for value, count in counts.items() if folder.labels.class_of(value) is None}
        unknown.update(here)
        wrong += [scan] if here else []
        pixels[scan.pair.split] += sum(counts.values())
    if wrong:
        by_split = Counter(scan.pair.split for scan in wrong)
        split, masks = ", ".join(by_split), _masks(wrong)
        if len(by_split) > 1:
            each = ", ".join(f"{count:,} in {name}" for name, count in by_split.items())
            masks = masks.replace("pixels added up", f"{each}, pixels added up")
        if soft := _soft(scans):
            yield Problem("fatal", f"{split}: {soft}", _mask_files(folder, wrong))
            return
        message = folder.labels.unknown_message(dict(unknown.most_common()))
        places = [
            _place(wrong, value, reading)
            for value, count in unknown.items()
            if count <= _STRAY_PX and value != IGNORE_INDEX
        ]
        if places:
            message += f" Values in so few pixels may be strays: {first_of(places, _PLACES, separator='; ')}."
        if 2 * sum(unknown.values()) > sum(pixels[name] for name in by_split) and not set(unknown) <= set(
            VOID_BY_CUSTOM
        ):
            message += " Most pixels are of no class: are these masks of another data set, or the classes?"
        elif len(left := set[int]().union(*(_classes(scan, folder.labels) for scan in scans)) - {IGNORE_INDEX}) < 2:
            lost = [repr(name) for index, name in enumerate(folder.labels.names) if index not in left]
            message += f" No mask holds {first_of(lost, 3)}: if one of these values means it, say so in classes.yaml; "
            message += "--ignore would leave nothing of it."
        yield Problem("fatal", f"{split}: {masks} {message}", _mask_files(folder, wrong))


def _soft(scans: Sequence[PairScan]) -> str:
    """What is asked about masks of numbers whose classes have soft rims; "" if they have none."""
    masks = [scan.mask for scan in scans if scan.mask and scan.mask.kind == "index"]
    counts, solid = Counter[int](), Counter[int]()
    for mask in masks:
        counts.update({value: n for value, n in mask.counts.items() if isinstance(value, int)})
        solid.update({value: n for value, n in mask.solid.items() if isinstance(value, int)})
    found = find_soft(counts, solid, any(mask.format in ("jpeg", "mpo") for mask in masks)) if masks else None
    return "" if found is None else soft_question(found, "write them to a classes.yaml (values: 128-255)")


def _place(scans: list[PairScan], value: Value, reading: Reading | None) -> str:
    """Where the first pixel of a value is: "7 in a.png at row 3, column 5"."""
    holder = next(scan.pair for scan in scans if scan.mask and value in scan.mask.counts)
    name = printable(holder.mask.name if holder.mask else "")
    return f"{value_name(value)} in {name} at {place_of(holder, value, reading)}"


def _empty_masks(split: str, scans: list[PairScan], folder: DataFolder) -> Iterator[Problem]:
    held = [(scan, _classes(scan, folder.labels)) for scan in scans if scan.mask]
    void = [scan for scan, classes in held if classes <= {IGNORE_INDEX}]
    background = [scan for scan, classes in held if 0 in classes and classes <= {0, IGNORE_INDEX}]
    if folder.labels.names[0] != "background":
        background = []
    for what, empty in (("no labelled pixel", void), ("nothing but background", background)):
        if files := _mask_files(folder, empty):
            count = counted(len(files), "mask", "holds", "hold")
            yield Problem("warning", f"{split}: {count} {what}: {first_of(files, 3)}.", files)


def _missing_classes(split: str, scans: list[PairScan], folder: DataFolder) -> Iterator[Problem]:
    seen = [_classes(scan, folder.labels) for scan in scans if scan.mask]
    missing = [repr(name) for index, name in enumerate(folder.labels.names) if not any(index in here for here in seen)]
    if seen and missing:
        effect = "cannot be learnt." if split == "train" else "cannot be scored there."
        subject = "It" if len(missing) == 1 else "They"
        yield Problem("warning", f"{split}: no mask contains {first_of(missing, 12)}. {subject} {effect}")


def _left_out(split: str, scans: list[PairScan], folder: DataFolder) -> Iterator[Problem]:
    """Further images of a file, and files beside it that other programs follow."""
    found: dict[str, list[str]] = defaultdict(list)
    for scan in scans:
        for text in scan.image.remarks if scan.image else ():
            found[text].append(relative(scan.pair.image, folder.root))
    for text, names in found.items():
        yield Problem("warning", f"{split}: {first_of(names, 3)}: {text}.", tuple(names))


def _swapped(scans: Sequence[PairScan], folder: DataFolder) -> Iterator[Problem]:
    """Looked at only where most masks cannot be masks."""
    masks = [scan for scan in scans if scan.pair.mask]
    known = folder.labels.class_of
    odd = [
        scan
        for scan in masks
        if scan.mask is None or not fills_areas(scan.mask) or all(known(value) is None for value in scan.mask.counts)
    ]
    if 2 * len(odd) > len(masks) and (message := looks_swapped([scan.pair for scan in odd])):
        yield Problem("fatal", message)


def _inverted(scans: Sequence[PairScan], folder: DataFolder) -> Iterator[Problem]:
    """Of background and foreground, the background is what reaches the frame of nearly every image."""
    labels = folder.labels
    if labels.num_classes != 2 or labels.names[0].lower() != "background":
        return
    seen = inverted = 0
    files = []
    for scan in scans:
        if scan.mask is None or not {0, 1} <= _classes(scan, labels):
            continue
        seen += 1
        shares = []
        for counts in (scan.mask.border, scan.mask.counts):
            pixels = [sum(n for value, n in counts.items() if labels.class_of(value) == index) for index in (0, 1)]
            shares.append(pixels[1] / max(1, sum(pixels)))
        if shares[0] > _FRAME and shares[1] > 0.5:
            inverted += 1
            files.append(scan)
    if inverted:
        names = first_of(_mask_files(folder, files), 3)
        shown = f"{labels.names[1]} ({', '.join(map(str, as_ranges(labels.values[1])))})"
        message = (
            f"{counted(inverted, 'mask', 'looks', 'look')} inverted (of {seen:,} with both classes): {shown} "
            f"fills the frame and most of the area: {names}. "
        )
        advice = (
            "If so, exchange the values of both classes in classes.yaml (`pixelwise inspect DATA --write-classes`)."
        )
        if inverted < seen:
            advice = "If so, invert these files; the others look different."
        yield Problem("warning", message + advice, _mask_files(folder, files))


def _mixed_images(folder: DataFolder, scans: Sequence[PairScan]) -> Iterator[Problem]:
    images = [(scan.pair.image, scan.image) for scan in scans if scan.image]
    channels = Counter(image.channels for _, image in images)
    if len(channels) > 1 and set(channels) != {1, 3}:
        shown = ", ".join(f"{count:,} with {number}" for number, count in channels.most_common())
        usual = channels.most_common(1)[0][0]
        rare = tuple(relative(path, folder.root) for path, image in images if image.channels != usual)
        message = f"images differ in their number of channels ({shown}), for example {rare[0]}."
        hint = "Only grey among RGB can be used together."
        if any(image.opacity_kind for _, image in images):
            bands = ",".join(str(band + 1) for band in range(min(channels)))
            hint = f"In some the last band may be opacity or a measurement; --bands {bands} leaves it out of all."
        yield Problem("fatal", f"{message} {hint}", rare)
    dtypes = Counter(image.dtype for _, image in images)
    if len(dtypes) > 1:
        shown = ", ".join(f"{count:,} x {name}" for name, count in dtypes.most_common())
        message = f"images differ in bit depth ({shown}); each is divided by the largest number of its own type."
        yield Problem("warning", message)


def _opacity(folder: DataFolder, scans: Sequence[PairScan]) -> Iterator[Problem]:
    """What became of a band that is marked as opacity, which is a guess."""
    by_text: dict[str, list[str]] = defaultdict(list)
    for scan in scans:
        if scan.image and scan.image.opacity:
            by_text[scan.image.opacity].append(relative(scan.pair.image, folder.root))
    for text, files in by_text.items():
        count = f"{len(files):,} image{'s' * (len(files) != 1)}"
        yield Problem("warning", f"{count} ({first_of(files, 3)}): {text}.", tuple(files))


def _shared_images(folder: DataFolder, scans: Sequence[PairScan]) -> Iterator[Problem]:
    """The same decoded pixels in two splits: the score there is better than it should be."""
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for scan in scans:
        if scan.image is not None:
            owners[scan.image.digest].setdefault(scan.pair.split, relative(scan.pair.image, folder.root))
    for first, second in combinations(SPLITS, 2):
        shared = [(there[first], there[second]) for there in owners.values() if first in there and second in there]
        if shared:
            shown = first_of([" = ".join(names) for names in shared], 3, separator="; ")
            count = counted(len(shared), "image", "is", "are")
            message = f"{count} both in {first} and in {second}: {shown}. That flatters the score on {second}."
            yield Problem("warning", message, tuple(name for names in shared for name in names))


def _divided_groups(folder: DataFolder) -> Iterator[Problem]:
    """Only where groups were asked for: elsewhere a group is a name, and equal names in two splits mean nothing."""
    splits: dict[str, set[str]] = defaultdict(set)
    for pair in folder.pairs if folder.group_by is not None else ():
        splits[pair.group].add(pair.split)
    divided = [group for group, there in splits.items() if len(there) > 1]
    if not divided:
        return
    shown = [f"{group!r} ({' and '.join(name for name in SPLITS if name in splits[group])})" for group in divided]
    message = f"--group-by: the given splits divide groups: {first_of(shown, 5)}. Move each group to one split."
    files = tuple(relative(pair.image, folder.root) for pair in folder.pairs if pair.group in set(divided))
    yield Problem("fatal", message, files)


def _classes(scan: PairScan, labels: LabelSpec) -> set[int]:
    ids = {labels.class_of(value) for value in scan.counts}
    return {index for index in ids if index is not None}


def _masks(scans: list[PairScan]) -> str:
    """ "mask a.png", or "mask a.png (and 3 more masks)"; what follows speaks of one mask that holds something."""
    name = printable(scans[0].pair.mask.name if scans[0].pair.mask else "")
    more = len(scans) - 1
    return f"mask {name}" + (f" (and {more:,} more mask{'s' * (more > 1)}, pixels added up)" if more else "")


def _mask_files(folder: DataFolder, scans: list[PairScan]) -> tuple[str, ...]:
    return tuple(relative(scan.pair.mask, folder.root) for scan in scans if scan.pair.mask)


def _capped(problems: list[Problem], rest: str) -> list[Problem]:
    if len(problems) <= _LISTED:
        return problems
    left = problems[_LISTED:]
    files = tuple(name for problem in left for name in problem.files)
    message = rest.format(f"{len(left):,}") + "; `pixelwise inspect --json` lists them all."
    return [*problems[:_LISTED], Problem("fatal", message, files)]
