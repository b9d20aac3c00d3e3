"""OME-XML, as far as it says how the planes of a file lie and what they measure; entities and other files are refused."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from pixelwise.errors import DataError

_MICROMETRES = {
    "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "pm": 1e-6, "Å": 1e-4, "mm": 1e3, "cm": 1e4, "dm": 1e5,
    "m": 1e6, "in": 25_400.0, "inch": 25_400.0,
}  # fmt: skip
_MAX_PLANES = 1_000_000
_SIZES = ("SizeX", "SizeY", "SizeZ", "SizeC", "SizeT")
_PLACES = ("IFD", "PlaneCount", "NumPlanes", "FirstZ", "FirstC", "FirstT")


@dataclass(frozen=True, kw_only=True)
class Ome:
    """What OME-XML says of its first image.

    Attributes:
        layout: OME-XML with nothing but the sizes and the places of the planes, all numbers checked.
        metadata: "image_name", "pixel_size_um" ({"x": …, "y": …, "z": …}), "channel_names", "time_increment_s".
    """

    layout: str
    metadata: dict[str, Any]


def parse_xml(text: str) -> ElementTree.Element:
    """The root element of XML that declares no document type, which is where entities would be defined.

    Raises:
        DataError: it declares one.
        SyntaxError: it is no XML.

    Example:
        >>> parse_xml("<a b='1'/>").attrib
        {'b': '1'}
        >>> parse_xml("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>")
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: its XML declares a document type or entities, which are not followed. Remove them.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError("its XML declares a document type or entities, which are not followed. Remove them.")
    return ElementTree.fromstring(text)


def read_ome(text: str, pages: int) -> Ome | None:
    """Read the description of an OME-TIFF.

    Args:
        text: the description.
        pages: how many there are in the file.

    Returns:
        None if it is no OME-XML, or describes no image.

    Raises:
        DataError: it declares entities, or numbers that cannot be.
    """
    if not text.rstrip().endswith("OME>"):
        return None
    root = parse_xml(text)
    image = next(_children(root, "Image"), None)
    pixels = None if image is None else next(_children(image, "Pixels"), None)
    if image is None or pixels is None:
        return None
    copy = ElementTree.Element("OME", _only(root, ("UUID",)))
    inner = ElementTree.SubElement(copy, "Image", _only(image, ("ID", "Name")))
    inner.append(_layout(pixels, pages))
    return Ome(layout=ElementTree.tostring(copy, encoding="unicode"), metadata=_metadata(image, pixels))


def _layout(pixels: ElementTree.Element, pages: int) -> ElementTree.Element:
    sizes = {name: _whole(pixels, name, 1) for name in _SIZES}
    if math.prod(sizes[name] for name in ("SizeZ", "SizeC", "SizeT")) > _MAX_PLANES:
        raise DataError(f"its OME-XML describes more than {_MAX_PLANES:,} planes.")
    copy = ElementTree.Element("Pixels", {**_only(pixels, ("ID", "DimensionOrder", "Type")), **_text(sizes)})
    for channel in _children(pixels, "Channel"):
        samples = (
            {"SamplesPerPixel": _whole(channel, "SamplesPerPixel", 1)} if "SamplesPerPixel" in channel.attrib else {}
        )
        ElementTree.SubElement(copy, "Channel", _text(samples))
    total = 0
    for data in _children(pixels, "TiffData"):
        places = {name: _whole(data, name, 0) for name in _PLACES if name in data.attrib}
        total += places.get("PlaneCount") or pages
        if total > _MAX_PLANES:
            raise DataError(f"its OME-XML places more than {_MAX_PLANES:,} planes.")
        block = ElementTree.SubElement(copy, "TiffData", _text(places))
        for uuid in _children(data, "UUID"):
            ElementTree.SubElement(block, "UUID", _only(uuid, ("FileName",))).text = uuid.text
    return copy


def _metadata(image: ElementTree.Element, pixels: ElementTree.Element) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if image.get("Name"):
        metadata["image_name"] = image.get("Name")
    sizes = {axis.lower(): _length(pixels, f"PhysicalSize{axis}") for axis in "XYZ"}
    known = {axis: size for axis, size in sizes.items() if size is not None}
    if known:
        metadata["pixel_size_um"] = known
    names = [channel.get("Name") for channel in _children(pixels, "Channel")]
    if names and all(names):
        metadata["channel_names"] = tuple(str(name) for name in names)
    increment = _positive(pixels.get("TimeIncrement"))
    if increment is not None and pixels.get("TimeIncrementUnit", "s") == "s":
        metadata["time_increment_s"] = increment
    return metadata


def _children(element: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """Those of that name, in any version of the namespace."""
    return (child for child in element if child.tag.rpartition("}")[2] == name)


def _only(element: ElementTree.Element, names: tuple[str, ...]) -> dict[str, str]:
    return {name: element.attrib[name] for name in names if name in element.attrib}


def _text(values: dict[str, int]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _whole(element: ElementTree.Element, name: str, least: int) -> int:
    text = element.get(name, str(least))
    if not text.isascii() or not text.isdigit() or len(text) > 12 or int(text) < least:
        raise DataError(f"its OME-XML gives {name} as {text[:40]!r}; a whole number of at least {least} is meant.")
    return int(text)


def _length(pixels: ElementTree.Element, name: str) -> float | None:
    unit = _MICROMETRES.get(pixels.get(f"{name}Unit", "µm"))
    size = _positive(pixels.get(name))
    return None if unit is None or size is None else size * unit


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
