"""Labels as a DICOM Segmentation object that refers to the images they were made from, through highdicom.

Each class becomes a binary segment, but for one that is called "background", "void", "unlabeled" or "unlabelled": by
name, not by place, because the first of two organs is no background. highdicom builds the object as a whole, so the
labels of all slices (a byte each) and the packed segments (a bit for each class) are in memory while it is written.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import atomic_path, cannot_write, extra
from pixelwise.formats.base import LABELS, Result
from pixelwise.formats.dicom_header import LOGGER, dicom_errors
from pixelwise.formats.intensity import quiet
from pixelwise.formats.local import Stamp
from pixelwise.formats.raster import DECODE_ERRORS

NO_SEGMENT = ("background", "void", "unlabeled", "unlabelled")
"""Classes of these names (in any case) get no segment."""

_MAX_BYTES = 2 * 2**30
_TISSUE = ("85756007", "SCT", "Tissue")
_AI = ("123109", "DCM", "Artificial Intelligence")
_LABEL_LETTERS = 64  # DICOM's long string
_SERIES_NUMBER = 9000
_MARK = "pixelwise"
_MARK_LETTERS = 10_000  # the algorithm's parameters are DICOM's long text of 10,240


def write_dicom_seg(path: Path, result: Result) -> None:
    """Write labels as a DICOM Segmentation (.dcm) of binary segments, one per class.

    The object belongs to the study, patient and frame of reference of the source; each frame names the image it lies on.

    Raises:
        UsageError: the result is no labels, the source is no DICOM, or the name does not end in .dcm.
        DataError: a source file changed since it was opened.
        PixelwiseError: the source has no position in space, the labels are too large, or the file cannot be written.

    Example:
        >>> import tempfile, pydicom
        >>> from pydicom.data import get_testdata_file
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.formats.dicom import open_dicom
        >>> spec = LabelSpec(names=("background", "bone"), colors=((0, 0, 0), (255, 255, 0)), values=((0,), (1,)))
        >>> target = Path(tempfile.mkdtemp()) / "labels.dcm"
        >>> with open_dicom(get_testdata_file("CT_small.dcm", download=False)) as source:
        ...     write_dicom_seg(target, Result(
        ...         kind="labels", spec=spec, source=source.info, metadata=source.metadata, dtype=np.dtype("uint8"),
        ...         rows=lambda plane, top, bottom: np.ones((bottom - top, 128), dtype=np.uint8)))
        >>> pydicom.dcmread(target).SegmentSequence[0].SegmentLabel
        'bone'
    """
    path = Path(path)
    _check(path, result)
    highdicom, pydicom = extra("highdicom", "medical", "DICOM-SEG"), extra("pydicom", "medical", "DICOM-SEG")
    classes = [k for k, name in enumerate(result.spec.names) if name.strip().casefold() not in NO_SEGMENT]
    if not classes:
        raise UsageError(f"{path}: no class is left to be a segment: {', '.join(result.spec.names)} mean background.")
    images = _source_images(pydicom, result)
    labels = _segment_numbers(result, classes)
    segmentation = _segmentation(highdicom, path, result, images, labels, classes)
    try:
        with atomic_path(path) as part, quiet(LOGGER, "highdicom"):
            segmentation.save_as(part)
    except OSError as error:
        raise cannot_write(path, error) from error


def read_dicom_seg_mark(path: str | Path) -> dict[str, Any] | None:
    """The mark of a file that `write_dicom_seg` wrote; None for every other file, however damaged.

    Example:
        >>> read_dicom_seg_mark("no/such.dcm") is None
        True
    """
    pydicom = extra("pydicom", "medical", "DICOM-SEG")
    try:
        with dicom_errors(Path(path)):
            found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SegmentSequence"])
            text = found.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
            mark = json.loads(str(text).partition(f"{_MARK}=")[2])
    except DataError:
        return None
    return mark if isinstance(mark, dict) else None


def _check(path: Path, result: Result) -> None:
    if result.kind != LABELS:
        raise UsageError(f"{path}: DICOM-SEG holds labels, not {result.kind}. Write maps as NIfTI (.nii.gz).")
    if path.suffix.lower() != ".dcm":
        raise UsageError(f"{path}: DICOM-SEG is written to a name that ends in .dcm.")
    source = result.source
    if source.format != "dicom" or "frames" not in result.metadata:
        raise UsageError(
            f"{path}: {source.location} is {source.format}, but a DICOM segmentation refers to DICOM images. Choose another "
            "format, such as NIfTI (.nii.gz)."
        )
    if "affine" not in result.metadata or not result.metadata["frame_of_reference_uid"]:
        raise PixelwiseError(
            f"{path}: {source.location} does not say where it lies in space (ImagePositionPatient, PixelSpacing, "
            "FrameOfReferenceUID), which a DICOM segmentation needs. Choose another format."
        )
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
    highdicom: Any, path: Path, result: Result, images: list[Any], labels: NDArray[np.uint8], classes: Sequence[int]
) -> Any:
    version = importlib.metadata.version("pixelwise")
    try:
        with quiet(LOGGER, "highdicom"):
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
    except DECODE_ERRORS as error:
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
