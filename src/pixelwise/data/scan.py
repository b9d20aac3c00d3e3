"""One pass over the two files of a pair: what can be known of them alone, before they are compared with the others.

Files are read by strips of rows, so that the size of an image does not matter. Masks are remembered, since proposing
classes and checking both need them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from pixelwise.data.labels import Value, pack_value, value_counts, value_name
from pixelwise.data.masks import Reading, mask_values, may_be_segmentation, open_mask_of
from pixelwise.data.measures import Sums, border_counts, pixel_digest, solid_counts
from pixelwise.data.pairs import Pair, first_of
from pixelwise.data.places import Places
from pixelwise.data.samples import Grid, open_image, open_region
from pixelwise.data.views import InRegion
from pixelwise.errors import DataError, PixelwiseError
from pixelwise.formats import Source
from pixelwise.formats.base import Palette
from pixelwise.formats.beside import not_read
from pixelwise.formats.local import printable
from pixelwise.formats.registry import is_picture
from pixelwise.machine import processors

MAX_VALUES = 4096  # of more, most pixels must lie in areas
_MAX_STORED = 65_536
MAX_VALUES_OF_LARGE = 256  # of each the places are counted
WHOLE_PX = 16_000_000
"""Planes of more pixels are not read as a whole, neither here nor in training."""

_STRIP_PX = 4_000_000

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class MaskScan:
    """What one mask holds."""

    grid: Grid  # its size and place
    kind: Literal["index", "rgb"]  # numbers or colours
    counts: Mapping[Value, int]  # pixels per value, by ascending value
    palette: Palette | None  # its colours by index
    digest: str  # SHA-256 of the decoded pixels
    format: str  # of the file
    solid: Mapping[Value, int] = field(
        default_factory=dict
    )  # of these, how many have only equal neighbours (8 of them)
    border: Mapping[Value, int] = field(default_factory=dict)  # pixels per value on the frame of each plane
    nodata: float | None = None  # the number that the file declares to be no data
    places: tuple[Places, ...] = ()  # where the values are, for each plane if they are too large to be read as a whole


@dataclass(frozen=True, kw_only=True)
class ImageScan:
    """What one image holds."""

    grid: Grid  # its size and place
    channels: int  # numbers per pixel
    dtype: str  # their type
    digest: str  # SHA-256 of the decoded pixels
    format: str  # of the file
    spacing: str = ""  # size of a pixel or voxel with its unit, in words; "" if the file does not know it
    pixels: int = 0  # how many hold data, inside of the region
    region: str = ""  # SHA-256 of the decoded region; "" if there is none
    opacity: str = ""  # what became of a band that is marked as opacity, in words
    opacity_kind: str = ""  # "opacity", "band" or "constant", by its numbers
    sums: Sums | None = None  # over the pixels that hold data; None if nobody asked
    remarks: tuple[str, ...] = ()  # what of the file, or beside it, is not read


@dataclass(frozen=True, kw_only=True)
class PairScan:
    """A pair and what its files hold; a file that cannot be read has an error instead."""

    pair: Pair
    image: ImageScan | None
    mask: MaskScan | None
    image_error: str | None = None
    mask_error: str | None = None
    labelled: Mapping[Value, int] | None = None  # pixels per value where the image has data, if it has not everywhere

    @property
    def counts(self) -> Mapping[Value, int]:
        """Pixels per value of the mask, where the image has data."""
        return self.labelled if self.labelled is not None else self.mask.counts if self.mask else {}


def scan_pair(
    pair: Pair,
    reading: Reading | None = None,
    channels: int | None = None,
    *,
    by_color: bool = False,
    with_pixels: bool = True,
) -> PairScan:
    """Read both files, the image as a network for so many channels does, and the region, if there is one.

    Masks with a palette are read `by_color` if the classes are colours. Without `with_pixels`, of the image only the header.
    """
    image = mask = image_error = mask_error = labelled = None
    try:
        region = _scan_region(pair, reading) if pair.region is not None else ""
        image = _scan_image(pair, reading, channels, region=region, with_pixels=with_pixels)
    except DataError as error:
        image_error = _reason(error, pair.image)
    try:
        mask = scan_mask(pair, reading) if pair.mask is not None else None
        by_color = by_color and mask is not None and mask.palette is not None
        if by_color:
            mask = scan_mask(pair, reading, by_color=True)
    except DataError as error:
        mask_error = _reason(error, pair.mask)
    if image and mask and image.pixels < image.grid.pixels and not mask.grid.difference(image.grid):
        labelled = _counts_with_data(pair, reading, channels, by_color)
    return PairScan(
        pair=pair, image=image, mask=mask, image_error=image_error, mask_error=mask_error, labelled=labelled
    )


def scan_mask(pair: Pair, reading: Reading | None = None, *, by_color: bool = False) -> MaskScan:
    """Read the mask of a pair and count its values; asked again about an unchanged file, it answers from memory."""
    paths = (pair.mask or Path(), *pair.more_masks)
    image = pair.image if any(map(may_be_segmentation, paths)) else Path()
    asked = replace(pair, image=image, split="", name="", group="", plane=None)  # in short, for the memory
    axes = tuple((reading or {}).get(key) for key in ("axis", "axes"))
    try:
        states = tuple((status.st_mtime_ns, status.st_size) for status in (path.stat() for path in paths))
    except (OSError, ValueError):
        states = ()  # the reader has its own message
    return _scan_mask(asked, axes, by_color, states)


def place_of(pair: Pair, value: Value, reading: Reading | None = None) -> str:
    """Where the first pixel of a value lies in a mask, in words; "" if it is not there."""
    with open_mask_of(pair, reading, by_color=isinstance(value, tuple)) as source:
        for plane, top, bottom in strips(source):
            raw = mask_values(source.read(top, 0, bottom - top, source.info.width, plane))
            here = raw == value if raw.ndim == 2 else (raw == np.array(value)).all(axis=2)
            if here.any():
                row, column = np.unravel_index(int(here.argmax()), here.shape)
                along = f" along axis {source.metadata['axis']}" if "axis" in source.metadata else ""
                within = f"plane {plane}{along}, " if source.info.planes > 1 else ""
                return f"{within}row {top + row}, column {column}"
    return ""


def strips(source: Source) -> Iterator[tuple[int, int, int]]:
    """(plane, top, bottom) of the strips that are read: whole planes, or several rows of blocks of large ones."""
    height, width = source.info.height, source.info.width
    rows = height
    if height * width > WHOLE_PX:
        block = min(source.info.block_px[0], height)
        rows = max(1, _STRIP_PX // width)
        rows = max(block, rows // block * block) if block * width <= WHOLE_PX else rows
    for plane in range(source.info.planes):
        for top in range(0, height, rows):
            yield plane, top, min(top + rows, height)


def in_threads(
    function: Callable[[T], R], items: Sequence[T], on_progress: Callable[[int, int], None] | None = None
) -> list[R]:
    """The results of `function` in the order of `items`; decoding leaves Python's lock, so threads do help.

    `on_progress(done, total)` is called in this thread as results come in.
    """
    results = []
    with ThreadPoolExecutor(max_workers=worker_count()) as pool:
        for result in pool.map(function, items):
            results.append(result)
            if on_progress is not None:
                on_progress(len(results), len(items))
    return results


def worker_count() -> int:
    """How many cores this process may use, at most 16."""
    return min(processors(), 16)


def _scan_region(pair: Pair, reading: Reading | None) -> str:
    """SHA-256 of a region.

    Raises:
        DataError: it is no mask of one region.
    """
    scan = scan_mask(replace(pair, mask=pair.region, more_masks=()), reading, by_color=True)
    inside = [value for value in scan.counts if value not in (0, (0, 0, 0))]
    if len(inside) > 1 or not inside:
        shown = first_of([value_name(value) for value in scan.counts], 5)
        raise DataError(
            f"{printable(pair.region or '')}: holds {shown}, but the mask of a region that counts holds 0 (black) outside "
            "of it and one other value inside."
        )
    return scan.digest


def _open_counted(pair: Pair, reading: Reading | None, channels: int | None) -> Source:
    """The image of a pair; what lies outside of its region counts like what has no data."""
    image = open_image(pair.image, reading, channels)
    try:
        region = open_region(pair, image, reading)
    except PixelwiseError:
        image.close()
        raise
    return image if region is None else InRegion(image, region)


def _scan_image(
    pair: Pair, reading: Reading | None, channels: int | None, *, region: str, with_pixels: bool
) -> ImageScan:
    """Sums are taken of training images only."""
    path, with_sums = pair.image, with_pixels and pair.split == "train"
    with _open_counted(pair, reading, channels) as source:
        info = source.info
        sums, pixels = Sums.none(info.channels), 0

        def arrays() -> Iterator[NDArray[Any]]:
            nonlocal pixels
            for plane, top, bottom in strips(source):
                array = source.read(top, 0, bottom - top, info.width, plane)
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise DataError(f"{info.location}: holds numbers that are NaN or infinite. Replace them.")
                yield array
                valid = source.valid(top, 0, bottom - top, info.width, plane)
                pixels += int(valid.sum()) if valid is not None else (bottom - top) * info.width
                if with_sums:
                    sums.add(array if valid is None else array[valid])

        digest = pixel_digest(source, arrays()) if with_pixels else ""
        return ImageScan(
            grid=Grid.of(source),
            channels=info.channels,
            dtype=info.dtype,
            digest=digest,
            opacity=source.metadata.get("opacity", ""),
            opacity_kind=source.metadata.get("opacity_kind", ""),
            format=path.suffix.lower().lstrip(".") if is_picture(path) else info.format,
            spacing=_spacing(source.metadata),
            pixels=pixels if with_pixels else info.height * info.width * info.planes,
            region=region,
            sums=sums if with_sums else None,
            remarks=not_read(path, source.metadata),
        )


def _counts_with_data(pair: Pair, reading: Reading | None, channels: int | None, by_color: bool) -> dict[Value, int]:
    """Pixels per value of a mask where its image has data, by ascending value."""
    counts = Counter[Value]()
    with (
        _open_counted(pair, reading, channels) as image,
        open_mask_of(pair, reading, by_color=by_color) as mask,
    ):
        for plane, top, bottom in strips(image):
            window = (top, 0, bottom - top, image.info.width, plane)
            raw, valid = mask_values(mask.read(*window)), image.valid(*window)
            counts.update(value_counts(raw if valid is None else raw[valid][None]))
    return dict(sorted(counts.items(), key=lambda item: pack_value(item[0])))


@lru_cache(maxsize=50_000)
def _scan_mask(pair: Pair, axes: tuple[Any, ...], by_color: bool, _states: tuple[tuple[int, int], ...]) -> MaskScan:
    path = pair.mask or Path()
    with open_mask_of(pair, {"axis": axes[0], "axes": axes[1]}, by_color=by_color) as source:
        info, counts, solid, border = source.info, Counter[Value](), Counter[Value](), Counter[Value]()
        is_large = info.height * info.width > WHOLE_PX
        places = [Places(info.height, info.width) for _ in range(info.planes if is_large else 0)]

        def arrays() -> Iterator[NDArray[Any]]:
            for plane, top, bottom in strips(source):
                raw = mask_values(source.read(top, 0, bottom - top, info.width, plane))
                yield raw
                found = value_counts(raw)
                counts.update(found)
                solid.update(solid_counts(raw, found))
                border.update(border_counts(raw, top == 0, bottom == info.height))
                if len(counts) > MAX_VALUES_OF_LARGE and is_picture(path):
                    places.clear()  # all of it is in memory while it is open, so it can be trained on as a whole
                has_areas = not places and len(counts) <= _MAX_STORED and 2 * sum(solid.values()) > sum(counts.values())
                if len(counts) > (MAX_VALUES_OF_LARGE if places else MAX_VALUES) and not has_areas:
                    raise DataError(
                        f"{printable(path)}: holds {len(counts):,} different values; it looks like a photograph, not a mask "
                        "of classes. If it is one, save it again as PNG, without JPEG and antialiasing."
                    )
                if places:
                    places[plane].add(top, raw, found)

        digest = pixel_digest(source, arrays())
        return MaskScan(
            grid=Grid.of(source),
            kind="rgb" if info.channels == 3 else "index",
            counts=dict(sorted(_short(counts, solid).items(), key=lambda item: pack_value(item[0]))),
            palette=source.metadata.get("palette"),
            digest=digest,
            format=info.format,
            solid=solid,
            border=border,
            nodata=source.metadata.get("nodata"),
            places=tuple(places),
        )


def _short(counts: Counter[Value], solid: Mapping[Value, int]) -> Counter[Value]:
    """Of thousands of values, as soft rims of 16 bits have, those that fill no area by the grey of 8 bits that they show.

    Masks are remembered, so what they hold must be small; which side of a threshold a pixel of a rim lies on matters little.
    """
    if len(counts) <= MAX_VALUES:
        return counts
    short = Counter[Value]()
    for value, count in counts.items():
        short[value // 257 * 257 if isinstance(value, int) and not solid.get(value) else value] += count
    return short


def _spacing(metadata: Mapping[str, Any]) -> str:
    """The size of a pixel or voxel, in words."""
    if zooms := metadata.get("zooms"):
        return " x ".join(f"{float(value):.4g}" for value in zooms[:3]) + " mm"
    if metadata.get("transform") and metadata.get("crs"):
        a, b, _, d, e, _ = metadata["transform"]
        return f"{np.hypot(a, d):.6g} x {np.hypot(b, e):.6g} units of the CRS"
    if size := metadata.get("pixel_size_um"):
        return " x ".join(f"{float(value):.4g}" for value in size.values()) + " um"
    return ""


def _reason(error: DataError, path: Path | None) -> str:
    return str(error).removeprefix(f"{printable(path or '')}: ")
