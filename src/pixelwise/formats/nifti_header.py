"""What a NIfTI header says: shape, type and place of the voxels, and where they lie in space.

Headers are read by nibabel; what it lets through and what could not be read or would be wrong is refused here.
"""

import errno
import gzip
import io
import math
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.intensity import quiet

GZIP = b"\x1f\x8b"

_LOGGER = "nibabel"
_VERSIONS = {348: 1, 540: 2}  # bytes of the header: version of the format
_MAX_RATIO = 1032  # deflate cannot do better
_MAX_OFFSET = 64 * 2**20  # header extensions before the voxels
_COPY_BYTES = 2**20
_SUFFIXES = {".img": ".hdr", ".hdr": ".img"}
_TO_DO = (
    "Set the right one with nibabel or the tool that wrote the file, or pass allow_no_affine (--allow-no-affine) to go on "
    "without a place in space."
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the voxels lie in a file and what they mean.

    Attributes:
        shape: (I, J, K, T), T the points in time.
        dtype: of a voxel as stored, with its order of bytes; colours have the fields R, G, B and maybe A.
        offset: bytes before the first voxel.
        slope: a stored number times this ...
        intercept: ... plus this is what it means.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float

    @property
    def nbytes(self) -> int:
        """Bytes of all voxels."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def colors(self) -> bool:
        """Whether a voxel is a colour."""
        return self.dtype.names is not None

    @property
    def scaled(self) -> bool:
        """Whether stored numbers differ from what they mean."""
        return (self.slope, self.intercept) != (1.0, 0.0)


def is_header(head: bytes) -> bool:
    """Whether bytes start with a NIfTI-1 or NIfTI-2 header, of a single file or of a pair.

    Example:
        >>> is_header(struct.pack(">i", 348) + bytes(340) + b"ni1\\0")
        True
    """
    sizes = {struct.unpack(order + "i", head[:4])[0] for order in "<>"} if len(head) >= 348 else set()
    return (348 in sizes and head[344:348] in (b"n+1\0", b"ni1\0")) or (
        540 in sizes and head[4:8] in (b"n+2\0", b"ni2\0")
    )


def pair(path: Path) -> tuple[Path, Path]:
    """The file of the header and the file of the voxels, which are one but for .hdr and .img.

    Example:
        >>> [item.name for item in pair(Path("scan.img.gz"))]
        ['scan.hdr.gz', 'scan.img.gz']
    """
    plain, packed = (path.with_suffix(""), path.suffix) if path.suffix.lower() == ".gz" else (path, "")
    other = _SUFFIXES.get(plain.suffix.lower())
    if other is None:
        return path, path
    other = other.upper() if plain.suffix.isupper() else other
    partner = plain.with_suffix(other).with_name(plain.with_suffix(other).name + packed)
    return (path, partner) if plain.suffix.lower() == ".hdr" else (partner, path)


def read_header(
    nibabel: Any, files: tuple[Path, ...], axis: int, allow_no_affine: bool
) -> tuple[Layout, dict[str, Any]]:
    """The layout of the voxels, and what a writer needs to place its own in the same space.

    Raises:
        DataError: the header is damaged, or says what cannot be used.
    """
    with quiet(_LOGGER), np.errstate(all="ignore"), _format_errors(nibabel):
        header = _parse(nibabel, files[0])
        layout = _layout(header, single=len(files) == 1)
        affine = _affine(header, allow_no_affine)
        shape = tuple(int(length) for length in header.get_data_shape())
        return layout, {
            "affine": affine,
            "zooms": tuple(float(zoom) for zoom in header.get_zooms()),
            "units": _units(header),
            "sform_code": int(header["sform_code"]),
            "qform_code": int(header["qform_code"]),
            "shape": shape,
            "axis": axis,
            "slices": layout.shape[axis],
            "time_points": layout.shape[3],
            "header": header.as_byteswapped("<").binaryblock,
        }


def check_size(path: Path, layout: Layout) -> None:
    """Refuse a file that is shorter than its header says; of a compressed one, that cannot be as long as it says.

    Raises:
        DataError: the voxels are not all there.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    wanted = layout.offset + layout.nbytes
    if wanted > (size * _MAX_RATIO if packed else size):
        raise DataError(
            f"its header says {' x '.join(map(str, layout.shape))} voxels of {layout.dtype.itemsize} bytes, {wanted:,} "
            f"bytes in all, which a file of {size:,} bytes cannot hold. It is truncated or damaged."
        )


def decompressed(path: Path, layout: Layout) -> BinaryIO:
    """The voxels of a compressed file in a temporary file without a name; not a byte more than the header says.

    Raises:
        DataError: the file is truncated, or there is no room for its voxels.
    """
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if layout.nbytes > free:
        raise DataError(
            f"decompressed it takes {layout.nbytes / 2**30:.1f} GiB in the folder for temporary files "
            f"({tempfile.gettempdir()}), which has {free / 2**30:.1f} GiB free. Set TMPDIR to a larger disk."
        )
    target = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  (the source closes it)
    try:
        with gzip.open(path) as stream:
            _copy(stream, None, layout.offset)
            _copy(stream, target, layout.nbytes)
            stream.read(1)  # at the end of the stream its checksum is compared
        target.flush()
    except OSError as error:
        target.close()
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(f"there is no room to decompress it in {tempfile.gettempdir()}. Set TMPDIR.") from error
    except BaseException:
        target.close()
        raise
    return target


def _copy(stream: BinaryIO | gzip.GzipFile, target: BinaryIO | None, count: int) -> None:
    while count > 0:
        part = stream.read(min(count, _COPY_BYTES))
        if not part:
            raise DataError(f"it ends {count:,} bytes before its voxels do. It is truncated.")
        if target is not None:
            target.write(part)
        count -= len(part)


@contextmanager
def _format_errors(nibabel: Any) -> Iterator[None]:
    """nibabel's own errors are no `ValueError`."""
    images = nibabel.spatialimages
    try:
        yield
    except (images.HeaderDataError, images.HeaderTypeError, nibabel.wrapstruct.WrapStructError) as error:
        raise DataError(f"its NIfTI header cannot be used ({' '.join(str(error).split())[:200]}).") from error


def _parse(nibabel: Any, path: Path) -> Any:
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
        file.seek(0)
        head = gzip.GzipFile(fileobj=file).read(540) if packed else file.read(540)
    if not is_header(head):
        if len(head) >= 348 and any(struct.unpack(order + "i", head[:4])[0] == 348 for order in "<>"):
            raise DataError("this is Analyze 7.5, which has no affine and no marked orientation. Convert it to NIfTI.")
        raise DataError("this is no NIfTI file, or its header is damaged.")
    size = next(size for size in _VERSIONS for order in "<>" if struct.unpack(order + "i", head[:4])[0] == size)
    kind = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}[size]
    return kind.from_fileobj(io.BytesIO(head[:size]), check=True)


def _layout(header: Any, single: bool) -> Layout:
    stored = tuple(int(length) for length in header.get_data_shape())
    trimmed = stored
    while len(trimmed) > 4 and trimmed[-1] == 1:
        trimmed = trimmed[:-1]
    if not 2 <= len(trimmed) <= 4 or min(trimmed) < 1:
        raise DataError(
            f"it has the shape {' x '.join(map(str, stored)) or 'of nothing'}; two to four axes of at least one voxel "
            "(rows, columns, slices, points in time) can be used."
        )
    i, j, k, t = (*trimmed, 1, 1)[:4]
    dtype = header.get_data_dtype()
    if dtype.kind == "c":
        raise DataError("its voxels are complex numbers. Save their magnitude, or their phase, as a volume of its own.")
    if dtype.kind not in "uif" and (dtype.names or ())[:3] != ("R", "G", "B"):
        raise DataError(f"its voxels are of type {dtype}; whole numbers, floats and RGB colours can be used.")
    offset = float(header["vox_offset"])
    is_pair = bytes(header["magic"])[:2] == b"ni"
    if single and is_pair:
        raise DataError("its header says that the voxels lie in an .img file; name both files .hdr and .img.")
    if not math.isfinite(offset) or not 0 <= offset <= _MAX_OFFSET:
        raise DataError(f"its header says that the voxels start at byte {offset:g}; it is damaged.")
    least = 0 if is_pair else int(header["sizeof_hdr"])
    slope, intercept = header.get_slope_inter()
    return Layout(
        shape=(i, j, k, t),
        dtype=dtype,
        offset=max(int(offset), least),
        slope=1.0 if slope is None or dtype.names else float(slope),
        intercept=0.0 if intercept is None or dtype.names else float(intercept),
    )


def _units(header: Any) -> tuple[str, ...]:
    try:
        return tuple(header.get_xyzt_units())
    except KeyError:  # a number that stands for no unit; nothing is measured by them here
        return ("unknown", "unknown")


def _affine(header: Any, allow_no_affine: bool) -> NDArray[np.float64]:
    """RAS+ (4, 4): the sform if it has a code, else the qform, as nibabel and SPM do."""
    if int(header["sform_code"]) > 0:
        affine, name = header.get_sform(), "sform"
    elif int(header["qform_code"]) > 0:
        affine, name = header.get_qform(), "qform"
    elif allow_no_affine:
        return cast(NDArray[np.float64], header.get_base_affine())
    else:
        raise DataError(
            f"it has no affine (sform_code and qform_code are 0), so nobody can tell left from right. {_TO_DO}"
        )
    if is_invertible(affine):
        return np.asarray(affine, dtype=np.float64)
    if allow_no_affine:
        return cast(NDArray[np.float64], header.get_base_affine())
    raise DataError(f"its affine (the {name}) is singular or not finite. {_TO_DO}")


def is_invertible(affine: NDArray[np.float64]) -> bool:
    """Whether the columns of an affine span space, whatever their lengths are.

    Example:
        >>> is_invertible(np.diag([1e-5, 1e-5, 1e-5, 1])), is_invertible(np.diag([1.0, 1, 0, 1]))
        (True, False)
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (lengths > 0).all() or not np.isfinite(lengths).all():
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6)
