"""Zarr arrays (versions 2 and 3) and OME-Zarr images (NGFF 0.1 to 0.5), local, zipped or behind a URL."""

from pixelwise.formats.zarr.source import ZarrSource, open_zarr
from pixelwise.formats.zarr.store import DOCUMENTS, is_zarr_folder
from pixelwise.formats.zarr.write import read_zarr_mark, write_ome_zarr, write_zarr

__all__ = [
    "DOCUMENTS", "ZarrSource", "is_zarr_folder", "open_zarr", "read_zarr_mark", "write_ome_zarr", "write_zarr",
]  # fmt: skip
