"""Any image classifier as a fully convolutional network, by its graph.

Read in this order: `conversion` (the public function, one walk over the graph), `tracer` and `capture` (from code to a graph
that knows what is a map), `trunk` (maps, and strides removed), `head` (from maps to scores).
"""

from pixelwise.ops.convolutionalize.conversion import HeadKind, convolutionalize

__all__ = ["HeadKind", "convolutionalize"]
