"""Which axes of a TIFF's images are rows, columns, channels and planes, and what its tags measure."""

import math
from dataclasses import dataclass
from typing import Any

from pixelwise.errors import DataError

_UNITS_UM = {2: 25_400.0, 3: 10_000.0}  # resolution unit: micrometres in an inch, in a centimetre
_UNIT_NAMES = {1: "none", 2: "inch", 3: "centimeter"}


@dataclass(frozen=True)
class Layout:
    """The parts of the axes of a stack, as positions in its shape.

    Attributes:
        axes: one letter each, as tifffile names them, those of length 1 left out.
        shape: their lengths.
        rows: position of the rows.
        columns: position of the columns.
        channels: position of the channels, or None if there is one.
    """

    axes: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    channels: int | None

    @property
    def planes(self) -> tuple[int, ...]:
        """Positions of all the other axes, in the order of the file."""
        taken = (self.rows, self.columns, self.channels)
        return tuple(axis for axis in range(len(self.axes)) if axis not in taken)

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Planes, rows, columns, channels."""
        planes = math.prod(self.shape[axis] for axis in self.planes)
        channels = 1 if self.channels is None else self.shape[self.channels]
        return planes, self.shape[self.rows], self.shape[self.columns], channels


def squeeze(axes: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Leave out the axes of length 1 that are neither rows nor columns.

    Example:
        >>> squeeze("ZCYX", (1, 3, 1, 9))
        ('CYX', (3, 1, 9))
    """
    kept = [axis for axis in range(len(axes)) if shape[axis] != 1 or axes[axis] in "YX"]
    return "".join(axes[axis] for axis in kept), tuple(int(shape[axis]) for axis in kept)


def arrange(axes: str, shape: tuple[int, ...], channels: int | None = None) -> Layout:
    """Tell channels from planes.

    S (samples) and C (channels) are channels, Z, T and pages (I) are planes. An axis that nothing names (Q) is the
    channels where it is the only one beside rows and columns, first or last, as `read_image` takes it. Where a file
    leaves it open, the number of channels that is wanted decides.

    Args:
        axes: one letter for each axis.
        shape: their lengths.
        channels: how many are wanted; None if that is not known.

    Raises:
        DataError: there are no rows or no columns.

    Example:
        >>> arrange("ZYX", (40, 64, 64)).size
        (40, 64, 64, 1)
        >>> arrange("QYX", (5, 64, 64)).size
        (1, 64, 64, 5)
        >>> arrange("QYX", (40, 64, 64), channels=1).size
        (40, 64, 64, 1)
    """
    axes, shape = squeeze(axes, shape)
    if axes.count("Y") != 1 or axes.count("X") != 1:
        raise DataError(f"its images have the axes {axes or 'none'}; rows (Y) and columns (X) are needed.")
    rows, columns = axes.index("Y"), axes.index("X")
    rest = [axis for axis in range(len(axes)) if axis not in (rows, columns)]
    named = [axis for letter in "SC" for axis in rest if axes[axis] == letter]
    if named:
        return Layout(axes, shape, rows, columns, named[0])
    if len(rest) != 1:
        return Layout(axes, shape, rows, columns, None)
    return _one_open_axis(Layout(axes, shape, rows, columns, None), rest[0], channels)


def _one_open_axis(stack: Layout, axis: int, wanted: int | None) -> Layout:
    axes, shape, rows, columns = stack.axes, stack.shape, stack.rows, stack.columns
    as_channels = Layout(axes, shape, rows, columns, axis)
    if axes[axis] != "Q":
        return as_channels if axes[axis] == "I" and wanted == shape[axis] else stack
    # An array (rows, columns, channels) that was written as pages of (columns, channels).
    as_last = Layout(axes, shape, axis, rows, columns)
    may_be_last = axis < rows < columns and shape[columns] < shape[axis]
    if may_be_last and wanted in (None, shape[columns]):
        return as_last
    if wanted in (None, shape[axis]) or axis > rows:
        return as_channels
    if wanted in (1, 3):
        return stack
    return as_last if may_be_last else as_channels


def tag_metadata(page: Any, turned: bool = False) -> dict[str, Any]:
    """Resolution and pixel size of a page, where its tags give them; `turned` if rows and columns are swapped."""
    metadata: dict[str, Any] = {}
    unit = _number(page, 296) or 2
    x, y = (_number(page, code) for code in ((283, 282) if turned else (282, 283)))
    if x and y:
        metadata["resolution"] = (x, y)
        metadata["resolution_unit"] = _UNIT_NAMES.get(int(unit), "none")
        if int(unit) in _UNITS_UM:
            micrometres = _UNITS_UM[int(unit)]
            metadata["pixel_size_um"] = {"x": micrometres / x, "y": micrometres / y}
    return metadata


def _number(page: Any, code: int) -> float | None:
    """The number in a tag, or the ratio of two; None if it is missing, no number, or not positive."""
    tag = page.tags.get(code)
    value = None if tag is None else tag.value
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, int) for part in value):
        value = value[0] / value[1] if value[1] else None
    return float(value) if isinstance(value, int | float) and 0 < value < math.inf else None
