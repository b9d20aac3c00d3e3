"""Labels and maps as NumPy's .npy: (H, W), or (planes, H, W). It has no place for names, colours or the mark."""

from pathlib import Path

import numpy as np

from pixelwise.files import atomic_path, cannot_write
from pixelwise.formats.base import Result

_BAND_BYTES = 16 * 2**20


def write_npy(path: Path, result: Result) -> None:
    """Write an array, a band of rows at a time; `numpy.load(path, mmap_mode="r")` reads it.

    Raises:
        PixelwiseError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.formats import SourceInfo
        >>> spec = LabelSpec(names=("a", "b"), colors=((0, 0, 0), (9, 9, 9)), values=((0,), (1,)))
        >>> source = SourceInfo(location="a.npy", format="npy", height=2, width=3, channels=1, dtype="uint8")
        >>> labels = np.eye(2, 3, dtype=np.uint8)
        >>> path = Path(tempfile.mkdtemp()) / "a.npy"
        >>> write_npy(path, Result(kind="labels", spec=spec, source=source, dtype=labels.dtype,
        ...                        rows=lambda plane, top, bottom: labels[top:bottom]))
        >>> np.load(path).tolist()
        [[1, 0, 0], [0, 1, 0]]
    """
    planes, height, width = result.source.planes, result.source.height, result.source.width
    shape = (height, width) if planes == 1 else (planes, height, width)
    dtype = np.dtype(result.dtype)
    step = max(1, _BAND_BYTES // (width * dtype.itemsize))
    header = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    try:
        with atomic_path(path) as part, part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for plane in range(planes):
                for top in range(0, height, step):
                    rows = result.rows(plane, top, min(top + step, height))
                    file.write(np.ascontiguousarray(rows, dtype=dtype).data)
    except OSError as error:
        raise cannot_write(path, error) from error


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
        >>> from pixelwise.formats import SourceInfo
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
