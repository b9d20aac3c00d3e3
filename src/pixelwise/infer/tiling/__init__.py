"""Strategies to score an image region by region: in one pass, exactly in stripes or tiles, or blended."""

from pixelwise.infer.network import Region, Scorer, Scores, WholeImage

__all__ = ["Region", "Scorer", "Scores", "WholeImage"]
