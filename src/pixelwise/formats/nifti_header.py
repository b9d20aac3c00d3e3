"""What a NIfTI header says: shape, type and place of the voxels, and where they lie in space, as nibabel reads it."""

import gzip
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.local import Stamp

GZIP = b"\x1f\x8b"

_MAX_RATIO = 1032  # deflate cannot do better
_SILENT = logging.Logger("pixelwise.nifti", level=logging.CRITICAL + 1)
_TO_DO = (
    "Set the right one with nibabel or the tool that wrote the file, or pass allow_no_affine (--allow-no-affine) to go on "
    "without a place in space."
)


def version(head: bytes) -> int:
    """1 or 2 where a file starts with the header of NIfTI-1 or NIfTI-2, else 0."""
    if len(head) >= 348 and head[344:348] in (b"n+1\0", b"ni1\0"):
        return 1
    return 2 if len(head) >= 348 and head[4:8] in (b"n+2\0", b"ni2\0") else 0


def pair(path: Path) -> tuple[Path, Path]:
    """The file of the header and the file of the voxels, which are one but for .hdr and .img."""
    found = re.fullmatch(r"(.*\.)(hdr|img)(\.gz)?", str(path), re.IGNORECASE | re.DOTALL)
    if found is None:
        return path, path
    stem, kind, packed = found.groups(default="")
    other = "img" if kind.lower() == "hdr" else "hdr"
    partner = Path(stem + (other.upper() if kind.isupper() else other) + packed)
    return (partner, path) if other == "hdr" else (path, partner)


def is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == GZIP


def read_header(nibabel: Any, path: Path) -> Any:
    with gzip.open(path) if is_packed(path) else path.open("rb") as stream:
        head = stream.read(540)
    found = version(head)
    if not found and len(head) >= 348 and (348).to_bytes(4, "little") in (head[:4], head[3::-1]):
        raise DataError("this is Analyze 7.5, which has no affine and no marked orientation. Convert it to NIfTI.")
    if not found:
        raise DataError("this is no NIfTI file, or its header is damaged.")
    kind = nibabel.Nifti1Header if found == 1 else nibabel.Nifti2Header
    header = kind(head[: kind.sizeof_hdr], check=False)
    header.check_fix(_SILENT, nibabel.imageglobals.error_level)
    return header


def shape_and_type(header: Any) -> tuple[tuple[int, int, int, int], np.dtype[Any]]:
    """(I, J, K, T), T the points in time, and the type of a voxel; colours have the fields R, G, B and maybe A."""
    shape, dtype = tuple(int(length) for length in header.get_data_shape()), header.get_data_dtype()
    if len(shape) < 2 or min(shape) < 1 or math.prod(shape[4:]) > 1:
        raise DataError(
            f"it has the shape {' x '.join(map(str, shape)) or 'of nothing'}; two to four axes of at least one voxel "
            "(rows, columns, slices, points in time) can be used."
        )
    if dtype.kind == "c":
        raise DataError("its voxels are complex numbers. Save their magnitude, or their phase, as a volume of its own.")
    if dtype.kind not in "uif" and (dtype.names or ())[:3] != ("R", "G", "B"):
        raise DataError(f"its voxels are of type {dtype}; whole numbers, floats and RGB colours can be used.")
    i, j, k, t = (*shape, 1, 1)[:4]
    return (i, j, k, t), dtype


def voxel_offset(header: Any, stamps: Mapping[Path, Stamp], path: Path, nbytes: int) -> int:
    """Where the voxels start in their file, which is long enough for them."""
    is_pair = bytes(header["magic"])[:2] == b"ni"
    if len(stamps) == 1 and is_pair:
        raise DataError("its header says that the voxels lie in an .img file; name both files .hdr and .img.")
    offset = max(int(header["vox_offset"]), 0 if is_pair else int(header["sizeof_hdr"]))
    size = stamps[path].size
    if offset + nbytes > size * (_MAX_RATIO if is_packed(path) else 1):
        raise DataError(
            f"its header says {' x '.join(map(str, header.get_data_shape()))} voxels, {offset + nbytes:,} bytes in all, "
            f"which a file of {size:,} bytes cannot hold. It is truncated or damaged."
        )
    return offset


def geometry(header: Any, axis: int, shape: tuple[int, ...], allow_no_affine: bool) -> dict[str, Any]:
    """What a writer needs to place its own voxels in the same space."""
    try:
        units = tuple(header.get_xyzt_units())
    except KeyError:  # a number that stands for no unit; nothing is measured by them here
        units = ("unknown", "unknown")
    return {
        "affine": _affine(header, allow_no_affine),
        "zooms": tuple(float(zoom) for zoom in header.get_zooms()),
        "units": units,
        "sform_code": int(header["sform_code"]),
        "qform_code": int(header["qform_code"]),
        "shape": tuple(int(length) for length in header.get_data_shape()),
        "axis": axis,
        "slices": shape[axis],
        "time_points": shape[3],
        "header": header.as_byteswapped("<").binaryblock,
    }


def _affine(header: Any, allow_no_affine: bool) -> NDArray[np.float64]:
    """RAS+ (4, 4): the sform if it has a code, else the qform, as nibabel and SPM do."""
    name = "sform" if int(header["sform_code"]) > 0 else "qform" if int(header["qform_code"]) > 0 else None
    if name is not None:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        lengths = np.linalg.norm(affine[:3, :3], axis=0)  # of small voxels the determinant alone would be tiny
        spans = np.isfinite(affine).all() and np.isfinite(lengths).all() and (lengths > 0).all()
        if spans and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6:
            return affine
    if allow_no_affine:
        return cast(NDArray[np.float64], header.get_base_affine())
    if name is None:
        raise DataError(
            f"it has no affine (sform_code and qform_code are 0), so nobody can tell left from right. {_TO_DO}"
        )
    raise DataError(f"its affine (the {name}) is singular or not finite. {_TO_DO}")
