"""What a NIfTI header says: shape, type and place of the voxels, and where they lie in space, as nibabel reads it."""

import errno
import gzip
import logging
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError

_GZIP = b"\x1f\x8b"

_MAX_RATIO = 1032  # deflate cannot do better
_SUFFIXES = {".img": ".hdr", ".hdr": ".img"}
_SILENT = logging.Logger("pixelwise.nifti", level=logging.CRITICAL + 1)
_SFORM_SCANNER = 1
_TO_DO = (
    "Set the right one with nibabel or the tool that wrote the file, or pass allow_no_affine (--allow-no-affine) to go on "
    "without a place in space."
)


@contextmanager
def unpacked(file: BinaryIO) -> Iterator[Any]:
    """The content of a file that may be compressed; its first bytes decide."""
    packed = file.read(2) == _GZIP
    file.seek(0)
    if not packed:
        yield file
        return
    with gzip.GzipFile(fileobj=file) as stream:
        yield stream


def version(head: bytes) -> int:
    """Bytes of the NIfTI-1 or NIfTI-2 header that a file starts with, 348 or 540; 0 if it starts with none."""
    sizes = {struct.unpack(order + "i", head[:4])[0] for order in "<>"} if len(head) >= 348 else set()
    if 348 in sizes and head[344:348] in (b"n+1\0", b"ni1\0"):
        return 348
    return 540 if 540 in sizes and head[4:8] in (b"n+2\0", b"ni2\0") else 0


def pair(path: Path) -> tuple[Path, Path]:
    """The file of the header and the file of the voxels, which are one but for .hdr and .img."""
    plain, packed = (path.with_suffix(""), path.suffix) if path.suffix.lower() == ".gz" else (path, "")
    other = _SUFFIXES.get(plain.suffix.lower())
    if other is None:
        return path, path
    other = other.upper() if plain.suffix.isupper() else other
    partner = plain.with_suffix(other).with_name(plain.with_suffix(other).name + packed)
    return (path, partner) if plain.suffix.lower() == ".hdr" else (partner, path)


@contextmanager
def format_errors(nibabel: Any) -> Iterator[None]:
    """nibabel's own errors are no `ValueError`."""
    images = nibabel.spatialimages
    try:
        with np.errstate(all="ignore"):
            yield
    except (images.HeaderDataError, images.HeaderTypeError, nibabel.wrapstruct.WrapStructError) as error:
        raise DataError(f"its NIfTI header cannot be used ({' '.join(str(error).split())[:200]}).") from error


def read_header(nibabel: Any, path: Path) -> Any:
    with path.open("rb") as file, unpacked(file) as stream:
        head = stream.read(540)
    size = version(head)
    if not size and len(head) >= 348 and any(struct.unpack(order + "i", head[:4])[0] == 348 for order in "<>"):
        raise DataError("this is Analyze 7.5, which has no affine and no marked orientation. Convert it to NIfTI.")
    if not size:
        raise DataError("this is no NIfTI file, or its header is damaged.")
    header = (nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header)(head[:size], check=False)
    header.check_fix(_SILENT, nibabel.imageglobals.error_level)
    return header


def shape_and_type(header: Any) -> tuple[tuple[int, int, int, int], np.dtype[Any]]:
    """(I, J, K, T), T the points in time, and the type of a voxel; colours have the fields R, G, B and maybe A."""
    stored = tuple(int(length) for length in header.get_data_shape())
    trimmed = stored
    while len(trimmed) > 4 and trimmed[-1] == 1:
        trimmed = trimmed[:-1]
    if not 2 <= len(trimmed) <= 4 or min(trimmed) < 1:
        raise DataError(
            f"it has the shape {' x '.join(map(str, stored)) or 'of nothing'}; two to four axes of at least one voxel "
            "(rows, columns, slices, points in time) can be used."
        )
    dtype = header.get_data_dtype()
    if dtype.kind == "c":
        raise DataError("its voxels are complex numbers. Save their magnitude, or their phase, as a volume of its own.")
    if dtype.kind not in "uif" and (dtype.names or ())[:3] != ("R", "G", "B"):
        raise DataError(f"its voxels are of type {dtype}; whole numbers, floats and RGB colours can be used.")
    i, j, k, t = (*trimmed, 1, 1)[:4]
    return (i, j, k, t), dtype


def voxel_range(header: Any, files: tuple[Path, ...], nbytes: int) -> tuple[int, int]:
    """Where the voxels start and end in the last of the files, which is long enough for them."""
    is_pair = bytes(header["magic"])[:2] == b"ni"
    if len(files) == 1 and is_pair:
        raise DataError("its header says that the voxels lie in an .img file; name both files .hdr and .img.")
    offset = max(int(header["vox_offset"]), 0 if is_pair else int(header["sizeof_hdr"]))
    with files[-1].open("rb") as file:
        ratio = _MAX_RATIO if file.read(2) == _GZIP else 1
    size = files[-1].stat().st_size
    if offset + nbytes > size * ratio:
        raise DataError(
            f"its header says {' x '.join(map(str, header.get_data_shape()))} voxels, {offset + nbytes:,} bytes in all, "
            f"which a file of {size:,} bytes cannot hold. It is truncated or damaged."
        )
    return offset, offset + nbytes


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
        affine = np.asarray(header.get_sform() if name == "sform" else header.get_qform(), dtype=np.float64)
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


def voxel_file(path: Path, nbytes: int) -> BinaryIO:
    """The file, opened; of a compressed one its first bytes in a temporary file without a name."""
    file = path.open("rb")
    if file.read(2) != _GZIP:
        return file
    file.close()
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise DataError(
            f"decompressed it takes {nbytes / 2**30:.1f} GiB in the folder for temporary files ({folder}), which has "
            f"{free / 2**30:.1f} GiB free. Set TMPDIR to a larger disk."
        )
    target = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  (the source closes it)
    try:
        with gzip.open(path) as stream:
            while nbytes > 0:
                content = stream.read(min(nbytes, 2**20))
                if not content:
                    raise DataError(f"it ends {nbytes:,} bytes before its voxels do. It is truncated.")
                target.write(content)
                nbytes -= len(content)
            stream.read(1)  # at the end of the stream its checksum is compared
        target.flush()
    except BaseException as error:
        target.close()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DataError(f"there is no room to decompress it in {folder}. Set TMPDIR.") from error
        raise
    return target


def fresh_header(kind: Any, known: Any) -> Any:
    """The header of a DICOM series, of which only the geometry is known."""
    header = kind(endianness="<")
    header.set_data_shape(known["shape"])
    header.set_zooms(known["zooms"])
    header.set_xyzt_units("mm", "sec" if len(known["shape"]) > 3 else "unknown")
    header.set_sform(known["affine"], code=_SFORM_SCANNER)
    header.set_qform(known["affine"], code=_SFORM_SCANNER, strip_shears=True)
    return header
