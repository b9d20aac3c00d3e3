"""Another name of `pixelwise.formats.geotiff`, until its users follow."""

from pixelwise.formats.geotiff import read_geotiff_mark, write_cog, write_geotiff

__all__ = ["read_geotiff_mark", "write_cog", "write_geotiff"]
