"""TIFF, BigTIFF, OME-TIFF and whole-slide images: windows of them, and results written in the same formats."""
