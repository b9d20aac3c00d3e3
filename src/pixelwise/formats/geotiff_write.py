"""Labels and maps as GeoTIFF, tiled and compressed, in the place of the image they were made from; or as COG.

Class names and colours, and the provenance record, are tags of the file: `CLASSES` and `PIXELWISE`, both JSON.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pixelwise.errors import PixelwiseError
from pixelwise.files import atomic_path, cannot_write, extra
from pixelwise.formats.base import LABELS, Result
from pixelwise.formats.gdal import Dataset, gdal

MARK_TAG, CLASSES_TAG = "PIXELWISE", "CLASSES"
_BLOCK_PX, _COG_BLOCK_PX = 256, 512
_NOT_KEPT = (
    "STATISTICS_", "TIFFTAG_SOFTWARE", "TIFFTAG_IMAGEDESCRIPTION", "TIFFTAG_DOCUMENTNAME", MARK_TAG, CLASSES_TAG,
)  # fmt: skip


def write_geotiff(path: Path, result: Result) -> None:
    """Write a map as GeoTIFF: CRS, transform and tags of its image, class colours, nodata; one band for each plane."""
    path = Path(path)
    try:
        with atomic_path(path) as part:
            _write(part, result)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_cog(path: Path, result: Result) -> None:
    """As `write_geotiff`, as a cloud optimised GeoTIFF: smaller copies inside, which can be read piece by piece over HTTP.

    Labels are made smaller by their most frequent value, maps by the mean.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            plain = Path(folder, "plain.tif")
            _write(plain, result)
            _check_room(path, plain.stat().st_size)
            with atomic_path(path) as part:
                _copy_as_cog(plain, Path(folder, "cog.tif"), result.kind)
                Path(folder, "cog.tif").replace(part)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_rows(rasterio: ModuleType, path: Path, result: Result, **profile: Any) -> None:
    """Write the rows of all planes into a new tiled file that says nothing more; to be used inside `gdal()`."""
    with Dataset(rasterio, path.open, mode="w", **(_shape(result) | profile)) as dataset:
        _fill(dataset, result)


def _write(path: Path, result: Result) -> None:
    with (
        gdal() as rasterio,
        Dataset(rasterio, path.open, mode="w", **_shape(result), **_place(rasterio, result)) as file,
    ):
        _describe(file, result)
        _fill(file, result)


def _fill(dataset: Any, result: Result) -> None:
    """Band by band along the rows of blocks, so that each block is compressed once and only one row of them is held."""
    info = result.source
    for plane in range(info.planes):
        for top in range(0, info.height, _BLOCK_PX):
            bottom = min(top + _BLOCK_PX, info.height)
            rows = np.asarray(result.rows(plane, top, bottom)).astype(result.dtype, copy=False)
            dataset.write(rows, plane + 1, window=((top, bottom), (0, info.width)))


def _shape(result: Result) -> dict[str, Any]:
    info, is_map = result.source, result.dtype.kind == "f"
    nodata = result.nodata if not is_map or result.nodata is not None else float("nan")
    return {
        "height": info.height,
        "width": info.width,
        "count": info.planes,
        "dtype": result.dtype.name,
        "nodata": nodata,
        "tiled": True,
        "blockxsize": min(_BLOCK_PX, -(-info.width // 16) * 16),
        "blockysize": min(_BLOCK_PX, -(-info.height // 16) * 16),
        "interleave": "band",
        "compress": "deflate",
        "predictor": 3 if is_map else 1,
        "bigtiff": "IF_SAFER",
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
    dataset.update_tags(**_kept(result), TIFFTAG_SOFTWARE="pixelwise")
    if result.mark:
        dataset.update_tags(**{MARK_TAG: json.dumps(dict(result.mark), sort_keys=True)})
    if rpcs := result.metadata.get("rpcs") if result.source.format == "geotiff" else None:
        dataset.update_tags(ns="RPC", **rpcs)
    for plane in range(result.source.planes):
        dataset.set_band_description(plane + 1, result.kind)
    if result.kind != LABELS:
        return
    spec = result.spec
    classes = [
        {"id": index, "name": name, "color": list(color)}
        for index, (name, color) in enumerate(zip(spec.names, spec.colors, strict=True))
    ]
    dataset.update_tags(**{CLASSES_TAG: json.dumps(classes, ensure_ascii=False)})
    if result.source.planes == 1:
        dataset.write_colormap(1, {index: (*color, 255) for index, color in enumerate(spec.colors)})


def _kept(result: Result) -> Mapping[str, str]:
    tags = result.metadata.get("tags", {}) if result.source.format == "geotiff" else {}
    kept = {key: value for key, value in tags.items() if not key.startswith(_NOT_KEPT)}
    if result.metadata.get("gcps"):  # GDAL has moved the points to the corners of pixels, and would do so again
        kept.pop("AREA_OR_POINT", None)
    return kept


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
