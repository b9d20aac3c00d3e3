"""Masks whose classes have soft rims: drawn with antialiasing, resized with interpolation, or saved as JPEG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import median
from typing import Literal, TypeVar

from pixelwise.data.classes import propose_labels
from pixelwise.data.labels import Color, LabelSpec, Value, as_ranges, distinct_colors, value_name
from pixelwise.data.pairs import first_of

_NEAREST = 1 / 16  # of the span of values: closer to a peak, a value is the peak's own noise
_GAP = 1 / 8  # of the span: closer classes are numbered, not painted
_SOLID = 0.1  # of the pixels of a class, at least so many have only equal neighbours; of a rim hardly any
_RARE = 1e-3
_MOST_BETWEEN = 0.5  # of all pixels
_NOISE_COLOR, _MAX_COLORS = 24, 20_000
_CLEAR = 8  # times the pixels of a usual value between: so many has the end of a scale that is a class
_MANY = 32  # values beside the peaks, most of which fill no area: numbered classes would
_NOISE = 0.02  # of the pixels of a class: more than these beside it, in areas, are another class

K = TypeVar("K", int, Color)


@dataclass(frozen=True)
class Soft:
    """What the values of soft masks are taken to mean."""

    peaks: tuple[Value, ...]  # the values that fill areas, ascending
    ranges: tuple[tuple[Value, ...], ...]  # for each of them the values that mean it
    rest: tuple[Value, ...]  # values between the ranges; none, if there are two, which share all
    values: int  # how many different ones are found
    share: float  # of the pixels, that have no value of a peak


def find_soft(counts: Mapping[int, int], solid: Mapping[int, int], is_lossy: bool = False) -> Soft | None:
    """The classes of masks with soft rims, or None if the masks have none, or nobody could say where the classes are.

    A class fills areas, and classes that are painted (0, 128, 255) lie far apart. The values of a rim lie between them and
    fill none. Numbered classes (0, 1, 2, ...) lie closely together, and a value beyond them all (void, 255) is no rim.

    Args:
        counts: pixels per value, over all masks.
        solid: how many of these have only equal neighbours.
        is_lossy: whether the masks are JPEG, where values beside the peaks need no further proof.

    Example:
        >>> find_soft({0: 900, 60: 20, 128: 20, 200: 20, 255: 500}, {0: 800, 255: 400}).peaks
        (0, 255)
        >>> find_soft({0: 900, 1: 20, 2: 20, 255: 500}, {0: 800, 255: 400}) is None
        True
    """
    low, high = min(counts, default=0), max(counts, default=0)
    span, total = high - low, sum(counts.values())
    if low < 0 or span < 32:
        return None
    peaks = _peaks(counts, solid, (low, high), total)
    gaps = [after - before for before, after in pairwise(peaks)]
    others = [value for value in counts if value not in peaks]
    share = sum(counts[value] for value in others) / max(1, total)
    if not gaps or min(gaps) < span * _GAP or not 0 < share < _MOST_BETWEEN:
        return None
    if len(peaks) > 2 and len(others) < len(peaks):
        return None  # a rim between painted classes takes more values; these are rare or thin classes
    rims = [value for value in others if solid.get(value, 0) <= _SOLID * counts[value]]
    is_noisy = is_lossy or (len(others) > _MANY and len(rims) > 0.75 * len(others))
    for value in others if not is_noisy else ():
        near = min(peaks, key=lambda peak: abs(peak - value))
        if counts[value] > _NOISE * counts[near] and value not in rims:
            return None
    middle = [value for value in others if any(a + (b - a) / 4 <= value <= b - (b - a) / 4 for a, b in pairwise(peaks))]
    if not middle and not is_lossy:
        return None
    ranges, rest = _ranges(peaks, (min(low, 0), max(high, 255)))
    return Soft(tuple(peaks), ranges, rest, len(counts), share)


def find_soft_colors(counts: Mapping[Color, int], solid: Mapping[Color, int]) -> Soft | None:
    """As `find_soft`, of masks of colours: those found that are nearest to a colour that fills areas belong to it.

    Example:
        >>> black, rim, red = (0, 0, 0), (110, 0, 0), (220, 0, 0)
        >>> find_soft_colors({black: 900, rim: 20, red: 500}, {black: 800, red: 400}).peaks
        ((0, 0, 0), (220, 0, 0))
    """
    total = sum(counts.values())
    peaks: list[Color] = []
    for color in sorted(_filling(counts, solid, total), key=lambda color: (-counts[color], color)):
        if all(math.dist(color, peak) > _NOISE_COLOR for peak in peaks):
            peaks.append(color)
    others = [color for color in counts if color not in peaks]
    if len(peaks) < 2 or len(others) > _MAX_COLORS:
        return None
    nearest = {color: min(sorted(peaks), key=lambda peak: math.dist(peak, color)) for color in counts}
    for color in others:
        if counts[color] > _NOISE * counts[nearest[color]] and solid.get(color, 0) > _SOLID * counts[color]:
            return None
    pairs = list(combinations(peaks, 2))
    if not any(_lies_between(color, *pair) for color in others for pair in pairs):
        return None
    most = min(math.dist(*pair) for pair in pairs) / 4 if len(peaks) > 2 else math.inf
    rest = {color for color in others if math.dist(color, nearest[color]) > most}
    kept = sorted(color for color in others if color not in rest)
    ranges = tuple((peak, *(color for color in kept if nearest[color] == peak)) for peak in sorted(peaks))
    share = sum(counts[color] for color in others) / total
    return Soft(tuple(sorted(peaks)), ranges, tuple(sorted(rest)), len(counts), share)


def soft_labels(soft: Soft, ignore: Sequence[Value] = ()) -> LabelSpec:
    """The classes, without the values that the user calls void."""
    two = propose_labels({0: 1, 1: 1})
    names = tuple(f"class {value_name(peak)}" for peak in soft.peaks)
    colors = tuple(peak for peak in soft.peaks if isinstance(peak, tuple))
    kind: Literal["index", "rgb"] = "rgb" if colors else "index"
    if len(soft.peaks) == 2:
        names, colors = two.names, colors or two.colors
    values = tuple(tuple(value for value in there if value not in ignore) for there in soft.ranges)
    void = tuple(dict.fromkeys((*ignore, *soft.rest)))
    colors = colors or distinct_colors(len(names))
    return LabelSpec(names=names, colors=colors, values=values, ignore_values=void, kind=kind)


def soft_question(soft: Soft, answer: str) -> str:
    """What to ask the author of the masks; `answer` says how the proposal is taken."""
    peaks = first_of([value_name(peak) for peak in soft.peaks], 8, " and " if len(soft.peaks) == 2 else ", ")
    shown = "with the values " + "; ".join(", ".join(map(str, as_ranges(there))) for there in soft.ranges)
    if isinstance(soft.peaks[0], tuple):
        shown = "with the colours that are nearest to them"
    rest = " (all else void)" if soft.rest else ""
    return (
        f"the masks hold {soft.values:,} values, but only {peaks} fill areas; {soft.share:.1%} of the pixels lie between, "
        f"as antialiasing, resizing or JPEG leaves them: no classes. Proposed are {len(soft.peaks)} classes {shown}{rest}; "
        f"{answer}. Or save the masks again without interpolation."
    )


def _lies_between(color: Color, one: Color, other: Color) -> bool:
    """Whether a colour is a mixture of two others, of each a quarter at least."""
    along = [b - a for a, b in zip(one, other, strict=True)]
    share = sum(d * (c - a) for a, c, d in zip(one, color, along, strict=True)) / sum(d * d for d in along)
    mixed = [a + share * d for a, d in zip(one, along, strict=True)]
    return 0.25 <= share <= 0.75 and math.dist(mixed, color) < _NOISE_COLOR


def _filling(counts: Mapping[K, int], solid: Mapping[K, int], total: int) -> list[K]:
    """Values that fill areas."""
    return [value for value in counts if counts[value] > _RARE * total and solid.get(value, 0) > _SOLID * counts[value]]


def _peaks(counts: Mapping[int, int], solid: Mapping[int, int], ends: tuple[int, int], total: int) -> list[int]:
    """Values that fill areas, and ends of the scale that stand out, none of them in the noise of a more frequent one."""
    filling = sorted(_filling(counts, solid, total), key=lambda value: -counts[value])
    usual = median([counts[value] for value in counts if value not in filling] or [0])
    peaks: list[int] = []
    for value in [*filling, *(end for end in ends if counts[end] > _CLEAR * usual or len(filling) < 2)]:
        if all(abs(value - peak) > (ends[1] - ends[0]) * _NEAREST for peak in peaks):
            peaks.append(value)
    return sorted(peaks)


def _ranges(peaks: Sequence[int], ends: tuple[int, int]) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Of two peaks, all up to the middle and all above; of more, what is near each: rims pass through other classes."""
    if len(peaks) == 2:
        middle = sum(peaks) // 2
        return (tuple(range(ends[0], middle + 1)), tuple(range(middle + 1, ends[1] + 1))), ()
    ranges = []
    for index, peak in enumerate(peaks):
        low = ends[0] if index == 0 else peak - (peak - peaks[index - 1]) // 4
        high = ends[1] if index == len(peaks) - 1 else peak + (peaks[index + 1] - peak) // 4
        ranges.append(tuple(range(low, high + 1)))
    known = {value for there in ranges for value in there}
    return tuple(ranges), tuple(value for value in range(ends[0], ends[1] + 1) if value not in known)
