"""TIFF, BigTIFF, OME-TIFF and whole-slide images: windows of them, and results written in the same formats."""

from pixelwise.formats.tiff.read import MAGIC, open_tiff
from pixelwise.formats.tiff.slide import is_slide, open_slide
from pixelwise.formats.tiff.write import write_ome_tiff, write_tiff

__all__ = ["MAGIC", "is_slide", "open_slide", "open_tiff", "write_ome_tiff", "write_tiff"]
