"""Labels as COCO JSON: for each class of each plane one run-length code, in the compressed text of pycocotools.

The code runs down the columns, but labels come in rows. They wait in a temporary file in columns of tiles; in memory are
only the places where they change.
"""

import json
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pixelwise.files import writing
from pixelwise.formats.base import Result
from pixelwise.formats.local import printable

_BAND_PX = 256  # rows that are asked for at once, and columns that are looked at together
_GROUP_BITS, _MORE, _OFFSET = 5, 0x20, 48
_CHUNK = 1 << 20


def write_coco(path: Path, result: Result) -> None:
    """Write the labels as COCO annotations: for each class that occurs one compressed run-length code (`iscrowd` 1).

    Categories are all classes, their `id` is the class id. Each plane is an image of its own, counted
    from 1. `pycocotools.mask.decode(annotation["segmentation"])` gives the mask back (it counts in 32 bits, so up to 2^32
    pixels). Pixels without data belong to no annotation.
    """
    with writing(path) as part, part.open("w", encoding="utf-8") as file:
        head = json.dumps(_head(path, result), ensure_ascii=False)
        file.write(head[:-1] + ', "annotations": [')
        separator, number = "\n", 1
        for plane in range(result.source.planes):
            for annotation in _annotations(path, result, plane):
                annotation = {"id": number, "image_id": plane + 1} | annotation
                file.write(separator + json.dumps(annotation))
                separator, number = ",\n", number + 1
        file.write("\n]}\n")


def run_lengths(edges: NDArray[np.int64], height: int, width: int) -> dict[str, Any]:
    """Code, area and box of a mask, made from the places (x * height + y, ascending) where it begins and ends in turn."""
    size = height * width
    counts = np.diff(edges, prepend=0, append=size)
    counts[3:] = counts[3:] - counts[1:-2]  # from the fourth on as differences to the one before the last
    chunks = np.array_split(counts, -(-len(counts) // _CHUNK))
    ends = np.append(edges, size) if len(edges) % 2 else edges
    first, last = ends[::2], ends[1::2] - 1
    (left, top), (right, bottom) = np.divmod(first, height), np.divmod(last, height)
    highest = 0 if (left != right).any() else int(top.min())  # a run that goes on in the next column touches both edges
    lowest = height - 1 if (left != right).any() else int(bottom.max())
    return {
        "segmentation": {"size": [height, width], "counts": b"".join(map(_characters, chunks)).decode("ascii")},
        "area": int((last - first + 1).sum()),
        "bbox": [int(left[0]), highest, int(right[-1] - left[0]) + 1, lowest - highest + 1],
    }


def _characters(numbers: NDArray[np.int64]) -> bytes:
    """Numbers of any size as pycocotools writes them: groups of 5 bits, lowest first, a sixth where more follow."""
    groups, wanted = [], []
    active = np.ones(len(numbers), dtype=bool)
    while active.any():
        group = numbers & (_MORE - 1)
        numbers = numbers >> _GROUP_BITS
        more = np.where(group & (_MORE >> 1), numbers != -1, numbers != 0)
        groups.append((group | (more * _MORE)) + _OFFSET)
        wanted.append(active)
        active = active & more
    return np.stack(groups, axis=1)[np.stack(wanted, axis=1)].astype(np.uint8).tobytes()


def _head(path: Path, result: Result) -> dict[str, Any]:
    info = result.source
    place = {"file_name": printable(PurePath(info.location).name), "width": info.width, "height": info.height}
    images = [{"id": plane + 1} | place | ({"plane": plane} if info.planes > 1 else {}) for plane in range(info.planes)]
    categories = [
        {"id": index, "name": name, "supercategory": "", "color": list(color), "isthing": 0}
        for index, (name, color) in enumerate(zip(result.spec.names, result.spec.colors, strict=True))
    ]
    about = {"description": printable(path.stem)} | ({"pixelwise": dict(result.mark)} if result.mark else {})
    return {"info": about, "images": images, "categories": categories}


def _annotations(path: Path, result: Result, plane: int) -> Iterator[dict[str, Any]]:
    """One for each class of a plane, in the order of the class ids."""
    height, width = result.source.height, result.source.width
    edges: dict[int, list[NDArray[np.int64]]] = {}
    with tempfile.TemporaryFile(dir=path.parent) as spill:
        before, base = -1, 0
        for columns in _columns(spill, result, plane):
            labels = columns.T.ravel()  # down the columns
            went = np.concatenate([[before], labels[:-1]])
            changes = np.flatnonzero(labels != went)
            went, came = went[changes], labels[changes].astype(np.int64)
            for label in np.union1d(went, came).tolist():
                if label not in (-1, result.nodata):
                    edges.setdefault(label, []).append(base + changes[(went == label) | (came == label)])
            before, base = int(labels[-1]), base + len(labels)
    for label in sorted(edges):
        yield {"category_id": label, **run_lengths(np.concatenate(edges.pop(label)), height, width), "iscrowd": 1}


def _columns(spill: BinaryIO, result: Result, plane: int) -> Iterator[NDArray[Any]]:
    """The labels (H, up to 256) from left to right; they come in rows, and wait compressed in a file."""
    height, width = result.source.height, result.source.width
    lefts = range(0, width, _BAND_PX)
    sizes: list[list[tuple[int, int]]] = [[] for _ in lefts]  # of each block: where it begins, its bytes
    for top in range(0, height, _BAND_PX):
        rows = np.asarray(result.rows(plane, top, min(top + _BAND_PX, height))).astype(result.dtype, copy=False)
        for blocks, left in zip(sizes, lefts, strict=True):
            blocks.append((spill.tell(), spill.write(zlib.compress(rows[:, left : left + _BAND_PX].tobytes(), 1))))
    for blocks, left in zip(sizes, lefts, strict=True):
        columns = np.empty((height, min(_BAND_PX, width - left)), dtype=result.dtype)
        top = 0
        for offset, size in blocks:
            spill.seek(offset)
            part = np.frombuffer(zlib.decompress(spill.read(size)), dtype=result.dtype).reshape(-1, columns.shape[1])
            columns[top : top + len(part)] = part
            top += len(part)
        yield columns
