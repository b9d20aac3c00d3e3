"""Opening images: plain pictures in this process, all else in the decoding child; and whole images and masks at once."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.base import Source
from pixelwise.formats.local import Stamp, local_path, printable
from pixelwise.formats.registry import open_as, picture_format

MAX_DECODED_BYTES = 4 * 2**30
"""Larger images are not read as a whole."""


def open_source(location: str | Path, *, format: str | None = None, **options: Any) -> Source:
    """Open an image of any format; only its header is read.

    Plain pictures are decoded in this process, within Pillow's limits; all others in a child process (`decoding`).

    Args:
        location: a path, or the URL of a file or Zarr folder.
        format: its format, if the content should not decide: a name of `FORMATS`.
        options: what the format offers, for example `axis` (NIfTI), `level` (slides, OME-Zarr, COG), `series` (DICOM,
            OME-Zarr, TIFF), `intensity` (NIfTI, DICOM) or `axes` (Zarr, .npy); None is as good as absent. `channels`, how
            many the network takes, and `allow_no_affine` (NIfTI) help where a file leaves something open and are welcome
            to all; so is `now`: all of it will be read at once.

    Raises:
        DataError: the file is missing, damaged, or of no known format.
        UsageError: the format has no such option, or its package is not installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.npy"
        >>> np.save(path, np.zeros((4, 5, 3), dtype=np.uint8))
        >>> with open_source(path) as source:
        ...     source.info.format, source.info.height, source.info.width
        ('npy', 4, 5)
    """
    name = str(location)
    given = {key: value for key, value in options.items() if value is not None}
    path = local_path(name)
    if path is not None and format is None:
        head = _first_bytes(path)
        if key := picture_format(head):
            return open_as(key, path, given)
        if not head and not os.path.isdir(path):  # noqa: PTH112  (also of names that no file can have)
            Stamp.of(path)  # what is not there, or no file, needs no child to find out
    if path is None and name.lower().startswith("memory:"):  # that of this process
        from pixelwise.formats.in_process import open_in_process

        return open_in_process(location, format=format, **given)
    from pixelwise.formats.decoding import WorkerSource

    return WorkerSource(name, format, given, is_remote=path is None)


def _first_bytes(path: str) -> bytes:
    """Enough of a file to know a picture; none of a folder, a pipe or what is not there."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            return os.read(handle, 12)
        finally:
            os.close(handle)
    except (OSError, ValueError):
        return b""


def read_image(path: str | Path) -> NDArray[Any]:
    """Read an image as it is meant to be seen, (H, W, C) in the file's number type; the array may be read-only.

    EXIF orientation is applied, palettes become RGB, opacity is dropped, 1-bit becomes 0 and 255. Bit depth stays.

    Raises:
        DataError: the file is missing, empty, damaged, too large, no image, a volume, or holds NaN or infinity.
    """
    with open_source(path, now=True) as source:
        return _whole(source)


def read_mask(path: str | Path) -> NDArray[Any]:
    """Read a mask as it is stored: the numbers of an index or palette file, or its RGB colours.

    EXIF orientation is applied as to images; 1-bit becomes 0 and 255; opacity is dropped.

    Returns:
        integers (H, W), or uint8 (H, W, 3); the array may be read-only.

    Raises:
        DataError: as `read_image`, or the file holds neither whole numbers nor 8-bit colours.
    """
    with open_source(path, labels=True, now=True) as source:
        array = _whole(source)
        return array[:, :, 0] if array.shape[2] == 1 else array


def _whole(source: Source) -> NDArray[Any]:
    info = source.info
    if info.planes > 1:
        raise DataError(f"{printable(info.location)}: it holds {info.planes:,} planes; a single image is needed.")
    size = info.height * info.width * info.channels * np.dtype(info.dtype).itemsize
    if size > MAX_DECODED_BYTES:
        raise DataError(
            f"{printable(info.location)}: it takes {size / 2**30:,.1f} GiB when decoded; at most "
            f"{MAX_DECODED_BYTES >> 30} GiB are read at once. Cut it into parts."
        )
    return source.read(0, 0, info.height, info.width)
