"""What a data folder is, once its layout was recognised: pairs of image and mask, classes, and problems."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pixelwise.data.labels import LabelSpec

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and the mask that labels it.

    Attributes:
        image: the image file.
        mask: the mask file, or None where there is none.
        split: "train", "val" or "test".
        group: what must not be divided between splits, for example the patient; the name, if nothing was asked for.
        name: unique inside the folder: the path below the folder of images, without suffix.
    """

    image: Path
    mask: Path | None
    split: str
    group: str
    name: str


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data; "fatal" ones must be mended before training."""

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
        group_by: the regular expression of the groups that must not be divided, or None.
    """

    root: Path
    layout: str
    pairs: tuple[Pair, ...]
    labels: LabelSpec
    problems: tuple[Problem, ...] = ()
    group_by: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have images, in the order train, val, test."""
        found = {pair.split for pair in self.pairs}
        return tuple(name for name in SPLITS if name in found)

    def split(self, name: str) -> tuple[Pair, ...]:
        """The pairs of one split, by name; empty if there are none."""
        return tuple(pair for pair in self.pairs if pair.split == name)
