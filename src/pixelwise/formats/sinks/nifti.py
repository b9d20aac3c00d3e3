"""Labels and maps as NIfTI, in the space and order of voxels of the volume or DICOM series they were made from.

Every field of a NIfTI source's header that says where the voxels lie is kept as it is, bit by bit. The voxels are
written in the order of the file, at most a few MiB at a time.
"""

import gzip
import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.files import atomic_path, cannot_write, extra
from pixelwise.formats.base import LABELS, Result

_INTENT_LABEL, _INTENT_ESTIMATE = 1002, 1001
_COMMENT = 6  # code of a header extension that is plain text
_BAND_BYTES = 8 * 2**20
_MAX_NIFTI1 = 32_767
_SFORM_SCANNER = 1
_MAX_TEXT_BYTES = 2**20


def write_nifti(path: Path, result: Result) -> None:
    """Write labels (intent label, smallest integer type) or a map (float32) as .nii or .nii.gz.

    Names and colours of the classes and the mark are JSON in a header extension of plain text.

    Raises:
        UsageError: the name ends in something else, or the source knows no space: it is neither NIfTI nor DICOM.
        PixelwiseError: the file cannot be written, or the slices of a DICOM series lie at uneven distances.

    Example:
        >>> import tempfile, nibabel
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.formats.nifti import open_nifti
        >>> folder = Path(tempfile.mkdtemp())
        >>> image = nibabel.Nifti1Image(np.zeros((5, 4, 3), dtype=np.int16), np.diag([2, 2, 3, 1]))
        >>> image.to_filename(folder / "brain.nii")
        >>> spec = LabelSpec(names=("a", "b"), colors=((0, 0, 0), (9, 9, 9)), values=((0,), (1,)))
        >>> with open_nifti(str(folder / "brain.nii")) as source:
        ...     write_nifti(folder / "labels.nii.gz", Result(
        ...         kind="labels", spec=spec, source=source.info, metadata=source.metadata, dtype=np.dtype("uint8"),
        ...         rows=lambda plane, top, bottom: np.full((bottom - top, 5), plane, dtype=np.uint8)))
        >>> nibabel.load(folder / "labels.nii.gz").dataobj[0, 0].tolist()
        [0, 1, 2]
    """
    path = Path(path)
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise UsageError(f"{path}: NIfTI is written to a name that ends in .nii or .nii.gz.")
    nibabel = extra("nibabel", "medical", "NIfTI")
    header = _header(nibabel, path, result)
    try:
        with atomic_path(path) as part, part.open("wb") as file, _packed(file, name.endswith(".gz")) as stream:
            header.write_to(stream)
            stream.write(bytes(int(header["vox_offset"]) - stream.tell()))
            for voxels in _in_file_order(result):
                stream.write(voxels.tobytes())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_nifti_mark(path: str | Path) -> dict[str, Any] | None:
    """The mark of a file that `write_nifti` wrote; None for every other file, however damaged.

    Only the header and the extension that comes first are read.

    Example:
        >>> read_nifti_mark("no/such.nii.gz") is None
        True
    """
    try:
        with Path(path).open("rb") as file, _unpacked(file) as stream:
            size = int.from_bytes(stream.read(4), "little")
            if size not in (348, 540):
                return None
            stream.read(size - 4)
            first, length, code = struct.unpack("<4sii", stream.read(12))
            if first[:1] != b"\1" or code != _COMMENT or not 8 < length <= _MAX_TEXT_BYTES:
                return None
            mark = json.loads(stream.read(length - 8).rstrip(b"\0")).get("pixelwise")
    except (OSError, EOFError, ValueError, AttributeError, RecursionError, struct.error, zlib.error):
        return None
    return mark if isinstance(mark, dict) else None


@contextmanager
def _unpacked(file: BinaryIO) -> Iterator[Any]:
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not packed:
        yield file
        return
    with gzip.GzipFile(fileobj=file) as stream:
        yield stream


@contextmanager
def _packed(file: BinaryIO, is_packed: bool) -> Iterator[Any]:
    """Compressed or not; neither name nor time is stored, so that equal labels give equal files."""
    if not is_packed:
        yield file
        return
    with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0, compresslevel=6) as stream:
        yield stream


def _header(nibabel: Any, path: Path, result: Result) -> Any:
    known = result.metadata
    if "affine" not in known or "shape" not in known:
        raise UsageError(
            f"{path}: {result.source.location} ({result.source.format}) does not say where its pixels lie in space, which "
            "NIfTI needs. NIfTI is written of NIfTI and DICOM; choose another format."
        )
    if not known.get("even", True):
        raise PixelwiseError(
            f"{path}: the slices of {result.source.location} lie at uneven distances, which NIfTI cannot say. Complete the "
            "series, or write DICOM-SEG, which keeps the place of every slice."
        )
    stored = known.get("header")
    big = max(known["shape"]) > _MAX_NIFTI1 if stored is None else len(stored) == 540
    kind = nibabel.Nifti2Header if big else nibabel.Nifti1Header
    header = _fresh(kind, known) if stored is None else kind(stored, endianness="<", check=False)
    header["magic"] = header.single_magic
    header.set_data_dtype(result.dtype)
    header.set_slope_inter(1, 0)
    is_labels = result.kind == LABELS
    header.set_intent(_INTENT_LABEL if is_labels else _INTENT_ESTIMATE, name=result.kind[:15], allow_unknown=True)
    header["cal_min"], header["cal_max"] = 0, result.spec.num_classes - 1 if is_labels else 0
    header["descrip"] = f"pixelwise {result.kind}".encode()
    for field in ("aux_file", "db_name"):  # these belong to the source, and may name somebody
        if field in header.keys():  # noqa: SIM118  (a header is no dict)
            header[field] = b""
    text = json.dumps(_description(result), sort_keys=True).encode()
    header.extensions.append(nibabel.nifti1.Nifti1Extension(_COMMENT, text))
    header["vox_offset"] = header.single_vox_offset + header.extensions.get_sizeondisk()
    return header


def _fresh(kind: Any, known: Any) -> Any:
    """The header of a DICOM series, of which only the geometry is known."""
    header = kind(endianness="<")
    header.set_data_shape(known["shape"])
    header.set_zooms(known["zooms"])
    header.set_xyzt_units("mm", "sec" if len(known["shape"]) > 3 else "unknown")
    header.set_sform(known["affine"], code=_SFORM_SCANNER)
    header.set_qform(known["affine"], code=_SFORM_SCANNER, strip_shears=True)
    return header


def _description(result: Result) -> dict[str, Any]:
    names, colors = result.spec.names, result.spec.colors
    classes = [{"label": k, "name": names[k], "color": list(colors[k])} for k in range(len(names))]
    content = {"kind": result.kind, "classes": classes, "pixelwise": dict(result.mark)}
    if "intensity" in result.metadata:
        content["intensity"] = result.metadata["intensity"]
    return content if result.nodata is None else content | {"nodata": result.nodata}


def _in_file_order(result: Result) -> Iterator[NDArray[Any]]:
    """All voxels, i fastest, in pieces (slices, rows, columns) of at most 8 MiB, or one line."""
    i, j, k, t = (*result.metadata["shape"], 1, 1)[:4]
    line, slab = i * result.dtype.itemsize, i * j * result.dtype.itemsize
    slabs, lines = max(1, _BAND_BYTES // slab), max(1, _BAND_BYTES // line)
    for time in range(t):
        for first in range(0, k, slabs):
            for top in range(0, j, lines if slab > _BAND_BYTES else j):
                box = ((first, min(first + slabs, k)), (top, min(top + lines, j)))
                yield _box(result, time, i, *box)


def _box(result: Result, time: int, columns: int, ks: tuple[int, int], js: tuple[int, int]) -> NDArray[Any]:
    """Voxels (K, J, I) of some slices and rows, gathered from the planes that hold them."""
    axis, shape = result.metadata["axis"], (*result.metadata["shape"], 1, 1)
    box = np.empty((ks[1] - ks[0], js[1] - js[0], columns), dtype=result.dtype)
    first = time * shape[axis]
    if axis == 2:
        for k in range(*ks):
            box[k - ks[0]] = result.rows(first + k, *js)
    elif axis == 1:
        for j in range(*js):
            box[:, j - js[0]] = result.rows(first + j, *ks)
    else:
        for i in range(columns):
            box[:, :, i] = result.rows(first + i, *ks)[:, js[0] : js[1]]
    return box
