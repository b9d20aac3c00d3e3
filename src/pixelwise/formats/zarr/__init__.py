"""Zarr arrays (versions 2 and 3) and OME-Zarr images (NGFF 0.1 to 0.5), local, zipped or behind a URL."""

from pixelwise.formats.zarr.source import open_zarr
from pixelwise.formats.zarr.store import DOCUMENTS, is_zarr_folder
from pixelwise.formats.zarr.write import write_ome_zarr, write_zarr

__all__ = ["DOCUMENTS", "is_zarr_folder", "open_zarr", "write_ome_zarr", "write_zarr"]
