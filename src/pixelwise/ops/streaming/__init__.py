"""Networks that compute any window of their logits exactly, and stream images through in stripes."""

from pixelwise.ops.streaming.graph import NotWindowed
from pixelwise.ops.streaming.network import ReadWindow, WindowedNetwork

__all__ = ["NotWindowed", "ReadWindow", "WindowedNetwork"]
