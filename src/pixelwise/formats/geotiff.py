"""GeoTIFF: the place on Earth through rasterio (GDAL), pixels as those of any TIFF; labels and maps, also as COG.

GDAL is given a copy of the tags in memory, never the file: no other driver, no file beside the image and no network is
ever asked. Class names and colours, and the provenance record, are tags of written files: `CLASSES` and `PIXELWISE`.
"""

import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.files import cannot_write, extra, writing
from pixelwise.formats.base import LABELS, TIFF_MAGIC, Opener, Result
from pixelwise.formats.local import Identity, readable, silence
from pixelwise.formats.ranges import Handles, opening
from pixelwise.formats.tiff.opacity import look
from pixelwise.formats.tiff.read import PLAIN, Rendering, TiffSource, check_pages
from pixelwise.formats.tiff.windows import Span, Stack, arrange
from pixelwise.formats.tiff.write import BIG_BYTES, BUFFER_BYTES, tiles

MARK_TAG, CLASSES_TAG = "PIXELWISE", "CLASSES"
_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",  # no .aux.xml, neither read nor written
    "GDAL_CACHEMAX": 64,  # MiB of decoded blocks, for the whole process; GDAL would take 5 % of the memory
}
_GEO = {  # ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GDAL_METADATA, GDAL_NODATA, RPCCoefficient
    33550, 33922, 34264, 34735, 42112, 42113, 50844,
}  # fmt: skip
_OF_PIXELS = {
    254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 282, 283, 284, 296, 317, 320, 322, 323, 324, 325, 338, 339,
}  # fmt: skip
"""Tags that tifffile writes by itself: of size, type and place of the pixels, and the resolution."""
_MAX_TAG_TEXT = 1 << 16
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_BLOCK_PX, _COG_BLOCK_PX = 256, 512
_NOT_KEPT = (
    "STATISTICS_", "TIFFTAG_SOFTWARE", "TIFFTAG_IMAGEDESCRIPTION", "TIFFTAG_DOCUMENTNAME", MARK_TAG, CLASSES_TAG,
)  # fmt: skip


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


def is_geotiff(head: bytes, name: str | os.PathLike[str], opener: Opener | None = None) -> bool:
    """Whether a file is a TIFF with a place on Earth or with GDAL's tags; `opener` gives it where `name` is no path."""
    if head[:4] not in TIFF_MAGIC:
        return False
    try:
        with (
            readable(name),
            opener() if opener is not None else Path(name).open("rb") as file,
            tifffile.TiffFile(file, name="tiff", **PLAIN) as tiff,
        ):
            return any(code in tiff.pages.first.tags for code in _GEO)
    except DataError:
        return False


def open_geotiff(
    location: str,
    opener: Opener | None = None,
    *,
    identity: Identity | None = None,
    channels: int | None = None,
    labels: bool = False,
) -> "GeoTIFF":
    """Open a GeoTIFF by its path, or by what opens it anew at each call; only its tags are read.

    Of a band that is marked as opacity some numbers are read too: they and `channels`, how many the network takes, decide
    whether it is that (`tiff.opacity`).
    """
    extra("rasterio", "geo", "GeoTIFF")
    with opening(location, opener, identity) as file:
        tiff = tifffile.TiffFile(file.buffered, name=file.name, **PLAIN)
        check_pages(tiff)
        with (
            gdal() as rasterio,
            rasterio.MemoryFile(_tags_alone(tiff)) as memory,
            silence(),  # rasterio warns of files without a place
            memory.open(driver="GTiff", GEOREF_SOURCES="INTERNAL") as dataset,
        ):
            metadata = _metadata(dataset)
        return GeoTIFF(location, file, tiff, metadata, channels, labels)


def _tags_alone(tiff: tifffile.TiffFile) -> bytes:
    """A BigTIFF that has all tags of the first page of a file, but no pixels."""
    order, tags = tiff.byteorder, sorted(tiff.pages.first.tags, key=lambda tag: tag.code)
    start = 16 + 8 + 20 * len(tags) + 8  # of the values that do not fit into their entry
    entries, values = b"", b""
    for tag in tags:
        value = _raw(tiff, tag)
        place = value.ljust(8, b"\0") if len(value) <= 8 else struct.pack(order + "Q", start + len(values))
        values += value if len(value) > 8 else b""
        entries += struct.pack(order + "HHQ", tag.code, int(tag.dtype), tag.count) + place
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HHHQQ", 43, 8, 0, 16, len(tags))
    return head + entries + bytes(8) + values


def _raw(tiff: tifffile.TiffFile, tag: tifffile.TiffTag) -> bytes:
    """The value of a tag as it is stored."""
    tiff.filehandle.seek(tag.valueoffset)
    return bytes(tiff.filehandle.read(tag.valuebytecount))


class GeoTIFF(TiffSource):
    """The first image of a GeoTIFF.

    `metadata` has "crs" (WKT, or None), "transform" (a, b, c, d, e, f: x = a column + b row + c, y = d column + e row + f;
    or None), "gcps", "gcps_crs" and "rpcs" where the file has them, "nodata", "band_names", "colors", "tags" and "palette".
    A pixel has data where the file's mask, opacity and nodata value all say so.
    """

    def __init__(
        self,
        location: str,
        file: Handles,
        tiff: tifffile.TiffFile,
        metadata: Mapping[str, Any],
        channels: int | None,
        labels: bool,
    ) -> None:
        page = tiff.pages.first
        self._bands = [band for band, color in enumerate(metadata["colors"]) if color != "alpha"]
        self._alpha = [band for band, color in enumerate(metadata["colors"]) if color == "alpha"]
        rendering = Rendering(page, np.dtype(page.dtype), len(self._bands), labels)
        self._stack = _stack(page, file)
        if len(self._alpha) == 1 and not labels:
            opacity = look(self._stack, self._alpha[0], channels)
            self._bands = [*range(len(metadata["colors"]))] if opacity.is_kept else self._bands
            self._alpha = self._alpha if opacity.hides else []
            metadata = {**metadata, **opacity.metadata}
        if not labels:
            rendering.has_opacity, rendering.channels = False, len(self._bands)  # GDAL's word comes first
        if rendering.orientation not in (0, 1):
            raise DataError(
                f"its Orientation tag is {rendering.orientation}, which would turn the pixels but not their place on Earth. "
                "Turn it for good (gdalwarp IN OUT), or remove that tag."
            )
        size = page.imagelength, page.imagewidth
        pages: Any = tiff.pages
        masks = [other for other in pages if other.is_mask and (other.imagelength, other.imagewidth) == size]
        self._mask = _stack(masks[0], file) if masks and not self._alpha else None
        info = rendering.info(location, "geotiff", (1, *size), self._stack.block)
        super().__init__(file, self._colors, rendering, info, {**metadata, **rendering.metadata})

    def _colors(self, plane: int, rows: Span, columns: Span) -> NDArray[Any]:
        """All bands but opacity."""
        pixels = self._stack.read(0, rows, columns)
        return pixels[:, :, self._bands] if len(self._bands) < pixels.shape[2] else pixels

    def _unmasked(self, plane: int, rows: Span, columns: Span) -> NDArray[np.bool_] | None:
        if self._alpha:
            return np.asarray((self._stack.read(0, rows, columns)[:, :, self._alpha] != 0).all(axis=2))
        return None if self._mask is None else self._mask.read(0, rows, columns)[:, :, 0] != 0


def _stack(page: Any, file: Handles) -> Stack:
    """The pixels of one page, whatever pages of the same size follow."""
    series = tifffile.TiffPageSeries([page], page.shape, page.dtype, page.axes)
    return Stack(series, arrange(page.axes, page.shape), file)


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


def write_geotiff(path: Path, result: Result) -> None:
    """Write a map as GeoTIFF: CRS, transform and tags of its image, class colours, nodata; one band for each plane."""
    with writing(path) as part:
        write_bands(part, result, **_header(result))


def write_cog(path: Path, result: Result) -> None:
    """As `write_geotiff`, as a cloud optimised GeoTIFF: smaller copies inside, which can be read piece by piece over HTTP.

    Labels are made smaller by their most frequent value, maps by the mean.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            plain, cog = Path(folder, "plain.tif"), Path(folder, "cog.tif")
            write_bands(plain, result, **_header(result))
            _check_room(path, plain.stat().st_size)
            with writing(path) as part:
                _copy_as_cog(plain, cog, result.kind)
                cog.replace(part)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_bands(path: Path, result: Result, **options: Any) -> None:
    """Write all planes as the bands of a new tiled file, of which one row of tiles is in memory."""
    info = result.source
    tile = (min(_BLOCK_PX, -(-info.height // 16) * 16), min(_BLOCK_PX, -(-info.width // 16) * 16))
    size = info.planes * info.height * info.width * result.dtype.itemsize
    with path.open("w+b") as file, tifffile.TiffWriter(file, bigtiff=size > BIG_BYTES) as writer:
        writer.write(
            tiles(result, tile), shape=(info.planes, info.height, info.width)[info.planes == 1 :], dtype=result.dtype,
            tile=tile, compression="zlib", predictor=3 if result.dtype.kind == "f" else None, software=False,
            planarconfig="separate" if info.planes > 1 else None, metadata=None, buffersize=BUFFER_BYTES,
            **({"photometric": "minisblack"} | options),
        )  # fmt: skip


def _header(result: Result) -> dict[str, Any]:
    """The tags and the palette of a result, as arguments of tifffile: those of a pixel that GDAL writes into memory."""
    info, nodata = result.source, result.nodata
    profile = {
        "driver": "GTiff", "width": 1, "height": 1, "count": info.planes, "dtype": result.dtype.name,
        "nodata": float("nan") if nodata is None and result.dtype.kind == "f" else nodata,
    }  # fmt: skip
    with gdal() as rasterio, rasterio.MemoryFile() as memory:
        with silence(), memory.open(**profile, **_place(rasterio, result)) as dataset:
            _describe(dataset, result)
        with tifffile.TiffFile(memory, name="tiff") as tiff:
            page = tiff.pages.first
            tags = [tag for tag in page.tags if tag.code not in _OF_PIXELS]
            return {
                "extratags": [(tag.code, int(tag.dtype), tag.count, _raw(tiff, tag), True) for tag in tags],
                "photometric": page.photometric,
                "colormap": page.colormap,
                "resolution": page.resolution,
                "resolutionunit": page.resolutionunit,
            }


def _place(rasterio: ModuleType, result: Result) -> dict[str, Any]:
    """Where the image lies, as arguments of `rasterio.open`; none for images from other formats."""
    metadata = result.metadata if result.source.format == "geotiff" else {}
    place: dict[str, Any] = {}
    if crs := metadata.get("gcps_crs" if metadata.get("gcps") else "crs"):
        place["crs"] = rasterio.crs.CRS.from_user_input(crs)
    if metadata.get("transform"):
        place["transform"] = rasterio.Affine(*metadata["transform"])
    elif metadata.get("gcps"):
        point = rasterio.control.GroundControlPoint
        place["gcps"] = [point(row=row, col=col, x=x, y=y, z=z) for row, col, x, y, z in metadata["gcps"]]
    return place


def _describe(dataset: Any, result: Result) -> None:
    """Tags, names and colours. Palettes belong to files of one band; others have the colours in their tags."""
    known = result.metadata if result.source.format == "geotiff" else {}
    kept = {key: value for key, value in known.get("tags", {}).items() if not key.startswith(_NOT_KEPT)}
    if known.get("gcps"):  # GDAL has moved the points to the corners of pixels, and would do so again
        kept.pop("AREA_OR_POINT", None)
    if result.mark:
        kept[MARK_TAG] = json.dumps(dict(result.mark), sort_keys=True)
    dataset.update_tags(**kept, TIFFTAG_SOFTWARE="pixelwise")
    if rpcs := known.get("rpcs"):
        dataset.update_tags(ns="RPC", **rpcs)
    for plane in range(result.source.planes):
        dataset.set_band_description(plane + 1, result.kind)
    if result.kind != LABELS:
        return
    classes = [
        {"id": index, "name": name, "color": list(color)}
        for index, (name, color) in enumerate(zip(result.spec.names, result.spec.colors, strict=True))
    ]
    dataset.update_tags(**{CLASSES_TAG: json.dumps(classes, ensure_ascii=False)})
    if result.source.planes == 1:
        dataset.write_colormap(1, {index: (*color, 255) for index, color in enumerate(result.spec.colors)})


def _check_room(path: Path, size: int) -> None:
    """GDAL writes a COG, and its smaller copies first, by itself; a full disk should be known before."""
    free = shutil.disk_usage(path.parent).free
    if free < 2 * size + (1 << 20):
        raise PixelwiseError(
            f"{path}: a COG of about {1.5 * size / 2**20:,.0f} MiB needs room for two copies, but {free / 2**20:,.0f} MiB "
            "are free. Free some space or choose another folder."
        )


def _copy_as_cog(source: Path, target: Path, kind: str) -> None:
    with gdal():
        extra("rasterio.shutil", "geo", "COG").copy(
            source,
            target,
            driver="COG",
            COMPRESS="DEFLATE",
            PREDICTOR="YES" if kind != LABELS else "NO",
            BLOCKSIZE=_COG_BLOCK_PX,
            BIGTIFF="IF_SAFER",
            OVERVIEW_RESAMPLING="MODE" if kind == LABELS else "AVERAGE",
            SPARSE_OK="NO",
        )
