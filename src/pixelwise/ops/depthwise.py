"""Depthwise convolutions whose training step in bfloat16 is fast on a CPU.

On CPUs, the bfloat16 gradients of two kinds of depthwise convolution run in a slow reference kernel: the weight of kernels
wider than 3, and the input where the stride is over 1. The same gradients in float32 take a fifth of the time or less, and
are more exact. For the EfficientNet and MobileNet families, these few layers are the larger half of a training step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution without bias; the forward pass is torch's, the backward pass runs in float32 where faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = (stride, padding, dilation, False, (0, 0), weight.shape[0])
        return F.conv2d(x, weight, None, stride, padding, dilation, groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, x, weight = (item.float() for item in (*grads, *ctx.saved_tensors))
        mask = [*ctx.needs_input_grad[:2], False]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *ctx.geometry, mask)
        return grad_x, grad_weight, None, None, None  # autograd gives them the types of what came in


def _forward(self: nn.Conv2d, x: Tensor) -> Tensor:
    is_bf16_cpu = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (is_bf16_cpu and torch.is_grad_enabled()):
        return type(self).forward(self, x)
    if isinstance(self, Conv2dSame):
        x = pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
    padding = (0, 0) if isinstance(self, Conv2dSame) else self.padding
    dtype = torch.get_autocast_dtype("cpu")
    return _Depthwise.apply(x.to(dtype), self.weight.to(dtype), self.stride, padding, self.dilation)


def _is_slow(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and type(module) in (nn.Conv2d, Conv2dSame)
        and 1 < module.groups == module.in_channels == module.out_channels
        and module.bias is None
        and not isinstance(module.padding, str)
        and module.padding_mode == "zeros"
        and (max(module.kernel_size) > 3 or max(module.stride) > 1)
    )


def speed_up_depthwise(model: nn.Module) -> int:
    """Give the slow depthwise convolutions of `model` the faster backward pass; returns how many there were.

    Parameters, names and results of the forward pass stay what they were. It acts under bfloat16 autocast on a CPU only.
    """
    slow = [module for module in model.modules() if _is_slow(module)]
    for module in slow:
        module.forward = _forward.__get__(module)
    return len(slow)
