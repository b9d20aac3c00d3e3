"""Labels and maps as Zarr arrays and OME-Zarr images (NGFF 0.4 in Zarr 2, 0.5 in Zarr 3), in the version of the source.

An OME-Zarr of labels holds them once, as `labels/pixelwise` with the colours and names of the classes; the root lists the
same arrays as its image, so that it opens in any viewer. The folder is written beside its place and renamed at the end.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.files import cannot_write, extra
from pixelwise.formats.base import LABELS, Result

MARK = "pixelwise"
"""The key of the attributes that holds the classes and the mark; also the name of the labels in an OME-Zarr."""

_CHUNK_PX = (256, 1024)
_SMALLEST_PX = 1024  # a level of the pyramid that is no larger is the last
_DOCUMENTS = ("zarr.json", ".zarray", ".zgroup")
_MAX_ATTRIBUTES_BYTES = 2**20


def write_zarr(path: Path, result: Result) -> None:
    """Write a map as a plain Zarr array: (H, W), or (…, H, W) with the axes of the source's planes.

    Classes, colours, nodata and the mark are its attribute "pixelwise".

    Args:
        path: the folder; an older array there is replaced at the end.
        result: the map; its rows are asked for from top to bottom, one row of chunks at a time.

    Raises:
        PixelwiseError: it cannot be written, or something else than Zarr has that name.
        UsageError: zarr is not installed, or `path` does not end in .zarr.

    Example:
        >>> import tempfile, zarr
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.formats import SourceInfo
        >>> info = SourceInfo(location="a.png", format="png", height=2, width=3, channels=3, dtype="uint8")
        >>> spec = LabelSpec(names=("sky", "road"), colors=((0, 0, 200), (90, 90, 90)), values=((0,), (1,)))
        >>> labels = np.array([[0, 1, 1], [0, 0, 1]], dtype=np.uint8)
        >>> path = Path(tempfile.mkdtemp()) / "labels.zarr"
        >>> write_zarr(path, Result(kind="labels", spec=spec, source=info, dtype=labels.dtype,
        ...                         rows=lambda plane, top, bottom: labels[top:bottom]))
        >>> array = zarr.open_array(path, mode="r")
        >>> array[:].tolist(), array.attrs["pixelwise"]["classes"][1]["name"]
        ([[0, 1, 1], [0, 0, 1]], 'road')
    """
    zarr = _zarr(path)
    with _written(path) as part:
        store = zarr.storage.LocalStore(part)
        array = _create(zarr, store, "", result, _version(result))
        names = {} if _version(result) == 3 else {"_ARRAY_DIMENSIONS": [*_axes(result)[0], "y", "x"]}  # as xarray does
        array.attrs.put(_about(result) | names)
        _fill(array, result)


def write_ome_zarr(path: Path, result: Result) -> None:
    """Write a map as an OME-Zarr image with a pyramid: each level takes every second pixel of the one before.

    Scales, units and axes of an OME-Zarr source are kept; so is the place of its level.

    Raises:
        PixelwiseError: it cannot be written, or something else than Zarr has that name.
        UsageError: zarr is not installed, or `path` does not end in .zarr.
    """
    zarr = _zarr(path)
    version = _version(result)
    inner = f"labels/{MARK}" if result.kind == LABELS else ""
    with _written(path) as part:
        store = zarr.storage.LocalStore(part)
        array = _create(zarr, store, f"{inner}/0".lstrip("/"), result, version)
        _fill(array, result)
        levels = 1
        while max(array.shape[-2:]) > _SMALLEST_PX:
            array = _halve(zarr, store, f"{inner}/{levels}".lstrip("/"), array, result, version)
            levels += 1
        for group, attributes in _groups(result, inner, levels, version).items():
            zarr.open_group(store, path=group, mode="a", zarr_format=version).attrs.put(attributes)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends without an error.

    An older folder steps aside for the moment of the rename and is deleted then. Whatever is killed when, `path` is the
    old folder, the new one, or missing; never a mixture.

    Raises:
        PixelwiseError: the name belongs to something that is no Zarr.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.zarr"
        >>> with atomic_folder(target) as part:
        ...     _ = (part / "zarr.json").write_text("{}")
        >>> sorted(item.name for item in target.parent.iterdir())
        ['a.zarr']
    """
    if os.path.lexists(path) and not any((path / name).is_file() for name in _DOCUMENTS):
        raise PixelwiseError(f"{path}: exists and is no Zarr, so it is kept. Choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    part, old = (path.with_name(f".{path.name}.{token}.{end}") for end in ("part", "old"))
    try:
        part.mkdir()
        yield part
        _flush(part)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            path.rename(old)
        try:
            part.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        for rest in (part, old):
            shutil.rmtree(rest, ignore_errors=True)


def read_zarr_mark(path: str | Path) -> dict[str, Any] | None:
    """The mark of a folder that this module wrote; None for every other one, however damaged.

    Example:
        >>> read_zarr_mark("no/such.zarr") is None
        True
    """
    for name, inner in (("zarr.json", True), (".zattrs", False)):
        try:
            with Path(path, name).open("rb") as file:
                found = json.loads(file.read(_MAX_ATTRIBUTES_BYTES))
            mark = (found["attributes"] if inner else found)[MARK]["mark"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        return mark if isinstance(mark, dict) else None
    return None


def _zarr(path: Path) -> ModuleType:
    if path.suffix.lower() != ".zarr":
        raise UsageError(f"{path}: Zarr is written to a name that ends in .zarr.")
    return extra("zarr", "zarr", "Zarr")


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    try:
        with atomic_folder(path) as part:
            yield part
    except OSError as error:
        raise cannot_write(path, error) from error


def _flush(folder: Path) -> None:
    """Wait until the disk has all files, so that a power cut cannot leave empty ones under the final name."""

    def flush(item: Path) -> None:
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    with ThreadPoolExecutor(8, thread_name_prefix="pixelwise-flush") as pool:  # the disk sees many waits as one
        for _ in pool.map(flush, (item for item in folder.rglob("*") if item.is_file())):
            pass


def _version(result: Result) -> int:
    return 2 if result.metadata.get("zarr_format") == 2 else 3


def _axes(result: Result) -> tuple[list[str], list[int]]:
    """Names and lengths of the axes before the rows: the source's own where they fit, else one for all planes."""
    sizes = result.metadata.get("sizes") or {}
    if isinstance(sizes, Mapping) and int(np.prod(list(sizes.values()), dtype=np.int64)) == result.source.planes:
        return [str(name) for name in sizes], [int(size) for size in sizes.values()]
    return (["z"], [result.source.planes]) if result.source.planes > 1 else ([], [])


def _create(zarr: ModuleType, store: Any, name: str, result: Result, version: int, shape: tuple[int, ...] = ()) -> Any:
    names, sizes = _axes(result)
    low, high = _CHUNK_PX
    height, width = shape or (result.source.height, result.source.width)
    block = [min(max(side, low), high) for side in result.source.block_px]
    chunks = tuple(max(1, min(side, length)) for side, length in zip(block, (height, width), strict=True))
    options: dict[str, Any] = {"dimension_names": [*names, "y", "x"]} if version == 3 else {}
    fill = result.nodata if result.nodata is not None else float("nan") if result.dtype.kind == "f" else 0
    return zarr.create_array(
        store,
        name=name or None,
        shape=(*sizes, height, width),
        chunks=(*(1 for _ in sizes), *chunks),
        dtype=result.dtype,
        zarr_format=version,
        fill_value=fill,
        chunk_key_encoding={"name": "v2" if version == 2 else "default", "separator": "/"},
        config={"write_empty_chunks": True},  # a chunk that is missing was lost, it is not class 0
        **options,
    )


def _fill(array: Any, result: Result) -> None:
    step, height = array.chunks[-2], array.shape[-2]
    sizes = array.shape[:-2]
    for plane in range(result.source.planes):
        place = tuple(int(at) for at in np.unravel_index(plane, sizes)) if sizes else ()
        for top in range(0, height, step):
            bottom = min(top + step, height)
            array[(*place, slice(top, bottom), slice(None))] = result.rows(plane, top, bottom)


def _halve(zarr: ModuleType, store: Any, name: str, finer: Any, result: Result, version: int) -> Any:
    """The next level of a pyramid, made of the one before, a row of chunks at a time."""
    height, width = (-(-side // 2) for side in finer.shape[-2:])
    array = _create(zarr, store, name, result, version, (height, width))
    step = array.chunks[-2]
    for place in np.ndindex(*array.shape[:-2]):
        for top in range(0, height, step):
            bottom = min(top + step, height)
            rows = finer[(*place, slice(2 * top, min(2 * bottom, finer.shape[-2])), slice(None))]
            array[(*place, slice(top, bottom), slice(None))] = rows[::2, ::2]
    return array


def _about(result: Result) -> dict[str, Any]:
    about: dict[str, Any] = {"kind": result.kind, "nodata": result.nodata, "mark": dict(result.mark)}
    if result.kind == LABELS:
        about["classes"] = [
            {"id": index, "name": name, "color": "#{:02x}{:02x}{:02x}".format(*color)}
            for index, (name, color) in enumerate(zip(result.spec.names, result.spec.colors, strict=True))
        ]
    return {MARK: about}


def _groups(result: Result, inner: str, levels: int, version: int) -> dict[str, dict[str, Any]]:
    """The attributes of each group, by its path."""
    image = _multiscale(result, levels, version, "")
    if not inner:
        return {"": _wrapped({"multiscales": [image]}, version) | _about(result)}
    names = zip(result.spec.names, result.spec.colors, strict=True)
    label: dict[str, Any] = {"colors": [], "properties": [], "source": {"image": "../../"}}
    for index, (name, color) in enumerate(names):
        label["colors"].append({"label-value": index, "rgba": [*color, 255]})
        label["properties"].append({"label-value": index, "name": name})
    if result.nodata is not None:
        label["colors"].append({"label-value": int(result.nodata), "rgba": [0, 0, 0, 0]})
        label["properties"].append({"label-value": int(result.nodata), "name": "no data"})
    if version == 2:
        label["version"] = "0.4"
    whole = _multiscale(result, levels, version, f"{inner}/")
    return {
        inner: _wrapped({"multiscales": [image], "image-label": label}, version),
        "labels": _wrapped({"labels": [MARK]}, version),
        "": _wrapped({"multiscales": [whole]}, version) | _about(result),
    }


def _wrapped(attributes: dict[str, Any], version: int) -> dict[str, Any]:
    return attributes if version == 2 else {"ome": {"version": "0.5", **attributes}}


def _multiscale(result: Result, levels: int, version: int, prefix: str) -> dict[str, Any]:
    """The description of an image of which each level takes every second pixel, so that the first stays in its place."""
    metadata = result.metadata if result.source.format == "ome-zarr" else {}
    names = [*_axes(result)[0], "y", "x"]
    types, units, scale, shift = (metadata.get(key) or {} for key in ("types", "units", "scale", "translation"))
    axes = []
    for name in names:
        axis = {"name": name, "type": types.get(name, "time" if name == "t" else "space")}
        axes.append(axis | ({"unit": units[name]} if name in units else {}))
    datasets = []
    for level in range(levels):
        steps = [scale.get(name, 1.0) * (2**level if name in ("y", "x") else 1) for name in names]
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": steps}]
        if shift:
            transforms.append({"type": "translation", "translation": [shift.get(name, 0.0) for name in names]})
        datasets.append({"path": f"{prefix}{level}", "coordinateTransformations": transforms})
    image: dict[str, Any] = {"name": metadata.get("name") or result.kind, "axes": axes, "datasets": datasets}
    return image | ({"version": "0.4"} if version == 2 else {})
