"""Photos that their EXIF orientation turns, with masks that were drawn on the pixels as they are stored."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pixelwise.data.masks import mask_values, open_mask_of
from pixelwise.data.pairs import Problem, first_of
from pixelwise.data.scan import PairScan
from pixelwise.errors import PixelwiseError
from pixelwise.formats.base import orient
from pixelwise.formats.local import printable
from pixelwise.formats.opening import read_image

_LOOKS = 16  # pairs that are looked at
_CLEAR = 1.2  # so many times stronger edges decide
_SIDE_PX = 1024  # of larger ones every n-th row and column is taken
_ADVICE = (
    "Tools that ignore EXIF (labelme, CVAT) draw on the pixels as stored: then remove the orientation from the photos "
    "(exiftool -Orientation= FOLDER), or turn the masks like them."
)


def turned_masks(scans: Sequence[PairScan]) -> Iterator[Problem]:
    """A warning, unless the edges of the photos agree with their masks as both are read now."""
    turned = [scan for scan in scans if scan.image and scan.mask and scan.image.grid.orientation != 1]
    alone = [scan for scan in turned if scan.mask and scan.mask.grid.orientation == scan.mask.grid.planes == 1]
    if not alone:
        return
    now = as_stored = 0.0
    for scan in alone[:_LOOKS]:
        found = _edges(scan)
        now, as_stored = now + found[0], as_stored + found[1]
    if now > _CLEAR * as_stored:
        return
    count = "1 photo carries an EXIF orientation that its mask does"
    if len(alone) > 1:
        count = f"{len(alone):,} photos carry an EXIF orientation that their masks do"
    if as_stored > 0 and all(
        scan.mask and scan.image and scan.mask.grid.width != scan.image.grid.width for scan in alone
    ):
        test = "the sizes agree only if the masks are turned too"
    elif as_stored > _CLEAR * now:
        times = as_stored / max(now, 1e-9)
        test = f"the borders of the masks lie on {times:.1f} times stronger edges if they are turned too"
    else:
        test = "whether the masks must be turned too cannot be told from the edges"
    names = first_of([printable(scan.pair.image.name) for scan in alone], 3)
    yield Problem("warning", f"{count} not ({names}): {test}. {_ADVICE}", tuple(scan.pair.name for scan in alone))


def _edges(scan: PairScan) -> tuple[float, float]:
    """How strong the edges of a photo are under the borders of its mask, as both are read, and with the mask turned too."""
    if scan.image is None or scan.mask is None or scan.pair.mask is None:
        return 0.0, 0.0
    try:
        photo = read_image(scan.pair.image).mean(axis=2)
        with open_mask_of(scan.pair) as source:
            mask = mask_values(source.read(0, 0, source.info.height, source.info.width))
    except PixelwiseError:
        return 0.0, 0.0
    step = max(1, max(photo.shape) // _SIDE_PX)
    found = []
    for turned in (mask, orient(mask, scan.image.grid.orientation)):
        fits = turned.shape[:2] == photo.shape
        found.append(_under_borders(photo[::step, ::step], turned[::step, ::step]) if fits else 0.0)
    return found[0], found[1]


def _under_borders(photo: NDArray[np.floating], mask: NDArray[np.generic]) -> float:
    """The mean difference of neighbouring pixels of a photo where those of a mask differ."""
    differences, count = 0.0, 0
    for axis in (0, 1):
        one, other = (slice(1, None), slice(None)), (slice(None, -1), slice(None))
        one, other = (one, other) if axis == 0 else (one[::-1], other[::-1])
        border = mask[one] != mask[other]
        border = border if border.ndim == 2 else border.any(axis=2)
        differences += float(np.abs(photo[one] - photo[other])[border].sum())
        count += int(border.sum())
    return differences / max(1, count)
