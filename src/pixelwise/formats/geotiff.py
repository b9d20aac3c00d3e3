"""GeoTIFF: the place on Earth through rasterio (GDAL), pixels as those of any TIFF; labels and maps, also as COG.

What the tags say is read in `geotiff_tags`. Class names and colours, and the provenance record, are tags of written
files: `CLASSES` and `PIXELWISE`.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.extras import extra
from pixelwise.files import cannot_write, temporary_folder, writing
from pixelwise.formats.base import LABELS, TIFF_MAGIC, Opener, Result
from pixelwise.formats.geotiff_tags import at_level, describe, gdal, raw
from pixelwise.formats.local import Identity, readable, silence
from pixelwise.formats.ranges import Handles, opening
from pixelwise.formats.tiff.images import Stacks, choose, is_meant, main_page
from pixelwise.formats.tiff.opacity import look
from pixelwise.formats.tiff.read import PLAIN, Rendering, TiffSource, check_pages
from pixelwise.formats.tiff.windows import Span, arrange
from pixelwise.formats.tiff.write import BIG_BYTES, BUFFER_BYTES, tiles

MARK_TAG, CLASSES_TAG = "PIXELWISE", "CLASSES"
_GEO = {  # ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GDAL_METADATA, GDAL_NODATA, RPCCoefficient
    33550, 33922, 34264, 34735, 42112, 42113, 50844,
}  # fmt: skip
_OF_PIXELS = {
    254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 282, 283, 284, 296, 317, 320, 322, 323, 324, 325, 338, 339,
}  # fmt: skip
"""Tags that tifffile writes by itself: of size, type and place of the pixels, and the resolution."""
_BLOCK_PX, _COG_BLOCK_PX = 256, 512
_NOT_KEPT = (
    "STATISTICS_", "TIFFTAG_SOFTWARE", "TIFFTAG_IMAGEDESCRIPTION", "TIFFTAG_DOCUMENTNAME", MARK_TAG, CLASSES_TAG,
)  # fmt: skip


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
            return any(code in main_page(tiff).tags for code in _GEO)
    except DataError:
        return False


def open_geotiff(
    location: str,
    opener: Opener | None = None,
    *,
    identity: Identity | None = None,
    level: int = 0,
    series: int | None = None,
    channels: int | None = None,
    labels: bool = False,
) -> "GeoTIFF":
    """Open a GeoTIFF by its path, or by what opens it anew at each call; only its tags are read.

    `level` is that of its pyramid (overviews inside the file; 0 is the full resolution). Several images of one size, type
    and place are planes, one after the other; of others the first is read, which "warnings" of the metadata tell, or that
    of the number `series`. Of a band that is marked as opacity some numbers are read too: they and `channels`, how many the
    network takes, decide whether it is that (`tiff.opacity`).
    """
    extra("rasterio", "geo", "GeoTIFF")
    with opening(location, opener, identity) as file:
        tiff = tifffile.TiffFile(file.buffered, name=file.name, **PLAIN)
        check_pages(tiff)
        return GeoTIFF(location, file, tiff, level, series, channels, labels)


class GeoTIFF(TiffSource):
    """The first image of a GeoTIFF, or all of them as planes.

    `metadata` has "crs" (WKT, or None), "transform" (a, b, c, d, e, f: x = a column + b row + c, y = d column + e row + f;
    or None), "gcps", "gcps_crs" and "rpcs" where the file has them, "nodata", "band_names", "colors", "scales" and
    "offsets" (stored numbers are read times the one plus the other, except of masks), "tags" and "palette". A pixel has
    data where the file's mask, opacity and nodata value all say so.
    """

    def __init__(
        self,
        location: str,
        file: Handles,
        tiff: tifffile.TiffFile,
        level: int,
        series: int | None,
        channels: int | None,
        labels: bool,
    ) -> None:
        pages: list[Any] = list(tiff.pages)
        images = [page for page in pages if is_meant(page)] or pages[:1]
        count = len(images)
        images, warnings = choose(images, series, [_size(page) for page in images])
        metadata = describe(images[0])
        full = images
        if level:
            full = images[:1]
            if len(images) > 1:
                warnings = (f"it holds {count:,} images, of which only the first is read at level {level}",)
            images, metadata = _at_level(images[0], pages, level, metadata)
        page = images[0]
        self._bands = [band for band, color in enumerate(metadata["colors"]) if color != "alpha"]
        self._alpha = [band for band, color in enumerate(metadata["colors"]) if color == "alpha"]

        def rendered() -> Rendering:
            meaning = [[metadata[name][band] for band in self._bands] for name in ("scales", "offsets")]
            return Rendering(page, np.dtype(page.dtype), len(self._bands), labels, meaning)

        rendering = rendered()  # first, for it refuses what cannot be read
        self._stack = _stack(images, file)
        if len(self._alpha) == 1 and not labels:
            opacity = look(self._stack, self._alpha[0], channels)
            self._bands = [*range(len(metadata["colors"]))] if opacity.is_kept else self._bands
            self._alpha = self._alpha if opacity.hides else []
            metadata, rendering = {**metadata, **opacity.metadata}, rendered()
        if not labels:
            rendering.has_opacity, rendering.channels = False, len(self._bands)  # GDAL's word comes first
        if rendering.orientation not in (0, 1):
            raise DataError(
                f"its Orientation tag is {rendering.orientation}, which would turn the pixels but not their place on Earth. "
                "Turn it for good (gdalwarp IN OUT), or remove that tag."
            )
        size = page.imagelength, page.imagewidth
        found = [_mask_of(image, pages, size) for image in full]
        masks = [mask for mask in found if mask is not None]
        if masks and len(full) != len(masks):
            raise DataError(
                f"of its {len(full)} images {len(masks)} have a mask of where there is data. Choose an image by series "
                "(--series 0)."
            )
        self._mask = _stack(masks, file) if masks and not self._alpha else None
        info = rendering.info(location, "geotiff", (len(images), *size), self._stack.block)
        metadata |= rendering.metadata | ({"warnings": warnings} if warnings else {})
        super().__init__(file, self._colors, rendering, info, metadata)

    def _colors(self, plane: int, rows: Span, columns: Span) -> NDArray[Any]:
        """All bands but opacity."""
        pixels = self._stack.read(plane, rows, columns)
        return pixels[:, :, self._bands] if len(self._bands) < pixels.shape[2] else pixels

    def _unmasked(self, plane: int, rows: Span, columns: Span) -> NDArray[np.bool_] | None:
        if self._alpha:
            return np.asarray((self._stack.read(plane, rows, columns)[:, :, self._alpha] != 0).all(axis=2))
        return None if self._mask is None else self._mask.read(plane, rows, columns)[:, :, 0] != 0


def _at_level(
    image: Any, pages: Sequence[Any], level: int, metadata: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The page of a smaller copy of an image, and what is said of it."""
    copies = [page for page in _after(image, pages) if not page.is_mask]
    levels = [image, *sorted(copies, key=lambda page: -page.imagewidth)]
    if not 0 <= level < len(levels):
        sizes = ", ".join(f"{number} ({page.imagewidth} x {page.imagelength})" for number, page in enumerate(levels))
        raise UsageError(f"it has no level {level}. Its levels are {sizes} pixels.")
    page = levels[level]
    shrunk = page.imagelength / image.imagelength, page.imagewidth / image.imagewidth
    shapes = tuple((page.imagelength, page.imagewidth) for page in levels)
    return [page], at_level(metadata, level, shrunk) | {"level_shapes": shapes}


def _after(image: Any, pages: Sequence[Any]) -> Iterator[Any]:
    """The smaller copies and masks of an image: the pages up to the next image."""
    return takewhile(lambda page: not is_meant(page), pages[pages.index(image) + 1 :])


def _mask_of(image: Any, pages: Sequence[Any], size: tuple[int, int]) -> Any:
    """The page that says where an image, or its copy of this size, has data; None if there is none."""
    found = (page for page in _after(image, pages) if page.is_mask and (page.imagelength, page.imagewidth) == size)
    return next(found, None)


def _size(page: Any) -> tuple[str, Any]:
    """Size, layout and number type of an image in words, and whatever else images of one stack have in common."""
    place = [raw(page.parent, page.tags[code]) if code in page.tags else b"" for code in sorted(_GEO)]
    return f"{' x '.join(map(str, page.shape))} ({page.axes}) {page.dtype}", (
        page.photometric,
        page.extrasamples,
        place,
    )


def _stack(pages: Sequence[Any], file: Handles) -> Stacks:
    """The pixels of pages, each of them one plane."""
    images = [tifffile.TiffPageSeries([page], page.shape, page.dtype, page.axes) for page in pages]
    return Stacks(images, arrange(pages[0].axes, pages[0].shape), file)


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
        with temporary_folder(path.parent) as folder:
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
                "extratags": [(tag.code, int(tag.dtype), tag.count, raw(tiff, tag), True) for tag in tags],
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
