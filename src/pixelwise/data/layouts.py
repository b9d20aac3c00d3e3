"""From a folder to pairs of image and mask: the layout is recognised by looking."""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pixelwise.data.folders import Layout, beside_splits, find_layout
from pixelwise.data.groups import check_expression, match_groups
from pixelwise.data.labels import LabelSpec
from pixelwise.data.mask_folders import add_regions, choose_masks, is_doubtful, propose_region
from pixelwise.data.matching import FolderPair, match_source
from pixelwise.data.pairs import (
    NO_VALIDATION,
    SPLITS,
    VAL_OF_TRAIN,
    DataFolder,
    Pair,
    Problem,
    assign_splits,
    first_of,
)
from pixelwise.data.proposals import find_labels
from pixelwise.data.split_lists import SplitLists, apply_split_lists, find_split_lists
from pixelwise.data.tables import Table, find_tables, read_pairs
from pixelwise.data.text_labels import describe_text_labels
from pixelwise.data.unused import find_unused, unread_lists
from pixelwise.errors import DataError, UsageError
from pixelwise.formats import SOURCE_SUFFIXES

__all__ = ["SPLITS", "DataFolder", "Pair", "Problem", "open_data"]

_FEW_FOLDERS = 5  # of so many folders below the images it is told that they are no splits


def open_data(
    root: str | Path,
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (),
    group_by: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    labels: LabelSpec | None = None,
    masks: str | None = None,
    region: str | None = None,
) -> DataFolder:
    """Recognise a data folder, pair its files, decide its splits and its classes.

    Understood are `images/` with `masks/`, with `train/ val/ test/` above or below them or without; SegNet's `train/
    trainannot/ …`; images and masks in one folder; and a CSV file with the columns `image,mask[,split]`. Lists such as
    train.txt or a JSON of splits are followed. Where no split is given, the hash of each group's name decides
    (`fractions`); where only train and test are, 15 % of train becomes val. A given test split never moves.

    Args:
        root: the folder, or the CSV file.
        classes: a `classes.yaml`; without it the one in `root`, else classes are proposed from the masks.
        ignore: mask values that mean void, besides those in `classes.yaml`.
        group_by: a regular expression on names; what its group 1 (or the whole match) is equal in, stays together. Or the
            column of a CSV file that names the groups.
        fractions: of train, val, test.
        labels: classes that are already known, for example a network's; `classes.yaml` is then not looked for.
        masks: the name of the folder of masks, where several hold labels.
        region: the name of the folder, or of the column of a CSV file, of masks that are 0 where pixels do not count.

    Returns:
        The pairs, by split and name. Images without masks and the like are listed in `problems`.

    Raises:
        DataError: no layout is recognised, several folders hold masks, nothing can be paired, or no classes can be found.
        UsageError: an option does not fit.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for kind, value in (("images", 200), ("masks", 1)):
        ...     (root / kind).mkdir()
        ...     for i in range(9):
        ...         Image.new("L", (8, 6), value).save(root / kind / f"{i}.png")
        >>> folder = open_data(root)
        >>> len(folder.pairs), folder.splits
        (9, ('train', 'val', 'test'))
    """
    root = Path(root)
    found = _recognise(root, masks, region, group_by)
    pairs, problems, words = found.pairs, found.problems, found.words
    if not any(pair.mask for pair in pairs):
        raise DataError(_nothing_pairs(root, words, problems))
    expression = None if found.is_grouped else group_by
    check_expression(expression)
    pairs, split_words = _with_splits(_grouped(pairs, expression), fractions, found.is_listed)
    spec, questions, names_file = find_labels(
        root, pairs, classes=classes, ignore=ignore, labels=labels, camvid=found.is_segnet
    )
    if root.is_dir():
        told = {name for problem in problems for name in problem.files}
        problems += find_unused(root, pairs, told, [*found.list_files, *([names_file] if names_file else [])])
    problems += _undivided_folders(pairs, split_words) if group_by is None else []
    problems += _doubtful_split(root, found, split_words)
    return DataFolder(
        root=root,
        layout=f"{words}{f', class names from {names_file.name}' if names_file else ''}{split_words}",
        pairs=tuple(sorted(pairs, key=lambda pair: (SPLITS.index(pair.split), pair.name))),
        labels=spec,
        problems=(*problems, *questions),
        group_by=group_by,
        masks=masks,
        region=region,
    )


@dataclass(kw_only=True)
class _Found:
    """What was recognised."""

    words: str
    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    is_segnet: bool = False
    tables: tuple[Table, ...] = ()  # the CSV files that list the pairs
    lists: SplitLists | None = None
    is_grouped: bool = False  # a column of theirs says what must not be divided
    beside: tuple[str, ...] = ()  # folders with images that lie beside splits and are none by their names

    def take(self, read: Sequence[tuple[list[Pair], list[Problem]]]) -> None:
        """Take the pairs and the problems of all parts."""
        self.pairs = [pair for pairs, _ in read for pair in pairs]
        self.problems = [problem for _, problems in read for problem in problems]

    @property
    def is_listed(self) -> bool:
        """Whether lists give the splits: then no split means that none is wanted."""
        return (self.lists is not None and self.lists.is_complete) or any(
            "split" in table.columns for table in self.tables
        )

    @property
    def list_files(self) -> tuple[Path, ...]:
        """The lists that are used."""
        return (*(table.path for table in self.tables), *(self.lists.files if self.lists else ()))


def _recognise(root: Path, masks: str | None, region: str | None, group_by: str | None) -> _Found:
    if not (root.is_dir() or root.is_file()):
        what = "is neither a folder nor a file" if root.exists() else "there is no such folder"
        raise DataError(f"{root}: {what}. Give a folder of images and masks, or a CSV file that lists them.")
    sources: list[FolderPair] = []
    layout, chosen = None, ("", "")
    doubts: list[Problem] = []
    if tables := find_tables(root):
        if masks is not None:
            raise UsageError(f"--masks does not apply to {root}: the CSV file names the masks.")
        found = _Found(
            words="CSV " + ", ".join(table.path.name for table in tables),
            tables=tuple(tables),
            is_grouped=any(table.place(group_by) is not None for table in tables),
        )
        found.take([read_pairs(table, region, group_by if found.is_grouped else None) for table in tables])
    else:
        layout = find_layout(root)
        if (found_masks := choose_masks(layout, root, masks)) is None:
            raise DataError(_no_masks(root, layout))
        chosen = found_masks
        sources = layout.sources(*chosen)
        read = _read_sources(sources, root)
        words = layout.describe(*chosen)
        if not any(pairs for pairs, _ in read):
            raise DataError(_no_images(root, words, sources))
        found = _Found(
            words=words,
            is_segnet=chosen[0] == "annot",
            beside=beside_splits(layout, root),
        )
        found.take(read)
        if not any(source.split for source in sources) and any(pair.split for pair in found.pairs):
            found.words += " with its splits below"
        if masks is None and is_doubtful(layout, chosen[0], root):
            what = f"the masks in {chosen[0]}/ mark much the same region in every image, as a field of view is"
            doubts = [Problem("warning", f"{what}; are they the ones that are meant?")]
        elif masks is not None and region is None:
            doubts = propose_region(layout, chosen[0], root)
    if root.is_dir() and not any("split" in table.columns for table in found.tables):
        found.lists = find_split_lists(root, [table.path for table in found.tables])
    if found.lists:
        found.words += f", split by {' '.join(path.name for path in found.lists.files)}"
        pairs, more = apply_split_lists(found.lists, found.pairs, root)
        if sources:  # what stays alone is asked about the images that are listed
            found.take(_read_sources(sources, root, {pair.image for pair in pairs}))
        found.pairs, found.problems = pairs, found.problems + more
    found.problems += doubts
    if layout is not None and region is not None:
        found.pairs, more, region_words = add_regions(found.pairs, layout, root, region, chosen)
        found.problems, found.words = found.problems + more, found.words + region_words
    return found


def _undivided_folders(pairs: Sequence[Pair], split_words: str) -> list[Problem]:
    """Folders below the images may be meant as splits, for all that their names say."""
    tops = Counter(pair.group.partition("/")[0] for pair in pairs if "/" in pair.group)
    if not split_words or not 2 <= len(tops) <= _FEW_FOLDERS or sum(tops.values()) < len(pairs):
        return []
    shown = first_of([f"{name}/ ({count:,})" for name, count in sorted(tops.items())], _FEW_FOLDERS)
    return [Problem("warning", f"the folders {shown} are not taken as splits; each is divided by hash.")]


def _doubtful_split(root: Path, found: _Found, split_words: str) -> list[Problem]:
    """Splits are not made by hash where something that may be meant as one lies beside those that were understood."""
    if not split_words or found.is_listed:
        return []
    unread = [path.name for path in unread_lists(root) if path not in found.list_files]
    advice = "Name folders train, val and test, or list all pairs in a CSV file with the columns image,mask,split."
    if found.beside:
        what = (
            f"the splits are not complete, and beside them lie {first_of(found.beside, 5)}, which are not understood."
        )
        return [Problem("fatal", f"{what} {advice}", found.beside)]
    if unread:
        what = f"no split was found, but {first_of(unread, 5)} may say one and is not understood."
        return [Problem("fatal", f"{what} Remove or rename it, or: {advice[0].lower()}{advice[1:]}", tuple(unread))]
    return []


def _grouped(pairs: list[Pair], expression: str | None) -> list[Pair]:
    """The pairs with their group; a name that is used twice gets its split."""
    count = Counter(pair.name for pair in pairs)
    grouped, unmatched = [], []
    names = [pair.name for pair in pairs]
    own = [pair.group or pair.name for pair in pairs]
    for pair, group in zip(pairs, own if expression is None else match_groups(expression, names), strict=True):
        if group is None:
            unmatched.append(pair.name)
        name = f"{pair.split}/{pair.name}" if count[pair.name] > 1 and pair.split else pair.name
        grouped.append(replace(pair, group=group or "", name=name))
    if unmatched:
        raise UsageError(
            f"--group-by {expression!r} does not match {len(unmatched):,} of {len(pairs):,} names, for example "
            f"{unmatched[0]!r}. It is a regular expression and must match somewhere in each name."
        )
    return grouped


def _read_sources(
    sources: Sequence[FolderPair], root: Path, listed: Container[Path] | None = None
) -> list[tuple[list[Pair], list[Problem]]]:
    """The pairs of all sources; how many files an image without mask has is known from those with masks."""
    read = [match_source(source, root, listed) for source in sources]
    counts = {pair.channel_files for pairs, _ in read for pair in pairs if pair.mask}
    return [
        part if any(pair.mask for pair in part[0]) else match_source(source, root, listed, counts)
        for source, part in zip(sources, read, strict=True)
    ]


def _with_splits(pairs: list[Pair], fractions: Sequence[float], is_listed: bool) -> tuple[list[Pair], str]:
    """Decide the open splits by hash, carve val from train where only a test split was given, and say so in words.

    A list that calls everything train means it.
    """
    given = {pair.split for pair in pairs}
    if is_listed and given == {"train"}:
        return pairs, NO_VALIDATION
    if given <= {"", "train"}:
        words = ", split by hash"
    elif "train" in given and "val" not in given:
        fractions, words = VAL_OF_TRAIN, f", {VAL_OF_TRAIN[1]:.0%} of train is val by hash"
    else:  # images without mask, whose splits are those of masks, have none; they are fatal
        return [replace(pair, split=pair.split or "train") for pair in pairs], ""
    splits = assign_splits([pair.group for pair in pairs if pair.split in ("", "train")], fractions)
    return [replace(pair, split=splits[pair.group]) if pair.split in ("", "train") else pair for pair in pairs], words


def _no_masks(root: Path, layout: Layout) -> str:
    there = ", ".join(f"{name}/" for name in layout.masks)
    return (
        f"{root}: there are images, but no folder of masks beside it: of {there} none pairs with the images by name and "
        "holds labels. Say which with --masks NAME, or list the pairs in a CSV file with the columns image,mask."
        f"{describe_text_labels(root)}"
    )


def _nothing_pairs(root: Path, words: str, problems: Sequence[Problem]) -> str:
    reasons = " ".join(problem.message for problem in problems[:3])
    return (
        f"{root}: {words}: not one image has a mask. Names must match by stem; what cannot be renamed can be listed in a "
        f"CSV file with the columns image,mask. {reasons}{describe_text_labels(root) if root.is_dir() else ''}"
    )


def _no_images(root: Path, words: str, sources: list[FolderPair]) -> str:
    other = Counter(
        path.suffix.lower() or path.name
        for source in sources
        for path in source.images.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )
    found = ", ".join(f"{count:,} x {suffix}" for suffix, count in other.most_common(5)) or "no files"
    return f"{root}: {words} is there, but without images ({found}). Readable are {', '.join(SOURCE_SUFFIXES)}."
