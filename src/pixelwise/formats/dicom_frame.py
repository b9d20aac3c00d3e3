"""What the header of a DICOM file says of each of its frames: where it lies, and what its numbers stand for."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixelwise.errors import DataError
from pixelwise.formats.intensity import LookUp, Scaling, display_window


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a file, which becomes one plane; what the header does not say is None."""

    path: Path
    index: int  # in the file
    position: tuple[float, ...] | None  # centre of the first pixel in mm: left, back and head of the patient (LPS)
    orientation: tuple[float, ...] | None  # direction of the rows (x, y, z), then that of the columns
    spacing_mm: tuple[float, ...] | None  # between rows, between columns
    depth_mm: float | None = None  # to the next slice, as far as one slice can tell
    slope: float = 1.0  # a stored number times this ...
    intercept: float = 0.0  # ... plus this is in the file's unit
    window: Scaling | LookUp | None = None  # the display window, or table, as a map to 0..1
    order: tuple[float, ...] = ()  # tells apart frames at one place, such as the time


def frames_of(dataset: Any, path: Path, count: int, inverted: bool) -> Iterator[Frame]:
    """Of enhanced objects each frame has its own values, or shares those of all frames."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if own and len(own) != count:
        raise DataError(f"it has {count} frames, but describes {len(own)}.")
    top = {} if own else dataset
    for index in range(count):
        groups = (own[index] if own else {}, shared)

        def find(group: str, keyword: str, length: int = 1, groups: Any = groups) -> tuple[float, ...] | None:
            return numbers(_value(groups, top, group, keyword), length)

        spacing = find("PixelMeasuresSequence", "PixelSpacing", 2)
        depth = find("PixelMeasuresSequence", "SpacingBetweenSlices") or (0.0,)
        depth = depth if depth[0] else find("PixelMeasuresSequence", "SliceThickness") or (0.0,)
        # a classic file of many frames has one position, that of its first
        place = _value(groups, top if count == 1 else {}, "PlanePositionSequence", "ImagePositionPatient")
        center, width = (find("FrameVOILUTSequence", keyword) for keyword in ("WindowCenter", "WindowWidth"))
        function = str(_value(groups, top, "FrameVOILUTSequence", "VOILUTFunction") or "LINEAR")
        window = display_window(center[0], width[0], function, inverted) if center and width else None
        table = _table(_value(groups, top, "FrameVOILUTSequence", "VOILUTSequence"), inverted)
        yield Frame(
            path=path,
            index=index,
            position=numbers(place, 3),
            orientation=find("PlaneOrientationSequence", "ImageOrientationPatient", 6),
            spacing_mm=spacing if spacing and min(spacing) > 0 else None,
            depth_mm=abs(depth[0]) or None,
            slope=(find("PixelValueTransformationSequence", "RescaleSlope") or (1.0,))[0],
            intercept=(find("PixelValueTransformationSequence", "RescaleIntercept") or (0.0,))[0],
            window=table or window,
            order=_order(groups[0], dataset, index),
        )


def _table(sequence: Any, inverted: bool) -> LookUp | None:
    """The first table of a VOI LUT Sequence, which comes before a window beside it (PS3.3 C.11.2.1.1); None without one."""
    if not sequence:
        return None
    count, first, bits = (int(value) for value in sequence[0].LUTDescriptor)
    count, data = count or 2**16, sequence[0]["LUTData"].value
    if isinstance(data, bytes):  # OW; of 8 bits there may be two in a word
        data = np.frombuffer(data, np.dtype("<u2" if len(data) >= 2 * count else "u1"))
    values = tuple(int(value) for value in data[:count])
    if len(values) < count or not 1 <= bits <= 16:
        raise DataError(f"its VOI LUT says {count} numbers of {bits} bits, but has {len(values)}.")
    return LookUp(first=first, values=values, largest=2**bits - 1, inverted=inverted)


def _value(groups: Sequence[Any], top: Any, group: str, keyword: str) -> Any:
    """An element of a frame: in its own groups, in those of all frames, or (in classic files) at the top."""
    found = (item[0].get(keyword) for place in groups if (item := place.get(group)))
    return next((value for value in found if value is not None), top.get(keyword))


def numbers(value: Any, count: int = 1) -> tuple[float, ...] | None:
    """So many finite numbers, the first of an element; None if it does not have them."""
    if value is None or value == "":
        return None
    values = [value] if isinstance(value, str | float | int) else list(value)
    found = tuple(float(part) for part in values[:count])
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def _order(own: Any, dataset: Any, index: int) -> tuple[float, ...]:
    """What tells apart frames at one place."""
    keywords = ("TemporalPositionIdentifier", "AcquisitionNumber", "TriggerTime", "InstanceNumber")
    values = [dataset.get(keyword) for keyword in keywords]
    if content := own.get("FrameContentSequence"):
        values = [content[0].get("TemporalPositionIndex")]
    return (*((numbers(value) or (0.0,))[0] for value in values), float(index))
