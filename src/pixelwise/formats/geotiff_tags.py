"""What a GeoTIFF says besides its pixels, through rasterio (GDAL): its place on Earth, nodata, scales, names and tags.

GDAL is given a copy of the tags in memory, never the file: no other driver, no file beside the image and no network is
ever asked.
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import tifffile

from pixelwise.errors import DataError
from pixelwise.extras import extra
from pixelwise.formats.local import silence

_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",  # no .aux.xml, neither read nor written
    "GDAL_CACHEMAX": 64,  # MiB of decoded blocks, for the whole process; GDAL would take 5 % of the memory
}
_COMPRESSION = 259
_MAX_TAG_TEXT = 1 << 16
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@contextmanager
def gdal(what: str = "GeoTIFF") -> Iterator[ModuleType]:
    """The module rasterio, with these options in this thread; its errors become an `OSError` that says GDAL's reason."""
    rasterio = extra("rasterio", "geo", what)
    errors = (rasterio.errors.RasterioError, extra("rasterio._err", "geo", what).CPLE_BaseError)
    session = extra("rasterio.session", "geo", what).DummySession()  # or boto3 would be asked for credentials
    try:
        with rasterio.Env(session=session, **_OPTIONS):
            yield rasterio
    except errors as error:
        reason = str(getattr(error.__cause__, "errmsg", None) or error.__cause__ or error)
        raise OSError(re.sub(r"/vsimem/\S+?: ", "", reason) or type(error).__name__) from error


def describe(page: tifffile.TiffPage) -> dict[str, Any]:
    """What the tags of a page say besides its pixels; `DataError` if its place is unknown."""
    try:
        return _described(_tags_alone(page))
    except OSError as error:
        if "missing codec" not in str(error):
            raise
        return _described(_tags_alone(page, compressed=False))  # the pixels are decoded without GDAL


def _described(content: bytes) -> dict[str, Any]:
    with (
        gdal() as rasterio,
        rasterio.MemoryFile(content) as memory,
        silence(),  # rasterio warns of files without a place
        memory.open(driver="GTiff", GEOREF_SOURCES="INTERNAL") as dataset,
    ):
        return _metadata(dataset)


def at_level(metadata: Mapping[str, Any], level: int, shrunk: tuple[float, float]) -> dict[str, Any]:
    """What is said of an image, for its smaller copy of `shrunk` times its rows and columns."""
    down, across = shrunk
    found = {**metadata, "level": level, "downsample": 0.5 / down + 0.5 / across}
    if found["transform"]:
        a, b, c, d, e, f = found["transform"]
        found["transform"] = (a / across, b / down, c, d / across, e / down, f)
    if "gcps" in found:
        found["gcps"] = tuple((row * down, column * across, *place) for row, column, *place in found["gcps"])
    if "rpcs" in found:
        found["rpcs"] = dict(found["rpcs"])
        for name, factor in (("LINE", down), ("SAMP", across)):
            offset, scale = (float(found["rpcs"][f"{name}_{what}"]) for what in ("OFF", "SCALE"))
            # offsets count from the centre of the first pixel
            found["rpcs"] |= {
                f"{name}_OFF": repr((offset + 0.5) * factor - 0.5), f"{name}_SCALE": repr(scale * factor)
            }  # fmt: skip
    return found


def _tags_alone(page: tifffile.TiffPage, *, compressed: bool = True) -> bytes:
    """A BigTIFF that has all tags of a page, but no pixels; it need not say how these are compressed."""
    order, tags = page.parent.byteorder, sorted(page.tags, key=lambda tag: tag.code)
    start = 16 + 8 + 20 * len(tags) + 8  # of the values that do not fit into their entry
    entries, values = b"", b""
    for tag in tags:
        is_plain = tag.code == _COMPRESSION and not compressed
        value = struct.pack(order + "H", 1) if is_plain else raw(page.parent, tag)
        place = value.ljust(8, b"\0") if len(value) <= 8 else struct.pack(order + "Q", start + len(values))
        values += value if len(value) > 8 else b""
        entries += struct.pack(order + "HHQ", tag.code, int(tag.dtype), tag.count) + place
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HHHQQ", 43, 8, 0, 16, len(tags))
    return head + entries + bytes(8) + values


def raw(tiff: tifffile.TiffFile, tag: tifffile.TiffTag) -> bytes:
    """The value of a tag as it is stored."""
    tiff.filehandle.seek(tag.valueoffset)
    return bytes(tiff.filehandle.read(tag.valuebytecount))


def _metadata(dataset: Any) -> dict[str, Any]:
    """What a dataset says besides its pixels; `DataError` if its place is unknown or its transform cannot be inverted."""
    gcps, gcps_crs = dataset.gcps
    rpcs = _texts(dataset, ns="RPC")
    transform = tuple(float(value) for value in tuple(dataset.transform)[:6])
    has_place = transform != _IDENTITY
    if dataset.crs and not (has_place or gcps or rpcs):
        raise DataError(
            f"it has a coordinate system ({dataset.crs.to_string()[:80]}) but no transform, so where its pixels lie is "
            "unknown. Add it (gdal_edit.py -a_ullr LEFT TOP RIGHT BOTTOM FILE), or remove the coordinate system "
            "(gdal_edit.py -a_srs None FILE)."
        )
    if not all(map(math.isfinite, transform)) or transform[0] * transform[4] == transform[1] * transform[3]:
        raise DataError(
            f"its transform {transform} gives pixels no place or no area. Correct it: gdal_edit.py -a_ullr LEFT TOP RIGHT "
            "BOTTOM FILE."
        )
    metadata = {
        "crs": dataset.crs.to_wkt() if dataset.crs else None,
        "transform": transform if has_place else None,
        "nodata": dataset.nodata,
        "band_names": _names(dataset),
        "colors": tuple(color.name for color in dataset.colorinterp),
        "scales": tuple(map(float, dataset.scales)),
        "offsets": tuple(map(float, dataset.offsets)),
        "tags": _texts(dataset),
    }
    if gcps:
        metadata["gcps"] = tuple((gcp.row, gcp.col, gcp.x, gcp.y, gcp.z) for gcp in gcps)
        metadata["gcps_crs"] = gcps_crs.to_wkt() if gcps_crs else None
    return metadata | ({"rpcs": rpcs} if rpcs else {})


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
