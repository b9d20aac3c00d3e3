"""Formatting of numbers, shares, counts, durations and settings as text."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

DASH = "–"  # what stands where there is no value
MAX_DEPTH = 6
MAX_FACTS = 500
MAX_ITEMS = 50  # of one list
MAX_TEXT = 600  # characters of one setting

Facts = list[tuple[str, str]]


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, without the sign; a dash if it is undefined."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}"


def share(value: float | None) -> str:
    """A fraction in percent, with more digits where it is small, so that a rare class does not read as none."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    if value < 0.0001:
        return "<0.01"
    return percent(value, 1 if value >= 0.01 else 2)


def count(value: int | None) -> str:
    """A count, readable at a glance."""
    if value is None:
        return DASH
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if value >= size:
            return f"{value / size:,.1f} {word}"
    return f"{value:,}"


def plural(number: int, noun: str) -> str:
    """A count with its noun: "1 image", "2,000 images"."""
    return f"{count(number)} {noun}" if number == 1 else f"{count(number)} {noun}s"


def duration(seconds: float | None) -> str:
    """A time span in its two largest units."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    large, small = (f"{minutes} min", f"{rest} s") if minutes < 60 else (f"{minutes // 60:,} h", f"{minutes % 60} min")
    return large if small.startswith("0 ") else f"{large} {small}"


def setting(value: Any, depth: int = 0) -> str:
    """One value of a configuration as text of bounded length."""
    if value is None or value in ([], {}, ""):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping | list | tuple):
        text = "…" if depth > 2 else ", ".join(_items(value, depth + 1))
    elif isinstance(value, int):
        text = f"{value:,}" if abs(value) >= 10_000 else str(value)
    else:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def flatten(settings: Mapping[str, Any]) -> Facts:
    """Nested settings as pairs of a dotted key and a text; at most 500 of them."""
    return [(key, setting(value)) for key, value in islice(_walk(settings, "", 0), MAX_FACTS)]


def describe(settings: Mapping[str, Any], hidden: Sequence[str] = ()) -> Facts:
    """As `flatten`, with the keys as words and the units that they end in beside the values."""
    shown = {key: value for key, value in settings.items() if key not in hidden}
    return [_with_unit(key, value) for key, value in islice(_walk(shown, "", 0), MAX_FACTS)]


def _with_unit(key: str, value: Any) -> tuple[str, str]:
    """A dotted key as words without its unit, and the value with it."""
    words = key.replace("_", " ").replace(".", " ")
    stem, _, unit = words.rpartition(" ")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if unit == "px" and stem:
        return stem, f"{setting(value)} px"
    if unit in ("s", "seconds") and stem and is_number:
        return stem, duration(value) if value >= 1 else f"{value:.3g} s"
    if unit == "bytes" and stem and is_number:
        return stem, f"{value / 2**30:.1f} GiB"
    return words, setting(value)


def _walk(settings: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value and depth < MAX_DEPTH:
            yield from _walk(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _items(value: Mapping[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> Iterator[str]:
    """The first items as texts; a file may repeat an item (YAML's aliases) more often than there is time for."""
    if isinstance(value, Mapping):
        return (f"{key}: {setting(item, depth)}" for key, item in islice(value.items(), MAX_ITEMS))
    return (setting(item, depth) for item in islice(value, MAX_ITEMS))


def command_line(value: Any) -> str:
    """The command as a user could type it again, from the list of its arguments."""
    if isinstance(value, list):
        return shlex.join(str(argument) for argument in value)
    return setting(value)
