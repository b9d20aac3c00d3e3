"""One exact confusion matrix; every score derives from it."""

from pixelwise.metrics.confusion import ConfusionMatrix, Scores

__all__ = ["ConfusionMatrix", "Scores"]
