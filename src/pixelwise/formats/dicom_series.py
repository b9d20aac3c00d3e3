"""From the files of a DICOM series to a volume: what their headers say of each frame, and the order of the slices.

Names of files and instance numbers say nothing reliable of that order; positions along the normal of the slices do. Only
elements that describe pixels are read, never those that describe a person, and messages never quote a value that could be
one.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.dicom_frame import Frame, frames_of, numbers
from pixelwise.formats.local import HEAD_BYTES, Stamp, is_dicom_head, printable, readable, silence

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
PARALLEL = 1e-3  # what directions of slices may differ by
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SAME_PLACE_MM = 1e-4
_EVEN = 0.02  # of the distance between slices; positions are written with few digits
_SAME_PLACE = 0.01  # of the thickness of a slice
_SAME_SPACING = 1e-3  # as a share

_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "FrameOfReferenceUID", "Modality",
    "InstanceNumber", "AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "VOILUTSequence", "ModalityLUTSequence",
    "PixelPaddingValue", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_COLORS = {"RGB": 3, "YBR_FULL": 3, "YBR_FULL_422": 3, "YBR_ICT": 3, "YBR_RCT": 3}
_GREYS = ("MONOCHROME1", "MONOCHROME2")
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")


class Header:
    """What is known of a file (a pydicom dataset without pixels) and of its `frames`, in the order of the file."""

    def __init__(self, dataset: Any, path: Path, stamp: Stamp, syntax: Any) -> None:
        self.path, self.stamp, self.syntax = path, stamp, syntax
        photometric, samples = str(dataset.PhotometricInterpretation), int(dataset.get("SamplesPerPixel") or 1)
        if dataset.get("SOPClassUID") == _WHOLE_SLIDE:
            raise DataError("this is a whole-slide image, whose frames are tiles of one picture. Convert it to TIFF.")
        if photometric not in (*_GREYS, *_COLORS, "PALETTE COLOR") or samples != _COLORS.get(photometric, 1):
            raise DataError(
                f"its pixels are {samples} numbers of {safe_text(photometric)}; MONOCHROME1, MONOCHROME2, PALETTE COLOR, "
                "RGB and YBR can be read. Convert it."
            )
        self.height, self.width, self.allocated = int(dataset.Rows), int(dataset.Columns), int(dataset.BitsAllocated)
        count = int(dataset.get("NumberOfFrames") or 1)
        bits = self.allocated * (2 if photometric == "YBR_FULL_422" else samples)
        least = count * self.height * self.width * bits // 8 if syntax in _UNCOMPRESSED else count
        if min(self.height, self.width, count, self.allocated) < 1 or least > stamp.size:
            raise DataError(
                f"its header says {count} frames of {self.height} x {self.width} pixels of {bits} bits, which a file of "
                f"{stamp.size:,} bytes cannot hold. It is truncated or damaged."
            )

        def text(keyword: str) -> str:
            return safe_text(dataset.get(keyword) or "")

        self.instance_uid, self.series_uid = text("SOPInstanceUID"), text("SeriesInstanceUID")
        self.class_uid, self.description = text("SOPClassUID"), text("SeriesDescription")
        self.modality, self.reference_uid = text("Modality"), text("FrameOfReferenceUID")
        self.channels = 1 if photometric in _GREYS else 3
        self.palette, self.inverted = photometric == "PALETTE COLOR", photometric == "MONOCHROME1"
        self.has_table = bool(dataset.get("ModalityLUTSequence"))  # of what the stored numbers stand for
        self.bits = int(dataset.get("BitsStored") or self.allocated)
        self.signed = bool(dataset.get("PixelRepresentation"))
        self.largest = int(2 ** (self.bits - self.signed) - 1)
        padding = numbers(dataset.get("PixelPaddingValue"))
        self.padding = None if padding is None else int(padding[0])
        self.frames = tuple(frames_of(dataset, path, count, self.inverted))


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the warnings and the log lines of libraries; only one thread at a time is inside."""
    with silence():
        before = logging.root.manager.disable
        logging.disable()
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def dicom_errors(path: Path) -> Iterator[None]:
    """Turn what pydicom raises into a `DataError` that names the file and quotes nothing of it."""
    name = printable(path)
    try:
        with quiet():
            yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:
        if isinstance(error, Warning | UsageError):
            raise
        told = error.strerror if isinstance(error, OSError) else None
        reason = told or "it ends too early, or what its headers say makes no sense"
        raise DataError(f"{name}: the file is damaged or truncated ({reason}).") from None


def has_mark(path: Path) -> bool:
    """Whether a file starts as DICOM does."""
    Stamp.of(path)  # a pipe must not even be opened
    with readable(path), path.open("rb") as file:
        return is_dicom_head(file.read(HEAD_BYTES))


def is_marked(path: Path) -> bool:
    """Whether a file has 128 bytes and DICM before its first element; those of old exports begin with that."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def plain_syntax(pydicom: Any, dataset: Any) -> Any:
    """The transfer syntax of a file that does not name it, as its elements are written: these are not compressed."""
    implicit, little = dataset.original_encoding
    uid = pydicom.uid
    return (
        uid.ExplicitVRBigEndian
        if not little
        else uid.ImplicitVRLittleEndian
        if implicit
        else uid.ExplicitVRLittleEndian
    )


def safe_text(value: Any) -> str:
    """Text of a file as a terminal can take it, at most 64 letters."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))[:64]


def read_header(pydicom: Any, path: Path) -> Header | None:
    """The header of a file; None if it holds no image (a report, a directory)."""
    stamp = Stamp.of(path)
    with dicom_errors(path):
        if not has_mark(path):
            raise DataError(
                "this is no DICOM file: the mark DICM is missing at byte 128, and so is a header without it."
            )
        marked = is_marked(path)
        meta = (
            pydicom.filereader.read_file_meta_info(path)
            if marked
            else pydicom.dcmread(path, stop_before_pixels=True, force=True).file_meta
        )
        syntax = pydicom.uid.UID(str(meta.TransferSyntaxUID if marked else meta.get("TransferSyntaxUID", "")))
        if syntax == _DEFLATED:
            raise DataError(
                "it is deflated as a whole (Deflated Explicit VR Little Endian), so its header cannot be read alone. "
                "Convert it, for example with `dcmconv +te`."
            )
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=not marked)
        if not syntax:
            syntax = plain_syntax(pydicom, dataset)
        if "Rows" in dataset and "BitsAllocated" in dataset:
            return Header(dataset, path, stamp, syntax)
        kind = pydicom.uid.UID(str(meta.get("MediaStorageSOPClassUID", ""))).name
        if "Image" in kind:
            raise DataError(f"it is marked as {safe_text(kind)}, but has no size of an image. It is truncated.")
        return None


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Frames in the order of planes: all slices of the first volume, along their normal, then those of the next."""

    name: str  # for messages
    frames: tuple[Frame, ...]
    size: tuple[int, int]  # rows, columns
    reference_uid: str  # frame of reference; "" if unknown
    known: Mapping[str, Any]  # metadata on geometry and origin


def arrange(location: str, headers: Sequence[Header]) -> Volume:
    """The frames of a series in the order of their places."""
    _check_alike(location, headers)
    frames = [frame for header in headers for frame in header.frames]
    if any(frame.position is None or frame.orientation is None for frame in frames):
        if len(headers) > 1:
            raise DataError(
                f"{location}: of {len(headers)} images some have no ImagePositionPatient or ImageOrientationPatient, so "
                "their order is unknown. Give them one by one."
            )
        return make_volume(location, headers[0], frames, len(frames))
    normal = normal_of(location, frames)
    groups = places_of(frames, normal)
    counts = Counter(len(group) for group in groups)
    if len(counts) > 1:
        raise DataError(
            f"{location}: {len(frames)} images lie at {len(groups)} places, {min(counts)} at some and {max(counts)} at "
            "others, so slices are missing or there twice. Give a folder with one complete series."
        )
    ordered = [sorted(group, key=lambda frame: (*frame.order, str(frame.path))) for group in groups]
    planes = [group[time] for time in range(len(groups[0])) for group in ordered]
    return make_volume(location, headers[0], planes, len(groups), normal)


def make_volume(
    name: str, header: Header, frames: Sequence[Frame], slices: int, normal: NDArray[np.float64] | None = None
) -> Volume:
    times = len(frames) // slices
    space, warnings = ({}, ()) if normal is None else _space(frames[:slices], normal)
    known = {
        "axis": 2,
        "shape": (header.width, header.height, slices, times)[: 4 if times > 1 else 3],
        "slices": slices,
        "time_points": times,
        "even": not warnings,
        "warnings": warnings,
        "modality": header.modality,
        "series_uid": header.series_uid,
        "frame_of_reference_uid": header.reference_uid,
        **space,
    }
    if space and times > 1:
        known["zooms"] = (*space["zooms"], 1.0)
    size = (header.height, header.width)
    return Volume(name=name, frames=tuple(frames), size=size, reference_uid=header.reference_uid, known=known)


def _check_alike(location: str, headers: Sequence[Header]) -> None:
    first = headers[0]
    seen: dict[str, Header] = {}
    for header in headers:
        other = seen.setdefault(header.instance_uid, header)
        if other is not header:
            raise DataError(f"{location}: {header.path.name} and {other.path.name} are the same image. Remove one.")
        for name in ("height", "width", "channels"):
            if getattr(header, name) != getattr(first, name):
                raise DataError(
                    f"{location}: {header.path.name} has {header.height} x {header.width} pixels of {header.channels} "
                    f"channels, but {first.path.name} {first.height} x {first.width} of {first.channels}. A series has "
                    "images of one size; give the files one by one, or choose a series."
                )


def normal_of(location: str, frames: Sequence[Frame]) -> NDArray[np.float64]:
    """The direction across the slices, which all must share."""
    first = np.array(frames[0].orientation)
    for frame in frames:
        if np.abs(np.array(frame.orientation) - first).max() > PARALLEL:
            raise DataError(
                f"{location}: {frame.path.name} is turned against {frames[0].path.name} (ImageOrientationPatient), so they "
                "form no volume. Is a scout image among them? Give the files one by one, or remove it."
            )
    rows, columns = first[:3], first[3:]
    is_square = abs(float(rows @ columns)) < 0.01 and all(abs(math.hypot(*axis) - 1) < 0.01 for axis in (rows, columns))
    if not is_square:
        raise DataError(
            f"{location}: ImageOrientationPatient of {frames[0].path.name} is not two directions at a right angle."
        )
    return np.cross(rows, columns)


def places_of(frames: Sequence[Frame], normal: NDArray[np.float64]) -> list[list[Frame]]:
    """Frames at the same distance along the normal together, by ascending distance; positions may have few digits."""
    least = min((frame.depth_mm for frame in frames if frame.depth_mm), default=0.0)
    same_mm = max(_SAME_PLACE_MM, _SAME_PLACE * least)
    distances = np.array([frame.position for frame in frames]) @ normal
    groups: list[list[Frame]] = []
    last = -math.inf
    for index in np.argsort(distances, kind="stable"):
        if distances[index] - last > same_mm:
            groups.append([])
            last = distances[index]
        groups[-1].append(frames[index])
    return groups


def _space(frames: Sequence[Frame], normal: NDArray[np.float64]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The affine of a volume, (column, row, slice) to the patient in mm (RAS+), and what is odd about the positions.

    A tilted gantry shifts each slice sideways, so the step is taken from the positions.
    """
    first, count = frames[0], len(frames)
    if first.spacing_mm is None or not all(
        frame.spacing_mm and np.allclose(frame.spacing_mm, first.spacing_mm, rtol=_SAME_SPACING) for frame in frames
    ):
        return {}, ("PixelSpacing is missing or differs between slices",)
    positions, orientation = np.array([frame.position for frame in frames]), np.array(first.orientation)
    step = normal * (first.depth_mm or 1.0) if count == 1 else (positions[-1] - positions[0]) / (count - 1)
    length = float(np.linalg.norm(step))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = orientation[:3] * first.spacing_mm[1], orientation[3:] * first.spacing_mm[0]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    off = np.abs(positions - (positions[0] + np.arange(count)[:, None] * step)).max()
    warnings: tuple[str, ...] = ()
    if off > _EVEN * length + 1e-3:
        gaps = np.diff(positions @ normal)
        warnings = (
            f"the distances between its {count} slices are uneven ({gaps.min():.3f} to {gaps.max():.3f} mm); slices may be "
            "missing. NIfTI cannot hold such a volume; without --format its labels become DICOM-SEG",
        )
    zooms = (first.spacing_mm[1], first.spacing_mm[0], length)
    return {"affine": LPS_TO_RAS @ affine, "zooms": zooms, "units": ("mm", "unknown")}, warnings
