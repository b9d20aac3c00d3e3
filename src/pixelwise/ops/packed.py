"""Convolutions that oneDNN runs on weights in an order of its own, activation included."""

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Activation = tuple[str, tuple[float, ...], Callable[[Tensor], Tensor]]
"""oneDNN's name for an activation, its numbers, and what torch calls it."""


class PackedConvolution:
    """A convolution that oneDNN runs on weights in an order of its own, into which they are brought once, at the first call.

    These operations are no public part of torch: `is_possible` tells whether there are any. Use `of`, which packs the same
    weights once, however many image sizes have operations of their own.
    """

    _known: ClassVar[WeakValueDictionary[Any, "PackedConvolution"]] = WeakValueDictionary()

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, stride: Any, dilation: Any, groups: int, activation: Activation | None
    ) -> "PackedConvolution":
        """The one of these weights in memory, and what else is given."""
        name = None if activation is None else activation[:2]
        places = (weight.data_ptr(), None if bias is None else bias.data_ptr())
        key = (places, weight.shape, weight.dtype, tuple(stride), tuple(dilation), groups, name)
        made = cls._known.get(key) or cls(weight, bias, stride, dilation, groups, activation)
        cls._known[key] = made
        return made

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        dilation: Any,
        groups: int,
        activation: Activation | None,
    ) -> None:
        self.weight, self.bias, self.geometry = weight, bias, (stride, dilation, groups)
        self.activation = ("none", ()) if activation is None else activation[:2]
        self._packed: Tensor | None = None

    @staticmethod
    def is_possible(x: Tensor) -> bool:
        """Whether the input is on a CPU with oneDNN, and has numbers: shapes and graphs take torch's own operations."""
        is_real = type(x) is Tensor and x.device.type == "cpu"
        return is_real and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")

    def __call__(self, x: Tensor, padding: Any) -> Tensor:
        """(N, C, H, W) with (above and below, left and right) rows and columns of zeros around it -> (N, C', H', W')."""
        geometry = (padding, *self.geometry)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *geometry, *self.activation, "")
