"""Images of any size in any format, read window by window.

`open_source` looks at the content (for URLs and folders at the name too) and hands over to the module of that format.
"""

from pixelwise.data.sources.base import Source, SourceInfo
from pixelwise.data.sources.registry import FORMATS, SOURCE_SUFFIXES, open_source

__all__ = ["FORMATS", "SOURCE_SUFFIXES", "Source", "SourceInfo", "open_source"]
