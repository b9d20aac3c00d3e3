"""What a user should know of an image before its labels are believed: what of it is not read, and numbers unlike trained."""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.data.numbers import Numbers
from pixelwise.formats.base import Source
from pixelwise.formats.beside import unread
from pixelwise.formats.local import is_url, printable
from pixelwise.infer.bundle import ModelCard

_SIDE_PX, _PLACES = 64, 3  # windows of an image that are looked at: so large, so many along rows and columns
_MOST_PX = 1 << 16  # of an image in memory
MANY_PX = 100_000_000


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


def warn(text: str) -> None:
    """Tell whoever called `evaluate` in Python."""
    level = 2
    while sys._getframe(level - 1).f_globals.get("__name__", "").startswith("pixelwise."):
        level += 1
    warnings.warn(text, stacklevel=level)


class Remarks:
    """What is told of the images of one job, through `note`: each kind once, since it is said of every image.

    Example:
        >>> told = Remarks(print)
        >>> told.tell("a.tif: band 4 is left out.", key="band 4"), told.tell("b.tif: band 4 is left out.", key="band 4")
        a.tif: band 4 is left out.
        (None, None)
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note, self._lock = note, threading.Lock()  # images are opened by several threads
        self._told: set[object] = set()

    def tell(self, text: str, key: object = None) -> None:
        """Tell one line, unless one of this kind (`key`, else the text itself) was told."""
        with self._lock:
            is_new = (key or text) not in self._told
            self._told.add(key or text)
        if is_new:
            self._note(text)

    def look(self, source: Source, card: ModelCard, *, all_bands: bool = False) -> None:
        """Tell the `remarks` on an open image."""
        for kind, text in remarks(source, card, all_bands=all_bands):
            self.tell(text, kind)


def remarks(source: Source, card: ModelCard, *, all_bands: bool = False) -> Iterator[tuple[str, str]]:
    """(kind, one line) of all that should be known of an open image, for a network with this card.

    A band that is marked as opacity and is left out is one of these; with `all_bands`, also one that is read.
    """
    name, pixels = printable(source.info.location), _sampled(source)  # first: a picture is decoded by it
    for warning in source.metadata.get("warnings", ()):
        yield f"{name}: {warning}", f"{name}: {warning}."
    is_kept = source.metadata.get("opacity_is_kept", False)
    if (opacity := source.metadata.get("opacity")) and (all_bands or not is_kept):
        yield opacity, f"{name}: {opacity}."
    if not is_url(source.info.location):
        for file, what in unread(source.info.location, source.metadata):
            told = f"{name}: {printable(file)} beside it is not read ({what}), nor is that of other images."
            yield f"beside{file[file.rfind('.') :]}", f"{told} Write both into one GeoTIFF: gdal_translate IN OUT.tif."
    if pixels is None or card.data.get("region"):  # of the training's images only what lies in the regions was measured
        return
    trained = card.numbers or Numbers(mean=card.mean, std=card.std)
    if told := trained.difference(pixels):
        yield "numbers", f"{name}: {told}."


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
