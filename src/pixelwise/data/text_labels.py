"""Labels that are text (polygons, boxes): what tool wrote them, and what to do, for they are not read here."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixelwise.data.image_files import walk
from pixelwise.data.pairs import counted, first_of
from pixelwise.files import read_ends
from pixelwise.formats.local import printable

_LOOKS = 3  # files of each folder and suffix that are looked into
_BYTES = 1 << 18  # at both ends of a file

_ROW = re.compile(r"\d+((?: \d?\.?\d+(?:e-\d+)?){4,}) *")  # YOLO: the number of a class, then coordinates in 0..1
_BOXES = "a box says no outline, so there is no label for a pixel: draw outlines"
_KINDS: tuple[
    tuple[str, tuple[str, ...], str, str], ...
] = (  # suffix, words (or others) in it, what it is, how it is drawn
    (".json", ('"shapes"', '"imagePath"'), "labelme's polygons", "labelme_export_voc does"),
    (
        ".json",
        ('"imgHeight"', '"objects"'),
        "Cityscapes' polygons",
        "csCreateTrainIdLabelImgs of cityscapesScripts does",
    ),
    (".json", ('"_via_|"shape_attributes"',), "polygons of VIA", "PIL.ImageDraw.polygon does"),
    (".json", ('"from_name"|"to_name"',), "tasks of Label Studio", "its export of brush labels as PNG does"),
    (".json", ('"images"', '"annotations"|"categories"'), "COCO's annotations", "pycocotools' annToMask does"),
    (".json", ('"FeatureCollection"',), "GeoJSON", "gdal_rasterize does"),
    (".geojson", ('"FeatureCollection"',), "GeoJSON", "gdal_rasterize does"),
    (".xml", ("<bndbox>", "<annotation>"), "VOC boxes", _BOXES),
    (".xml", ("<annotations>", "<polygon|<mask|<box|<image"), "CVAT's XML", "its export as Segmentation mask does"),
)
_SUFFIXES = {".txt", *(kind[0] for kind in _KINDS)}
_YOLO = {True: ("YOLO polygons", "PIL.ImageDraw.polygon does"), False: ("YOLO boxes", _BOXES)}


def describe_text_labels(root: Path) -> str:
    """What labels in text lie below a folder and what to do with them, as sentences; "" if there are none."""
    files: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for here, _, names in walk(root):
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if suffix in _SUFFIXES and not name.startswith("."):
                files[suffix, os.path.relpath(here, root)].append(here / name)
    found: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    for (suffix, folder), there in files.items():
        if kind := next((kind for path in there[:_LOOKS] if (kind := _kind(path, suffix))), None):
            where = f"*{suffix}" if folder == "." else f"{printable(folder)}/*{suffix}"
            found[kind].append((where, len(there)))
    if not found:
        return _unknown(files)
    said = [
        f"{name} ({first_of([where for where, _ in there], 3)}: "
        f"{counted(sum(count for _, count in there), 'file', '', '').strip()})"
        for (name, _), there in found.items()
    ]
    ways = "; ".join(how for _, how in found)
    return (
        f" There are labels as text: {first_of(said, 3)}. They are not read: draw an image of labels for each image, with "
        f"the number of a class in each pixel ({ways}), and put it in masks/ under the name of its image, or list the pairs "
        "in a CSV file with the columns image,mask."
    )


def _unknown(files: Mapping[tuple[str, str], Sequence[Path]]) -> str:
    """What is said of text of which no tool is known."""
    count = Counter[str]()
    for (suffix, folder), there in files.items():
        top = folder.partition(os.sep)[0]
        count[suffix if top == "." else f"{suffix} in {printable(top)}/"] += len(there)
    if not count:
        return ""
    shown = ", ".join(f"{number:,} x {where}" for where, number in count.most_common(3))
    return f" Labels in text, such as polygons or boxes ({shown}), have to be drawn as images of labels first."


def _kind(path: Path, suffix: str) -> tuple[str, str] | None:
    try:
        text = read_ends(path, _BYTES).decode("utf-8", "replace").lstrip("\ufeff")
    except (OSError, ValueError):
        return None
    if suffix == ".txt":
        rows = [_ROW.fullmatch(line[:10_000]) for line in text.splitlines()[:20] if line.strip()]
        return _YOLO[any(row and row[1].count(" ") > 4 for row in rows)] if rows and all(rows) else None
    for ending, words, *kind in _KINDS:
        if ending == suffix and all(any(other in text for other in word.split("|")) for word in words):
            return kind[0], kind[1]
    return None
