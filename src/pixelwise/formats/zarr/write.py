"""Labels and maps as Zarr arrays and OME-Zarr images (NGFF 0.4 in Zarr 2, 0.5 in Zarr 3), in the version of the source.

An OME-Zarr of labels holds them once, as `labels/pixelwise` with the colours and names of the classes; the root lists the
same arrays as its image, so that it opens in any viewer. The folder is written beside its place and renamed at the end.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pixelwise.extras import extra
from pixelwise.files import atomic_folder, cannot_write
from pixelwise.formats.base import LABELS, Result

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
        names = (
            {} if _zarr_format(result) == 3 else {"_ARRAY_DIMENSIONS": [*_plane_axes(result)[0], "y", "x"]}
        )  # xarray
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
        for name, attributes in _group_attributes(result, MARK, levels, zarr_format).items():
            group = zarr.open_group(store, path=name, mode="a", zarr_format=zarr_format)
            group.attrs.put(attributes if name else attributes | _about(result))


@contextmanager
def _new_store(path: Path) -> Iterator[tuple[ModuleType, Any]]:
    """zarr-python, and its store of a folder that takes its place at the end."""
    zarr = extra("zarr", "zarr", "Zarr")
    try:
        with atomic_folder(path) as part:
            yield zarr, zarr.storage.LocalStore(part)
    except OSError as error:
        raise cannot_write(path, error) from error


def _zarr_format(result: Result) -> int:
    return 2 if result.metadata.get("zarr_format") == 2 else 3


def _create(zarr: ModuleType, store: Any, name: str, result: Result, shape: tuple[int, ...] = ()) -> Any:
    names, sizes = _plane_axes(result)
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


def _plane_axes(result: Result) -> tuple[list[str], list[int]]:
    """Names and lengths of the axes before the rows: the source's own where they fit, else one for all planes."""
    sizes = result.metadata.get("sizes") or {}
    if isinstance(sizes, Mapping) and math.prod(sizes.values()) == result.source.planes:
        return [str(name) for name in sizes], [int(size) for size in sizes.values()]
    return (["z"], [result.source.planes]) if result.source.planes > 1 else ([], [])


def _group_attributes(result: Result, labels: str, levels: int, zarr_format: int) -> dict[str, dict[str, Any]]:
    """The NGFF attributes of each group of a result, by its path."""
    version = {"version": "0.4"} if zarr_format == 2 else {}
    groups: dict[str, dict[str, Any]] = {"": {"multiscales": [_image(result, levels, "") | version]}}
    if result.kind == LABELS:
        inner = f"labels/{labels}"
        classes = zip(result.spec.names, result.spec.colors, strict=True)
        about = [(index, name, [*color, 255]) for index, (name, color) in enumerate(classes)]
        if result.nodata is not None:
            about.append((int(result.nodata), "no data", [0, 0, 0, 0]))
        label = {
            "colors": [{"label-value": value, "rgba": rgba} for value, _, rgba in about],
            "properties": [{"label-value": value, "name": name} for value, name, _ in about],
            "source": {"image": "../../"},
        }
        groups = {
            inner: groups[""] | {"image-label": label | version},
            "labels": {"labels": [labels]},
            "": {"multiscales": [_image(result, levels, f"{inner}/") | version]},
        }
    return groups if version else {path: {"ome": {"version": "0.5", **group}} for path, group in groups.items()}


def _image(result: Result, levels: int, prefix: str) -> dict[str, Any]:
    """The description of an image of which each level takes every second pixel, so that the first stays in its place."""
    metadata = result.metadata if result.source.format == "ome-zarr" else {}
    names = [*_plane_axes(result)[0], "y", "x"]
    types, units, scale, shift = (metadata.get(key) or {} for key in ("types", "units", "scale", "translation"))
    axes = []
    for name in names:
        axis = {"name": name, "type": types.get(name, "time" if name == "t" else "space")}
        axes.append(axis | ({"unit": units[name]} if name in units else {}))
    datasets = []
    for level in range(levels):
        steps = [scale.get(name, 1.0) * (2**level if name in ("y", "x") else 1) for name in names]
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": steps}]
        if any(shift.values()):
            transforms.append({"type": "translation", "translation": [shift.get(name, 0.0) for name in names]})
        datasets.append({"path": f"{prefix}{level}", "coordinateTransformations": transforms})
    return {"name": metadata.get("name") or result.kind, "axes": axes, "datasets": datasets}
