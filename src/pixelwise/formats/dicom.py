"""DICOM images and series through pydicom: a file of one or many frames, or a folder that holds one series.

Opening reads headers; a frame is decoded when a window of it is asked for, and the last few are kept. Numbers are what
the scanner meant (rescale slope and intercept, modality tables), then mapped to 0..1: by the display window of their
file, or by the range of the whole series if it has none. Black stays black: MONOCHROME1 is turned round.

Planes are slices along the normal of the images, rows and columns are those of the images.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.files import extra
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.dicom_codecs import plugin_for
from pixelwise.formats.dicom_header import Frame, Header, dicom_errors
from pixelwise.formats.dicom_series import arrange, read_headers
from pixelwise.formats.intensity import Intensity, Scaling, by_type, check_intensity
from pixelwise.formats.local import Stamp, fingerprint
from pixelwise.formats.raster import printable
from pixelwise.formats.tiff import MAGIC

_CACHE_BYTES = 64 * 2**20
_TIFF_NAMES = (".tif", ".tiff", ".btf", ".tf8", ".svs", ".ndpi", ".scn", ".bif")


def open_dicom(location: str, *, intensity: Intensity | str = "auto", series: str | None = None) -> Source:
    """Open an image or a series of which the headers are read.

    Args:
        location: a file, or the folder of a series (files in folders inside it do not count).
        intensity: how the numbers become 0..1; "auto" takes the display window of each file, or the range of the whole
            series where there is none; 8-bit numbers without a window, and colours, stay as they are.
        series: SeriesInstanceUID of the one to take of a folder that holds several.

    Returns:
        uint8 as stored where 8-bit numbers need no change, else float32 in 0..1. Its metadata: `affine` (4, 4; RAS+) and
        `zooms` in mm, `shape` (columns, rows, slices[, volumes]), `even` distances, `warnings`, `files` and `stamps`, the
        plane's file and frame in `frames`, and the `intensity` in use.

    Raises:
        DataError: a file is missing, damaged or compressed in a way that cannot be decoded; the folder holds no image or
            several series; images differ in size or direction, or are there twice.
        UsageError: an option is wrong, or pydicom is not installed.

    Example:
        >>> from pydicom.data import get_testdata_file
        >>> with open_dicom(get_testdata_file("CT_small.dcm", download=False)) as source:
        ...     source.info.height, source.info.width, source.metadata["zooms"]
        (128, 128, (0.661468, 0.661468, 5.0))
    """
    checked = check_intensity(intensity)
    pydicom = extra("pydicom", "medical", "DICOM")
    return _DicomSource(pydicom, location, checked, series)


def is_dicom(head: bytes, name: str) -> bool:
    """Whether a file is DICOM, by its first 4,096 bytes.

    The 128 bytes before the mark may be the start of a TIFF, in files that are both; of these the name decides.

    Example:
        >>> is_dicom(bytes(128) + b"DICM", "IM0001")
        True
        >>> both = b"II*\\0".ljust(128) + b"DICM"
        >>> is_dicom(both, "slide.dcm"), is_dicom(both, "slide.tif")
        (True, False)
    """
    is_named_tiff = head[:4] in MAGIC and name.lower().endswith(_TIFF_NAMES)
    return head[128:132] == b"DICM" and not is_named_tiff


class _DicomSource(Source):
    def __init__(self, pydicom: Any, location: str, intensity: Intensity, series: str | None) -> None:
        self._pydicom = pydicom
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()
        headers = read_headers(pydicom, Path(location), series)
        self._headers = {header.path: header for header in headers}
        self._volume = arrange(printable(location), headers)
        self._intensity = intensity
        first = headers[0]
        has_window = any(frame.window is not None for frame in self._volume.frames)
        is_8_bit = all(header.bits == 8 and not header.signed and not header.palette for header in headers)
        is_color = first.channels == 3
        same = is_color or all((frame.slope, frame.intercept) == (1.0, 0.0) for frame in self._volume.frames)
        auto = intensity == "auto" and same and (is_color or not has_window)
        self._stays = any(header.palette for header in headers) or is_8_bit
        self._stays = self._stays and (auto or intensity == "type")
        self.info = SourceInfo(
            location=location,
            format="dicom",
            height=first.height,
            width=first.width,
            channels=first.channels,
            dtype="uint8" if self._stays else "float32",
            planes=len(self._volume.frames),
            block_px=(first.height, first.width),
        )

    @property
    def metadata(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Geometry and origin, and the range in use, for which all slices may have to be read."""
        return MappingProxyType(self._known | {"intensity": self._used})

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window as (height, width, C): uint8, or float32 in 0..1."""
        stored = self._stored(plane)[top : top + height, left : left + width]
        frame = self._volume.frames[plane]
        header = self._headers[frame.path]
        scaling = self._scaling(frame, header)
        if scaling is not None:
            return scaling.apply(_meant(stored, frame))
        if header.inverted:
            stored = header.largest - stored if not header.signed else -1 - stored.astype(np.int64)
        return np.ascontiguousarray(stored) if self._stays else by_type(stored, header.largest)

    def fingerprint(self) -> str:
        """Of the file, or of all files of the series in the order of their planes."""
        found = [fingerprint(path) for path in dict.fromkeys(frame.path for frame in self._volume.frames)]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise `DataError` if a file has changed."""
        for header in self._headers.values():
            header.stamp.check(header.path)

    def close(self) -> None:
        """Forget the decoded frames."""
        with self._lock:
            self._kept.clear()

    def _stored(self, plane: int) -> NDArray[Any]:
        """The numbers (H, W, C) of a frame before slope and window, from the last few frames if it is one of them."""
        with self._lock:
            if plane in self._kept:
                self._kept.move_to_end(plane)
                return self._kept[plane]
        frame = self._volume.frames[plane]
        with dicom_errors(frame.path):
            array = self._decoded(frame)
        with self._lock:
            self._kept[plane] = array
            while len(self._kept) > 1 and sum(item.nbytes for item in self._kept.values()) > _CACHE_BYTES:
                self._kept.popitem(last=False)
        return array

    def _decoded(self, frame: Frame) -> NDArray[Any]:
        pixels, header = self._pydicom.pixels, self._headers[frame.path]
        dataset = self._pydicom.Dataset()
        array = pixels.pixel_array(
            frame.path, index=frame.index, ds_out=dataset, decoding_plugin=plugin_for(header.syntax)
        )
        if header.palette:
            array = pixels.apply_color_lut(array, dataset)
            if array.dtype != np.uint8:  # tables of 16 bits hold 8 bits in their upper half
                array = (array >> 8).astype(np.uint8)
        elif dataset.get("ModalityLUTSequence"):
            array = pixels.apply_modality_lut(array, dataset)
        array = array[:, :, None] if array.ndim == 2 else array
        if array.shape != (header.height, header.width, header.channels):
            raise DataError(
                f"its pixels have the shape {array.shape}, but its header says {header.height} x {header.width} of "
                f"{header.channels} channels."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(
                f"frame {frame.index} holds {int((~np.isfinite(array)).sum()):,} pixels that are NaN or infinite. Replace "
                "them."
            )
        return array

    def _scaling(self, frame: Frame, header: Header) -> Scaling | None:
        """The map to 0..1 of what a frame means; None where the type decides."""
        if self._stays or self._intensity == "type" or (self._intensity == "auto" and header.channels == 3):
            return None
        if self._intensity != "auto":
            return Scaling(low=self._intensity[0], high=self._intensity[1], inverted=header.inverted)
        if frame.window is not None:
            return frame.window
        low, high = self._range
        return Scaling(low=low, high=high, inverted=header.inverted)

    @cached_property
    def _range(self) -> tuple[float, float]:
        """The least and largest number of all frames; what only fills the picture up does not count."""
        low, high = np.inf, -np.inf
        for plane, frame in enumerate(self._volume.frames):
            stored, padding = self._stored(plane), self._headers[frame.path].padding
            kept = stored if padding is None else stored[stored != padding]
            if kept.size:
                ends = _meant(np.array([kept.min(), kept.max()]), frame)
                low, high = min(low, float(ends.min())), max(high, float(ends.max()))
        return (low, high) if low <= high else (0.0, 1.0)

    @cached_property
    def _used(self) -> dict[str, Any]:
        used = [self._scaling(frame, self._headers[frame.path]) for frame in self._volume.frames]
        kinds = list(dict.fromkeys(used))
        if kinds[0] is None:
            return {"function": "type"}
        if len(kinds) == 1:
            return kinds[0].to_dict()
        return {"function": "window of each slice", "planes": [item.to_dict() for item in used if item is not None]}

    @cached_property
    def _known(self) -> dict[str, Any]:
        volume, first = self._volume, next(iter(self._headers.values()))
        shape = (self.info.width, self.info.height, volume.slices)
        known: dict[str, Any] = {
            "axis": 2,
            "shape": shape if volume.volumes == 1 else (*shape, volume.volumes),
            "slices": volume.slices,
            "time_points": volume.volumes,
            "even": not volume.warnings,
            "warnings": volume.warnings,
            "files": tuple(str(path) for path in self._headers),
            "stamps": tuple(_plain(header.stamp) for header in self._headers.values()),
            "frames": tuple((str(frame.path), frame.index) for frame in volume.frames),
            "modality": first.modality,
            "series_uid": first.series_uid,
            "frame_of_reference_uid": first.reference_uid,
        }
        if volume.affine is not None and volume.spacing_mm is not None:
            zooms = (*volume.spacing_mm, 1.0) if volume.volumes > 1 else volume.spacing_mm
            known |= {"affine": volume.affine, "zooms": zooms, "units": ("mm", "unknown")}
        return known


def _plain(stamp: Stamp) -> tuple[int, int, int]:
    return stamp.size, stamp.mtime_ns, stamp.inode


def _meant(stored: NDArray[Any], frame: Frame) -> NDArray[np.float64]:
    return stored.astype(np.float64) * frame.slope + frame.intercept
