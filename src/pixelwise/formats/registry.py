"""The one table of formats: what their files are called and begin with, and who reads and writes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from pixelwise.errors import DataError, UsageError
from pixelwise.extras import extra
from pixelwise.formats.base import LABELS, TIFF_MAGIC, Source, SourceInfo, Writer
from pixelwise.formats.local import printable, shown

Refusal = Callable[[SourceInfo, str, Mapping[str, Any]], str]
_HINTS = ("channels", "allow_no_affine", "now")  # that all formats allow: they help where a file leaves something open
_GIVEN = ("location", "opener", "identity")


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
    has_reference = _has_space(info, metadata) and metadata.get("frame_of_reference_uid", True)
    return "" if has_reference else "the DICOM image says nothing about its place in space"


def _has_space(info: SourceInfo, metadata: Mapping[str, Any]) -> bool:
    """Without metadata the best is assumed; only DICOM can lack a place."""
    return info.format != "dicom" or not metadata or metadata.get("affine") is not None


@dataclass(frozen=True, kw_only=True)
class Format:
    """How files of a format are found, read and written.

    Attributes:
        opens: the module and function that opens a location; "" if the format is only written. One with the parameter
            `opener` reads parts of files from anywhere.
        creates: the module and function that writes a `Result`; "" if the format is only read.
        suffixes: what names end in, in lower case; the first is that of written files.
        magic: possible first bytes.
        looks: the module and function (head, name; of GeoTIFF also opener) that decides where the first bytes cannot; "" if
            they can.
        package: what writing needs beside pixelwise itself, with the extra that installs it.
        becomes: the format of results of such images.
        refuses: why it cannot hold a result (of an image, of a kind, with metadata); "" where it can.
    """

    opens: str = ""
    creates: str = ""
    suffixes: tuple[str, ...] = ()
    magic: tuple[bytes, ...] = ()
    looks: str = ""
    package: tuple[str, str] | None = None
    becomes: str = "png"
    refuses: Refusal = lambda info, kind, metadata: ""


_PILLOW = "image.ImageSource"
_MEDICAL, _GEO, _ZARR = ("nibabel", "medical"), ("rasterio", "geo"), ("zarr", "zarr")

FORMATS: Mapping[str, Format] = {
    "png": Format(opens=_PILLOW, creates="image.write_png_labels", suffixes=(".png",), magic=(b"\x89PNG\r\n\x1a\n",),
                  refuses=_not_flat),
    "jpeg": Format(opens=_PILLOW, suffixes=(".jpg", ".jpeg", ".jfif", ".jpe"), magic=(b"\xff\xd8\xff",)),
    "webp": Format(opens=_PILLOW, suffixes=(".webp",), magic=(b"RIFF????WEBP",)),
    "bmp": Format(opens=_PILLOW, suffixes=(".bmp",), magic=(b"BM",)),
    "gif": Format(opens=_PILLOW, suffixes=(".gif",), magic=(b"GIF87a", b"GIF89a")),
    "pnm": Format(opens=_PILLOW, suffixes=(".ppm", ".pgm", ".pbm"), magic=tuple(b"P%d" % kind for kind in range(1, 7))),
    "dicom": Format(opens="dicom.open_dicom", suffixes=(".dcm", ".dicom"), looks="dicom.is_dicom", becomes="nifti"),
    "dicom-seg": Format(creates="dicom_seg.write_dicom_seg", suffixes=(".dcm",), package=("highdicom", "medical"),
                        refuses=_no_dicom),
    "slide": Format(opens="tiff.slide.open_slide", suffixes=(".svs", ".ndpi", ".scn", ".bif"), looks="tiff.slide.is_slide",
                    becomes="ome-tiff"),
    "geotiff": Format(opens="geotiff.open_geotiff", creates="geotiff.write_geotiff", suffixes=(".tif",),
                      looks="geotiff.is_geotiff", package=_GEO, becomes="geotiff"),
    "cog": Format(creates="geotiff.write_cog", suffixes=(".tif",), package=_GEO, becomes="geotiff"),
    "ome-tiff": Format(creates="tiff.write.write_ome_tiff", suffixes=(".ome.tif", ".ome.tiff"), becomes="ome-tiff"),
    "tiff": Format(opens="tiff.read.open_tiff", creates="tiff.write.write_tiff", suffixes=(".tif", ".tiff", ".btf", ".tf8"),
                   magic=TIFF_MAGIC, becomes="tiff"),
    "npy": Format(opens="npy.open_npy", creates="npy.write_npy", suffixes=(".npy",), magic=(b"\x93NUMPY",), becomes="npy"),
    "nifti": Format(opens="nifti.open_nifti", creates="nifti.write_nifti", suffixes=(".nii.gz", ".nii"),
                    looks="nifti.is_nifti", package=_MEDICAL, becomes="nifti", refuses=_no_space),
    "ome-zarr": Format(creates="zarr.write.write_ome_zarr", suffixes=(".ome.zarr",), package=_ZARR, becomes="ome-zarr"),
    "zarr": Format(opens="zarr.source.open_zarr", creates="zarr.write.write_zarr", suffixes=(".zarr", ".zarr.zip"),
                   magic=(b"PK\x03\x04",), package=_ZARR, becomes="zarr"),
}  # fmt: skip
"""Every format by its name, in the order in which files are compared with them."""

SOURCE_SUFFIXES: tuple[str, ...] = tuple(
    dict.fromkeys(suffix for known in FORMATS.values() if known.opens for suffix in known.suffixes)
)
"""What the names of images end in, in lower case; those of Zarr are folders."""

WRITERS: Mapping[str, Format] = {name: known for name, known in FORMATS.items() if known.creates}
"""The formats that results can be written in."""

_READ_AS = {"ome-tiff": "tiff", "cog": "geotiff", "ome-zarr": "zarr", "dicom-seg": "dicom"}
_PICTURE_SUFFIXES = tuple(suffix for known in FORMATS.values() if known.opens == _PILLOW for suffix in known.suffixes)
_ALL_SUFFIXES = sorted({suffix for known in FORMATS.values() for suffix in known.suffixes}, key=len, reverse=True)


def is_picture(path: str | Path) -> bool:
    """Whether a file is named as one of the formats that are decoded as a whole, in this process: PNG, JPEG, ..."""
    return str(path).lower().endswith(_PICTURE_SUFFIXES)


def suffix_of(name: str) -> str:
    """What a file name ends in, in lower case, the double suffixes of formats as one; "" if it has no suffix."""
    lower = name.lower()
    known = next((suffix for suffix in _ALL_SUFFIXES if lower.endswith(suffix) and len(name) > len(suffix)), None)
    return PurePath(lower).suffix if known is None else known


def stem_of(name: str) -> str:
    """A file name without its suffix; the double ones of the formats (.nii.gz, .ome.tif) are one."""
    suffix = suffix_of(name)
    return name[: -len(suffix)] if suffix else name


def likely_suffix(name: str) -> str:
    """What the labels of an image will end in, as far as its name tells."""
    suffix = suffix_of(name)
    known = (item for item in FORMATS.values() if suffix in item.suffixes and item.becomes != "geotiff")
    return FORMATS[next((item.becomes for item in known), "png")].suffixes[0]


def named_format(name: str) -> str:
    """The name of the format that a user means, which may be a suffix such as "jpg".

    Raises:
        UsageError: there is no such format that can be read.
    """
    found = _READ_AS.get(name, name)
    if found not in FORMATS:
        named = [key for key, known in FORMATS.items() if known.opens and f".{name}" in known.suffixes]
        found = named[-1] if named else ""  # the more general format stands later
    if not found:
        possible = [key for key, known in FORMATS.items() if known.opens or key in _READ_AS]
        raise UsageError(f"format {name!r} is not known; possible are {', '.join(possible)}.")
    return found


@cache
def function_of(key: str, kind: str) -> Callable[..., Any]:
    """The function of a format that "opens", "creates" or "looks"; its module is imported now."""
    module, _, name = getattr(FORMATS[key], kind).rpartition(".")
    function: Callable[..., Any] = getattr(import_module(f"pixelwise.formats.{module}"), name)
    return function


def open_as(key: str, location: str, options: dict[str, Any], **given: Any) -> Source:
    """Open by the function of a format, after a look whether it has such options."""
    function = function_of(key, "opens")
    offered = [name for name in _parameters(key) if name not in _GIVEN]
    for name in options:
        if name not in offered and name not in _HINTS:
            has = [option for option in offered if option not in (*_HINTS, "labels")]
            choice = f"it has {', '.join(has)}" if has else "it has no options"
            raise UsageError(f"{shown(location)}: its format ({key}) has no option {name}; {choice}.")
    given |= {name: value for name, value in options.items() if name in offered}
    try:
        source: Source = function(location, **given)
    except UsageError as error:  # a package is missing, or an option is wrong: which image needs it?
        if shown(location) in str(error):
            raise
        raise UsageError(f"{shown(location)}: {error}") from error
    return source


@cache
def _parameters(key: str) -> tuple[str, ...]:
    """Of the function that opens a format."""
    return tuple(signature(function_of(key, "opens")).parameters)


def reads_parts(key: str) -> bool:
    """Whether a format reads parts of files, which need not lie on this machine."""
    return "opener" in _parameters(key)


def picture_format(head: bytes) -> str:
    """The format of a file that begins with `head`, if Pillow decodes it; "" if not."""
    return next((key for key, known in FORMATS.items() if known.opens == _PILLOW and _begins(head, known)), "")


def format_of(head: bytes, name: str, opener: Callable[[], BinaryIO] | None = None, level: int | None = None) -> str:
    """The format of a file, a name of `FORMATS`.

    Args:
        head: its first 4,096 bytes.
        name: its path, or its URL without secrets.
        opener: gives the file where `name` is no local path.
        level: of a pyramid, if one was asked for: pyramids in TIFF are read as slides, those of GeoTIFF as such.

    Raises:
        DataError: none fits.
    """
    for key, known in FORMATS.items():
        if _begins(head, known) or (
            known.looks and function_of(key, "looks")(head, name, *[opener] * (key == "geotiff"))
        ):
            return "slide" if level is not None and key == "tiff" else key
    for key in ("dicom", "nifti"):  # both exist in a form without a mark at the beginning
        if name.lower().endswith(FORMATS[key].suffixes):
            return key
    what = (
        "this is no image that can be read, or its first bytes are damaged" if head else "the file is empty (0 bytes)"
    )
    raise DataError(
        f"{printable(name)}: {what}. Known are PNG, JPEG, WebP, BMP, GIF, PNM, TIFF, OME-TIFF, GeoTIFF, slides, NumPy, "
        "NIfTI, DICOM and Zarr."
    )


def _begins(head: bytes, known: Format) -> bool:
    return any(
        len(head) >= len(magic) and all(wanted in (found, ord("?")) for wanted, found in zip(magic, head, strict=False))
        for magic in known.magic
    )


def choose_writer(
    source_info: SourceInfo, kind: str, wanted: str | None = None, metadata: Mapping[str, Any] | None = None
) -> tuple[str, Writer]:
    """The suffix and the writer of a result.

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
    return writer.suffixes[0], function_of(name, "creates")


def _default(info: SourceInfo, kind: str, metadata: Mapping[str, Any]) -> str:
    """The format of the image, or the next best that can hold the result; TIFF can hold all."""
    same = FORMATS[info.format].becomes if info.format in FORMATS else "png"
    names = (same, "dicom-seg") if info.format == "dicom" else (same,)
    return next(name for name in (*names, "png", "tiff") if not WRITERS[name].refuses(info, kind, metadata))
