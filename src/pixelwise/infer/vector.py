"""Labels as vectors: polygons (GeoJSON) and runs (COCO)."""

from pixelwise.infer.vector_coco import write_coco
from pixelwise.infer.vector_geojson import write_geojson

__all__ = ["write_coco", "write_geojson"]
