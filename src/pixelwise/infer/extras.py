"""Two outputs for any image beside labels and maps: a picture to look at, and the probabilities of all classes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pixelwise.data.readers import to_tensor
from pixelwise.data.sources import Source
from pixelwise.files import atomic_path, cannot_write
from pixelwise.infer.sinks import Result
from pixelwise.infer.writers import blend, displayable, write_png

OVERLAY_PX = 4096
"""Pictures of larger images are made smaller, for nobody can look at them otherwise."""


def write_overlay(path: Path, result: Result, source: Source) -> None:
    """Write the class colours over the first plane of the image as PNG; larger sides than 4,096 px are made smaller.

    Args:
        path: where to.
        result: the labels.
        source: the image.

    Raises:
        DataError: the image cannot be read.
        PixelwiseError: the picture cannot be written.
    """
    info = source.info
    step = -(-max(info.height, info.width) // OVERLAY_PX)
    rows, labels = [], []
    band = max(1, (4 << 20) // info.width // step) * step  # rows that are read at once
    for top in range(0, info.height, band):
        bottom = min(top + band, info.height)
        rows.append(source.read(top, 0, bottom - top, info.width)[::step, ::step])
        labels.append(result.rows(0, top, bottom)[::step, ::step])
    picture, classes = displayable(_tensor(np.concatenate(rows))), np.concatenate(labels)
    mixed = blend(picture, classes.clip(0, result.spec.num_classes - 1), result.spec)
    if result.nodata is not None:  # no class, no colour
        array = np.array(mixed)
        array[classes == result.nodata] = picture[classes == result.nodata]
        mixed = Image.fromarray(array)
    write_png(path, mixed, result.mark)


def _tensor(pixels: NDArray[Any]) -> torch.Tensor:
    with np.errstate(over="ignore"):
        return to_tensor(pixels)


def write_probabilities(path: Path, result: Result) -> None:
    """Write the probabilities of all classes as .npy, float32 (K, H, W), or (planes, K, H, W) of several planes.

    Args:
        path: where to.
        result: its planes are the classes of the first plane of the image, then those of the next.

    Raises:
        PixelwiseError: it cannot be written.

    Example:
        >>> import tempfile
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.data.sources import SourceInfo
        >>> spec = LabelSpec(names=("a", "b"), colors=((0, 0, 0), (9, 9, 9)), values=((0,), (1,)))
        >>> info = SourceInfo(location="a.png", format="png", height=1, width=3, channels=3, dtype="uint8", planes=2)
        >>> values = np.array([[[0.5, 1, 0]], [[0.5, 0, 1]]], dtype=np.float32)
        >>> result = Result(kind="probabilities", spec=spec, source=info, dtype=values.dtype,
        ...                 rows=lambda plane, top, bottom: values[plane, top:bottom])
        >>> path = Path(tempfile.mkdtemp()) / "a.npy"
        >>> write_probabilities(path, result)
        >>> np.load(path).shape
        (2, 1, 3)
    """
    info, classes = result.source, result.spec.num_classes
    shape: tuple[int, ...] = (classes, info.height, info.width)
    if info.planes > classes:
        shape = (info.planes // classes, *shape)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    band = max(1, (16 << 20) // (4 * info.width))
    try:
        with atomic_path(path) as part, part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for plane in range(info.planes):
                for top in range(0, info.height, band):
                    rows = result.rows(plane, top, min(top + band, info.height))
                    file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
    except OSError as error:
        raise cannot_write(path, error) from error
