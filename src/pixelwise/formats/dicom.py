"""DICOM images and series through pydicom: a file of one or many frames, or a folder that holds one series.

Opening reads headers; a frame is decoded when a window of it is asked for, and the last few are kept. Numbers are what
the scanner meant (rescale slope and intercept, modality tables), then mapped to 0..1: by the display window of their
file, or by the range of the whole series if it has none. Black stays black: MONOCHROME1 is turned round. Masks are the
numbers as stored; segmentations (DICOM-SEG) are read in `dicom_seg`.

Planes are slices along the normal of the images, rows and columns are those of the images. What pydicom and its plugins
leave out (JPEG lossless, JPEG of 12 bits, High-Throughput JPEG 2000, JPEG 2000 of wide colours) imagecodecs decodes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError, UsageError
from pixelwise.extras import extra
from pixelwise.formats.base import TIFF_MAGIC, Source, SourceInfo, check_finite, whole_numbers
from pixelwise.formats.dicom_frame import Frame
from pixelwise.formats.dicom_series import (
    SEGMENTATIONS,
    Header,
    arrange,
    dicom_errors,
    has_mark,
    is_marked,
    read_header,
    safe_text,
)
from pixelwise.formats.intensity import Intensity, LookUp, Scaling, by_type, check_intensity
from pixelwise.formats.local import Identity, is_dicom_head, printable, readable

_CACHE_BYTES = 64 * 2**20
_DICOM_NAMES = (".dcm", ".dicom", ".ima")
_TIFF_NAMES = (".tif", ".tiff", ".btf", ".tf8", ".svs", ".ndpi", ".scn", ".bif")

DECODER_DEPENDENCIES = dict.fromkeys(
    (f"1.2.840.10008.1.2.4.{code}" for code in (51, 57, 70, 90, 91, 201, 202, 203)), ("imagecodecs",)
)
"""The transfer syntaxes that `decode` knows and what they need, as pydicom asks of a plugin."""


def open_dicom(
    location: str,
    *,
    intensity: Intensity | str = "auto",
    series: str | None = None,
    labels: bool = False,
    like: str | None = None,
) -> Source:
    """Open a file, or the one series of a folder (folders inside it do not count), of which the headers are read.

    `intensity` "auto" takes the display window of each file, or the range of the whole series where there is none; 8-bit
    numbers without a window, and colours, stay as they are. `series` is the SeriesInstanceUID of the one to take of a
    folder that holds several. Masks (`labels`) are the numbers as stored, of a segmentation the numbers of its segments;
    `like` is the series or NIfTI volume whose planes a segmentation shall have, by default those it has frames for.

    Pixels are uint8 as stored where 8-bit numbers need no change, else float32 in 0..1. Metadata: `affine` (4, 4; RAS+) and
    `zooms` in mm, `shape` (columns, rows, slices[, volumes]), `even` distances, `warnings`, `files` and `stamps`, the
    plane's file and frame in `frames`, and the `intensity` in use; of masks no intensity, of segmentations `segments`
    (label of each number), of palettes `palette`.
    """
    checked = check_intensity(intensity)
    pydicom = extra("pydicom", "medical", "DICOM")
    if like is not None and not labels:
        raise UsageError(f"{location}: like is an option of masks (labels).")
    headers = read_headers(pydicom, Path(location), None if like else series, labels)
    for header in headers:
        with dicom_errors(header.path):
            _check_decoder(header.syntax)
    if headers[0].class_uid not in SEGMENTATIONS:
        return _DicomSource(pydicom, location, headers, checked, labels)
    if not labels:
        raise DataError(
            f"{printable(location)}: this is a segmentation (DICOM-SEG), no image. Use it as the mask of the series that it "
            "belongs to."
        )
    from pixelwise.formats.dicom_seg import open_segmentation

    return open_segmentation(pydicom, location, headers, like, series)


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
        lost = [file.name for file in inside if _is_named_dicom(file) and file not in files]
        if files and lost:
            names = ", ".join(map(safe_text, lost[:5])) + (", ..." if len(lost) > 5 else "")
            raise DataError(
                f"{printable(path)}: of its files {len(lost)} are named as DICOM but are not, or are damaged: {names}. "
                "Slices would be missing. Repair or remove them."
            )
        found = [header for file in files if (header := read_header(pydicom, file)) is not None]
        found = [header for header in found if (header.class_uid in SEGMENTATIONS) == labels] or found
    if not found:
        folders = [folder.name for folder in inside if folder.is_dir()]
        hint = f" It has the folders {', '.join(folders[:5])}; give the one of a series." if folders else ""
        raise DataError(f"{printable(path)}: there is no DICOM image in this folder.{hint}")
    return _one_series(path, found, series)


def _is_named_dicom(path: Path) -> bool:
    return path.suffix.lower() in _DICOM_NAMES and not path.name.startswith(".") and path.is_file()


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


def is_dicom(head: bytes, name: str) -> bool:
    """Whether a file is DICOM, by its first 4,096 bytes.

    The 128 bytes before the mark may be the start of a TIFF, in files that are both; of these the name decides.
    """
    is_named_tiff = head[:4] in TIFF_MAGIC and name.lower().endswith(_TIFF_NAMES)
    return is_dicom_head(head) and not is_named_tiff


class _DicomSource(Source):
    def __init__(
        self, pydicom: Any, location: str, headers: Sequence[Header], intensity: Intensity, labels: bool
    ) -> None:
        self._pydicom, self._intensity, self._labels = pydicom, intensity, labels
        self._headers = {header.path: header for header in headers}
        self._volume = arrange(printable(location), headers)
        frames, first = self._volume.frames, headers[0]
        self._stamps = {frame.path: self._headers[frame.path].stamp for frame in frames}  # in the order of the planes
        self.identity = Identity.of_stamps(self._stamps)
        is_8_bit = all(header.bits == 8 and not header.signed and not header.palette for header in headers)
        is_color = first.channels == 3
        same = all((frame.slope, frame.intercept, frame.window) == (1.0, 0.0, None) for frame in frames)
        same = same and not any(header.has_table for header in headers)
        self._stays = any(header.palette for header in headers) or is_8_bit
        self._stays = self._stays and (intensity == "type" or (intensity == "auto" and (is_color or same)))
        dtype = np.result_type(*map(_stored_type, headers)).name if labels else "uint8" if self._stays else "float32"
        self.info = SourceInfo(
            location=location, format="dicom", height=first.height, width=first.width,
            channels=1 if labels and first.palette else first.channels, dtype=dtype, planes=len(frames),
            block_px=(first.height, first.width),
        )  # fmt: skip
        nbytes = first.height * first.width * self.info.channels * max(1, first.allocated // 8)
        self._stored = lru_cache(maxsize=max(1, _CACHE_BYTES // nbytes))(self._decoded)

    @property
    def metadata(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Geometry and origin, and the range in use, for which all slices may have to be read."""
        return MappingProxyType(self._known if self._labels else self._known | {"intensity": self._used})

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window as (height, width, C): uint8, or float32 in 0..1, or whole numbers."""
        stored = self._stored(plane)[top : top + height, left : left + width]
        frame = self._volume.frames[plane]
        header = self._headers[frame.path]
        if self._labels:
            with dicom_errors(frame.path):
                whole = whole_numbers(stored == 1 if header.allocated == 1 else stored)
            return np.ascontiguousarray(whole, dtype=self.info.dtype)
        scaling = self._scaling(frame, header)
        if scaling is not None:
            return scaling.apply(_meant(stored, frame))
        if header.inverted:
            stored = header.largest - stored if not header.signed else -1 - stored.astype(np.int64)
        if self._stays:  # 8 bits may be stored in 16
            return np.ascontiguousarray(stored, dtype=self.info.dtype)
        return by_type(stored, header.largest)

    def close(self) -> None:
        """Forget the decoded frames."""
        self._stored.cache_clear()

    def _decoded(self, plane: int) -> NDArray[Any]:
        """The numbers (H, W, C) of a frame before slope and window."""
        frame = self._volume.frames[plane]
        header, pixels, dataset = self._headers[frame.path], self._pydicom.pixels, self._pydicom.Dataset()
        with dicom_errors(frame.path):
            if is_marked(frame.path):
                array = pixels.pixel_array(frame.path, index=frame.index, ds_out=dataset)
            else:
                dataset = self._pydicom.dcmread(frame.path, force=True)
                dataset.file_meta = self._pydicom.dataset.FileMetaDataset()
                dataset.file_meta.TransferSyntaxUID = header.syntax
                array = pixels.pixel_array(dataset, index=frame.index)
            if header.palette and not self._labels:
                array = _colors(pixels, array, dataset)
            elif header.has_table and not self._labels and self._intensity != "type":
                array = pixels.apply_modality_lut(array, dataset)
            array = array[:, :, None] if array.ndim == 2 else array
            shape = (self.info.height, self.info.width, self.info.channels)
            if array.shape != shape:
                raise DataError(f"its pixels have the shape {array.shape}, but its header says {shape}.")
            check_finite(array, f"frame {frame.index}")
        return np.asarray(array)

    def _scaling(self, frame: Frame, header: Header) -> Scaling | LookUp | None:
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
        first = next(iter(self._headers.values()))
        known = dict(self._volume.known) | {
            "files": tuple(map(str, self._stamps)),
            "stamps": tuple(map(astuple, self._stamps.values())),
            "frames": tuple((str(frame.path), frame.index) for frame in self._volume.frames),
        }
        if self._labels and first.palette:
            with dicom_errors(first.path):
                dataset = self._pydicom.dcmread(first.path, stop_before_pixels=True)
                count, start, _ = dataset.RedPaletteColorLookupTableDescriptor
                numbers = np.arange(min(int(start) + (int(count) or 2**16), 2**first.bits), dtype=np.uint16)
                colors = _colors(self._pydicom.pixels, numbers, dataset)
            known["palette"] = tuple(map(tuple, colors.tolist()))
        return known


def _colors(pixels: Any, array: NDArray[Any], dataset: Any) -> NDArray[np.uint8]:
    """The colours that numbers stand for; tables of 16 bits hold 8 bits in their upper half."""
    colors = pixels.apply_color_lut(array, dataset)
    return np.asarray(colors if colors.dtype == np.uint8 else colors >> 8, dtype=np.uint8)


def _stored_type(header: Header) -> np.dtype[Any]:
    """The number type of a mask; pixels of 32 bits and more may be floats, so they become int64."""
    if header.allocated > 16:
        return np.dtype("int64")
    return np.dtype(f"{'' if header.signed else 'u'}int{max(8, header.allocated)}")


def _meant(stored: NDArray[Any], frame: Frame) -> NDArray[np.float64]:
    return stored.astype(np.float64) * frame.slope + frame.intercept


def _check_decoder(syntax: Any) -> None:
    """Make sure that a transfer syntax (a pydicom UID) can be decoded, with our plugin where pydicom has none."""
    from pydicom.pixels import get_decoder

    name = f"{syntax.name} ({syntax})" if syntax.name != syntax else safe_text(syntax)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise DataError(
            f"its pixels are compressed as {name}, which cannot be decoded. Convert it to Explicit VR Little Endian, for "
            "example with dcmdjpeg or gdcmconv."
        ) from error
    if is_available(syntax) and "pixelwise" not in decoder.available_plugins:
        decoder.add_plugin("pixelwise", (__name__, "decode"))
    if not decoder.is_available:
        raise DataError(
            f"its pixels are compressed as {name}, for which no decoder is installed. Install one: pip install "
            "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg pylibjpeg-rle."
        )


def is_available(uid: str) -> bool:
    """Whether `decode` knows a transfer syntax; pydicom asks this of a plugin."""
    return uid in DECODER_DEPENDENCIES


def decode(source: bytes, runner: Any) -> bytes:
    """Decode one frame, as pydicom asks of a plugin."""
    import imagecodecs

    if source[:2] != b"\xff\xd8":  # JPEG 2000
        frame = imagecodecs.jpeg2k_decode(source)
        if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):  # turned back by the decoder
            runner.set_option("photometric_interpretation", "RGB")
    else:
        # the same space in and out: whether colours must be turned is for pydicom to decide, by the header
        space = "YCBCR" if runner.samples_per_pixel == 3 else None
        frame = imagecodecs.jpeg8_decode(source, colorspace=space, outcolorspace=space)
    if frame.shape != (runner.rows, runner.columns) + (runner.samples_per_pixel,) * (runner.samples_per_pixel > 1):
        raise ValueError("the frame has another size than the header says")
    if runner.samples_per_pixel > 1:
        runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", frame.itemsize * 8)
    return bytes(frame.tobytes())
