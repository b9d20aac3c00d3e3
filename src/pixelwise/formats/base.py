"""What every image can be asked, whatever file it lies in and however large: its size, and any window of its pixels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.local import Identity

Palette = tuple[tuple[int, int, int], ...]
Opener = Callable[[], BinaryIO]
"""Opens a file anew at each call, for reading, seekable."""

LABELS = "labels"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BACKGROUND = ("background", "void", "unlabeled", "unlabelled")
"""What classes are called, in lower case, that are no object; by name, because the first of two organs is none."""
NAN_VALUE = -(2**31) - 1
"""What a mask of floats holds where it has no number: NaN, infinity or the fill value of a raster, such as -3.4e38."""
_FILL = 1e30
MAPS = ("entropy", "mutual_information", "max_probability")


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """What is known of an image before any pixel is read.

    Attributes:
        location: the path or URL, as it was given.
        format: "png", "tiff", "ome-tiff", "geotiff", "nifti", "dicom", "slide", "zarr", "ome-zarr", "npy", ...
        height: rows of each plane, in pixels.
        width: columns of each plane, in pixels.
        channels: numbers per pixel, without opacity.
        dtype: their type, as numpy names it.
        planes: images of this size in the file (slices of a volume, points in time), at least 1.
        block_px: the rows and columns that are stored together, so that windows along them are read fastest.
    """

    location: str
    format: str
    height: int
    width: int
    channels: int
    dtype: str
    planes: int = 1
    block_px: tuple[int, int] = (256, 256)


class Source(ABC):
    """An open image, or a stack of images of one size, of which windows are read.

    Attributes:
        info: size, channels, type.
        metadata: what the format knows besides (CRS, affine, series, pixel size); the sink of the same format takes it.
        identity: how to tell whether its file is still the same.
    """

    info: SourceInfo
    metadata: Mapping[str, Any] = MappingProxyType({})
    identity: Identity

    @abstractmethod
    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        """The window as (height, width, C) in `info.dtype`; it lies inside the image.

        Raises:
            DataError: the pixels cannot be decoded; the message names the file.
        """

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        """Where the window holds data, bool (height, width); None if the image has no pixels without data."""
        return None

    def fingerprint(self) -> str:
        """Hexadecimal text that changes when the content does."""
        return self.identity.fingerprint()

    def check_unchanged(self) -> None:
        """Raise `DataError` if the file has changed since it was opened."""
        self.identity.check()

    def close(self) -> None:  # noqa: B027  (most formats have nothing to close)
        """Let go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class View(Source):
    """Other pixels of an open image, `source`, which is closed with this; `changes` are those of its info."""

    def __init__(self, source: Source, **changes: Any) -> None:
        self.source, self.info, self.metadata = source, replace(source.info, **changes), source.metadata

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        return self.source.valid(top, left, height, width, plane)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def check_unchanged(self) -> None:
        self.source.check_unchanged()

    def close(self) -> None:
        self.source.close()


class Classes(Protocol):
    """Names and colours of the classes, as the writers need them; `LabelSpec` is one."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def colors(self) -> tuple[tuple[int, int, int], ...]: ...

    @property
    def num_classes(self) -> int: ...

    def palette_bytes(self) -> bytes: ...

    def colorize(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished map of all planes of one image; a writer never needs it in memory as a whole.

    Attributes:
        kind: "labels", or one of `MAPS`.
        spec: names and colours of the classes.
        source: the image it was made from; the map has its height, width and planes.
        metadata: the source's own, which the writer of the same format keeps.
        dtype: of the numbers: uint8 or uint16 for labels, float32 for maps.
        nodata: the number that stands where the source has no data; None if it has data everywhere.
        rows: (plane, top, bottom) -> the rows top..bottom of a plane, (bottom - top, W).
        mark: JSON-able values on the origin: network, input, options.
    """

    kind: str
    spec: Classes
    source: SourceInfo
    dtype: np.dtype[Any]
    rows: Callable[[int, int, int], NDArray[Any]]
    nodata: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    mark: Mapping[str, Any] = field(default_factory=dict)


Writer = Callable[[Path, Result], None]
"""Writes one result to a local path, atomically; raises `PixelwiseError` where it cannot be written."""


def orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image (H, W[, C]) as EXIF orientation 1..8 says; other numbers turn nothing (EXIF 2.3, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def whole_numbers(array: NDArray[Any]) -> NDArray[Any]:
    """Masks are integers; 1 bit counts as black and white, and floats pass if they are whole, or no number (`NAN_VALUE`).

    Raises:
        DataError: they are not.
    """
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "ui":
        return array
    if array.dtype.kind == "f":
        array = array.astype(np.float32) if array.dtype.itemsize < 4 else array
        gaps = ~(np.abs(array) < _FILL)
        known = np.where(gaps, 0, array)
        if np.abs(known).max() < 2**32:
            whole = known.astype(np.int64)
            if (whole == known).all():
                whole[gaps] = NAN_VALUE
                return whole
    raise DataError(
        f"it holds numbers of type {array.dtype} that are not whole; a mask has whole numbers. If they "
        "are probabilities or greys, apply a threshold: (mask > 0.5).astype(numpy.uint8)."
    )


def check_opacity(colors: NDArray[Any], opacity: NDArray[Any]) -> None:
    """Raise `DataError` for a mask (H, W, C) that would lose all it says with its opacity (H, W), which is no label."""
    if (colors == colors[:1, :1]).all() and (opacity != opacity[0, 0]).any():
        raise DataError(
            "its colour is the same everywhere and only its opacity (alpha) differs, so the mask is in its alpha channel. "
            "Save that channel alone: PIL.Image.open(FILE).getchannel('A').save(FILE)."
        )


def pixel_type(dtype: np.dtype[Any], channels: int, labels: bool) -> str:
    """The type of the pixels of an image: 1 bit is read as 0 and 255, and masks (`labels`) are whole numbers.

    Raises:
        DataError: it cannot be a mask.
    """
    if dtype.kind not in "buif":
        raise DataError(f"its numbers are of type {str(dtype)[:60]}; whole numbers and floats can be used.")
    name = "uint8" if dtype.kind == "b" else dtype.newbyteorder("=").name
    if labels and channels != 1 and (channels, name) != (3, "uint8"):
        raise DataError(
            f"it has {channels} channels of {name}; a mask has one channel of whole numbers, or 8-bit RGB. "
            "If each channel is one class (one-hot), save the number of the largest instead (numpy.argmax); if "
            "they are slices, name the axes (tifffile.imwrite(FILE, stack, metadata={'axes': 'ZYX'}))."
        )
    return "int64" if labels and dtype.kind == "f" else name


def check_finite(array: NDArray[Any], where: str, advice: str = "") -> None:
    """Raise `DataError` if some numbers are NaN or infinite; `advice` is what else can be done."""
    if array.dtype.kind == "f" and (bad := int(np.count_nonzero(~np.isfinite(array)))):
        raise DataError(
            f"{bad:,} of its numbers in {where} are NaN or infinite. Replace them, for example with numpy.nan_to_num"
            f"{', or ' * bool(advice)}{advice}."
        )
