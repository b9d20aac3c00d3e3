"""From headers to a volume: one series of a folder, its slices in the order in which they lie in the patient.

Names of files and instance numbers say nothing reliable of that order; positions along the normal of the slices do.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.dicom_header import Frame, Header, has_mark, read_header
from pixelwise.formats.local import printable, readable
from pixelwise.formats.nifti import open_nifti

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_PARALLEL = 1e-3
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NEAR = 0.05  # of the distance between planes, or of a pixel: what positions of a segmentation may differ by
_SAME_PLACE_MM = 1e-4
_EVEN = 0.02  # of the distance between slices; positions are written with few digits


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Frames in the order of planes: all slices of the first volume, along their normal, then those of the next."""

    name: str  # for messages
    frames: tuple[Frame, ...]
    size: tuple[int, int]  # rows, columns
    reference_uid: str  # frame of reference; "" if unknown
    known: Mapping[str, Any]  # metadata on geometry and origin


def read_headers(pydicom: Any, path: Path, series: str | None, labels: bool = False) -> tuple[Header, ...]:
    """The headers of a file, or of the one series of a folder.

    Files of a folder that are no DICOM, or hold no image, do not count. Where segmentations lie beside images, images are
    taken, or segmentations if `labels`.
    """
    inside: list[Path] = []
    if not path.is_dir():
        header = read_header(pydicom, path)
        if header is None:
            raise DataError(f"{printable(path)}: it holds no image.")
        found = [header]
    else:
        with readable(path):
            inside = sorted(path.iterdir())
        files = [file for file in inside if file.is_file() and has_mark(file)]
        found = [header for file in files if (header := read_header(pydicom, file)) is not None]
        found = [header for header in found if (header.class_uid in SEGMENTATIONS) == labels] or found
    if not found:
        folders = [folder.name for folder in inside if folder.is_dir()]
        hint = f" It has the folders {', '.join(folders[:5])}; give the one of a series." if folders else ""
        raise DataError(f"{printable(path)}: there is no DICOM image in this folder.{hint}")
    return _one_series(path, found, series)


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
        return _volume(location, headers[0], frames, len(frames))
    normal = _normal(location, frames)
    groups = _places(frames, normal)
    counts = Counter(len(group) for group in groups)
    if len(counts) > 1:
        raise DataError(
            f"{location}: {len(frames)} images lie at {len(groups)} places, {min(counts)} at some and {max(counts)} at "
            "others, so slices are missing or there twice. Give a folder with one complete series."
        )
    ordered = [sorted(group, key=lambda frame: (*frame.order, str(frame.path))) for group in groups]
    planes = [group[time] for time in range(len(groups[0])) for group in ordered]
    return _volume(location, headers[0], planes, len(groups), normal)


def _volume(
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


def _one_series(path: Path, headers: list[Header], series: str | None) -> tuple[Header, ...]:
    counts = Counter(header.series_uid for header in headers)
    if series is None and len(counts) == 1:
        return tuple(headers)
    chosen = tuple(header for header in headers if header.series_uid == series)
    if chosen:
        return chosen
    words = {header.series_uid: header.description for header in headers}
    listed = "; ".join(
        f"{uid} ({words[uid] or 'no description'}, {count:,} image{'s' * (count != 1)})"
        for uid, count in list(counts.items())[:5]
    )
    listed += f"; and {len(counts) - 5:,} more" if len(counts) > 5 else ""
    if series is not None:
        raise UsageError(f"{printable(path)}: there is no series {series!r}. There are: {listed}.")
    raise DataError(
        f"{printable(path)}: this folder holds {len(counts)} series: {listed}. Choose one by its SeriesInstanceUID (the "
        "part before the bracket) with the option series (--series UID), give each its own folder, or, if each file is an "
        "image of its own, give the files (such as 'folder/*.dcm')."
    )


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


def _normal(location: str, frames: Sequence[Frame]) -> NDArray[np.float64]:
    """The direction across the slices, which all must share."""
    first = np.array(frames[0].orientation)
    for frame in frames:
        if np.abs(np.array(frame.orientation) - first).max() > _PARALLEL:
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


def _places(frames: Sequence[Frame], normal: NDArray[np.float64]) -> list[list[Frame]]:
    """Frames at the same distance along the normal together, by ascending distance."""
    distances = np.array([frame.position for frame in frames]) @ normal
    groups: list[list[Frame]] = []
    last = -math.inf
    for index in np.argsort(distances, kind="stable"):
        if distances[index] - last > _SAME_PLACE_MM:
            groups.append([])
            last = distances[index]
        groups[-1].append(frames[index])
    return groups


def _space(frames: Sequence[Frame], normal: NDArray[np.float64]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The affine of a volume, (column, row, slice) to the patient in mm (RAS+), and what is odd about the positions.

    A tilted gantry shifts each slice sideways, so the step is taken from the positions.
    """
    first, count = frames[0], len(frames)
    if first.spacing_mm is None or any(frame.spacing_mm != first.spacing_mm for frame in frames):
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
    return {"affine": _LPS_TO_RAS @ affine, "zooms": zooms, "units": ("mm", "unknown")}, warnings


def own_planes(location: str, header: Header) -> Volume:
    """The planes that the segmentation itself has frames for."""
    normal = _normal(printable(location), header.frames)
    frames = [group[0] for group in _places(header.frames, normal)]
    return _volume("it", header, frames, len(frames), normal)


def planes_of(pydicom: Any, like: str, series: str | None) -> Volume:
    """The planes of a DICOM series, or of a NIfTI volume cut along its third axis."""
    name, path = printable(like), Path(like)
    if path.is_dir() or has_mark(path):
        volume = arrange(name, read_headers(pydicom, path, series))
        if "affine" not in volume.known:
            raise DataError(f"{name}: it does not say where its planes lie, so no segmentation can follow them.")
        return volume
    with open_nifti(like, intensity="type") as source:
        info, known = source.info, {key: value for key, value in source.metadata.items() if key != "intensity"}
    affine = _LPS_TO_RAS @ known["affine"]
    lengths = np.linalg.norm(affine[:3, :2], axis=0)
    orientation, spacing = (affine[:3, :2] / lengths).T.reshape(6).tolist(), lengths[::-1].tolist()
    places = [affine[:3, 3] + (plane % known["slices"]) * affine[:3, 2] for plane in range(info.planes)]
    frames = [
        Frame(path=path, index=index, position=tuple(place), orientation=tuple(orientation), spacing_mm=tuple(spacing))
        for index, place in enumerate(places)
    ]
    return Volume(name=name, frames=tuple(frames), size=(info.height, info.width), reference_uid="", known=known)


def on_planes(location: str, header: Header, volume: Volume) -> list[list[int]]:
    """For each plane of a volume the frames that lie on it; all frames lie on one."""
    differing = ""
    spacing, orientation = volume.frames[0].spacing_mm or (1.0, 1.0), np.array(volume.frames[0].orientation)
    positions = np.array([frame.position for frame in volume.frames])
    if (header.height, header.width) != volume.size:
        differing = f"{header.height} x {header.width} pixels, that one {volume.size[0]} x {volume.size[1]}"
    elif header.reference_uid and volume.reference_uid and header.reference_uid != volume.reference_uid:
        differing = "another frame of reference (FrameOfReferenceUID)"
    elif any(np.abs(np.array(frame.orientation) - orientation).max() > _PARALLEL for frame in header.frames):
        differing = "planes of another direction, or turned or mirrored ones"
    elif any(not np.allclose(frame.spacing_mm or 0, spacing, rtol=1e-3) for frame in header.frames):
        differing = f"pixels of {header.frames[0].spacing_mm} mm, that one of {spacing}"
    if differing:
        raise DataError(f"{location}: the segmentation does not lie on the grid of {volume.name}: it has {differing}.")
    normal = np.cross(orientation[:3], orientation[3:])
    distances = positions @ normal
    gaps = np.diff(np.unique(distances.round(4)))
    near = _NEAR * (gaps.min() if len(gaps) else min(spacing))
    found: list[list[int]] = [[] for _ in positions]
    for frame in header.frames:
        position = np.array(frame.position)
        planes = np.flatnonzero(np.abs(distances - position @ normal) <= near)
        shifts = np.linalg.norm(positions[planes] - position, axis=1)
        if not len(planes) or shifts.max() > near + _NEAR * min(spacing):
            raise DataError(
                f"{location}: frame {frame.index} of the segmentation, at {', '.join(f'{part:g}' for part in position)} mm, "
                f"lies on no plane of {volume.name}. Is it the series that was segmented?"
            )
        for plane in planes:
            found[plane].append(frame.index)
    return found
