"""What can be wrong with a data set, each as one message that names file, value and count."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations

from pixelwise.data.labels import IGNORE_INDEX, LabelSpec, Value
from pixelwise.data.matching import listing, relative
from pixelwise.data.pairs import SPLITS, DataFolder, Problem
from pixelwise.data.scan import PairLook
from pixelwise.formats.raster import printable

_LISTED = 20
"""Of more problems of one kind in one split, the rest is told in one message."""


def find_problems(folder: DataFolder, looks: Sequence[PairLook]) -> tuple[Problem, ...]:
    """All problems of a folder, fatal ones first: those of the names, then those of the files."""
    problems = [*folder.problems, *_missing_parts(folder)]
    by_split = {name: [look for look in looks if look.pair.split == name] for name in folder.splits}
    per_split: tuple[Callable[[str, list[PairLook], DataFolder], list[Problem]], ...] = (
        _unreadable,
        _size_mismatches,
        _other_kind,
        _unknown_values,
        _empty_masks,
        _missing_classes,
    )
    for check in per_split:
        for split, there in by_split.items():
            problems += check(split, there, folder)
    problems += _mixed_images(folder, looks) + _shared_images(folder, looks) + _divided_groups(folder)
    return tuple(sorted(problems, key=lambda problem: problem.severity != "fatal"))


def _missing_parts(folder: DataFolder) -> list[Problem]:
    problems = []
    if folder.labels.num_classes < 2:
        values = folder.labels.describe_values()
        problems.append(Problem("fatal", f"the masks hold only {values}: with one class there is nothing to learn."))
    if not folder.split("train"):
        problems.append(Problem("fatal", "there are no training images."))
    elif not folder.split("val"):
        problems.append(Problem("fatal", "there are no validation images: more than one image (or group) is needed."))
    return problems


def _unreadable(split: str, looks: list[PairLook], folder: DataFolder) -> list[Problem]:
    problems = []
    for look in looks:
        for what, path, error in (
            ("image", look.pair.image, look.image_error),
            ("mask", look.pair.mask, look.mask_error),
        ):
            if error is not None and path is not None:
                name = relative(path, folder.root)
                message = f"{split}: {what} {printable(path.name)} cannot be used: {error}"
                problems.append(Problem("fatal", message, (name,)))
    return _capped(problems, f"{split}: {{}} more files cannot be used")


def _size_mismatches(split: str, looks: list[PairLook], folder: DataFolder) -> list[Problem]:
    problems = []
    for look in looks:
        image, mask = look.image, look.mask
        if image is None or mask is None or (image.width, image.height) == (mask.width, mask.height):
            continue
        names = _names(folder, look)
        turned = (image.width, image.height) == (mask.height, mask.width)
        hint = " One of them may be turned: both have their own EXIF orientation." if turned else ""
        message = (
            f"{split}: mask {names[-1]} is {mask.width} x {mask.height} px, but its image {names[0]} is "
            f"{image.width} x {image.height} px. Both must have the same size.{hint}"
        )
        problems.append(Problem("fatal", message, names))
    return _capped(problems, f"{split}: {{}} more masks differ in size from their images")


def _other_kind(split: str, looks: list[PairLook], folder: DataFolder) -> list[Problem]:
    wrong = [look for look in looks if look.mask and look.mask.kind != folder.labels.kind]
    if not wrong or wrong[0].mask is None:
        return []
    message = folder.labels.kind_mismatch(wrong[0].mask.kind)
    return [Problem("fatal", f"{split}: {_masks(wrong)} {message}", _mask_files(folder, wrong))]


def _unknown_values(split: str, looks: list[PairLook], folder: DataFolder) -> list[Problem]:
    wrong, unknown = [], Counter[Value]()
    for look in looks:
        if look.mask is None or look.mask.kind != folder.labels.kind:
            continue
        here = {value: count for value, count in look.mask.counts.items() if folder.labels.class_of(value) is None}
        unknown.update(here)
        if here:
            wrong.append(look)
    if not wrong:
        return []
    message = folder.labels.unknown_message(dict(unknown.most_common()))
    return [Problem("fatal", f"{split}: {_masks(wrong)} {message}", _mask_files(folder, wrong))]


def _empty_masks(split: str, looks: list[PairLook], folder: DataFolder) -> list[Problem]:
    held = [(look, _classes(look, folder.labels)) for look in looks if look.mask]
    void = [look for look, classes in held if classes <= {IGNORE_INDEX}]
    background = [look for look, classes in held if 0 in classes and classes <= {0, IGNORE_INDEX}]
    problems = []
    if void:
        problems.append(_empty(split, void, "no labelled pixel", folder))
    if background and folder.labels.names[0] == "background":
        problems.append(_empty(split, background, "nothing but background", folder))
    return problems


def _empty(split: str, looks: list[PairLook], what: str, folder: DataFolder) -> Problem:
    masks = [look.pair.mask for look in looks if look.pair.mask]
    count = f"{len(masks):,} masks hold" if len(masks) > 1 else "1 mask holds"
    message = f"{split}: {count} {what}: {listing(masks, folder.root, limit=3)}."
    return Problem("warning", message, _mask_files(folder, looks))


def _missing_classes(split: str, looks: list[PairLook], folder: DataFolder) -> list[Problem]:
    if not any(look.mask for look in looks):
        return []
    seen = set().union(*(_classes(look, folder.labels) for look in looks if look.mask))
    missing = [name for index, name in enumerate(folder.labels.names) if index not in seen]
    if not missing:
        return []
    effect = "They cannot be learnt." if split == "train" else "They cannot be scored there."
    if len(missing) == 1:
        effect = effect.replace("They", "It")
    shown = ", ".join(map(repr, missing[:12])) + (f" and {len(missing) - 12} more" if len(missing) > 12 else "")
    return [Problem("warning", f"{split}: no mask contains {shown}. {effect}")]


def _mixed_images(folder: DataFolder, looks: Sequence[PairLook]) -> list[Problem]:
    problems = []
    channels = Counter(look.image.channels for look in looks if look.image)
    if len(channels) > 1 and set(channels) != {1, 3}:
        shown = ", ".join(f"{count:,} with {number}" for number, count in channels.most_common())
        rare = [
            look.pair.image for look in looks if look.image and look.image.channels != channels.most_common(1)[0][0]
        ]
        message = f"images differ in their number of channels ({shown}), for example {relative(rare[0], folder.root)}."
        files = tuple(relative(path, folder.root) for path in rare)
        problems.append(Problem("fatal", f"{message} Only grey among RGB can be used together.", files))
    dtypes = Counter(look.image.dtype for look in looks if look.image)
    if len(dtypes) > 1:
        shown = ", ".join(f"{count:,} x {name}" for name, count in dtypes.most_common())
        message = f"images differ in bit depth ({shown}); each is divided by the largest number of its own type."
        problems.append(Problem("warning", message))
    return problems


def _shared_images(folder: DataFolder, looks: Sequence[PairLook]) -> list[Problem]:
    """The same decoded pixels in two splits: the score there is better than it should be."""
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for look in looks:
        if look.image is not None:
            owners[look.image.digest].setdefault(look.pair.split, relative(look.pair.image, folder.root))
    problems = []
    for first, second in combinations(SPLITS, 2):
        shared = [(there[first], there[second]) for there in owners.values() if first in there and second in there]
        if shared:
            shown = "; ".join(" = ".join(names) for names in shared[:3])
            more = f" and {len(shared) - 3:,} more" if len(shared) > 3 else ""
            count = f"{len(shared):,} images are" if len(shared) > 1 else "1 image is"
            message = f"{count} both in {first} and in {second}: {shown}{more}. That flatters the score on {second}."
            problems.append(Problem("warning", message, tuple(name for names in shared for name in names)))
    return problems


def _divided_groups(folder: DataFolder) -> list[Problem]:
    """Only where groups were asked for: elsewhere a group is a name, and equal names in two splits mean nothing."""
    splits: dict[str, set[str]] = defaultdict(set)
    for pair in folder.pairs if folder.group_by is not None else ():
        splits[pair.group].add(pair.split)
    divided = [group for group, there in splits.items() if len(there) > 1]
    if not divided:
        return []
    shown = ", ".join(
        f"{group!r} ({' and '.join(name for name in SPLITS if name in splits[group])})" for group in divided[:5]
    )
    more = f" and {len(divided) - 5:,} more" if len(divided) > 5 else ""
    message = f"--group-by: the given splits divide groups: {shown}{more}. Move each group to one split."
    files = tuple(relative(pair.image, folder.root) for pair in folder.pairs if pair.group in set(divided))
    return [Problem("fatal", message, files)]


def _classes(look: PairLook, labels: LabelSpec) -> set[int]:
    ids = {labels.class_of(value) for value in look.mask.counts} if look.mask else set()
    return {index for index in ids if index is not None}


def _masks(looks: list[PairLook]) -> str:
    """ "mask a.png", or "mask a.png (and 3 more masks)"; what follows speaks of one mask that holds something."""
    name = printable(looks[0].pair.mask.name if looks[0].pair.mask else "")
    more = len(looks) - 1
    return f"mask {name}" + (f" (and {more:,} more mask{'s' * (more > 1)}, pixels added up)" if more else "")


def _names(folder: DataFolder, look: PairLook) -> tuple[str, ...]:
    return tuple(relative(path, folder.root) for path in (look.pair.image, look.pair.mask) if path)


def _mask_files(folder: DataFolder, looks: list[PairLook]) -> tuple[str, ...]:
    return tuple(relative(look.pair.mask, folder.root) for look in looks if look.pair.mask)


def _capped(problems: list[Problem], rest: str) -> list[Problem]:
    if len(problems) <= _LISTED:
        return problems
    left = problems[_LISTED:]
    files = tuple(name for problem in left for name in problem.files)
    message = rest.format(f"{len(left):,}") + "; `pixelwise inspect --json` lists them all."
    return [*problems[:_LISTED], Problem("fatal", message, files)]
