"""Zarr arrays (versions 2 and 3) and OME-Zarr images (NGFF 0.1 to 0.5), local, zipped or behind a URL."""
