"""Groups that names show: pictures of one case, patient or film, copies of one picture. They belong in one split."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from pixelwise.data.pairs import DataFolder, Problem

_PATTERNS = (
    (r"(.+)\.rf\.", "copies of one picture by Roboflow", 1.0),
    (
        r"(?i)((?:case|patient|pat|subject|sub|study|drive|video|scene|seq|slide|vol)[_\- ]?\d+)",
        "a case",
        1.5,
    ),
    (r"(.*\d.*?)[_\-. ](?:frame|slice|tile|patch|im|img|f|z|t)?[_\-. ]?\d+$", "a case", 1.5),
    (r"(.*\d.*)/", "a folder", 1.5),
)
"""Expressions, what their groups are, and the mean size from which on they are groups. The first that fits is proposed."""

_YEAR = re.compile(r"(?:19|20)\d\d")
_FEWEST = 3  # groups


def propose_groups(folder: DataFolder) -> Iterator[Problem]:
    """A warning where names show groups that nobody asked for, unless the splits that were given leave them whole."""
    found = None if folder.group_by is not None else find_groups([pair.group for pair in folder.pairs])
    if found is None:
        return
    expression, what, groups = found
    splits: dict[str, set[str]] = defaultdict(set)
    for pair, group in zip(folder.pairs, groups, strict=True):
        splits[group].add(pair.split)
    divided = [group for group, there in splits.items() if len(there) > 1]
    is_by_hash = folder.layout.endswith("by hash")
    if not divided and not is_by_hash:
        return
    words = f"the names look like {len(splits):,} groups, each of {what} (such as {groups[0]!r})"
    effect = (
        f"{len(divided):,} of them in several splits, which flatters the scores" if divided else "none is divided yet"
    )
    advice = f"keep them together with --group-by '{expression}'" if is_by_hash else "move each to one split"
    yield Problem("warning", f"{words}; {effect}. If they are, {advice}.")


def find_groups(names: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """The expression whose groups the names show, what its groups are, and the group of each name.

    Example:
        >>> find_groups([f"7_{case}/slice_{number}" for case in range(3) for number in range(4)])[2][:2]
        ['7_0/slice', '7_0/slice']
    """
    for expression, what, mean in _PATTERNS:
        pattern = re.compile(expression)
        matches = [pattern.search(name) for name in names]
        groups = [match[1] for match in matches if match]
        count = Counter(groups)
        if len(groups) < len(names) or len(count) < _FEWEST or len(names) < mean * len(count):
            continue
        if len(count) < len(names) and not all(_YEAR.fullmatch(group) for group in count):
            return expression, what, groups
    return None
