"""Images of any size in any format, read window by window, and results written in the same formats.

`open_source` looks at the content (for URLs and folders at the name too) and hands over to the module of that format.
"""

from pixelwise.formats.base import LABELS, MAPS, Result, Source, SourceInfo, Writer
from pixelwise.formats.opening import open_source
from pixelwise.formats.registry import FORMATS, SOURCE_SUFFIXES, WRITERS, choose_writer

__all__ = [
    "FORMATS",
    "LABELS",
    "MAPS",
    "SOURCE_SUFFIXES",
    "WRITERS",
    "Result",
    "Source",
    "SourceInfo",
    "Writer",
    "choose_writer",
    "open_source",
]
