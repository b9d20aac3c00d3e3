"""What a data folder is, once its layout was recognised: pairs of image and mask, classes, and problems."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import UsageError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and the mask that labels it."""

    image: Path  # the image file
    mask: Path | None  # the mask file, or None where there is none
    split: str  # "train", "val" or "test"; "" until it is decided
    name: str  # unique inside the folder: the path below the folder of images, without suffix
    group: str = (
        ""  # what must not be divided between splits, for example the patient; the name, if nothing was asked for
    )
    channel_files: int = 1  # of so many files the image is the first: case_0000.png, case_0001.png
    plane: int | None = None  # the one plane of a volume that is meant; None means all of the file
    more_masks: tuple[Path, ...] = ()  # joined with `mask`: a pixel means what any of them marks it with
    region: Path | None = None  # a mask that is not 0 where pixels count; None means everywhere


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data; "fatal" ones must be fixed before training."""

    severity: Literal["fatal", "warning"]
    message: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataFolder:
    """A folder whose layout was recognised.

    Attributes:
        root: the folder, or the CSV file.
        layout: what was recognised, in words.
        pairs: by split, then by name.
        labels: from `classes.yaml`, or proposed from the masks.
        problems: what matching the names showed; `inspect_data` looks into the files.
        group_by: the regular expression, or the column of a CSV file, of the groups that must not be divided, or None.
        masks: the folder of masks that was asked for by name, or None.
        region: the folder, or the column of a CSV file, of masks of what counts, or None.
    """

    root: Path
    layout: str
    pairs: tuple[Pair, ...]
    labels: LabelSpec
    problems: tuple[Problem, ...] = ()
    group_by: str | None = None
    masks: str | None = None
    region: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have images, in the order train, val, test."""
        found = {pair.split for pair in self.pairs}
        return tuple(name for name in SPLITS if name in found)

    @property
    def reading(self) -> dict[str, int]:
        """How its images are opened, as the layout shows: from how many files each."""
        files = max((pair.channel_files for pair in self.pairs), default=1)
        return {"channel_files": files} if files > 1 else {}

    @property
    def choices(self) -> dict[str, str | None]:
        """What was asked for by name, which a run remembers: the keywords of `open_data`."""
        return {"group_by": self.group_by, "masks": self.masks, "region": self.region}

    def split(self, name: str) -> tuple[Pair, ...]:
        """The pairs of one split, by name; empty if there are none."""
        return tuple(pair for pair in self.pairs if pair.split == name)


SPLIT_ALIASES = {
    "train": "train", "training": "train", "trn": "train", "tr": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "development": "val",
    "test": "test", "testing": "test", "tst": "test", "ts": "test",
    "holdout": "test", "hold_out": "test", "hold-out": "test",
}  # fmt: skip
_SPLIT_ENDING = re.compile(r"[_\-. ]?(?:set|split)?[_\-. ]?(?:(?:19|20)\d\d)?$")  # trainset, train2017, val_2012
_LIST_WORDS = (
    "list",
    "lists",
    "ids",
    "id",
    "names",
    "files",
    "filenames",
    "images",
    "imgs",
    "index",
    "split",
    "set",
    "paths",
)
NO_VALIDATION = ", all of it train"
"""How the words of a layout end where a list says that all images are for training."""

VAL_OF_TRAIN = (0.85, 0.15, 0.0)
"""How a training split is divided where a test split was given but no validation split."""


def split_of(name: str) -> str:
    """The split that a folder, a list or a cell means by its name, "" if none: "train2017" and "Training" mean train."""
    name = name.strip().casefold()
    return SPLIT_ALIASES.get(name) or SPLIT_ALIASES.get(_SPLIT_ENDING.sub("", name), "")


def split_of_list(stem: str) -> str:
    """The split that a list means by its name, "" if none: "train_list" and "ids-val" as well as "train"."""
    words = [word for word in re.split(r"[_\-. ]+", stem.casefold()) if word not in _LIST_WORDS]
    return split_of(stem) or (split_of(words[0]) if len(words) == 1 else "")


def composed(text: str) -> str:
    """The composed Unicode form (NFC): one name, whether a Mac or another system wrote it."""
    return unicodedata.normalize("NFC", text)


def assign_splits(groups: Iterable[str], fractions: Sequence[float]) -> dict[str, str]:
    """The split of each group, by the hash of its name.

    With so few groups that a wanted split would stay empty, the groups nearest to it by hash are moved there.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] <= 0:
        raise UsageError(
            f"the fractions of train, val and test are {tuple(fractions)}. They must be three numbers that are not "
            "negative and add up to 1, with some training data."
        )
    digests = {group: hashlib.sha256(composed(group).encode("utf-8", "surrogateescape")).digest() for group in groups}
    position = {group: int.from_bytes(digest[:7], "big") / 2**56 for group, digest in digests.items()}
    ordered = sorted(position, key=lambda group: (position[group], group))
    borders = (fractions[0], fractions[0] + fractions[1])
    splits = {group: SPLITS[sum(position[group] >= border for border in borders)] for group in ordered}
    wanted = [name for name, share in zip(SPLITS, fractions, strict=True) if share > 0]
    needed = wanted[: len(ordered)]
    for name in needed:
        if name not in splits.values():
            count = Counter(splits.values())
            spare = [group for group in ordered if splits[group] not in needed or count[splits[group]] > 1]
            splits[spare[0 if name == "train" else -1]] = name
    return splits


def counted(number: int, noun: str, verb: str, verbs: str) -> str:
    """ "1 image has", "2,000 images have"."""
    return f"1 {noun} {verb}" if number == 1 else f"{number:,} {noun}s {verbs}"


def first_of(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first few, and how many more there are."""
    rest = len(texts) - most
    return separator.join(texts[:most]) + (f" and {rest:,} more" if rest > 0 else "")
