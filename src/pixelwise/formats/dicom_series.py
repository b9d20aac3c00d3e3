"""From headers to a volume: one series of a folder, its slices in the order in which they lie in the patient.

Names of files and instance numbers say nothing reliable of that order; positions along the normal of the slices do.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.formats.dicom_header import Frame, Header, has_mark, read_header
from pixelwise.formats.local import readable
from pixelwise.formats.nifti import open_nifti
from pixelwise.formats.raster import printable

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_PARALLEL = 1e-3
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NEAR = 0.05  # of the distance between planes, or of a pixel: what positions of a segmentation may differ by
_SAME_PLACE_MM = 1e-4
_EVEN = 0.02  # of the distance between slices; positions are written with few digits


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Frames in the order of planes, and the space they span."""

    frames: tuple[Frame, ...]  # all slices of the first volume, along their normal, then those of the next
    slices: int  # of one volume
    volumes: int = 1  # images at each place, such as points in time
    affine: NDArray[np.float64] | None = (
        None  # (column, row, slice) to the patient in mm, RAS+; None without a position
    )
    spacing_mm: tuple[float, float, float] | None = None  # between columns, rows and slices; None where unknown
    warnings: tuple[str, ...] = ()  # what is odd about the positions, in words


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The planes that a segmentation shall have, in the patient's space of DICOM (LPS, mm)."""

    name: str  # what they belong to, for messages
    positions: NDArray[np.float64]  # centre of the first pixel of each plane
    orientation: NDArray[np.float64]  # direction of the rows, then that of the columns
    spacing_mm: tuple[float, float]  # between rows, between columns
    size: tuple[int, int]  # rows, columns
    reference_uid: str  # frame of reference; "" if unknown
    known: Mapping[str, Any]  # metadata on the geometry


def read_headers(pydicom: Any, path: Path, series: str | None, labels: bool = False) -> tuple[Header, ...]:
    """The headers of a file, or of the one series of a folder.

    Files of a folder that are no DICOM, or hold no image, do not count. Where segmentations lie beside images, images are
    taken, or segmentations if `labels`.

    Raises:
        DataError: a file is damaged, the folder has no image, or several series of which none was chosen.
        UsageError: the chosen series is not there.
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
    """The frames of a series in the order of their places.

    Raises:
        DataError: images differ in size or direction, one is there twice, or their places are unknown or incomplete.
    """
    _check_alike(location, headers)
    frames = [frame for header in headers for frame in header.frames]
    if any(frame.position is None or frame.orientation is None for frame in frames):
        if len(headers) > 1:
            raise DataError(
                f"{location}: of {len(headers)} images some have no ImagePositionPatient or ImageOrientationPatient, so "
                "their order is unknown. Give them one by one."
            )
        return Volume(frames=tuple(frames), slices=len(frames))
    normal = _normal(location, frames)
    groups = _places(frames, normal)
    counts = Counter(len(group) for group in groups)
    if len(counts) > 1:
        raise DataError(
            f"{location}: {len(frames)} images lie at {len(groups)} places, {min(counts)} at some and {max(counts)} at "
            "others, so slices are missing or there twice. Give a folder with one complete series."
        )
    volumes = len(groups[0])
    ordered = [sorted(group, key=lambda frame: (*frame.order, str(frame.path))) for group in groups]
    planes = tuple(group[volume] for volume in range(volumes) for group in ordered)
    volume = Volume(frames=planes, slices=len(groups), volumes=volumes)
    return _with_affine(volume, np.array([group[0].position for group in ordered]), normal)


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


def _with_affine(volume: Volume, positions: NDArray[np.float64], normal: NDArray[np.float64]) -> Volume:
    """The space of a volume; a tilted gantry shifts each slice sideways, so the step is taken from the positions."""
    first = volume.frames[0]
    if first.spacing_mm is None or any(frame.spacing_mm != first.spacing_mm for frame in volume.frames):
        return replace(volume, warnings=("PixelSpacing is missing or differs between slices",))
    count = len(positions)
    step = normal * (first.depth_mm or 1.0) if count == 1 else (positions[-1] - positions[0]) / (count - 1)
    length = float(np.linalg.norm(step))
    affine = np.eye(4)
    orientation = np.array(first.orientation)
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
    spacing = (first.spacing_mm[1], first.spacing_mm[0], length)
    return replace(volume, affine=_LPS_TO_RAS @ affine, spacing_mm=spacing, warnings=warnings)


def geometry(headers: Sequence[Header], volume: Volume) -> dict[str, Any]:
    """What a source says of the space and origin of its planes."""
    first = headers[0]
    shape = (first.width, first.height, volume.slices)
    known: dict[str, Any] = {
        "axis": 2,
        "shape": shape if volume.volumes == 1 else (*shape, volume.volumes),
        "slices": volume.slices,
        "time_points": volume.volumes,
        "even": not volume.warnings,
        "warnings": volume.warnings,
        "modality": first.modality,
        "series_uid": first.series_uid,
        "frame_of_reference_uid": first.reference_uid,
    }
    if volume.affine is not None and volume.spacing_mm is not None:
        zooms = (*volume.spacing_mm, 1.0) if volume.volumes > 1 else volume.spacing_mm
        known |= {"affine": volume.affine, "zooms": zooms, "units": ("mm", "unknown")}
    return known


def own_grid(location: str, header: Header) -> Grid:
    """The planes that the segmentation itself has frames for."""
    normal = _normal(printable(location), header.frames)
    places = _places(header.frames, normal)
    positions = np.array([place[0].position for place in places])
    volume = _with_affine(Volume(frames=tuple(place[0] for place in places), slices=len(places)), positions, normal)
    return _grid(header, positions, geometry((header,), volume))


def grid_of(pydicom: Any, like: str, series: str | None) -> Grid:
    """The planes of a DICOM series, or of a NIfTI volume cut along its third axis."""
    if Path(like).is_dir() or has_mark(Path(like)):
        headers = read_headers(pydicom, Path(like), series)
        volume = arrange(printable(like), headers)
        if volume.affine is None:
            raise DataError(
                f"{printable(like)}: it does not say where its planes lie, so no segmentation can follow them."
            )
        positions = np.array([frame.position for frame in volume.frames])
        return _grid(headers[0], positions, geometry(headers, volume), name=printable(like))
    with open_nifti(like, intensity="type") as source:
        info, known = source.info, {key: value for key, value in source.metadata.items() if key != "intensity"}
    affine = _LPS_TO_RAS @ known["affine"]
    lengths = np.linalg.norm(affine[:3, :2], axis=0)
    planes = np.arange(info.planes) % known["slices"]
    return Grid(
        name=printable(like),
        positions=affine[:3, 3] + planes[:, None] * affine[:3, 2],
        orientation=(affine[:3, :2] / lengths).T.reshape(6),
        spacing_mm=(float(lengths[1]), float(lengths[0])),
        size=(info.height, info.width),
        reference_uid="",
        known=known,
    )


def _grid(header: Header, positions: NDArray[np.float64], known: Mapping[str, Any], name: str = "it") -> Grid:
    first = header.frames[0]
    return Grid(
        name=name,
        positions=positions,
        orientation=np.array(first.orientation),
        spacing_mm=cast(tuple[float, float], first.spacing_mm),
        size=(header.height, header.width),
        reference_uid=header.reference_uid,
        known=known,
    )


def on_planes(location: str, header: Header, grid: Grid) -> list[list[int]]:
    """For each plane of the grid the frames that lie on it; all frames lie on one."""
    differing = ""
    if (header.height, header.width) != grid.size:
        differing = f"{header.height} x {header.width} pixels, that one {grid.size[0]} x {grid.size[1]}"
    elif header.reference_uid and grid.reference_uid and header.reference_uid != grid.reference_uid:
        differing = "another frame of reference (FrameOfReferenceUID)"
    elif any(np.abs(np.array(frame.orientation) - grid.orientation).max() > _PARALLEL for frame in header.frames):
        differing = "planes of another direction, or turned or mirrored ones"
    elif any(not np.allclose(frame.spacing_mm or 0, grid.spacing_mm, rtol=1e-3) for frame in header.frames):
        differing = f"pixels of {header.frames[0].spacing_mm} mm, that one of {grid.spacing_mm}"
    if differing:
        raise DataError(f"{location}: the segmentation does not lie on the grid of {grid.name}: it has {differing}.")
    normal = np.cross(grid.orientation[:3], grid.orientation[3:])
    distances = grid.positions @ normal
    gaps = np.diff(np.unique(distances.round(4)))
    near = _NEAR * (gaps.min() if len(gaps) else min(grid.spacing_mm))
    found: list[list[int]] = [[] for _ in grid.positions]
    for frame in header.frames:
        position = np.array(frame.position)
        planes = np.flatnonzero(np.abs(distances - position @ normal) <= near)
        shifts = np.linalg.norm(grid.positions[planes] - position, axis=1)
        if not len(planes) or shifts.max() > near + _NEAR * min(grid.spacing_mm):
            raise DataError(
                f"{location}: frame {frame.index} of the segmentation, at {', '.join(f'{part:g}' for part in position)} mm, "
                f"lies on no plane of {grid.name}. Is it the series that was segmented?"
            )
        for plane in planes:
            found[plane].append(frame.index)
    return found
