"""DICOM Segmentation objects: read as masks on the planes of their series, and written with highdicom.

Of the classes that are written each becomes a binary segment, but for one that is called "background", "void",
"unlabeled" or "unlabelled": by name, not by place, because the first of two organs is no background. highdicom builds
the object as a whole, so the labels of all slices (a byte each) and the packed segments (a bit for each class) are in
memory while it is written.
"""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.extras import extra
from pixelwise.files import writing
from pixelwise.formats.base import BACKGROUND, Result, Source, SourceInfo
from pixelwise.formats.dicom import read_headers
from pixelwise.formats.dicom_frame import Frame
from pixelwise.formats.dicom_series import (
    LPS_TO_RAS,
    PARALLEL,
    Header,
    Volume,
    arrange,
    dicom_errors,
    has_mark,
    make_volume,
    normal_of,
    places_of,
    quiet,
    safe_text,
)
from pixelwise.formats.local import Identity, Stamp, printable
from pixelwise.formats.nifti import open_nifti

_CACHE_BYTES = 64 * 2**20
_NEAR = 0.05  # of the distance between planes, or of a pixel: what positions of a segmentation may differ by
_FRAME_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_MAX_BYTES = 2 * 2**30
_TISSUE = ("85756007", "SCT", "Tissue")
_AI = ("123109", "DCM", "Artificial Intelligence")
_LABEL_LETTERS = 64  # DICOM's long string
_SERIES_NUMBER = 9000
_MARK = "pixelwise"
_MARK_LETTERS = 10_000  # the algorithm's parameters are DICOM's long text of 10,240


def open_segmentation(
    pydicom: Any, location: str, headers: Sequence[Header], like: str | None, series: str | None
) -> Source:
    """Open a DICOM-SEG of binary segments or a label map as a mask: 0 is background, other numbers are segments.

    The mask has the planes of `like` (a DICOM series, of which `series` may choose one, or a NIfTI volume).
    """
    if len(headers) > 1:
        raise DataError(f"{printable(location)}: there are {len(headers)} segmentations in this folder. Give one file.")
    header = headers[0]
    tags = ["SegmentationType", "SegmentSequence", *_FRAME_GROUPS]
    with dicom_errors(header.path):
        dataset = pydicom.dcmread(header.path, stop_before_pixels=True, specific_tags=tags)
        kind = str(dataset.get("SegmentationType", ""))
        if kind not in ("BINARY", "LABELMAP"):
            raise DataError(
                f"its segments are {safe_text(kind)}, not labels: BINARY and LABELMAP can be read. Apply a threshold."
            )
        if any(
            frame.position is None or frame.orientation is None or frame.spacing_mm is None for frame in header.frames
        ):
            raise DataError("its frames do not say where they lie in the patient, so they belong to no image.")
        labels = {int(item.SegmentNumber): safe_text(item.get("SegmentLabel", "")) for item in dataset.SegmentSequence}
        labels = {number: labels[number] for number in sorted(labels) if number > 0}
        segments = _segments(dataset, len(header.frames)) if kind == "BINARY" else ()
    volume = _own_planes(location, header) if like is None else _planes_of(pydicom, like, series)
    return _SegmentationSource(pydicom, location, header, labels, segments, volume)


def _own_planes(location: str, header: Header) -> Volume:
    """The planes that the segmentation itself has frames for."""
    normal = normal_of(printable(location), header.frames)
    frames = [group[0] for group in places_of(header.frames, normal)]
    return make_volume("it", header, frames, len(frames), normal)


def _planes_of(pydicom: Any, like: str, series: str | None) -> Volume:
    """The planes of a DICOM series, or of a NIfTI volume cut along its third axis."""
    name, path = printable(like), Path(like)
    if path.is_dir() or has_mark(path):
        volume = arrange(name, read_headers(pydicom, path, series))
        if "affine" not in volume.known:
            raise DataError(f"{name}: it does not say where its planes lie, so no segmentation can follow them.")
        return volume
    with open_nifti(like, intensity="type") as source:
        info, known = source.info, {key: value for key, value in source.metadata.items() if key != "intensity"}
    affine = LPS_TO_RAS @ known["affine"]
    lengths = np.linalg.norm(affine[:3, :2], axis=0)
    orientation, spacing = (affine[:3, :2] / lengths).T.reshape(6).tolist(), lengths[::-1].tolist()
    places = [affine[:3, 3] + (plane % known["slices"]) * affine[:3, 2] for plane in range(info.planes)]
    frames = [
        Frame(path=path, index=index, position=tuple(place), orientation=tuple(orientation), spacing_mm=tuple(spacing))
        for index, place in enumerate(places)
    ]
    return Volume(name=name, frames=tuple(frames), size=(info.height, info.width), reference_uid="", known=known)


def _on_planes(location: str, header: Header, volume: Volume) -> list[list[int]]:
    """For each plane of a volume the frames that lie on it; all frames lie on one."""
    differing = ""
    spacing, orientation = volume.frames[0].spacing_mm or (1.0, 1.0), np.array(volume.frames[0].orientation)
    positions = np.array([frame.position for frame in volume.frames])
    if (header.height, header.width) != volume.size:
        differing = f"{header.height} x {header.width} pixels, that one {volume.size[0]} x {volume.size[1]}"
    elif header.reference_uid and volume.reference_uid and header.reference_uid != volume.reference_uid:
        differing = "another frame of reference (FrameOfReferenceUID)"
    elif any(np.abs(np.array(frame.orientation) - orientation).max() > PARALLEL for frame in header.frames):
        differing = "planes of another direction, or turned or mirrored ones"
    elif any(not np.allclose(frame.spacing_mm or 0, spacing, rtol=1e-3) for frame in header.frames):
        differing = f"pixels of {header.frames[0].spacing_mm} mm, that one of {spacing}"
    if differing:
        raise DataError(f"{location}: the segmentation does not lie on the grid of {volume.name}: it has {differing}.")
    normal = np.cross(orientation[:3], orientation[3:])
    distances = positions @ normal
    gaps = np.diff([float(np.array(group[0].position) @ normal) for group in places_of(volume.frames, normal)])
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


class _SegmentationSource(Source):
    """A label map of as many planes as the volume has; where the segmentation has no frame, it is background."""

    def __init__(
        self,
        pydicom: Any,
        location: str,
        header: Header,
        labels: Mapping[int, str],
        segments: Sequence[int],
        volume: Volume,
    ) -> None:
        self._pydicom, self._header, self._labels, self._segments = pydicom, header, labels, segments
        self.identity = Identity.of_stamps({header.path: header.stamp})
        (height, width), dtype = volume.size, "uint8" if max(labels, default=0) < 256 else "uint16"
        self.info = SourceInfo(
            location=location, format="dicom", height=height, width=width, channels=1, dtype=dtype,
            planes=len(volume.frames), block_px=(height, width),
        )  # fmt: skip
        self._frames = _on_planes(printable(location), header, volume)
        self.metadata = MappingProxyType(
            dict(volume.known)
            | {"modality": "SEG", "series_uid": header.series_uid}
            | {"segments": {str(number): label for number, label in labels.items()}}
        )
        nbytes = height * width * np.dtype(self.info.dtype).itemsize
        self._plane = lru_cache(maxsize=max(1, _CACHE_BYTES // nbytes))(self._composed)

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window as (height, width, 1): numbers of segments, 0 where there is none."""
        return np.ascontiguousarray(self._plane(plane)[top : top + height, left : left + width, None])

    def close(self) -> None:
        self._plane.cache_clear()

    def _composed(self, plane: int) -> NDArray[Any]:
        """The label map of a plane, of all frames that lie on it."""
        found = np.zeros((self.info.height, self.info.width), self.info.dtype)
        with dicom_errors(self._header.path):
            for index in self._frames[plane]:
                frame = self._frame(index)
                if self._segments:
                    frame = (frame > 0) * found.dtype.type(self._segments[index])
                taken = (found > 0) & (frame > 0) & (found != frame)
                if taken.any():
                    pairs = sorted({(int(found[taken][0]), int(frame[taken][0]))})[0]
                    names = " and ".join(f"{number} ({self._labels.get(number, '')})" for number in sorted(pairs))
                    raise DataError(
                        f"segments {names} overlap in {int(taken.sum()):,} pixels of plane {plane}, but a mask holds one "
                        "label for each pixel. Remove one, or write each segment to a file of its own."
                    )
                np.copyto(found, frame, where=frame > 0, casting="unsafe")
        return found

    def _frame(self, index: int) -> NDArray[Any]:
        """A frame as stored."""
        if self._header.allocated > 1:
            return np.asarray(self._pydicom.pixels.pixel_array(self._header.path, index=index))
        # pydicom 3.0 fails at single frames whose bits end in the middle of a byte
        count = self.info.height * self.info.width
        first, start = divmod(index * count, 8)
        bits = np.unpackbits(self._packed[first : first + count // 8 + 2], bitorder="little")
        return bits[start : start + count].reshape(self.info.height, self.info.width)

    @cached_property
    def _packed(self) -> NDArray[np.uint8]:
        dataset = self._pydicom.dcmread(self._header.path, specific_tags=["PixelData"])
        return np.frombuffer(dataset.PixelData, dtype=np.uint8)


def _segments(dataset: Any, count: int) -> tuple[int, ...]:
    """The number of the segment that each frame shows."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    own = dataset.get("PerFrameFunctionalGroupsSequence") or [{}] * count
    groups = (item.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence for item in own)
    return tuple(int(group[0].ReferencedSegmentNumber) for group in groups)


def write_dicom_seg(path: Path, result: Result) -> None:
    """Write labels as a DICOM Segmentation (.dcm) of binary segments, one per class.

    The object belongs to the study, patient and frame of reference of the source; each frame names the image it lies on.
    """
    path = Path(path)
    _check_size(path, result)
    highdicom, pydicom = extra("highdicom", "medical", "DICOM-SEG"), extra("pydicom", "medical", "DICOM-SEG")
    classes = [k for k, name in enumerate(result.spec.names) if name.strip().casefold() not in BACKGROUND]
    if not classes:
        raise UsageError(f"{path}: no class is left to be a segment: {', '.join(result.spec.names)} mean background.")
    images = _source_images(pydicom, result)
    labels = _segment_numbers(result, classes)
    segmentation = _segmentation(highdicom, result, images, labels, classes)
    with writing(path) as part, quiet():
        segmentation.save_as(part)


def _check_size(path: Path, result: Result) -> None:
    source = result.source
    packed = source.height * source.width * source.planes * (1 + result.spec.num_classes / 8)
    if packed > _MAX_BYTES:
        raise PixelwiseError(
            f"{path}: a DICOM segmentation of this size takes {packed / 2**30:.1f} GiB of memory; at most "
            f"{_MAX_BYTES >> 30} GiB are taken. Write NIfTI (.nii.gz), which is written slice by slice."
        )


def _source_images(pydicom: Any, result: Result) -> list[Any]:
    """The headers of all source files again, in the order of the planes, if the files are still the same."""
    stamps = dict(zip(result.metadata["files"], result.metadata["stamps"], strict=True))
    images = []
    for name in dict.fromkeys(name for name, _ in result.metadata["frames"]):
        Stamp(*stamps[name]).check(name)
        with dicom_errors(Path(name)):
            images.append(pydicom.dcmread(name, stop_before_pixels=True))
    frames = [int(image.get("NumberOfFrames") or 1) for image in images]
    if len(images) > 1 and max(frames) > 1:
        raise PixelwiseError(
            f"{result.source.location}: a DICOM segmentation refers to one file of many frames or to many of one, not to "
            "several of many. Choose another format, such as NIfTI (.nii.gz)."
        )
    return images


def _segment_numbers(result: Result, classes: Sequence[int]) -> NDArray[np.uint8]:
    """uint8 (planes, H, W) in the order of the source's frames: 0 nothing, then the segments from 1 on."""
    numbers = np.zeros(2 ** (8 * result.dtype.itemsize), dtype=np.uint8)
    numbers[list(classes)] = range(1, len(classes) + 1)
    if result.nodata is not None:
        numbers[result.nodata] = 0
    source, frames = result.source, result.metadata["frames"]
    is_one_file = len({name for name, _ in frames}) == 1
    labels = np.empty((source.planes, source.height, source.width), dtype=np.uint8)
    for plane in range(source.planes):
        place = frames[plane][1] if is_one_file else plane
        labels[place] = numbers[result.rows(plane, 0, source.height)]
    return labels


def _segmentation(
    highdicom: Any, result: Result, images: list[Any], labels: NDArray[np.uint8], classes: Sequence[int]
) -> Any:
    version = importlib.metadata.version("pixelwise")
    try:
        with quiet():
            return highdicom.seg.Segmentation(
                source_images=images,
                pixel_array=labels,
                segmentation_type="BINARY",
                segment_descriptions=_descriptions(highdicom, result, classes, version),
                series_instance_uid=highdicom.UID(),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="pixelwise",
                manufacturer_model_name="pixelwise",
                software_versions=version,
                device_serial_number=str(result.mark.get("model", "none"))[:_LABEL_LETTERS],  # hash of the weights
                content_label="PIXELWISE",
                content_description="Labels by a neural network",
                series_description="pixelwise labels",
                omit_empty_frames=bool(labels.any()),
            )
    except Exception as error:  # noqa: BLE001  (of what highdicom misses, and how)
        # what highdicom misses is named by its keyword; values of the patient are not quoted
        missing = f" ({error})" if isinstance(error, AttributeError) and "has no attribute" in str(error) else ""
        raise DataError(
            f"{result.source.location}: its headers do not allow a DICOM segmentation, because something that the standard "
            f"demands is missing or wrong{missing or f' ({type(error).__name__})'}. Choose another format, such as NIfTI."
        ) from None


def _descriptions(highdicom: Any, result: Result, classes: Sequence[int], version: str) -> list[Any]:
    tissue = highdicom.sr.CodedConcept(*_TISSUE)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="pixelwise",
        family=highdicom.sr.CodedConcept(*_AI),
        version=version,
        parameters={_MARK: json.dumps(dict(result.mark), sort_keys=True, default=str)[:_MARK_LETTERS]},
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=result.spec.names[k][:_LABEL_LETTERS].replace("\\", "/"),
            segmented_property_category=tissue,
            segmented_property_type=tissue,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            display_color=highdicom.color.CIELabColor.from_rgb(*result.spec.colors[k]),
        )
        for number, k in enumerate(classes, start=1)
    ]
