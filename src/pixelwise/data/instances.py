"""Masks whose numbers count objects (cells, nuclei) and mean no classes: how they are told from masks of many classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixelwise.data.classes import MAX_VALUES, VOID_BY_CUSTOM, propose_labels
from pixelwise.data.labels import LabelSpec
from pixelwise.data.masks import mask_values, open_mask_of
from pixelwise.data.pairs import Pair
from pixelwise.data.scan import WHOLE_PX, MaskScan
from pixelwise.errors import DataError

_FEW = 3  # fewer numbers are classes, for all that can be seen
_SURE = 6  # from so many numbers on it is asked, below it is told
_MANY = 30  # one mask alone tells nothing unless it counts to so many
_MOST = 0.9
_LOOKS = 8  # masks in which the regions are counted
_WHOLE = 0.95  # of the pixels of an object lie in one region; strays are forgiven


@dataclass(frozen=True)
class Instances:
    """Numbers that seem to count objects."""

    largest: int
    numbers: int  # how many different ones there are
    is_anew: bool  # whether each mask counts from 1

    @property
    def is_sure(self) -> bool:
        """Whether there are too many for classes."""
        return self.numbers >= _SURE

    def labels(self, ignore: Sequence[int]) -> LabelSpec:
        """Background, and one class for all numbers."""
        values = tuple(value for value in range(1, MAX_VALUES) if value not in ignore)
        two = propose_labels({0: 1, 1: 1})
        return LabelSpec(names=two.names, colors=two.colors, values=((0,), values), ignore_values=tuple(ignore))

    def question(self, answer: str) -> str:
        """What to ask the author of the masks; `answer` says how the proposal is taken."""
        where = "counts from 1 anew in each mask" if self.is_anew else "hardly ever returns in another mask"
        message = (
            f"the masks number objects, it seems, and no classes: each number (1 to {self.largest:,}) is one connected "
            f"region and {where}. "
        )
        if not self.is_sure:
            return f"{message}If so, merge them in a classes.yaml: {{name: foreground, values: 1-65535}}."
        return f"{message}Proposed is one class of all of them; {answer}. If they are classes, list them in a classes.yaml."


def find_instances(masks: Sequence[tuple[Pair, MaskScan]], ignore: Sequence[int]) -> Instances | None:
    """What the numbers of masks count, or None if they may be classes.

    Objects are counted anew in each mask, 1 to n with another n, or go on from mask to mask; classes return in many masks,
    with gaps, and in several regions.
    """
    held = [(pair, values) for pair, scan in masks if (values := _numbers(scan, ignore))]
    everything = {value for _, values in held for value in values}
    has_background = 0 not in ignore and any(0 in scan.counts for _, scan in masks)
    if len(everything) < _FEW or min(everything) < 1 or not has_background:
        return None
    dense = sum(len(values) >= _MOST * max(values) for _, values in held) >= _MOST * len(held)
    counts = {len(values) for _, values in held}
    is_anew = dense and (len(counts) >= min(3, len(held)) if len(held) > 1 else len(everything) >= _MANY)
    is_once = len(everything) >= _MOST * sum(len(values) for _, values in held)
    goes_on = len(held) > 1 and len(everything) >= _SURE and is_once
    if not (is_anew or goes_on):
        return None
    looks = held[:: -(-len(held) // _LOOKS)]
    whole = [part for pair, values in looks for part in _wholes(pair, values)]
    if not whole or sum(whole) < _MOST * len(whole):
        return None
    return Instances(max(everything), len(everything), is_anew)


def _numbers(scan: MaskScan, ignore: Sequence[int]) -> set[int]:
    """The numbers of a mask without background and void."""
    found = {value for value in scan.counts if isinstance(value, int) and value and value not in ignore}
    return {value for value in found if value not in VOID_BY_CUSTOM or value - 1 in found}


def _wholes(pair: Pair, values: set[int]) -> list[bool]:
    """For each number of a mask, whether its pixels are one connected region; nothing for a mask that is too large."""
    try:
        with open_mask_of(pair) as source:
            info = source.info
            if info.height * info.width * info.planes > WHOLE_PX:
                return []
            planes = [mask_values(source.read(0, 0, info.height, info.width, plane)) for plane in range(info.planes)]
    except DataError:
        return []
    stack = np.stack([plane if plane.ndim == 2 else plane[:, :, 0] for plane in planes])  # greys
    keys, inverse = np.unique(stack, return_inverse=True)
    numbers = np.where(np.isin(keys, list(values)), np.arange(1, len(keys) + 1), 0)[inverse].reshape(stack.shape)
    from scipy import ndimage  # slow to import, and few masks look like this

    boxes = enumerate(ndimage.find_objects(numbers), start=1)
    found = []
    for number, box in boxes:
        if box is not None:
            there = numbers[box] == number
            regions, count = ndimage.label(there, structure=np.ones((3, 3, 3)))
            found.append(count == 1 or bool(np.bincount(regions.ravel())[1:].max() >= _WHOLE * there.sum()))
    return found
