"""What the header of a DICOM file says of its frames: how numbers are stored, what they mean, where each lies in space.

Only elements that describe pixels are read, never those that describe a person, and messages never quote a value that
could be one.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelwise.errors import DataError
from pixelwise.formats.intensity import Scaling, display_window
from pixelwise.formats.local import DECODE_ERRORS, Stamp, printable, readable, silence

LOGGER = "pydicom"

_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "FrameOfReferenceUID", "Modality",
    "InstanceNumber", "AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "PixelPaddingValue", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_COLORS = {"RGB": 3, "YBR_FULL": 3, "YBR_FULL_422": 3, "YBR_ICT": 3, "YBR_RCT": 3}
_GREYS = ("MONOCHROME1", "MONOCHROME2")
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")


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
    window: Scaling | None = None  # the display window as a map to 0..1
    order: tuple[float, ...] = ()  # tells apart frames at one place, such as the time


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known of a file without its pixels; `frames` in the order of the file."""

    path: Path
    stamp: Stamp
    syntax: Any
    instance_uid: str
    series_uid: str
    class_uid: str
    description: str
    modality: str
    reference_uid: str
    height: int
    width: int
    channels: int
    palette: bool
    inverted: bool
    allocated: int
    bits: int
    signed: bool
    padding: int | None
    frames: tuple[Frame, ...]

    @property
    def largest(self) -> int:
        """The largest number that can be stored."""
        return int(2 ** (self.bits - self.signed) - 1)


@contextmanager
def quiet(*packages: str) -> Iterator[None]:
    """Drop the warnings and the log lines of some packages; only one thread at a time is inside."""
    loggers = [
        logging.getLogger(name) for name in tuple(logging.root.manager.loggerDict) if name.partition(".")[0] in packages
    ]
    with silence():
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def dicom_errors(path: Path) -> Iterator[None]:
    """Turn what pydicom raises into a `DataError` that names the file and quotes nothing of it."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    name = printable(path)
    try:
        with quiet(LOGGER):
            yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except (*DECODE_ERRORS, BytesLengthException, InvalidDicomError) as error:
        told = error.strerror if isinstance(error, OSError) else None
        reason = told or "it ends too early, or what its headers say makes no sense"
        raise DataError(f"{name}: the file is damaged or truncated ({reason}).") from None


def has_mark(path: Path) -> bool:
    """Whether a file starts as DICOM does: any 128 bytes, then DICM."""
    Stamp.of(path)  # a pipe must not even be opened
    with readable(path), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def safe_text(value: Any) -> str:
    """Text of a file as a terminal can take it, at most 64 letters."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))[:64]


def read_header(pydicom: Any, path: Path) -> Header | None:
    """The header of a file; None if it holds no image (a report, a directory)."""
    stamp = Stamp.of(path)
    with dicom_errors(path):
        if not has_mark(path):
            raise DataError("this is no DICOM file: the mark DICM is missing at byte 128.")
        meta = pydicom.filereader.read_file_meta_info(path)
        syntax = pydicom.uid.UID(str(meta.TransferSyntaxUID))
        if syntax == _DEFLATED:
            raise DataError(
                "it is deflated as a whole (Deflated Explicit VR Little Endian), so its header cannot be read alone. "
                "Convert it, for example with `dcmconv +te`."
            )
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        if "Rows" in dataset and "BitsAllocated" in dataset:
            return _header(dataset, path, stamp, syntax)
        kind = pydicom.uid.UID(str(meta.get("MediaStorageSOPClassUID", ""))).name
        if "Image" in kind:
            raise DataError(f"it is marked as {safe_text(kind)}, but has no size of an image. It is truncated.")
        return None


def _header(dataset: Any, path: Path, stamp: Stamp, syntax: Any) -> Header:
    photometric, samples = str(dataset.PhotometricInterpretation), int(dataset.get("SamplesPerPixel") or 1)
    if dataset.get("SOPClassUID") == _WHOLE_SLIDE:
        raise DataError("this is a whole-slide image, whose frames are tiles of one picture. Convert it to TIFF.")
    if photometric not in (*_GREYS, *_COLORS, "PALETTE COLOR") or samples != _COLORS.get(photometric, 1):
        raise DataError(
            f"its pixels are {samples} numbers of {safe_text(photometric)}; MONOCHROME1, MONOCHROME2, PALETTE COLOR, RGB "
            "and YBR can be read. Convert it."
        )
    rows, columns, allocated = int(dataset.Rows), int(dataset.Columns), int(dataset.BitsAllocated)
    count = int(dataset.get("NumberOfFrames") or 1)
    bits = allocated * (2 if photometric == "YBR_FULL_422" else samples)
    least = count * rows * columns * bits // 8 if syntax in _UNCOMPRESSED else count
    if min(rows, columns, count, allocated) < 1 or least > stamp.size:
        raise DataError(
            f"its header says {count} frames of {rows} x {columns} pixels of {bits} bits, which a file of "
            f"{stamp.size:,} bytes cannot hold. It is truncated or damaged."
        )
    inverted, padding = photometric == "MONOCHROME1", _number(dataset.get("PixelPaddingValue"))
    names = (
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "SOPClassUID",
        "SeriesDescription",
        "Modality",
        "FrameOfReferenceUID",
    )
    instance, series, kind, description, modality, reference = (safe_text(dataset.get(name) or "") for name in names)
    return Header(
        path=path, stamp=stamp, syntax=syntax, instance_uid=instance, series_uid=series, class_uid=kind,
        description=description, modality=modality, reference_uid=reference, height=rows, width=columns,
        channels=1 if photometric in _GREYS else 3, palette=photometric == "PALETTE COLOR", inverted=inverted,
        allocated=allocated, bits=int(dataset.get("BitsStored") or allocated),
        signed=bool(dataset.get("PixelRepresentation") or 0), padding=None if padding is None else int(padding),
        frames=tuple(_frames(dataset, path, count, inverted)),
    )  # fmt: skip


def _frames(dataset: Any, path: Path, count: int, inverted: bool) -> Iterator[Frame]:
    """Of enhanced objects each frame has its own values, or shares those of all frames."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if own and len(own) != count:
        raise DataError(f"it has {count} frames, but describes {len(own)}.")
    # a classic file of many frames has one position, that of its first
    top = {} if own else dataset
    for index in range(count):
        places = (own[index] if own else {}, shared)
        spacing = _numbers(_value(places, top, "PixelMeasuresSequence", "PixelSpacing"), 2)
        depth = _number(_value(places, top, "PixelMeasuresSequence", "SpacingBetweenSlices"))
        depth = depth or _number(_value(places, top, "PixelMeasuresSequence", "SliceThickness"))
        slope = _number(_value(places, top, "PixelValueTransformationSequence", "RescaleSlope"))
        intercept = _number(_value(places, top, "PixelValueTransformationSequence", "RescaleIntercept"))
        position = _value(places, top if count == 1 else {}, "PlanePositionSequence", "ImagePositionPatient")
        orientation = _value(places, top, "PlaneOrientationSequence", "ImageOrientationPatient")
        yield Frame(
            path=path,
            index=index,
            position=_numbers(position, 3),
            orientation=_numbers(orientation, 6),
            spacing_mm=spacing if spacing and min(spacing) > 0 else None,
            depth_mm=abs(depth) if depth else None,
            slope=1.0 if slope is None else slope,
            intercept=0.0 if intercept is None else intercept,
            window=_window(places, top, inverted),
            order=_order(places[0], dataset, index),
        )


def _value(places: Sequence[Any], top: Any, group: str, keyword: str) -> Any:
    """An element of a frame: in its own groups, in those of all frames, or (in classic files) at the top."""
    for place in places:
        items = place.get(group)
        if items and items[0].get(keyword) is not None:
            return items[0].get(keyword)
    return top.get(keyword)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """So many finite numbers, the first of an element; None if it does not have them."""
    if value is None or value == "":
        return None
    values = [value] if isinstance(value, str | float | int) else list(value)
    found = tuple(float(part) for part in values[:count])
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def _number(value: Any) -> float | None:
    found = _numbers(value, 1)
    return None if found is None else found[0]


def _window(places: Sequence[Any], top: Any, inverted: bool) -> Scaling | None:
    center, width, function = (
        _value(places, top, "FrameVOILUTSequence", name) for name in ("WindowCenter", "WindowWidth", "VOILUTFunction")
    )
    low, high = _number(center), _number(width)
    return None if low is None or high is None else display_window(low, high, str(function or "LINEAR"), inverted)


def _order(own: Any, dataset: Any, index: int) -> tuple[float, ...]:
    content = own.get("FrameContentSequence")
    if content:
        return (_number(content[0].get("TemporalPositionIndex")) or 0.0, float(index))
    keywords = ("TemporalPositionIdentifier", "AcquisitionNumber", "TriggerTime", "InstanceNumber")
    return (*(_number(dataset.get(keyword)) or 0.0 for keyword in keywords), float(index))
