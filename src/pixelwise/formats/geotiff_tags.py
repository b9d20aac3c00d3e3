"""What the tags of a GeoTIFF say: whether it is one, whether its pixels can be used, and where on Earth they lie."""

import math
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple
from xml.parsers import expat

from pixelwise.errors import DataError
from pixelwise.formats.tiff import MAGIC

_GEO = {
    33550: "ModelPixelScale", 33922: "ModelTiepoint", 34264: "ModelTransformation", 34735: "GeoKeyDirectory",
    42112: "GDAL_METADATA", 42113: "GDAL_NODATA", 50844: "RPCCoefficient",
}  # fmt: skip
_COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _GDAL_METADATA = 259, 262, 274, 42112
_GRAY_OR_RGB, _YCBCR, _JPEG = (0, 1, 2, 3, 32803), 6, (6, 7)
_COLOR_NAMES = {
    4: "a mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELAB",
    9: "ICCLAB",
    10: "ITULAB",
    32844: "LogL",
    32845: "LogLuv",
}
_SHORT = 3
_MAX_ENTRIES = 4096
_MAX_TAG_TEXT = 1 << 16
_MAX_METADATA_BYTES = 1 << 26
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class Tag(NamedTuple):
    """One tag: how its values are stored, how many there are, and the value if it is one short number, else their place."""

    kind: int
    length: int
    value: int


def read_tags(file: BinaryIO) -> Mapping[int, Tag]:
    """The tags of the first image by their numbers.

    Raises:
        DataError: the tags do not lie (as a whole) in the file, or it is no TIFF.

    Example:
        >>> import io
        >>> entries = struct.pack("<HHHII", 1, 274, 3, 1, 6)
        >>> read_tags(io.BytesIO(b"II*" + bytes(1) + struct.pack("<I", 8) + entries))
        {274: Tag(kind=3, length=1, value=6)}
    """
    file.seek(0)
    start = file.read(16)
    if start[:4] not in MAGIC:
        raise DataError("this is no TIFF.")
    order, big = "<" if start[:2] == b"II" else ">", 43 in start[2:4]
    link, length = ("Q", "Q") if big else ("I", "H")
    entry = struct.Struct(f"{order}HH{link}{link}")
    try:
        file.seek(struct.unpack_from(order + link, start, 8 if big else 4)[0])
        (count,) = struct.unpack(order + length, file.read(struct.calcsize(length)))
        entries = file.read(min(count, _MAX_ENTRIES) * entry.size)
        if not 0 < count <= _MAX_ENTRIES or len(entries) < count * entry.size:
            raise DataError("its tags are damaged or cut off.")
        tags = {}
        for place in range(0, len(entries), entry.size):
            number, kind, values, value = entry.unpack_from(entries, place)
            if kind == _SHORT and values == 1:
                (value,) = struct.unpack_from(order + "H", entries, place + entry.size - struct.calcsize(link))
            tags[number] = Tag(kind, values, value)
        return tags
    except (struct.error, OverflowError) as error:
        raise DataError("its tags are damaged or cut off.") from error


def is_geo(tags: Mapping[int, Any]) -> bool:
    """Whether these tags are those of a GeoTIFF, or of a TIFF that GDAL has given a nodata value or metadata.

    Example:
        >>> is_geo({256: Tag(3, 1, 10)}), is_geo({256: Tag(3, 1, 10), 34735: Tag(3, 4, 8)})
        (False, True)
    """
    return any(tag in _GEO for tag in tags)


def check_tags(file: BinaryIO) -> int:
    """The photometric interpretation, of pixels that can be used as they are.

    Raises:
        DataError: they are neither grey nor RGB, or turned; or the tags are damaged.
    """
    tags = read_tags(file)
    photometric, compression, turned = (
        tags[number].value if number in tags else 1 for number in (_PHOTOMETRIC, _COMPRESSION, _ORIENTATION)
    )
    if photometric not in _GRAY_OR_RGB and not (photometric == _YCBCR and compression in _JPEG):
        name = _COLOR_NAMES.get(photometric, f"interpretation {photometric}")
        raise DataError(f"its colours are stored as {name}. Convert it to RGB or grey.")
    if turned not in (0, 1):
        raise DataError(
            f"its Orientation tag is {turned}, which would turn the pixels but not their place on Earth. Turn it for good "
            "(gdalwarp IN OUT), or remove that tag."
        )
    if _GDAL_METADATA in tags:
        _check_xml(file, tags[_GDAL_METADATA])
    return photometric


def _check_xml(file: BinaryIO, tag: Tag) -> None:
    """GDAL cites what is wrong with its metadata, and rasterio cannot print that unless it is UTF-8."""
    if tag.length > _MAX_METADATA_BYTES:
        raise DataError(f"its GDAL metadata takes {tag.length:,} bytes; at most {_MAX_METADATA_BYTES:,} are read.")
    file.seek(tag.value)
    text = file.read(tag.length).rstrip(b"\0")
    try:
        text.decode()
    except UnicodeDecodeError:
        try:
            if b"<!" in text:  # no document types, which could define entities
                raise DataError("its GDAL metadata is damaged.") from None
            expat.ParserCreate("iso-8859-1").Parse(text, True)
        except expat.ExpatError as error:
            raise DataError("its GDAL metadata is damaged.") from error


def geo_metadata(dataset: Any) -> dict[str, Any]:
    """What an open rasterio dataset says besides its pixels, as plain values that JSON and other processes take.

    Raises:
        DataError: there is a coordinate system without a transform, or the transform cannot be turned round.
    """
    gcps, gcps_crs = dataset.gcps
    rpcs = _texts(dataset, ns="RPC")
    transform: tuple[float, ...] | None = tuple(float(value) for value in tuple(dataset.transform)[:6])
    crs = dataset.crs.to_wkt() if dataset.crs else None
    if transform == _IDENTITY:
        if crs is not None and not gcps and not rpcs:
            raise DataError(
                f"it has a coordinate system ({dataset.crs.to_string()[:80]}) but no transform, so where its pixels lie is "
                "unknown. Add it (gdal_edit.py -a_ullr LEFT TOP RIGHT BOTTOM FILE), or remove the coordinate system "
                "(gdal_edit.py -a_srs None FILE)."
            )
        transform = None
    _check_transform(transform)
    metadata = {
        "crs": crs,
        "transform": transform,
        "nodata": dataset.nodata,
        "band_names": _names(dataset),
        "colors": tuple(color.name for color in dataset.colorinterp),
        "tags": _texts(dataset),
    }
    if gcps:
        metadata["gcps"] = tuple((gcp.row, gcp.col, gcp.x, gcp.y, gcp.z) for gcp in gcps)
        metadata["gcps_crs"] = gcps_crs.to_wkt() if gcps_crs else None
    if rpcs:
        metadata["rpcs"] = rpcs
    return metadata


def _check_transform(transform: tuple[float, ...] | None) -> None:
    if transform is None:
        return
    a, b, _, d, e, _ = transform
    if not all(map(math.isfinite, transform)) or a * e - b * d == 0:
        raise DataError(
            f"its transform {transform} gives pixels no place or no area. Correct it: gdal_edit.py -a_ullr LEFT TOP RIGHT "
            "BOTTOM FILE."
        )


def _texts(dataset: Any, **where: Any) -> dict[str, str]:
    """Tags of a domain that are UTF-8, as GDAL has them; older programs wrote other text, of which nobody knows which."""
    try:
        tags = dataset.tags(**where)
    except UnicodeDecodeError:
        return {}
    return {str(key): str(value) for key, value in tags.items() if len(str(value)) <= _MAX_TAG_TEXT}


def _names(dataset: Any) -> tuple[str, ...]:
    try:
        return tuple(name or "" for name in dataset.descriptions)
    except UnicodeDecodeError:
        return ("",) * dataset.count
