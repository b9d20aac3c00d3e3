"""What a finished prediction hands to the writer of a format: rows on demand, and what its file should say of itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.data.labels import LabelSpec
from pixelwise.data.sources import SourceInfo

LABELS = "labels"
MAPS = ("entropy", "mutual_information", "max_probability")


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
    spec: LabelSpec
    source: SourceInfo
    dtype: np.dtype[Any]
    rows: Callable[[int, int, int], NDArray[Any]]
    nodata: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    mark: Mapping[str, Any] = field(default_factory=dict)


Writer = Callable[[Path, Result], None]
"""Writes one result to a local path, atomically; raises `PixelwiseError` where it cannot be written."""
