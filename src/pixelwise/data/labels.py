"""Classes: their names, their colours, and which values of a mask file mean them.

In memory a label image is always uint8 (H, W) with class ids 0..K-1 and 255 for void. What stands in the files is up to
the user: indices, 0/255, merged ids, RGB colours. `LabelSpec` is the one translation between the two.
"""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.base import NAN_VALUE

IGNORE_INDEX = 255
MAX_CLASSES = 254  # ids 0..253; 254 marks "unknown value" while encoding, 255 is void

Color = tuple[int, int, int]
Value = int | Color

CAMVID_NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CAMVID_COLORS: tuple[Color, ...] = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
CAMVID_VOID = 11

_UNKNOWN = 254
_KEYS = ("names", "colors", "values", "ignore_values", "kind")


@dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """The classes of a data set and how its mask files write them.

    Attributes:
        names: one name per class, in the order of the class ids.
        colors: one RGB colour (0..255) per class.
        values: per class the mask-file values that mean it; several values are merged into the class.
        ignore_values: mask-file values that mean void.
        kind: "index" for masks of integers (H, W), "rgb" for masks of colours (H, W, 3). Where it is "index", a picture
            in the colours of the classes is understood too, as `colorize` paints it.

    Raises:
        DataError: the parts do not fit together (lengths, duplicate names or values, numbers out of range).

    Example:
        >>> labels = LabelSpec(names=("road", "car"), colors=((128, 64, 128), (64, 0, 128)), values=((0, 7), (2,)),
        ...                    ignore_values=(9,))
        >>> labels.encode(np.array([[0, 7], [2, 9]]))
        array([[  0,   0],
               [  1, 255]], dtype=uint8)
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    values: tuple[tuple[Value, ...], ...]
    ignore_values: tuple[Value, ...] = ()
    kind: Literal["index", "rgb"] = "index"

    def __post_init__(self) -> None:
        _check_names(self.names)
        if not len(self.names) == len(self.colors) == len(self.values):
            raise DataError(
                f"{len(self.names)} class names, {len(self.colors)} colours, {len(self.values)} lists of mask values: "
                "every class needs one of each."
            )
        if self.kind not in ("index", "rgb"):
            raise DataError(f"the kind of masks is {self.kind!r}; allowed are 'index' and 'rgb'.")
        for name, color in zip(self.names, self.colors, strict=True):
            if not is_color(color):
                raise DataError(f"class {name!r}: colour {color!r} is not three whole numbers in 0..255.")
        _check_values(self)

    @property
    def num_classes(self) -> int:
        """The number of classes, K; void is not one of them."""
        return len(self.names)

    def class_of(self, value: Value) -> int | None:
        """The class id of a mask-file value, `IGNORE_INDEX` for void, None for a value nobody has named."""
        return self._ids.get(value)

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Translate a mask as read from its file into class ids.

        Args:
            raw: integers (H, W), or uint8 (H, W, 3) for kind "rgb" and for pictures in the colours of the classes.

        Returns:
            uint8 (H, W), ids 0..K-1 and 255 for void.

        Raises:
            DataError: the mask is of the other kind, or holds values that are neither a class nor void. The message has
                no file name; the caller knows it.
        """
        kind: Literal["index", "rgb"] = "rgb" if raw.ndim == 3 else "index"
        keys = pack_pixels(raw)
        labels = self._table[keys] if keys.dtype == np.uint8 else self._search(keys, kind)
        unknown = labels == _UNKNOWN
        if unknown.any():
            raise DataError(self.kind_mismatch(kind) or self.unknown_message(value_counts(raw[unknown][None])))
        return labels

    def kind_mismatch(self, kind: str) -> str | None:
        """What is wrong with a mask of this kind ("index" or "rgb"), or None if it is the kind described here."""
        if kind == self.kind:
            return None
        shown = {"index": "one number for each pixel", "rgb": "an RGB colour for each pixel"}
        return (
            f"holds {shown[kind]}, but the classes are described by {shown[self.kind]}. Write `masks: {kind}` and "
            "matching values in classes.yaml, or convert the mask."
        )

    def unknown_message(self, unknown: Mapping[Value, int], place: str = "") -> str:
        """One sentence on values that are no class, as said after "mask street_004.png"; `place` is where the first is."""
        shown = ", ".join(f"{value_name(value)} ({count:,} px{place})" for value, count in list(unknown.items())[:8])
        rest = len(unknown) - 8
        word = "value" if len(unknown) == 1 else "values"
        listing = shown + (f" and {rest:,} other values" if rest > 0 else "")
        advice = "Map it in classes.yaml."
        if not any(isinstance(value, tuple) and len(set(value)) > 1 for value in unknown):
            options = " ".join(f"--ignore {value_name(value)}" for value in list(unknown)[:8])
            advice = f"Pass {options}, or map {'it' if len(unknown) == 1 else 'them'} in classes.yaml."
        count = f"there {'is 1 class' if self.num_classes == 1 else f'are {self.num_classes} classes'}"
        return f"holds {word} {listing}, but {count} ({self.describe_values()}). {advice}"

    def describe_values(self) -> str:
        """The values that mean classes, shortly: "0..10", or "values 0, 255"."""
        known = [value for values in self.values for value in values]
        if known == list(range(len(known))) and len(known) > 1:
            return f"0..{len(known) - 1}"
        shown = as_ranges(known)
        return f"values {', '.join(map(str, shown[:12]))}" + (", …" if len(shown) > 12 else "")

    def colorize(self, labels: np.ndarray) -> np.ndarray:
        """Paint class ids (H, W) with the class colours: uint8 (H, W, 3); void and unknown ids are black."""
        return self._palette[np.asarray(labels, dtype=np.uint8)]

    def palette_bytes(self) -> bytes:
        """The colours as the 768 bytes that `PIL.Image.Image.putpalette` wants."""
        return self._palette.tobytes()

    def with_ignored(self, ignore: Iterable[int]) -> "LabelSpec":
        """The same classes with more mask-file values counted as void; of colours, a number means that grey.

        Raises:
            UsageError: a value already means a class, or is no grey.
        """
        wanted: list[Value] = list(dict.fromkeys(ignore))
        if self.kind == "rgb":
            wanted = [(value, value, value) for value in wanted if isinstance(value, int)]
        added = tuple(value for value in wanted if value not in self.ignore_values)
        for value in added:
            if self.kind == "rgb" and not is_color(value):
                raise UsageError(
                    f"--ignore {value_name(value)}: these masks hold RGB colours, of which a number names a grey, 0 to 255. "
                    "Write void colours as ignore_index in classes.yaml, for example `ignore_index: [[0, 0, 0]]`."
                )
            owner = self.class_of(value)
            if owner is not None:
                what = "this RGB colour" if self.kind == "rgb" else "this mask value"
                raise UsageError(
                    f"--ignore {value_name(value)}: {what} means class {self.names[owner]!r}. Take it out of "
                    "classes.yaml, or leave the option out."
                )
        return replace(self, ignore_values=self.ignore_values + added)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings for JSON; `from_dict` gives back an equal object."""
        return as_lists(asdict(self))

    @classmethod
    def from_dict(cls, content: Any) -> "LabelSpec":
        """Rebuild what `to_dict` gave.

        Raises:
            DataError: anything is missing, unknown or of the wrong type; the content may come from anywhere.
        """
        if not isinstance(content, dict) or set(content) != set(_KEYS):
            found = ", ".join(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
            raise DataError(f"classes: expected the keys {', '.join(_KEYS)}, found {found or 'none'}.")
        for key in _KEYS[:4]:
            if not isinstance(content[key], list):
                raise DataError(f"classes: {key} is {type(content[key]).__name__}, not a list.")
        if not all(isinstance(values, list) for values in content["values"]):
            raise DataError("classes: each item of values must be a list of mask values.")
        return cls(**{key: _as_tuples(value) for key, value in content.items()})

    @cached_property
    def _ids(self) -> dict[Value, int]:
        ids = {value: index for index, values in enumerate(self.values) for value in values}
        ids |= dict.fromkeys(self.ignore_values, IGNORE_INDEX)
        if self.kind == "index" and len(set(self.colors)) == len(self.colors):
            ids |= {color: index for index, color in enumerate(self.colors)}
        return ids

    @cached_property
    def _palette(self) -> np.ndarray:
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[: self.num_classes] = self.colors
        return palette

    @cached_property
    def _table(self) -> np.ndarray:
        return self._search(np.arange(256), "index")

    @cached_property
    def _sorted(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each kind of mask the keys of the known pixels, ascending, and their ids."""
        tables = {}
        for kind, wanted in (("index", int), ("rgb", tuple)):
            ids = sorted((pack_value(value), index) for value, index in self._ids.items() if isinstance(value, wanted))
            keys = np.array([key for key, _ in ids], dtype=np.int64)
            tables[kind] = keys, np.array([index for _, index in ids], dtype=np.uint8)
        return tables

    def _search(self, keys: np.ndarray, kind: Literal["index", "rgb"]) -> np.ndarray:
        known, ids = self._sorted[kind]
        if not len(known):
            return np.full(keys.shape, _UNKNOWN, dtype=np.uint8)
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[at] == keys, ids[at], np.uint8(_UNKNOWN))


def value_counts(raw: np.ndarray) -> dict[Value, int]:
    """How many pixels hold each value of a mask (H, W) or (H, W, 3), by ascending value."""
    keys = pack_pixels(raw).ravel()
    if keys.dtype == np.uint8:
        counts = np.bincount(keys, minlength=256)
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, found = np.unique(keys, return_counts=True)
    pairs = zip(values.tolist(), found.tolist(), strict=True)
    if raw.ndim == 3:
        return {(key >> 16, key >> 8 & 255, key & 255): count for key, count in pairs}
    return dict(pairs)


def distinct_colors(count: int) -> tuple[Color, ...]:
    """`count` colours that are easy to tell apart; none of them is black, which is void's."""
    colors = []
    for index in range(count):
        hue = index * 0.618034 % 1.0  # the golden ratio spreads any number of hues evenly
        red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.55, 0.7)[index % 3], (0.95, 0.8, 0.6)[index // 3 % 3])
        colors.append((round(red * 255), round(green * 255), round(blue * 255)))
    return tuple(colors)


def _check_names(names: tuple[str, ...]) -> None:
    if not 1 <= len(names) <= MAX_CLASSES:
        raise DataError(f"{len(names)} classes: there must be 1 to {MAX_CLASSES}.")
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > 200:
            raise DataError(f"class name {name!r} is not a text of 1 to 200 printable characters.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"class name {twice!r} stands twice. Merge classes by giving one class several values.")


def _check_values(spec: LabelSpec) -> None:
    seen: dict[Value, str] = {}
    owners = [*zip(spec.names, spec.values, strict=True), ("void", spec.ignore_values)]
    for name, values in owners:
        if not values and name != "void":
            raise DataError(f"class {name!r} has no mask value.")
        for value in values:
            allowed = is_color(value) if spec.kind == "rgb" else _is_index(value)
            if not allowed:
                want = "three numbers in 0..255" if spec.kind == "rgb" else "a whole number or a range (128-255)"
                raise DataError(f"class {name!r}: mask value {value!r} is not {want} ({spec.kind} masks).")
            if value in seen:
                raise DataError(f"mask value {value} means both {seen[value]!r} and {name!r}.")
            seen[value] = name


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and NAN_VALUE <= value < 2**32


def is_color(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(_is_index(part) and 0 <= part < 256 for part in value)


def pack_pixels(raw: np.ndarray) -> np.ndarray:
    """One number per pixel: the value itself, or 0xRRGGBB."""
    if raw.ndim < 3:
        return raw
    wide = raw.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def pack_value(value: Value) -> int:
    """The number that orders mask values: the value itself, or 0xRRGGBB."""
    return value if isinstance(value, int) else value[0] << 16 | value[1] << 8 | value[2]


def value_name(value: Value) -> str:
    """A mask value as users write it: greys by their number, and "nan"."""
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else str(value)
    return "nan" if value == NAN_VALUE else str(value)


def as_ranges(values: Sequence[Value]) -> list[Any]:
    """Mask values with each run of three or more ascending numbers, or greys, as a text.

    Example:
        >>> as_ranges([0, 128, 129, 130, 131])
        [0, '128-131']
    """
    shown: list[Any] = []
    runs: list[list[Value]] = []
    for value in values:
        if runs and pack_value(value) - pack_value(runs[-1][-1]) == (1 if isinstance(value, int) else 0x010101):
            runs[-1].append(value)
        else:
            runs.append([value])
    for run in runs:
        is_number = isinstance(run[0], int) or len(set(run[0])) == 1
        shown += [f"{value_name(run[0])}-{value_name(run[-1])}"] if len(run) > 2 and is_number else run
    return shown


def as_lists(value: Any) -> Any:
    """Nested tuples as lists, as JSON and YAML have them."""
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, tuple | list) else value


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
