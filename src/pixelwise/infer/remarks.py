"""What a user should know of an image before its labels are believed: what of it is not read, and numbers unlike trained."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.formats.base import Source
from pixelwise.formats.beside import unread
from pixelwise.formats.local import is_url, printable

_SIDE_PX, _PLACES = 64, 3  # windows of an image that are looked at: so large, so many along rows and columns
_MOST_PX = 1 << 16  # of an image in memory
_FAR = 5.0  # deviations that the mean may be off
MANY_PX = 100_000_000
_NARROW, _OFF = 0.25, 0.5  # deviations that the numbers may be spread and off at once


def told_if_large(source: Source) -> str:
    """How much an image holds, where that is very much; a file of a few kilobytes may hold gigabytes. Else ""."""
    info = source.info
    pixels = info.height * info.width * info.planes
    if pixels < MANY_PX:
        return ""
    size = pixels * info.channels * np.dtype(info.dtype).itemsize / 2**30
    planes = f", {info.planes:,} planes" if info.planes > 1 else ""
    return (
        f"{printable(info.location)}: {info.width:,} x {info.height:,} px{planes}: {pixels / 1e6:,.0f} million pixels, "
        f"{size:,.1f} GiB when decoded. This takes a while."
    )


def remarks(source: Source, mean: Sequence[float], std: Sequence[float]) -> Iterator[tuple[str, str]]:
    """(kind, one line) of all that should be known of an open image, for a network trained on such mean and deviation."""
    name = printable(source.info.location)
    for warning in source.metadata.get("warnings", ()):
        yield f"{name}: {warning}", f"{name}: {warning}."
    if not is_url(source.info.location):
        for file, what in unread(source.info.location, source.metadata):
            told = f"{name}: {printable(file)} beside it is not read ({what}), nor is that of other images."
            yield f"beside{file[file.rfind('.') :]}", f"{told} Write both into one GeoTIFF: gdal_translate IN OUT.tif."
    if told := unlike_trained(source, mean, std):
        yield "numbers", told


def unlike_trained(source: Source, mean: Sequence[float], std: Sequence[float]) -> str:
    """One line on an image whose numbers are far from those that a network was trained on; "" if they are not.

    Far are numbers whose mean is off by five deviations of the training, and those that are spread over less than a quarter
    of its deviation and also off by half of it, as reflectances in 16 bits are for a network that learnt bytes. Of 8 bits
    the latter are dark or hazy photos.
    """
    pixels = _sampled(source)
    if pixels is None or pixels.shape[1] not in (1, len(mean)):
        return ""
    unit = pixels.astype(np.float64)
    if pixels.dtype.kind in "ui":
        unit /= np.iinfo(pixels.dtype).max
    found, spread = unit.mean(axis=0), unit.std(axis=0)  # (C,)
    off = np.abs(found - np.array(mean)) / np.array(std)
    is_far = off.mean() > _FAR
    if pixels.dtype != np.uint8 and 0 < spread.mean() < _NARROW * np.mean(std):
        is_far |= bool(off.mean() > _OFF)
    if not is_far:
        return ""
    here, there = (f"mean {np.mean(m):.3g}, deviation {np.mean(s):.3g}" for m, s in ((found, spread), (mean, std)))
    return (
        f"{printable(source.info.location)}: its numbers ({here}) are far from those that the network was trained on "
        f"({there}), so its labels may mean nothing. Whole numbers count as shares of the largest of their type, fractions "
        "as they are; scale them as the training images were."
    )


def _sampled(source: Source) -> NDArray[Any] | None:
    """Some pixels that hold data, (N, C), of the middle plane; None if none of those that were looked at does."""
    info = source.info
    plane = info.planes // 2
    if getattr(source, "pixels_in_memory", False):
        windows = [(0, 0, info.height, info.width)]
    else:
        height, width = min(_SIDE_PX, info.height), min(_SIDE_PX, info.width)
        tops, lefts = (
            np.unique(np.linspace(0, side - step, _PLACES).astype(int)).tolist()
            for side, step in ((info.height, height), (info.width, width))
        )
        windows = [(top, left, height, width) for top in tops for left in lefts]
    parts = []
    for window in windows:
        pixels, valid = source.read(*window, plane), source.valid(*window, plane)
        parts.append(pixels.reshape(-1, pixels.shape[2]) if valid is None else pixels[valid])
    flat = np.concatenate(parts)
    flat = flat[:: max(1, len(flat) // _MOST_PX)]
    if flat.dtype.kind == "f":
        flat = flat[np.isfinite(flat).all(axis=1)]
    return flat if len(flat) else None
