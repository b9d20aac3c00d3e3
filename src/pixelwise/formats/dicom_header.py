"""What the header of a DICOM file says of its frames: how numbers are stored, what they mean, where each lies in space.

Only elements that describe pixels are read, never those that describe a person, and messages never quote a value that
could be one.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelwise.errors import DataError
from pixelwise.formats.dicom_codecs import check_decoder, safe_text
from pixelwise.formats.intensity import Scaling, display_window, quiet
from pixelwise.formats.local import Stamp
from pixelwise.formats.raster import DECODE_ERRORS, printable

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
_MAX_FRAME_BYTES = 2**30
_BOMB_BYTES = 64 * 2**20
_BOMB_RATIO = 4096


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a file, which becomes one plane; what the header does not say is None.

    Attributes:
        path: the file.
        index: of the frame in its file.
        position: centre of the first pixel in mm, x to the left, y to the back, z to the head of the patient (LPS).
        orientation: direction of the rows (x, y, z), then that of the columns.
        spacing_mm: between rows, between columns.
        depth_mm: to the next slice, as far as one slice can tell.
        slope: a stored number times this ...
        intercept: ... plus this is in the file's unit.
        window: the display window as a map to 0..1.
        order: what tells apart frames at one place, such as the time.
    """

    path: Path
    index: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing_mm: tuple[float, ...] | None
    depth_mm: float | None
    slope: float
    intercept: float
    window: Scaling | None
    order: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known of a file without its pixels; `frames` in the order of the file."""

    path: Path
    stamp: Stamp
    syntax: str
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
    bits: int
    signed: bool
    padding: int | None
    frames: tuple[Frame, ...]

    @property
    def largest(self) -> int:
        """The largest number that can be stored."""
        return int(2 ** (self.bits - self.signed) - 1)


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
    except MemoryError:
        raise DataError(f"{name}: there is not enough memory to decode it.") from None
    except (*DECODE_ERRORS, BytesLengthException, InvalidDicomError) as error:
        told = error.strerror if isinstance(error, OSError) else None
        reason = told or "it ends too early, or what its headers say makes no sense"
        raise DataError(f"{name}: the file is damaged or truncated ({reason}).") from None


def has_mark(path: Path) -> bool:
    """Whether a file starts as DICOM does: any 128 bytes, then DICM."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_header(pydicom: Any, path: Path) -> Header | None:
    """The header of a file; None if it holds no image (a report, a directory).

    Raises:
        DataError: the file is missing or damaged, or its pixels are stored in a way that cannot be read.
    """
    stamp = Stamp.of(path)
    with dicom_errors(path):
        if not has_mark(path):
            raise DataError("this is no DICOM file: the mark DICM is missing at byte 128.")
        meta = pydicom.filereader.read_file_meta_info(path)
        syntax = pydicom.uid.UID(str(meta.TransferSyntaxUID))
        if syntax == "1.2.840.10008.1.2.1.99":
            check_decoder(syntax)
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        if "Rows" not in dataset or "BitsAllocated" not in dataset:
            kind = pydicom.uid.UID(str(meta.get("MediaStorageSOPClassUID", ""))).name
            if "Image" in kind:
                raise DataError(f"it is marked as {safe_text(kind)}, but has no size of an image. It is truncated.")
            return None
        check_decoder(syntax)
        _check(dataset, stamp.size, bool(syntax.is_encapsulated))
        return _header(dataset, path, stamp, str(syntax))


def _header(dataset: Any, path: Path, stamp: Stamp, syntax: str) -> Header:
    photometric = str(dataset.PhotometricInterpretation)
    inverted = photometric == "MONOCHROME1"
    return Header(
        path=path,
        stamp=stamp,
        syntax=syntax,
        instance_uid=_text(dataset, "SOPInstanceUID"),
        series_uid=_text(dataset, "SeriesInstanceUID"),
        class_uid=_text(dataset, "SOPClassUID"),
        description=_text(dataset, "SeriesDescription"),
        modality=_text(dataset, "Modality"),
        reference_uid=_text(dataset, "FrameOfReferenceUID"),
        height=int(dataset.Rows),
        width=int(dataset.Columns),
        channels=1 if photometric in _GREYS else 3,
        palette=photometric == "PALETTE COLOR",
        inverted=inverted,
        bits=int(dataset.get("BitsStored") or dataset.BitsAllocated),
        signed=bool(dataset.get("PixelRepresentation") or 0),
        padding=_whole(dataset, "PixelPaddingValue"),
        frames=tuple(_frames(dataset, path, inverted)),
    )


def _frames(dataset: Any, path: Path, inverted: bool) -> Iterator[Frame]:
    """Of enhanced objects each frame has its own values, or shares those of all frames."""
    count = int(dataset.get("NumberOfFrames") or 1)
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if own and len(own) != count:
        raise DataError(f"it has {count} frames, but describes {len(own)}.")
    for index in range(count):
        groups = _Groups(dataset, shared, own[index] if own else {}, enhanced=bool(own), single=count == 1)
        spacing = groups.numbers("PixelMeasuresSequence", "PixelSpacing", 2)
        depth = groups.number("PixelMeasuresSequence", "SpacingBetweenSlices")
        depth = depth or groups.number("PixelMeasuresSequence", "SliceThickness")
        slope = groups.number("PixelValueTransformationSequence", "RescaleSlope")
        intercept = groups.number("PixelValueTransformationSequence", "RescaleIntercept")
        yield Frame(
            path=path,
            index=index,
            position=groups.numbers("PlanePositionSequence", "ImagePositionPatient", 3),
            orientation=groups.numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6),
            spacing_mm=spacing if spacing and min(spacing) > 0 else None,
            depth_mm=abs(depth) if depth else None,
            slope=1.0 if slope is None else slope,
            intercept=0.0 if intercept is None else intercept,
            window=_window(groups, inverted),
            order=groups.order(index),
        )


class _Groups:
    """Finds an element of a frame: in its own groups, in those of all frames, or (in classic files) at the top."""

    def __init__(self, dataset: Any, shared: Any, own: Any, *, enhanced: bool, single: bool) -> None:
        self._own, self._shared, self._top = own, shared, dataset
        self._classic = not enhanced
        self._single = single

    def value(self, group: str, keyword: str) -> Any:
        for place in (self._own, self._shared):
            items = place.get(group)
            if items and items[0].get(keyword) is not None:
                return items[0].get(keyword)
        if not self._classic or (not self._single and group == "PlanePositionSequence"):
            return None  # a classic file of many frames has one position, that of its first
        return self._top.get(keyword)

    def numbers(self, group: str, keyword: str, count: int) -> tuple[float, ...] | None:
        value = self.value(group, keyword)
        if value is None or isinstance(value, str | float | int) or len(value) != count:
            return None
        found = tuple(float(part) for part in value)
        return found if all(math.isfinite(part) for part in found) else None

    def number(self, group: str, keyword: str) -> float | None:
        value = first(self.value(group, keyword))
        return None if value is None or not math.isfinite(value) else value

    def order(self, index: int) -> tuple[float, ...]:
        content = self._own.get("FrameContentSequence")
        if content:
            item = content[0]
            return (first(item.get("TemporalPositionIndex")) or 0.0, float(index))
        keywords = ("TemporalPositionIdentifier", "AcquisitionNumber", "TriggerTime", "InstanceNumber")
        return (*(first(self._top.get(keyword)) or 0.0 for keyword in keywords), float(index))


def first(value: Any) -> float | None:
    """The first number of an element that may hold none, one or several.

    Example:
        >>> first([40, 50]), first(""), first(7)
        (40.0, None, 7.0)
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str | float | int):
        return float(value[0]) if len(value) else None
    return float(value)


def _window(groups: _Groups, inverted: bool) -> Scaling | None:
    center, width = (
        groups.number("FrameVOILUTSequence", "WindowCenter"),
        groups.number("FrameVOILUTSequence", "WindowWidth"),
    )
    if center is None or width is None:
        return None
    function = str(groups.value("FrameVOILUTSequence", "VOILUTFunction") or "LINEAR")
    return display_window(center, width, function, inverted)


def _check(dataset: Any, file_bytes: int, compressed: bool) -> None:
    """Refuse what cannot be read, and a file that is too small for what its header says."""
    if dataset.get("SOPClassUID") == _WHOLE_SLIDE:
        raise DataError("this is a whole-slide image, whose frames are tiles of one picture. Convert it to TIFF.")
    photometric, samples = str(dataset.PhotometricInterpretation), int(dataset.get("SamplesPerPixel") or 1)
    if photometric not in (*_GREYS, *_COLORS, "PALETTE COLOR") or samples != _COLORS.get(photometric, 1):
        raise DataError(
            f"its pixels are {samples} numbers of {safe_text(photometric)}; MONOCHROME1, MONOCHROME2, PALETTE COLOR, RGB "
            "and YBR can be read. Convert it."
        )
    rows, columns, frames = int(dataset.Rows), int(dataset.Columns), int(dataset.get("NumberOfFrames") or 1)
    allocated, stored = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if min(rows, columns, frames, allocated, stored) < 1 or allocated > 64 or stored > allocated:
        raise DataError(
            f"its header is damaged: {rows} x {columns} pixels, {frames} frames, {stored} of {allocated} bits."
        )
    subsampled = photometric == "YBR_FULL_422" and not compressed
    frame_bits = rows * columns * (2 if subsampled else samples) * allocated
    if compressed:
        fits = frame_bits // 8 <= max(_BOMB_BYTES, _BOMB_RATIO * file_bytes) and frames * 8 <= file_bytes
    else:
        fits = frames * frame_bits // 8 <= file_bytes
    if not fits or frame_bits // 8 > _MAX_FRAME_BYTES:
        raise DataError(
            f"its header says {frames} frames of {rows} x {columns} pixels of {samples * allocated} bits, which a file of "
            f"{file_bytes:,} bytes cannot hold, or which is more than {_MAX_FRAME_BYTES >> 30} GiB a frame. It is truncated "
            "or damaged."
        )


def _text(dataset: Any, keyword: str) -> str:
    return safe_text(dataset.get(keyword) or "")


def _whole(dataset: Mapping[str, Any], keyword: str) -> int | None:
    number = first(dataset.get(keyword))
    return None if number is None else int(number)
