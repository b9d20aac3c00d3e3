"""TIFF, BigTIFF and OME-TIFF of any size, window by window, through tifffile.

Images are read at their full resolution, without thumbnails; pages and images of equal size are the planes of a stack.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.base import Opener, Source, SourceInfo, check_opacity, orient, pixel_type, whole_numbers
from pixelwise.formats.local import Identity, readable
from pixelwise.formats.ranges import Handles, opening
from pixelwise.formats.tiff import opacity
from pixelwise.formats.tiff.images import Stacks, choose, is_meant
from pixelwise.formats.tiff.windows import Span, arrange
from pixelwise.formats.tiff.write import NODATA_TAG

DIALECTS = ("avs", "bif", "eer", "fluoview", "lsm", "mdgel", "micromanager", "mmstack", "ndpi", "ndtiff", "nih", "philips",
            "qpi", "scanimage", "scn", "sis", "stk", "svs")  # fmt: skip
"""Of microscopes: not followed outside slides, since they may name other files."""
PLAIN: Any = {"_multifile": False, **{f"is_{name}": False for name in DIALECTS}}
"""Arguments of `tifffile.TiffFile` for a file that is no slide."""

_ORIENTATION_TAG = 274
_WHITE_IS_ZERO, _PALETTE, _CMYK, _YCBCR = 0, 3, 5, 6
_GRAY_OR_RGB = (_WHITE_IS_ZERO, 1, 2, _PALETTE, 32803)  # 32803, colour filter array, is one raw channel
_JPEG = (6, 7)  # decoding these turns YCbCr into RGB
_OPACITY = (1, 2)
_UNITS_UM = {2: 25_400.0, 3: 10_000.0}  # resolution unit: micrometres in an inch, in a centimetre
_UNIT_NAMES = {1: "none", 2: "inch", 3: "centimeter"}
_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "pm": 1e-6, "Å": 1e-4, "mm": 1e3, "cm": 1e4,
                "dm": 1e5, "m": 1e6, "in": 25_400.0, "inch": 25_400.0}  # fmt: skip


def open_tiff(
    location: str,
    opener: Opener | None = None,
    *,
    identity: Identity | None = None,
    series: int | None = None,
    channels: int | None = None,
    labels: bool = False,
) -> "TiffSource":
    """Open a TIFF by its path, or by what opens it anew at each call; only its tags are read.

    Several images of one size are planes, one after the other; of others the first is read, which "warnings" of the metadata
    tell, or that of the number `series`. `channels`, how many the network takes, decides where a file leaves open whether a
    stack of pages is channels or planes, and whether a band is opacity.
    """
    with opening(location, opener, identity) as file:
        tiff = tifffile.TiffFile(file.buffered, name=file.name, **PLAIN)
        check_pages(tiff)
        images = [item for item in tiff.series if is_meant(item.keyframe)] or tiff.series
        images, warnings = choose(images, series, [_size(item) for item in images])
        image = images[0]
        page = image.keyframe
        ome = ome_metadata(tiff.ome_metadata, series or 0)
        layout = arrange(image.axes, tuple(image.shape), channels)
        is_grey = layout.size[0] == layout.size[3] == 1 and ome is None
        stack = Stacks(images, layout, file, as_channels=is_grey and channels == len(images) > 1 and not labels)
        planes, height, width, count = stack.size
        rendering = Rendering(page, np.dtype(image.dtype), count, labels)
        rendering.look(stack, channels)
        info = rendering.info(location, "tiff" if ome is None else "ome-tiff", (planes, height, width), stack.block)
        metadata = {**_tag_metadata(page, rendering), **(ome or {}), **({"warnings": warnings} if warnings else {})}
        counts = [("I", len(images))] if planes > layout.size[0] else []
        counts += [(layout.axes[axis], layout.shape[axis]) for axis in layout.planes]
        names = "".join(name for name, _ in counts)
        if names and names.count("I") < 2:
            metadata["plane_axes"], metadata["plane_shape"] = names, tuple(count for _, count in counts)
        return TiffSource(file, stack.read, rendering, info, metadata)


def _size(image: Any) -> tuple[str, Any]:
    """Size, layout and number type of an image in words, and whatever else images of one stack have in common."""
    page, size = image.keyframe, " x ".join(map(str, image.shape))
    colors = None if page.colormap is None else page.colormap.tobytes()
    orientation = page.tags.valueof(_ORIENTATION_TAG, 1)
    words = f"{size} ({image.axes}) {np.dtype(image.dtype)}"
    return words, (page.photometric, page.extrasamples, orientation, colors)


def check_pages(tiff: tifffile.TiffFile) -> None:
    """Raise `DataError` where the list of pages breaks off or runs in a circle, which tifffile takes for its end."""
    form, file = tiff.tiff, tiff.filehandle
    last = tiff.pages[len(tiff.pages) - 1].offset
    file.seek(last)
    (tags,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
    file.seek(last + form.tagnosize + tags * form.tagsize)
    if any(file.read(form.offsetsize)):
        raise DataError(f"after its page {len(tiff.pages):,} its pages form a circle, or the file is truncated.")


class TiffSource(Source):
    """An image, or a stack of images, of a TIFF.

    `metadata` has, where the file knows them: "resolution" (pixels per unit, x and y), "resolution_unit", "pixel_size_um",
    "channel_names", "image_name", "time_increment_s", "plane_axes" (as "TZ") and "plane_shape", "nodata", "palette".

    A pixel has no data where the nodata value stands: if that is 0, or the numbers are unsigned, in all channels (0 and 255
    are also ordinary values), else in any. There `read` gives 0, except of masks.

    Args:
        file: is closed with the source.
        stored: (plane, rows, columns) -> the window as the file holds it (rows, columns, channels), not turned yet.
    """

    def __init__(
        self,
        file: Handles,
        stored: Callable[[int, Span, Span], NDArray[Any]],
        rendering: "Rendering",
        info: SourceInfo,
        metadata: Mapping[str, Any],
    ) -> None:
        self._file, self._stored, self._rendering, self.identity = file, stored, rendering, file.identity
        self.info, self.metadata = info, metadata
        self._nodata = _representable(metadata.get("nodata"), rendering.stored)

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        rows, columns = self._rendering.as_stored(self.info, (top, top + height), (left, left + width))
        where = f"rows {top}..{top + height}, columns {left}..{left + width}"
        with readable(self.info.location, where if self.info.planes == 1 else f"plane {plane}, {where}"):
            stored = self._stored(plane, rows, columns)
            pixels = self._rendering.without_opacity(stored)
            is_whole = (height, width) == (self.info.height, self.info.width)  # of a part nobody could say
            if self._rendering.labels and is_whole and pixels.shape[2] < stored.shape[2]:
                check_opacity(pixels, stored[:, :, -1])
            empty = None if self._rendering.labels else self._empty(pixels)
            if pixels.dtype.kind == "f" and not self._rendering.labels and not (finite := np.isfinite(pixels)).all():
                bad = ~finite if empty is None else ~finite & ~empty[:, :, None]
                there = self._unmasked(plane, rows, columns) if bad.any() else None
                if count := int((bad if there is None else bad[there]).sum()):
                    raise DataError(
                        f"{count:,} of its numbers in {where} are NaN or infinite, and the file does not declare them as "
                        "nodata. Replace them, or declare them: gdal_edit.py -a_nodata nan FILE."
                    )
                pixels[~finite] = 0
            pixels = self._rendering.apply(pixels)
            if empty is not None:
                pixels[orient(empty, self._rendering.orientation)] = 0
            return pixels

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        rows, columns = self._rendering.as_stored(self.info, (top, top + height), (left, left + width))
        with readable(self.info.location, f"rows {top}..{top + height}, columns {left}..{left + width}"):
            there = self._unmasked(plane, rows, columns)
            stored = None if self._nodata is None else self._stored(plane, rows, columns)
            empty = None if stored is None else self._empty(self._rendering.without_opacity(stored))
            if empty is not None:
                there = ~empty if there is None else there & ~empty
        return None if there is None else np.ascontiguousarray(orient(there, self._rendering.orientation))

    def close(self) -> None:
        self._file.close()

    def _empty(self, pixels: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Where stored pixels have the nodata value, (rows, columns)."""
        if self._nodata is None:
            return None
        equal = np.isnan(pixels) if self._nodata != self._nodata else pixels == self._nodata
        return equal.all(axis=2) if self._nodata == 0 or pixels.dtype.kind in "bu" else equal.any(axis=2)

    def _unmasked(self, plane: int, rows: Span, columns: Span) -> NDArray[np.bool_] | None:
        """Where a mask or opacity lets data through, (rows, columns) as stored; None if nothing hides any."""
        return None


def _representable(value: float | None, dtype: np.dtype[Any]) -> Any:
    """A nodata value as the pixels hold it; None if no pixel of this type can."""
    if value is None or dtype.kind == "f":
        with np.errstate(over="ignore"):
            return None if value is None else dtype.type(value)
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    fits = math.isfinite(value) and float(value).is_integer() and low <= int(value) <= high
    return dtype.type(int(value)) if fits else None


class Rendering:
    """How stored numbers become the pixels that are meant: palettes are looked up, opacity is dropped, black is 0.

    With `labels` the numbers stay as they are stored: no palette, no inversion; whole floats become integers. 1 bit gives
    0 (black) and 255 (white) in both, as in a PNG. Where the file says what its numbers stand for (`meaning`: scales and
    offsets, one of each for a channel), others than masks are float32 times the one plus the other. All this is taken from
    the tags of a page; `DataError` if it is neither grey, RGB nor a palette, or cannot be a mask.
    """

    def __init__(
        self, page: Any, stored: np.dtype[Any], channels: int, labels: bool, meaning: Sequence[Sequence[float]] = ()
    ) -> None:
        photometric = int(page.photometric)
        if photometric not in _GRAY_OR_RGB and not (photometric == _YCBCR and int(page.compression) in _JPEG):
            name = "CMYK" if photometric == _CMYK else tifffile.PHOTOMETRIC(photometric).name
            raise DataError(f"its colours are stored as {name}. Convert it to RGB or grey.")
        samples = [int(sample) for sample in page.extrasamples]
        self.stored, self.labels, self.bits = stored, labels, int(page.bitspersample)
        self.has_opacity = channels in (2, 4) and len(samples) == 1 and samples[0] in _OPACITY
        self.channels = channels - self.has_opacity
        self.dtype = pixel_type(stored, self.channels, labels)  # of the pixels, unless a palette is looked up
        self.palette: NDArray[np.uint8] | None = None
        if photometric == _PALETTE and self.channels == 1:
            self.palette = (page.colormap >> (8 if page.colormap.max() > 255 else 0)).T.astype(np.uint8)
        is_scaled = len(meaning) == 2 and (set(meaning[0]), set(meaning[1])) != ({1.0}, {0.0})
        self.meaning = [np.array(numbers) for numbers in meaning] if is_scaled and not labels else []
        if self.meaning:
            self.palette, self.dtype = None, "float32"
        self.inverted = photometric == _WHITE_IS_ZERO
        self.orientation = page.tags.valueof(_ORIENTATION_TAG, 1)
        self.opacity: opacity.Opacity | None = None

    def look(self, stack: opacity.Pixels, wanted: int | None) -> None:
        """Decide by its numbers whether the last channel is the opacity that it is marked as (`tiff.opacity`)."""
        if self.has_opacity and not self.labels:
            self.opacity = opacity.look(stack, self.channels, wanted)
            if self.opacity.is_kept:
                self.has_opacity, self.channels = False, self.channels + 1

    @property
    def metadata(self) -> dict[str, Any]:
        """The palette, how the pixels were turned, and what became of a channel that is marked as opacity, if there are."""
        known: dict[str, Any] = {} if self.palette is None else {"palette": tuple(map(tuple, self.palette.tolist()))}
        known |= {"orientation": self.orientation} if self.orientation in range(2, 9) else {}
        return known | (self.opacity.metadata if self.opacity else {})

    def info(self, location: str, form: str, size: tuple[int, int, int], block: Span) -> SourceInfo:
        """Of an image whose planes, rows and columns are stored so."""
        planes, height, width = size
        is_turned = self.orientation in (5, 6, 7, 8)
        is_colored = self.palette is not None and not self.labels
        return SourceInfo(
            location=location,
            format=form,
            height=width if is_turned else height,
            width=height if is_turned else width,
            channels=3 if is_colored else self.channels,
            dtype="uint8" if is_colored else self.dtype,
            planes=planes,
            block_px=(block[1], block[0]) if is_turned else block,
        )

    def without_opacity(self, array: NDArray[Any]) -> NDArray[Any]:
        """The channels that are colours or measurements."""
        return array[:, :, :-1] if self.has_opacity else array

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """The pixels of a window (rows, columns, channels) as stored, without opacity."""
        if self.palette is not None and not self.labels:
            array = self.palette[array[:, :, 0].astype(np.intp)]
        elif self.labels and array.dtype.kind == "f":
            array = whole_numbers(array)
        else:
            array = array * np.uint8(255) if self.bits == 1 else array
            if self.inverted and array.dtype.kind == "u" and (self.bits == 1 or not self.labels):
                array = array.dtype.type(255 if self.bits == 1 else (1 << self.bits) - 1) - array
        if self.meaning:
            scales, offsets = self.meaning
            array = (array * scales[: self.channels] + offsets[: self.channels]).astype(np.float32)
        return np.ascontiguousarray(orient(array, self.orientation))

    def as_stored(self, info: SourceInfo, rows: Span, columns: Span) -> tuple[Span, Span]:
        """Where a window lies before it is turned: `orient` backwards."""
        if self.orientation in (3, 4, 7, 8):
            rows = info.height - rows[1], info.height - rows[0]
        if self.orientation in (2, 3, 6, 7):
            columns = info.width - columns[1], info.width - columns[0]
        return (columns, rows) if self.orientation in (5, 6, 7, 8) else (rows, columns)


def _tag_metadata(page: Any, rendering: Rendering) -> dict[str, Any]:
    """Resolution, pixel size, number for missing data and palette, where the tags of a page give them."""
    metadata: dict[str, Any] = {}
    unit = int(page.resolutionunit)
    x, y = page.resolution[::-1] if rendering.orientation in (5, 6, 7, 8) else page.resolution
    if 282 in page.tags and 283 in page.tags and min(x, y) > 0:
        metadata["resolution"], metadata["resolution_unit"] = (x, y), _UNIT_NAMES.get(unit, "none")
        if unit in _UNITS_UM:
            metadata["pixel_size_um"] = {"x": _UNITS_UM[unit] / x, "y": _UNITS_UM[unit] / y}
    nodata = _number(str(page.tags.valueof(NODATA_TAG, "")).strip(" \0"))
    if nodata is not None:
        metadata["nodata"] = nodata
    return metadata | rendering.metadata


def ome_metadata(text: str | None, number: int = 0) -> dict[str, Any] | None:
    """Name, pixel size, channel names and time step of an image of OME-XML; None if there is no such image."""
    found = [] if text is None else ElementTree.fromstring(text).findall("{*}Image")
    image = found[number] if number < len(found) else None
    pixels = None if image is None else image.find("{*}Pixels")
    if image is None or pixels is None:
        return None
    metadata: dict[str, Any] = {"image_name": image.get("Name")} if image.get("Name") else {}
    sizes = {axis.lower(): _length(pixels, f"PhysicalSize{axis}") for axis in "XYZ"}
    known = {axis: size for axis, size in sizes.items() if size is not None}
    if known:
        metadata["pixel_size_um"] = known
    names = [channel.get("Name") for channel in pixels.findall("{*}Channel")]
    if names and all(names):
        metadata["channel_names"] = tuple(map(str, names))
    step = _number(pixels.get("TimeIncrement"))
    if step is not None and 0 < step < math.inf and pixels.get("TimeIncrementUnit", "s") == "s":
        metadata["time_increment_s"] = step
    return metadata


def _length(pixels: ElementTree.Element, name: str) -> float | None:
    """In micrometres."""
    size, unit = _number(pixels.get(name)), _MICROMETRES.get(pixels.get(f"{name}Unit", "µm"))
    return size * unit if size is not None and 0 < size < math.inf and unit is not None else None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
