"""Prediction of images that are too large for one pass."""

from pixelwise.infer.tiling.base import Read, Region, Scorer, Scores

__all__ = ["Read", "Region", "Scorer", "Scores"]
