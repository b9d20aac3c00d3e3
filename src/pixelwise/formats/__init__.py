"""Images of any size in any format, read window by window, and results written in the same formats.

`open_source` looks at the content (for URLs and folders at the name too) and hands over to the module of that format.
"""

from pixelwise.formats.base import LABELS, MAPS, Result, Source, SourceInfo, Writer
from pixelwise.formats.registry import FORMATS, SOURCE_SUFFIXES, open_source

__all__ = ["FORMATS", "LABELS", "MAPS", "SOURCE_SUFFIXES", "Result", "Source", "SourceInfo", "Writer", "open_source"]
