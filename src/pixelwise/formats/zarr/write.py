"""Labels and maps as Zarr arrays and OME-Zarr images (NGFF 0.4 in Zarr 2, 0.5 in Zarr 3), in the version of the source.

An OME-Zarr of labels holds them once, as `labels/pixelwise` with the colours and names of the classes; the root lists the
same arrays as its image, so that it opens in any viewer. The folder is written beside its place and renamed at the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pixelwise.errors import UsageError
from pixelwise.files import atomic_folder, cannot_write, extra
from pixelwise.formats.base import LABELS, Result
from pixelwise.formats.zarr.ngff import group_attributes, plane_axes

MARK = "pixelwise"
"""The key of the attributes that holds the classes and the origin; also the name of the labels in an OME-Zarr."""

_CHUNK_PX = (256, 1024)
_SMALLEST_PX = 1024  # a level of the pyramid that is no larger is the last


def write_zarr(path: Path, result: Result) -> None:
    """Write a map as a plain Zarr array: (H, W), or (…, H, W) with the axes of the source's planes.

    Classes, colours, nodata and origin are its attribute "pixelwise".
    """
    with _new_store(path) as (zarr, store):
        array = _create(zarr, store, "", result)
        names = {} if _zarr_format(result) == 3 else {"_ARRAY_DIMENSIONS": [*plane_axes(result)[0], "y", "x"]}  # xarray
        array.attrs.put(_about(result) | names)
        _fill(array, result)


def write_ome_zarr(path: Path, result: Result) -> None:
    """Write a map as an OME-Zarr image with a pyramid: each level takes every second pixel of the one before.

    Scales, units and axes of an OME-Zarr source are kept; so is the place of its level.
    """
    inner = f"labels/{MARK}/" if result.kind == LABELS else ""
    with _new_store(path) as (zarr, store):
        array = _create(zarr, store, f"{inner}0", result)
        _fill(array, result)
        levels = 1
        while max(array.shape[-2:]) > _SMALLEST_PX:
            array = _halve(zarr, store, f"{inner}{levels}", array, result)
            levels += 1
        zarr_format = _zarr_format(result)
        for name, attributes in group_attributes(result, MARK, levels, zarr_format).items():
            group = zarr.open_group(store, path=name, mode="a", zarr_format=zarr_format)
            group.attrs.put(attributes if name else attributes | _about(result))


@contextmanager
def _new_store(path: Path) -> Iterator[tuple[ModuleType, Any]]:
    """zarr-python, and its store of a folder that takes its place at the end."""
    if path.suffix.lower() != ".zarr":
        raise UsageError(f"{path}: Zarr is written to a name that ends in .zarr.")
    zarr = extra("zarr", "zarr", "Zarr")
    try:
        with atomic_folder(path) as part:
            yield zarr, zarr.storage.LocalStore(part)
    except OSError as error:
        raise cannot_write(path, error) from error


def _zarr_format(result: Result) -> int:
    return 2 if result.metadata.get("zarr_format") == 2 else 3


def _create(zarr: ModuleType, store: Any, name: str, result: Result, shape: tuple[int, ...] = ()) -> Any:
    names, sizes = plane_axes(result)
    shape = shape or (result.source.height, result.source.width)
    block = np.clip(result.source.block_px, *_CHUNK_PX).tolist()
    zarr_format = _zarr_format(result)
    return zarr.create_array(
        store,
        name=name or None,
        shape=(*sizes, *shape),
        chunks=(*(1 for _ in sizes), *map(min, block, shape)),
        dtype=result.dtype,
        zarr_format=zarr_format,
        fill_value=result.nodata if result.nodata is not None else float("nan") if result.dtype.kind == "f" else 0,
        chunk_key_encoding={"name": "v2" if zarr_format == 2 else "default", "separator": "/"},
        config={"write_empty_chunks": True},  # a chunk that is missing was lost, it is not class 0
        dimension_names=[*names, "y", "x"] if zarr_format == 3 else None,
    )


def _bands(array: Any) -> Iterator[tuple[int, tuple[int, ...], int, int]]:
    """The rows of chunks of all planes: the plane, its index in the array, the rows from top to bottom."""
    step, height = array.chunks[-2], array.shape[-2]
    for plane, index in enumerate(np.ndindex(*array.shape[:-2])):
        yield from ((plane, index, top, min(top + step, height)) for top in range(0, height, step))


def _fill(array: Any, result: Result) -> None:
    for plane, index, top, bottom in _bands(array):
        array[(*index, slice(top, bottom))] = result.rows(plane, top, bottom)


def _halve(zarr: ModuleType, store: Any, name: str, finer: Any, result: Result) -> Any:
    """The next level of a pyramid, made of the one before, a row of chunks at a time."""
    array = _create(zarr, store, name, result, tuple(-(-side // 2) for side in finer.shape[-2:]))
    for _, index, top, bottom in _bands(array):
        rows = finer[(*index, slice(2 * top, min(2 * bottom, finer.shape[-2])))]
        array[(*index, slice(top, bottom))] = rows[::2, ::2]
    return array


def _about(result: Result) -> dict[str, Any]:
    about: dict[str, Any] = {"kind": result.kind, "nodata": result.nodata, "mark": dict(result.mark)}
    if result.kind == LABELS:
        about["classes"] = [
            {"id": index, "name": name, "color": "#{:02x}{:02x}{:02x}".format(*color)}
            for index, (name, color) in enumerate(zip(result.spec.names, result.spec.colors, strict=True))
        ]
    return {MARK: about}
