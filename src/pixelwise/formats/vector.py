"""Labels as vectors: polygons (GeoJSON) and runs (COCO)."""

from pixelwise.formats.coco import write_coco
from pixelwise.formats.geojson import write_geojson

__all__ = ["write_coco", "write_geojson"]
