"""From a folder to pairs of image and mask: the layout is recognised by looking."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pixelwise.data.labels import LabelSpec
from pixelwise.data.matching import Source, find_csv, match_source, read_csv
from pixelwise.data.pairs import (
    SPLIT_ALIASES,
    SPLITS,
    VAL_OF_TRAIN,
    DataFolder,
    Pair,
    Problem,
    assign_splits,
    compile_group_by,
)
from pixelwise.data.proposals import find_labels
from pixelwise.errors import DataError, UsageError
from pixelwise.formats import SOURCE_SUFFIXES

__all__ = ["SPLITS", "DataFolder", "Pair", "Problem", "open_data"]

_IMAGE_DIRS = ("images", "image", "imgs", "img", "leftimg8bit", "jpegimages")
_MASK_DIRS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "annot", "gtfine", "gt", "ground_truth",
    "groundtruth", "segmentationclass", "segmentations", "targets",
)  # fmt: skip
_ANNOT_ENDINGS = ("annot", "_annot", "_labels", "labels", "_masks", "_mask", "masks", "_gt")


def open_data(
    root: str | Path,
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (),
    group_by: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    labels: LabelSpec | None = None,
) -> DataFolder:
    """Recognise a data folder, pair its files, decide its splits and its classes.

    Understood are `images/` with `masks/`, with `train/ val/ test/` above or below them or without; SegNet's `train/
    trainannot/ …`; and a CSV file with the columns `image,mask[,split]`. Where no split is given, the hash of each
    group's name decides (`fractions`); where only train and test are, 15 % of train becomes val. A given test split
    never moves.

    Args:
        root: the folder, or the CSV file.
        classes: a `classes.yaml`; without it the one in `root`, else classes are proposed from the masks.
        ignore: mask values that mean void, besides those in `classes.yaml`.
        group_by: a regular expression on names; what its group 1 (or the whole match) is equal in, stays together.
        fractions: of train, val, test.
        labels: classes that are already known, for example a network's; `classes.yaml` is then not looked for.

    Returns:
        The pairs, by split and name. Images without masks and the like are listed in `problems`.

    Raises:
        DataError: no layout is recognised, nothing can be paired, or no classes can be found.
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
    pattern = compile_group_by(group_by)
    words, read, is_segnet = _recognise(root)
    problems = tuple(problem for _, found in read for problem in found)
    pairs, split_words = _with_splits(_grouped([pair for found, _ in read for pair in found], pattern), fractions)
    if not any(pair.mask for pair in pairs):
        reasons = " ".join(problem.message for problem in problems[:3])
        raise DataError(f"{root}: {words}: not one image has a mask. Names must match by stem. {reasons}")
    found, questions = find_labels(root, pairs, classes=classes, ignore=ignore, labels=labels, camvid=is_segnet)
    return DataFolder(
        root=root,
        layout=words + split_words,
        pairs=tuple(sorted(pairs, key=lambda pair: (SPLITS.index(pair.split), pair.name))),
        labels=found,
        problems=(*problems, *questions),
        group_by=group_by,
    )


def _recognise(root: Path) -> tuple[str, list[tuple[list[Pair], list[Problem]]], bool]:
    """The layout in words, the pairs and problems of each of its parts, and whether it is SegNet's."""
    if not root.exists():
        raise DataError(f"{root}: there is no such folder.")
    if lists := find_csv(root):
        return "CSV " + ", ".join(path.name for path in lists), [read_csv(path) for path in lists], False
    segnet = _segnet_sources(root)
    words, sources = segnet or _image_mask_sources(root) or _split_above_sources(root) or ("", [])
    if not sources:
        raise DataError(_not_recognised(root))
    read = [match_source(source, root) for source in sources]
    if not any(pairs for pairs, _ in read):
        raise DataError(_no_images(root, words, sources))
    return words, read, bool(segnet)


def _segnet_sources(root: Path) -> tuple[str, list[Source]] | None:
    """train/ + trainannot/ and so on, the images directly in train/."""
    folders = _folders(root)
    sources = []
    for name, split in SPLIT_ALIASES.items():
        if name in folders:
            masks = next((folders[name + end] for end in _ANNOT_ENDINGS if name + end in folders), None)
            sources.append(Source(split=split, images=folders[name], masks=masks))
    if not any(source.masks for source in sources):
        return None
    return " ".join(f"{path.name}/" for source in sources for path in (source.images, source.masks) if path), sources


def _image_mask_sources(root: Path) -> tuple[str, list[Source]] | None:
    """images/ + masks/, alone or with the splits below them."""
    images, masks = _images_and_masks(root)
    if images is None:
        return None
    if masks is None:
        looked = ", ".join(f"{name}/" for name in _MASK_DIRS[:6])
        raise DataError(f"{root}: there is {images.name}/, but no folder of masks beside it ({looked} …). Add it.")
    words = f"{images.name}/ + {masks.name}/"
    image_folders, mask_folders = _folders(images), _folders(masks)
    below = {SPLIT_ALIASES[name]: path for name, path in mask_folders.items() if name in SPLIT_ALIASES}
    sources = [
        Source(split=SPLIT_ALIASES[name], images=path, masks=below.get(SPLIT_ALIASES[name]))
        for name, path in image_folders.items()
        if name in SPLIT_ALIASES
    ]
    if not sources:
        return words, [Source(split="", images=images, masks=masks)]
    return f"{words} with {_split_names(sources)} below", sources


def _split_above_sources(root: Path) -> tuple[str, list[Source]] | None:
    """train/ val/ test/, each with images/ + masks/."""
    sources = []
    for name, folder in _folders(root).items():
        images, masks = _images_and_masks(folder)
        if name in SPLIT_ALIASES and images is not None:
            sources.append(Source(split=SPLIT_ALIASES[name], images=images, masks=masks))
    named = next(((source.images, source.masks) for source in sources if source.masks), None)
    if named is None or named[1] is None:
        return None
    return f"{_split_names(sources)} with {named[0].name}/ + {named[1].name}/ below", sources


def _images_and_masks(folder: Path) -> tuple[Path | None, Path | None]:
    folders = _folders(folder)
    images = next((folders[name] for name in _IMAGE_DIRS if name in folders), None)
    return images, next((folders[name] for name in _MASK_DIRS if name in folders), None)


def _folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder by lower-case name, splits in the order train, val, test."""
    if not folder.is_dir():
        return {}
    rank = {name: index for index, name in enumerate(SPLIT_ALIASES)}
    found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return dict(sorted(found.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))


def _split_names(sources: list[Source]) -> str:
    return " ".join(f"{source.split}/" for source in sources)


def _grouped(pairs: list[Pair], pattern: re.Pattern[str] | None) -> list[Pair]:
    """The pairs with their group; a name that is used twice gets its split."""
    count = Counter(pair.name for pair in pairs)
    grouped, unmatched = [], []
    for pair in pairs:
        found = pattern.search(pair.name) if pattern else None
        group = pair.name if pattern is None else found and found.group(1 if pattern.groups else 0)
        if group is None:
            unmatched.append(pair.name)
        name = f"{pair.split}/{pair.name}" if count[pair.name] > 1 and pair.split else pair.name
        grouped.append(replace(pair, group=group or "", name=name))
    if pattern and unmatched:
        raise UsageError(
            f"--group-by {pattern.pattern!r} does not match {len(unmatched):,} of {len(pairs):,} names, for example "
            f"{unmatched[0]!r}. It is a regular expression and must match somewhere in each name."
        )
    return grouped


def _with_splits(pairs: list[Pair], fractions: Sequence[float]) -> tuple[list[Pair], str]:
    """Decide the open splits by hash, carve val from train where only a test split was given, and say so in words."""
    given = {pair.split for pair in pairs}
    if given <= {"", "train"}:
        words = ", split by hash"
    elif "train" in given and "val" not in given:
        fractions, words = VAL_OF_TRAIN, f", {VAL_OF_TRAIN[1]:.0%} of train is val by hash"
    else:
        return pairs, ""
    splits = assign_splits([pair.group for pair in pairs if pair.split in ("", "train")], fractions)
    return [replace(pair, split=splits[pair.group]) if pair.split in ("", "train") else pair for pair in pairs], words


def _not_recognised(root: Path) -> str:
    there = ", ".join(sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())[:8])
    inner = [folder for folder in _folders(root).values() if _looks_right(folder)]
    hint = f" Perhaps {inner[0]} is meant." if inner else ""
    return (
        f"{root}: no layout is recognised; it holds {there or 'nothing'}. Wanted are images/ and masks/ (with train/ "
        "val/ test/ above or below them), SegNet's train/ and trainannot/ …, or a CSV file with the columns image,mask."
        f"{hint}"
    )


def _looks_right(folder: Path) -> bool:
    images, masks = _images_and_masks(folder)
    return bool(images and masks) or _segnet_sources(folder) is not None or _split_above_sources(folder) is not None


def _no_images(root: Path, words: str, sources: list[Source]) -> str:
    other = Counter(
        path.suffix.lower() or path.name
        for source in sources
        for path in source.images.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )
    found = ", ".join(f"{count:,} x {suffix}" for suffix, count in other.most_common(5)) or "no files"
    return f"{root}: {words} is there, but without images ({found}). Readable are {', '.join(SOURCE_SUFFIXES)}."
