"""Which writer a result gets: the format of its image, unless another is wanted that can hold it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pixelwise.errors import UsageError
from pixelwise.files import extra
from pixelwise.formats import SourceInfo
from pixelwise.formats.base import LABELS, Writer

Refusal = Callable[[SourceInfo, str, Mapping[str, Any]], str]


@dataclass(frozen=True)
class WriterFormat:
    """A format that results can be written in.

    Attributes:
        suffix: what the files end in.
        module: in this package.
        function: writes a result to a path.
        package: what it needs beside pixelwise itself, with the extra that installs it.
        refuses: why it cannot hold a result (of an image, of a kind, with metadata); "" where it can.
    """

    suffix: str
    module: str
    function: str
    package: tuple[str, str] | None = None
    refuses: Refusal = lambda info, kind, metadata: ""


def _not_flat(info: SourceInfo, kind: str, metadata: Mapping[str, Any]) -> str:
    if kind != LABELS:
        return "it holds labels, not numbers with a fraction"
    return f"it holds one plane, the image has {info.planes}" if info.planes > 1 else ""


def _no_space(info: SourceInfo, kind: str, metadata: Mapping[str, Any]) -> str:
    if info.format not in ("nifti", "dicom"):
        return f"it needs a place in space, which only NIfTI and DICOM images have, not {info.format}"
    if metadata.get("even") is False:
        return "it cannot say where slices at uneven distances lie"
    return "" if _has_space(info, metadata) else "the DICOM image says nothing about its place in space"


def _no_dicom(info: SourceInfo, kind: str, metadata: Mapping[str, Any]) -> str:
    if kind != LABELS:
        return "it holds labels, not numbers with a fraction"
    if info.format != "dicom":
        return f"it refers to DICOM images, not to {info.format}"
    return "" if _has_space(info, metadata) else "the DICOM image says nothing about its place in space"


def _has_space(info: SourceInfo, metadata: Mapping[str, Any]) -> bool:
    """Without metadata the best is assumed; only DICOM can lack a place."""
    return info.format != "dicom" or not metadata or metadata.get("affine") is not None


WRITERS: Mapping[str, WriterFormat] = {
    "png": WriterFormat(".png", "png", "write_png_labels", refuses=_not_flat),
    "tiff": WriterFormat(".tif", "tiff", "write_tiff"),
    "ome-tiff": WriterFormat(".ome.tif", "tiff", "write_ome_tiff"),
    "geotiff": WriterFormat(".tif", "geotiff", "write_geotiff", ("rasterio", "geo")),
    "cog": WriterFormat(".tif", "geotiff", "write_cog", ("rasterio", "geo")),
    "nifti": WriterFormat(".nii.gz", "nifti", "write_nifti", ("nibabel", "medical"), _no_space),
    "dicom-seg": WriterFormat(".dcm", "dicom_seg", "write_dicom_seg", ("highdicom", "medical"), _no_dicom),
    "zarr": WriterFormat(".zarr", "zarr", "write_zarr", ("zarr", "zarr")),
    "ome-zarr": WriterFormat(".ome.zarr", "zarr", "write_ome_zarr", ("zarr", "zarr")),
    "npy": WriterFormat(".npy", "npy", "write_npy"),
}
"""Every format of results, by the name that chooses it."""

_SAME = {"slide": "ome-tiff"} | {
    name: name for name in ("tiff", "ome-tiff", "geotiff", "nifti", "zarr", "ome-zarr", "npy")
}


def choose_writer(
    source_info: SourceInfo, kind: str, wanted: str | None = None, metadata: Mapping[str, Any] | None = None
) -> tuple[str, Writer]:
    """The writer of a result, and what its file ends in.

    By default the format of the image is kept. Formats that lose detail or cannot hold numbers exactly become PNG (JPEG,
    WebP, BMP, GIF, PNM), or TIFF where PNG cannot hold it (maps, several planes); slides become OME-TIFF. DICOM becomes
    NIfTI, which holds labels and maps of a series in one file that every viewer opens; DICOM-SEG on request. A DICOM
    series of uneven distances becomes DICOM-SEG, an image without a place in space (an X-ray) PNG or TIFF. Maps take the
    default where the format that is wanted can hold labels alone (PNG, DICOM-SEG).

    Args:
        source_info: the image.
        kind: of the result: "labels" or the name of a map.
        wanted: a name of `WRITERS`.
        metadata: the image's own; without it every DICOM image is taken to know its place.

    Raises:
        UsageError: `wanted` is unknown or cannot hold the result, or its package is not installed.

    Example:
        >>> info = SourceInfo(location="a.jpg", format="jpeg", height=4, width=4, channels=3, dtype="uint8")
        >>> choose_writer(info, "labels")[0]
        '.png'
        >>> choose_writer(info, "labels", "nifti")
        Traceback (most recent call last):
            ...
        pixelwise.errors.UsageError: a.jpg: labels cannot be written as nifti: it needs a place in space, which only NIfTI \
and DICOM images have, not jpeg. Possible are png, tiff, ome-tiff, geotiff, cog, zarr, ome-zarr, npy.
    """
    known = dict(metadata or {})
    chosen = WRITERS.get(wanted or "")
    only_labels = chosen is not None and bool(chosen.refuses(source_info, kind, known))
    if chosen is not None and only_labels and not chosen.refuses(source_info, LABELS, known):
        wanted = None
    name = wanted or _default(source_info, kind, known)
    writer = WRITERS.get(name)
    reason = "there is no such format" if writer is None else writer.refuses(source_info, kind, known)
    if writer is None or reason:
        possible = [key for key, item in WRITERS.items() if not item.refuses(source_info, kind, known)]
        raise UsageError(
            f"{source_info.location}: {kind} cannot be written as {name}: {reason}. Possible are {', '.join(possible)}."
        )
    if writer.package is not None:
        extra(*writer.package, f"{source_info.location}: writing {name}")
    function: Writer = getattr(
        import_module(f"pixelwise.formats.{'' if writer.module == 'zarr' else 'sinks.'}{writer.module}"),
        writer.function,
    )
    return writer.suffix, function


def _default(info: SourceInfo, kind: str, metadata: Mapping[str, Any]) -> str:
    """The format of the image, or the next best that can hold the result; TIFF can hold all."""
    names = ("nifti", "dicom-seg") if info.format == "dicom" else (_SAME.get(info.format, "png"),)
    return next(name for name in (*names, "png", "tiff") if not WRITERS[name].refuses(info, kind, metadata))
