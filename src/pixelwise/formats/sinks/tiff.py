"""Where the table of writers looks for TIFF."""

from pixelwise.formats.tiff import read_tiff_mark, write_ome_tiff, write_tiff

__all__ = ["read_tiff_mark", "write_ome_tiff", "write_tiff"]
