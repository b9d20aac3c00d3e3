"""The mark that a finished file carries in itself, whatever its format: network, input and options it was made with."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from pixelwise.errors import PixelwiseError
from pixelwise.formats.writers import MARK

_MAX_LINE_BYTES = 4 * 2**20
_READERS = {
    ".png": (("pixelwise.formats.writers", "read_mark"),),
    ".tif": (
        ("pixelwise.formats.tiff", "read_tiff_mark"),
        ("pixelwise.formats.geotiff_write", "read_geotiff_mark"),
    ),
    ".nii": (("pixelwise.formats.nifti", "read_nifti_mark"),),
    ".nii.gz": (("pixelwise.formats.nifti", "read_nifti_mark"),),
    ".dcm": (("pixelwise.formats.dicom_seg", "read_dicom_seg_mark"),),
    "json": (("pixelwise.formats.sinks.marks", "read_vector_mark"),),
}


def mark_of(path: Path) -> dict[str, Any] | None:
    """The mark of a file or folder that pixelwise wrote; None for every other one, and for formats without a place for it.

    Only headers are read. Where the package of a format is not installed, there is no mark either.

    Example:
        >>> mark_of(Path("no/such.tif")) is None
        True
    """
    name = path.name.lower()
    for suffix, readers in _READERS.items():
        if not name.endswith(suffix):
            continue
        for module, function in readers:
            try:
                mark = getattr(import_module(module), function)(path)
            except PixelwiseError:
                continue
            if mark is not None:
                return dict(mark)
    return None


def read_vector_mark(path: str | Path) -> dict[str, Any] | None:
    """The mark of a GeoJSON or COCO file that pixelwise wrote; None for every other file.

    All but the features stands in the first line, up to the bracket that opens their list.

    Example:
        >>> read_vector_mark("no/such.geojson") is None
        True
    """
    try:
        with Path(path).open("rb") as file:
            head = json.loads(file.readline(_MAX_LINE_BYTES).rstrip() + b"]}")
    except (OSError, ValueError, RecursionError):
        return None
    about = head.get("info", head) if isinstance(head, dict) else None
    mark = about.get(MARK) if isinstance(about, dict) else None
    return mark if isinstance(mark, dict) else None
