"""Files beside an image that other programs follow: its mask, its place on Earth, its nodata value.

They are not read here, for a file should mean the same wherever it is copied to; that they are there is said.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_MOST_BYTES = 1 << 20  # of an .aux.xml
_MEANINGS = {  # elements of GDAL's .aux.xml: what they say, and the metadata that say it already
    b"<SRS": ("its coordinate system", "crs"),
    b"<GeoTransform>": ("its place on Earth", "transform"),
    b"<GCPList": ("control points", "gcps"),
    b"<NoDataValue": ("the number for missing data", "nodata"),
    b"<Scale>": ("what its numbers stand for", ""),
    b"<Offset>": ("what its numbers stand for", ""),
}


def unread(location: str, metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The names of such files, and what they say, as far as the image (its `metadata`) does not say it itself."""
    path = Path(location)
    if not path.name:  # "." and "/": nothing beside a folder belongs to it
        return
    for name, what, known in _candidates(path):
        if not metadata.get(known) and (found := _there(path.with_name(name))):
            yield found.name, what
    for name in (f"{path.name}.aux.xml", f"{path.stem}.aux.xml"):
        content = _content(path.with_name(name))
        said = [what for mark, (what, known) in _MEANINGS.items() if mark in content and not metadata.get(known)]
        if said:
            yield name, ", ".join(dict.fromkeys(said))


def not_read(location: str | Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """What of an image is not read, in words without its name: what its "warnings" say, and files beside it."""
    beside = [
        f"a file *{name[name.rfind('.') :]} beside it is not read ({what}); write both into one GeoTIFF (gdal_translate IN "
        "OUT.tif) to have it used"
        for name, what in unread(str(location), metadata)
    ]
    return (*metadata.get("warnings", ()), *beside)


def _candidates(path: Path) -> Iterator[tuple[str, str, str]]:
    suffix = path.suffix.lstrip(".")
    yield f"{path.name}.msk", "which pixels hold data", ""
    if suffix:
        short = f"{suffix[0]}{suffix[-1]}w"  # as .tfw and .jgw
        for ending in dict.fromkeys((short, f"{suffix}w", "wld")):
            yield f"{path.stem}.{ending}", "its place on Earth", "transform"
    yield f"{path.stem}.prj", "its coordinate system", "crs"


def _content(path: Path) -> bytes:
    """How a file begins; nothing of what is no file, or cannot be read."""
    if not os.path.isfile(path):  # noqa: PTH113  (also of names that no file can have)
        return b""
    with suppress(OSError), path.open("rb") as file:
        return file.read(_MOST_BYTES)
    return b""


def _there(path: Path) -> Path | None:
    """A file of this name, whose suffix may be in capitals."""
    for found in (path, path.with_suffix(path.suffix.upper()), path.with_suffix(path.suffix.lower())):
        if os.path.isfile(found):  # noqa: PTH113  (also of names that no file can have)
            return found
    return None
