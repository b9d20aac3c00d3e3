"""From files to the tensors that transforms and networks take; whole, or by windows; of volumes, neighbouring planes too."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from pixelwise.data.labels import IGNORE_INDEX, LabelSpec
from pixelwise.data.masks import Reading, mask_values, open_mask, open_mask_of
from pixelwise.data.names import channel_file
from pixelwise.data.pairs import Pair
from pixelwise.data.views import ChannelFiles, InRegion, SelectedBands, SliceStack
from pixelwise.errors import DataError, PixelwiseError
from pixelwise.extras import extra
from pixelwise.formats import Source, open_source
from pixelwise.formats.local import printable
from pixelwise.formats.registry import is_picture


@dataclass(frozen=True)
class Sample:
    """One image and its labels."""

    image: Tensor  # (C, H, W), uint8, or float32 in unit scale
    mask: Tensor | None  # uint8 (H, W), class ids and 255 for void; None where the pair has no mask
    name: str  # the pair's name
    valid: Tensor | None = None  # where the image has data, bool (H, W); None is everywhere


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the pixels of a file lie: their number, and the place that the file says they have in the world."""

    width: int  # columns of a plane
    height: int  # rows of a plane
    planes: int = 1  # of the file
    crs: str | None = None  # coordinate system as WKT
    transform: tuple[float, ...] | None = None  # (a, b, c, d, e, f): x = a column + b row + c, y = d column + e row + f
    affine: tuple[float, ...] | None = None  # (4, 4), row by row: voxels to millimetres
    orientation: int = 1  # EXIF orientation of the file, by which its pixels were turned

    @classmethod
    def of(cls, source: Source) -> "Grid":
        """The grid of an open file."""
        info, known = source.info, source.metadata
        affine, transform, crs = known.get("affine"), known.get("transform"), known.get("crs")
        return cls(
            width=info.width,
            height=info.height,
            planes=info.planes,
            crs=None if crs is None else str(crs),
            transform=None if transform is None or crs is None else tuple(float(value) for value in transform),
            affine=None if affine is None else tuple(np.asarray(affine, dtype=np.float64).ravel().tolist()),
            orientation=int(known.get("orientation", 1)),
        )

    @property
    def pixels(self) -> int:
        """Of all planes."""
        return self.width * self.height * self.planes

    def difference(self, image: "Grid") -> str | None:
        """How the grid of this mask differs from its image's, {}, as far as both files know it; None if it does not."""
        if (self.width, self.height) != (image.width, image.height):
            turned = (image.width, image.height) == (self.height, self.width)
            numbers = f"the image has {image.orientation}, the mask {self.orientation} (1 turns nothing)"
            hint = f" One of them is turned by its own EXIF orientation: {numbers}." if turned else ""
            mine, its = f"{self.width} x {self.height} px", f"{image.width} x {image.height} px"
            return f"is {mine}, but its image {{}} is {its}. Both must have the same size.{hint}"
        if self.planes != image.planes:
            mine, its = _count(self.planes), _count(image.planes)
            return f"has {mine}, but its image {{}} has {its}. Both must have the same size."
        advice = "Resample it to the grid of its image."
        if self.crs and image.crs and not _same_crs(self.crs, image.crs):
            mine, its = crs_name(self.crs), crs_name(image.crs)
            return f"is in the coordinate system {mine}, but its image {{}} is in {its}. {advice}"
        for what in ("transform", "affine"):
            here, there = getattr(self, what), getattr(image, what)
            if here and there and not _close(np.array(here), np.array(there)):
                return f"has the {what} {_numbers(here)}, but its image {{}} has {_numbers(there)}. {advice}"
        return None


class OpenPair:
    """The open files of a pair, of which windows are read: `image`; `mask` and `region`, None where the pair has none."""

    def __init__(
        self, pair: Pair, labels: LabelSpec, channels: int | None = None, reading: Reading | None = None
    ) -> None:
        self.pair, self.labels, self.channels = pair, labels, channels
        self.image = open_image(pair.image, reading, channels)
        self.mask: Source | None = None
        self.region: Source | None = None
        try:
            self.region = open_region(pair, self.image, reading)
            if pair.mask is not None:
                self.mask = open_mask_of(pair, reading, by_color=labels.kind == "rgb")
                if difference := Grid.of(self.mask).difference(Grid.of(self.image)):
                    name = printable(pair.image)
                    raise DataError(f"{printable(pair.mask)}: the mask {difference.format(name)}")
        except PixelwiseError:
            self.close()
            raise

    def close(self) -> None:
        """Close both files."""
        for source in (self.image, self.mask, self.region):
            if source is not None:
                source.close()

    def __enter__(self) -> "OpenPair":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_image(self, top: int, left: int, height: int, width: int, plane: int = 0) -> Tensor:
        """A window of the image, (C, height, width): uint8, or float32 in unit scale."""
        array = self.image.read(top, left, height, width, plane)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{printable(self.pair.image)}: holds numbers that are NaN or infinite. Replace them.")
        with _naming(self.pair.image):
            return to_tensor(array, self.channels)

    def read_valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> Tensor | None:
        """Where a window of the image has data, bool (height, width); None if it has data everywhere."""
        valid = self.image.valid(top, left, height, width, plane)
        return None if valid is None or valid.all() else from_numpy(np.array(valid))

    def read_mask(self, top: int, left: int, height: int, width: int, plane: int = 0) -> Tensor:
        """The labels of a window, uint8 (height, width); void where the image has no data, and outside of the region."""
        if self.mask is None or self.pair.mask is None:
            raise DataError(f"{printable(self.pair.image)}: has no mask.")
        raw = mask_values(self.mask.read(top, left, height, width, plane))
        with _naming(self.pair.mask, "the mask "):
            labels = self.labels.encode(raw)
        counted = self.image if self.region is None else InRegion(self.image, self.region)
        valid = counted.valid(top, left, height, width, plane)
        return from_numpy(labels if valid is None else np.where(valid, labels, np.uint8(IGNORE_INDEX)))

    def read(self, plane: int = 0) -> Sample:
        """A whole plane."""
        window = (0, 0, self.image.info.height, self.image.info.width, plane)
        image, mask = self.read_image(*window), None if self.mask is None else self.read_mask(*window)
        return Sample(image, mask, self.pair.name, self.read_valid(*window))


def files_of(pair: Pair) -> tuple[Path, ...]:
    """All files that a pair is read from."""
    images = (Path(channel_file(str(pair.image), number)) for number in range(1, pair.channel_files))
    masks = (path for path in (pair.mask, *pair.more_masks, pair.region) if path is not None)
    return (pair.image, *images, *masks)


class OpenPairs:
    """The open files of the last few pairs; every process opens its own."""

    def __init__(self, open_pair: Callable[[Pair], OpenPair]) -> None:
        self._open_pair = open_pair
        self._most = max(8, 2 * (os.cpu_count() or 1))  # more than threads that read at a time
        self._reset()

    def _reset(self) -> None:
        self._pairs: OrderedDict[tuple[Path, ...], OpenPair] = OrderedDict()
        self._lock, self._owner = threading.Lock(), os.getpid()

    def get(self, pair: Pair) -> OpenPair:
        """The open files of a pair."""
        if self._owner != os.getpid():  # forked: what is open belongs to the parent
            self._reset()
        key = files_of(pair)
        with self._lock:
            if key not in self._pairs:
                self._pairs[key] = self._open_pair(pair)
            self._pairs.move_to_end(key)
            if len(self._pairs) > self._most:
                self._pairs.popitem(last=False)[1].close()
            return self._pairs[key]

    def close(self) -> None:
        """Close all files."""
        for pair in self._pairs.values():
            pair.close()
        self._reset()

    def __reduce__(self) -> tuple[Any, ...]:  # to a process that is spawned
        return OpenPairs, (self._open_pair,)


def load_sample(pair: Pair, labels: LabelSpec, channels: int | None = None, reading: Reading | None = None) -> Sample:
    """Read the files of a pair as a whole; of a volume, the plane of the pair."""
    with OpenPair(pair, labels, channels, reading) as opened:
        if pair.plane is None and opened.image.info.planes > 1:
            name = printable(pair.image)
            raise DataError(f"{name}: holds {opened.image.info.planes} planes and cannot be read as one image.")
        return opened.read(pair.plane or 0)


def open_image(path: str | Path, reading: Reading | None = None, channels: int | None = None) -> Source:
    """Open an image as the network of a run sees it, which takes so many `channels`, neighbouring planes included."""
    options = dict(reading or {})
    bands, slices = options.pop("bands", None), options.pop("slices", None) or 1
    files = options.pop("channel_files", None) or 1
    names = list(dict.fromkeys(channel_file(str(path), number) for number in range(files)))
    if len(names) > 1:
        source = _open_channels(names, options)
    else:
        source = open_source(path, channels=None if bands else channels and channels // slices, **options)
    if bands:
        if max(bands) == source.info.channels + 1 and "opacity" in source.metadata:  # asked for, so it is a band
            source.close()
            source = open_source(path, channels=max(bands), **options)
        source = SelectedBands(source, bands)
    return source if slices == 1 else SliceStack(source, slices)


def _open_channels(names: Sequence[str], options: Mapping[str, Any]) -> Source:
    """The files of an image as its channels, in this order."""
    sources: list[Source] = []
    try:
        for name in names:
            sources.append(open_source(name, **options))
            if difference := Grid.of(sources[-1]).difference(Grid.of(sources[0])):
                raise DataError(f"{printable(name)}: the channel {difference.format(printable(names[0]))}")
    except PixelwiseError:
        for source in sources:
            source.close()
        raise
    return ChannelFiles(sources)


def are_pictures(pair: Pair) -> bool:
    """Whether both files of a pair are read fastest as a whole, in this process."""
    return is_picture(pair.image) and (pair.mask is None or is_picture(pair.mask))


def to_tensor(array: np.ndarray, channels: int | None = None) -> torch.Tensor:
    """An image (H, W, C) as (C, H, W), grey repeated where 3 channels are wanted.

    uint8 stays uint8; other integers become float32 divided by their type's maximum, floats float32 as they are.
    """
    found = array.shape[2]
    if channels is not None and found != channels:
        if (found, channels) != (1, 3):
            raise DataError(
                f"it has {found} channel{'s' * (found != 1)}, but {channels} are wanted. Only one can be repeated."
            )
        array = np.repeat(array, 3, axis=2)
    planes = np.ascontiguousarray(array.transpose(2, 0, 1))
    if planes.dtype.kind in "ui" and planes.dtype != np.uint8:
        planes = (planes / np.float64(np.iinfo(planes.dtype).max)).astype(np.float32)
    elif planes.dtype != np.uint8:
        planes = planes.astype(np.float32)
    return torch.from_numpy(planes if planes.flags.writeable else planes.copy())


def open_region(pair: Pair, image: Source, reading: Reading | None = None) -> Source | None:
    """Open the mask of what counts of an open image; None where the pair has none.

    Raises:
        DataError: it does not lie on the grid of its image.
    """
    if pair.region is None:
        return None
    region = open_mask(pair.region, reading, pair.image, by_color=True)  # black is outside, as it is seen
    if difference := Grid.of(region).difference(Grid.of(image)):
        region.close()
        raise DataError(f"{printable(pair.region)}: the region {difference.format(printable(pair.image))}")
    return region


def crs_name(wkt: str) -> str:
    """A coordinate system in short, such as EPSG:32633."""
    return str(extra("rasterio.crs", "geo", "coordinate systems").CRS.from_user_input(wkt).to_string())[:200]


@contextmanager
def _naming(path: Path, what: str = "") -> Iterator[None]:
    """Errors say which file they are about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{printable(path)}: {what}{error}") from error


def _close(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two matrices place the pixels alike: (4, 4) in a row to a thousandth, (2, 3) to a hundredth of a pixel."""
    if len(one) == 16:
        spacing = np.linalg.norm(one.reshape(4, 4)[:3, :3], axis=0).min()
        return bool(np.allclose(one, other, rtol=1e-3, atol=1e-3 * spacing))
    pixel = np.linalg.norm(one.reshape(2, 3)[:, :2], axis=0).min()
    return bool((np.abs(one - other) <= pixel * np.array([1e-6, 1e-6, 1e-2] * 2)).all())


def _same_crs(one: str, other: str) -> bool:
    if one == other:
        return True
    crs = extra("rasterio.crs", "geo", "coordinate systems").CRS
    return bool(crs.from_user_input(one) == crs.from_user_input(other))


def _numbers(values: tuple[float, ...]) -> str:
    digits = 6 if len(values) == 16 else 10  # of an affine, which is stored as float32
    return f"({', '.join(f'{value:.{digits}g}' for value in values)})"


def _count(planes: int) -> str:
    return f"{planes:,} plane{'s' * (planes != 1)}"
