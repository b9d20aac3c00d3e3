"""Groups that names show: pictures of one case, patient or film, copies of one picture. They belong in one split."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from pixelwise.data.pairs import DataFolder, Problem
from pixelwise.errors import UsageError, brief

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
_MOST_LETTERS = 1000
_MATCHING_S = 20.0
_MATCHING = """
import json, re, sys
expression, names = json.load(sys.stdin)
pattern = re.compile(expression)
found = map(pattern.search, names)
json.dump([match and match[1 if pattern.groups else 0] for match in found], sys.stdout)
"""


def check_expression(expression: str | None) -> None:
    """Raise `UsageError` if the text of `--group-by` is no regular expression."""
    try:
        if expression is not None:
            if len(expression) > _MOST_LETTERS:
                raise UsageError(f"--group-by has {len(expression):,} characters; at most {_MOST_LETTERS:,} are read.")
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--group-by {brief(expression)} is not a regular expression: {error}.") from error


def match_groups(expression: str, names: Sequence[str]) -> list[str | None]:
    """What the group 1 of a regular expression, or all of it, is in each name; None where it does not match.

    Some expressions, `(a+)+$` for example, take for ever, and nothing stops Python's `re`; it may come with the network of
    a stranger. So a process of its own does it, which is ended after a while.

    Example:
        >>> match_groups("case([0-9])", ["case1_2", "case2_2", "other"])
        ['1', '2', None]
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHING],
            input=json.dumps([expression, names]).encode(),
            capture_output=True,
            timeout=_MATCHING_S,
            check=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        is_late = isinstance(error, subprocess.TimeoutExpired)
        why = (
            f"takes more than {_MATCHING_S:g} s for {len(names):,} names"
            if is_late
            else f"cannot be matched ({type(error).__name__})"
        )
        raise UsageError(
            f"--group-by {brief(expression)} {why}. Write it with fewer repetitions inside repetitions, such as "
            "'([^_]+)_'. A network remembers the one of its training; --group-by gives another."
        ) from error
    found: list[str | None] = json.loads(done.stdout)
    return found


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
        # An expression that begins with .+ or .* matches at the start of a name or nowhere; trying on takes minutes.
        search = pattern.match if expression.startswith("(.") else pattern.search
        matches = [search(name) for name in names]
        groups = [match[1] for match in matches if match]
        count = Counter(groups)
        if len(groups) < len(names) or len(count) < _FEWEST or len(names) < mean * len(count):
            continue
        if len(count) < len(names) and not all(_YEAR.fullmatch(group) for group in count):
            return expression, what, groups
    return None
