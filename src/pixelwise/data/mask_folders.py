"""Which folder holds the masks: one whose files pair with the images and hold labels; of several the user chooses."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from pixelwise.data.folders import Layout
from pixelwise.data.image_files import has_images, relative
from pixelwise.data.labels import Value
from pixelwise.data.masks import mask_values, open_mask_of
from pixelwise.data.matching import ALL_MASKS, match_source
from pixelwise.data.names import MASK_DIRS
from pixelwise.data.pairs import Pair, Problem, counted, first_of
from pixelwise.data.scan import WHOLE_PX, MaskScan, in_threads, scan_mask
from pixelwise.errors import DataError, UsageError

_SAMPLES = 8  # masks of each folder that are looked at
_MAX_LABELS = 64  # different values in one mask that are clearly labels
_ALIKE = 0.8  # intersection over union of what is not 0 in two masks from which on they show the same region
_NO_CLASSES = re.compile(r"instance|object|visuali[sz]|overlay|preview|colou?r|panoptic|depth|weight", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    name: str
    images: int
    pairs: tuple[Pair, ...]  # those with a mask
    scans: tuple[MaskScan | None, ...] = ()  # of some of them; None for a file that cannot be read as a mask

    @property
    def holds_labels(self) -> bool:
        """Whether its files are masks; rims of soft masks are no labels, but belong to masks if the folder says so."""
        if not self.scans or None in self.scans:
            return False
        is_clear = all(scan and len(scan.counts) <= _MAX_LABELS for scan in self.scans)
        is_soft = is_usual(self.name) and all(scan and scan.kind == "index" for scan in self.scans)
        return is_clear or is_soft

    @property
    def counts(self) -> list[Mapping[Value, int]]:
        return [scan.counts for scan in self.scans if scan]


def is_usual(name: str) -> bool:
    """Whether folders of masks are usually called so."""
    return name.casefold() in MASK_DIRS


def choose_masks(layout: Layout, root: Path, wanted: str | None) -> tuple[str, str] | None:
    """The name of the folder of masks, with the ending of their names if it was asked for; None if no folder can be one.

    Raises:
        UsageError: nothing has the `wanted` name or ending.
        DataError: several folders hold labels of these images; it lists them, with a proposal.
    """
    if wanted is None:
        found = _find_folder(layout, root)
        return (found, "") if found else None
    return _named(layout, root, wanted, "--masks")


def add_regions(
    pairs: Sequence[Pair], layout: Layout, root: Path, wanted: str, masks: tuple[str, str]
) -> tuple[list[Pair], list[Problem], str]:
    """The pairs with the masks of what counts in the folder, or with the ending, that is `wanted`; its name in words.

    Images that have none are a problem.

    Raises:
        UsageError: nothing has this name, or it is that of the masks.
    """
    name, ending = _named(layout, root, wanted, "--region")
    if (name, ending) == masks:
        raise UsageError(
            f"--region {wanted}: these are the masks. Name the folder of what counts, such as a field of view."
        )
    shown = f"*{ending}" if ending else f"{name}/"
    regions = {pair.image: pair.mask for pair in _pairs(layout, name, root, ending)}
    found = [replace(pair, region=regions.get(pair.image)) for pair in pairs]
    return found, _missing_regions(found, root, shown), f", inside of {shown}"


def _missing_regions(pairs: Sequence[Pair], root: Path, where: str) -> list[Problem]:
    """A fatal problem if images with a mask have no region `where` it is said."""
    lonely = tuple(relative(pair.image, root) for pair in pairs if pair.mask and not pair.region)
    if not lonely:
        return []
    count = counted(len(lonely), "image", "has", "have")
    what = f"{count} no mask of what counts in {where}: {first_of(lonely, 5)}. Add it, or leave --region out."
    return [Problem("fatal", what, lonely)]


def propose_region(layout: Layout, masks: str, root: Path) -> list[Problem]:
    """A warning that names a folder, beside those `masks` that were chosen, which marks a field of view."""
    others = [name for name in layout.masks if name != masks and not _NO_CLASSES.search(name)]
    for found in (_scanned(_candidate(layout, name, root)) for name in others):
        if found.holds_labels and all(0 in counts for counts in found.counts) and _is_one_region(found):
            what = f"{found.name}/ marks much the same region in every image, as a field of view is"
            advice = f"--region {found.name} counts only the pixels inside of it."
            return [Problem("warning", f"{what}, and is not used; {advice}")]
    return []


def _named(layout: Layout, root: Path, wanted: str, option: str) -> tuple[str, str]:
    """The name of a folder of masks, and the ending of the names of its files if that is what was `wanted`."""
    wanted = wanted.strip("/")
    if folder := next((name for name in layout.masks if name.casefold() == wanted.casefold()), None):
        return folder, ""
    name, _, last = wanted.rpartition("/")
    if last == ALL_MASKS and option == "--masks":
        folder = next((other for other in layout.masks if other.casefold() == name.casefold()), None)
        folder = folder or (_find_folder(layout, root) if not name else None)
        if folder:
            return folder, ALL_MASKS
    by_ending = [name for name in layout.masks if _pairs(layout, name, root, wanted)] if wanted else []
    if len(by_ending) != 1:
        there = ", ".join(layout.masks) or "none"
        joined = f", nor {ALL_MASKS!r} (all masks of an image joined)" * (option == "--masks")
        raise UsageError(
            f"{option} {wanted!r}: it is neither a folder beside the images (there are: {there}) nor how the names of masks "
            f"in one of these folders end{joined}."
        )
    return by_ending[0], wanted


def _find_folder(layout: Layout, root: Path) -> str | None:
    if len(layout.masks) == 1 and is_usual(next(iter(layout.masks))):
        return next(iter(layout.masks))
    usual = sorted(filter(is_usual, layout.masks), key=lambda name: MASK_DIRS.index(name.casefold()))
    paired = [found for name in layout.masks if (found := _candidate(layout, name, root)).pairs]
    if len(paired) == 1 and is_usual(paired[0].name):
        return paired[0].name
    if not paired:
        return usual[0] if usual else None
    scanned = [_scanned(candidate) for candidate in paired]
    labels = [candidate for candidate in scanned if candidate.holds_labels]
    by_name = [candidate for candidate in labels if not _NO_CLASSES.search(candidate.name)]
    labels = _without_copies(sorted(by_name or labels, key=_rank))
    if len(labels) > 1:
        raise DataError(_question(root, labels))
    if labels:
        return labels[0].name
    return next((candidate.name for candidate in sorted(paired, key=_rank) if is_usual(candidate.name)), None)


def is_doubtful(layout: Layout, name: str, root: Path) -> bool:
    """Whether the masks of a folder may be a field of view: one region, with other folders of images beside."""
    others = [other for other in layout.masks if other != name and not _NO_CLASSES.search(other)]
    has_others = any(has_images(path) for other in others for path in layout.masks[other] if path)
    return has_others and _is_one_region(_scanned(_candidate(layout, name, root)))


def _candidate(layout: Layout, name: str, root: Path) -> _Candidate:
    pairs = _pairs(layout, name, root)
    return _Candidate(name=name, images=len(pairs), pairs=tuple(pair for pair in pairs if pair.mask))


def _pairs(layout: Layout, name: str, root: Path, ending: str = "") -> list[Pair]:
    """The images, with the masks of a folder; with an `ending` only those that have a mask with it."""
    pairs = [pair for source in layout.sources(name, ending) for pair in match_source(source, root)[0]]
    return [pair for pair in pairs if pair.mask] if ending else pairs


def _scanned(candidate: _Candidate) -> _Candidate:
    step = -(-len(candidate.pairs) // _SAMPLES)
    sampled = candidate.pairs[:: max(step, 1)]
    scans = tuple(in_threads(_scan_or_none, sampled))
    return _Candidate(name=candidate.name, images=candidate.images, pairs=candidate.pairs, scans=scans)


def _scan_or_none(pair: Pair) -> MaskScan | None:
    try:
        return scan_mask(pair)
    except DataError:
        return None


def _rank(candidate: _Candidate) -> tuple[bool, int, str]:
    """The most likely first: no region that is the same in every image, then by how usual the name is."""
    name = candidate.name.casefold()
    return _is_one_region(candidate), MASK_DIRS.index(name) if name in MASK_DIRS else len(MASK_DIRS), name


def _without_copies(candidates: list[_Candidate]) -> list[_Candidate]:
    """Without folders that hold the labels of another one, in another format."""
    kept: list[_Candidate] = []
    for candidate in candidates:
        if not any(candidate.counts == other.counts and candidate.images == other.images for other in kept):
            kept.append(candidate)
    return kept


def _is_one_region(candidate: _Candidate) -> bool:
    """Whether all its masks mark much the same place, as the field of view of a camera does."""
    masks = [_marked(pair) for pair in candidate.pairs[:4]]
    if len(masks) < 3 or any(len(counts) > 2 for counts in candidate.counts):
        return False
    return all(
        one is not None
        and other is not None
        and one.shape == other.shape
        and (one & other).sum() > _ALIKE * max((one | other).sum(), 1)
        for one, other in pairwise(masks)
    )


def _marked(pair: Pair) -> np.ndarray | None:
    """Where the first plane of a mask is not 0, (H, W); None for one that is large or cannot be read."""
    try:
        with open_mask_of(pair) as source:
            height, width = source.info.height, source.info.width
            if height * width > WHOLE_PX:
                return None
            values = mask_values(source.read(0, 0, height, width, 0))
            return np.asarray(values.reshape(height, width, -1).any(axis=2))
    except DataError:
        return None


def _question(root: Path, candidates: Sequence[_Candidate]) -> str:
    lines = []
    for candidate in candidates:
        found: Counter[Value] = Counter()
        for counts in candidate.counts:
            found.update(counts)
        total = sum(found.values())
        shares = ", ".join(f"{value} ({count / total:.1%})" for value, count in found.most_common(5))
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        region = "; much the same region in every image, as a field of view is" if _is_one_region(candidate) else ""
        lines.append(
            f"- {candidate.name}/: masks for {len(candidate.pairs):,} of {candidate.images:,} images, values "
            f"{shares}{more}{region}"
        )
    proposed, regions = candidates[0], [found.name for found in candidates[1:] if _is_one_region(found)]
    advice = f"--masks {proposed.name}"
    if len(regions) == 1 and not _is_one_region(proposed):
        advice += f" --region {regions[0]}, which counts only the pixels inside of {regions[0]}/"
    return (
        f"{root}: several folders hold masks of these images. Say which with --masks NAME; proposed is {advice}.\n"
        + "\n".join(lines)
    )
