"""Depthwise convolutions whose training step in bfloat16 is fast on a CPU.

oneDNN's fast bfloat16 kernels for depthwise convolutions are few. The gradient of the weights has one for kernels up to 3
wide without padding beyond half of the kernel, the gradient of the input one for stride 1; all else runs 10 to 60 times
slower in kernels for any convolution. For the EfficientNet and MobileNet families, these few layers would be the larger half
of a training step. So both gradients are taken apart into what is fast:

* The gradient of the input is a convolution of the gradient with the kernel turned by 180 degrees, which is a forward pass;
  a stride puts zeros between its pixels first (Dumoulin and Visin, arXiv:1603.07285, section 4).
* The gradient of a wide kernel is computed three columns at a time, each from the columns of the input that they see.
* Padding at one side only (TensorFlow's "same" at stride 2) is no copy of the input: padded at both sides, the convolution
  gives one row and column more, and these are cut off.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

FAST_WIDTH = 3  # of kernels, for the gradient of the weights
Pair = tuple[int, int]
Sides = tuple[Pair, Pair]  # (above, below), (left, right)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution without bias; padding may differ from side to side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, sides: Sides, dilation: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.sides, ctx.dilation = stride, sides, dilation
        # As much padding at the near side as at the far one: `skip` steps of the stride more than wanted.
        skip = [-((near - far) // step) for (near, far), step in zip(sides, stride, strict=True)]
        padding = [near + more * step for (near, _), more, step in zip(sides, skip, stride, strict=True)]
        out = F.conv2d(x, weight, None, stride, padding, dilation, groups=len(weight))
        if not any(skip):
            return out
        rows, columns = _out_size(x, weight, stride, sides, dilation)
        cut = out[..., skip[0] : skip[0] + rows, skip[1] : skip[1] + columns]
        return cut.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        geometry = (ctx.stride, ctx.sides, ctx.dilation)
        grad_x = _input_gradient(grad, x, weight, *geometry) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(grad, x, weight, *geometry) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None


def _out_size(x: Tensor, weight: Tensor, stride: Pair, sides: Sides, dilation: Pair) -> list[int]:
    """Rows and columns that the convolution gives."""
    sizes = zip(x.shape[-2:], weight.shape[-2:], stride, sides, dilation, strict=True)
    return [(length + sum(pad) - far * (kernel - 1) - 1) // step + 1 for length, kernel, step, pad, far in sizes]


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, sides: Sides, dilation: Pair) -> Tensor:
    reach = [far * (kernel - 1) for far, kernel in zip(dilation, weight.shape[-2:], strict=True)]
    turned = weight.flip(2, 3)
    before = [most - near for most, (near, _) in zip(reach, sides, strict=True)]
    after = [most - far for most, (_, far) in zip(reach, sides, strict=True)]
    if max(stride) == 1 and before == after:
        return F.conv2d(grad, turned, None, 1, before, dilation, groups=len(weight))
    height, width = (length + most for length, most in zip(x.shape[-2:], reach, strict=True))
    spread = grad.new_zeros(len(x), height, width, x.shape[1]).permute(0, 3, 1, 2)  # channels last
    spread[..., before[0] :: stride[0], before[1] :: stride[1]][..., : grad.shape[2], : grad.shape[3]] = grad
    return F.conv2d(spread, turned, None, 1, 0, dilation, groups=len(weight))


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, sides: Sides, dilation: Pair) -> Tensor:
    def gradient(x: Tensor, weight: Tensor, padding: Pair) -> Tensor:
        geometry = (stride, padding, dilation, False, (0, 0), len(weight))
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, [False, True, False])[1]

    (above, below), (left, right) = sides
    if max(dilation) > 1:  # nothing is fast, but float32 is the less slow
        grad, padded = grad.float(), F.pad(x, (left, right, above, below)).float()
        return gradient(padded, weight.float(), (0, 0)).to(weight.dtype)
    height, width = weight.shape[-2:]
    if above == below <= height // 2 and left == right <= width // 2 and width <= FAST_WIDTH:
        return gradient(x, weight, (above, left))
    rows = (grad.shape[2] - 1) * stride[0] + height  # that are seen
    parts = []
    for first in range(0, width, FAST_WIDTH):
        part = weight[..., first : first + FAST_WIDTH]
        columns = (grad.shape[3] - 1) * stride[1] + part.shape[-1]
        near = left - first
        if -near >= x.shape[3] or columns <= near:  # they see nothing but padding
            parts.append(torch.zeros_like(part))
            continue
        seen = F.pad(x, (near, columns - near - x.shape[3], above, rows - above - x.shape[2]))
        parts.append(gradient(seen, part, (0, 0)))
    return torch.cat(parts, dim=3)


def _forward(self: nn.Conv2d, x: Tensor) -> Tensor:
    is_bf16_cpu = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (is_bf16_cpu and torch.is_grad_enabled()):
        return type(self).forward(self, x)
    dtype = torch.get_autocast_dtype("cpu")
    sides = tuple(_sides(self, axis, x.shape[axis - 2]) for axis in (0, 1))
    return _Depthwise.apply(x.to(dtype), self.weight.to(dtype), self.stride, sides, self.dilation)


def _sides(conv: nn.Conv2d, axis: int, length: int) -> Pair:
    """The padding before and after the rows (axis 0) or columns (1) of a map."""
    if isinstance(conv, Conv2dSame):
        both = get_same_padding(length, conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis])
        return both // 2, both - both // 2
    return int(conv.padding[axis]), int(conv.padding[axis])


def _is_slow(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and type(module) in (nn.Conv2d, Conv2dSame)
        and 1 < module.groups == module.in_channels == module.out_channels
        and module.bias is None
        and not isinstance(module.padding, str)
        and module.padding_mode == "zeros"
        and (max(module.kernel_size) > FAST_WIDTH or max(module.stride) > 1)
        and all(
            pad <= far * (kernel - 1)
            for pad, far, kernel in zip(module.padding, module.dilation, module.kernel_size, strict=True)
        )
    )


def speed_up_depthwise(model: nn.Module) -> int:
    """Give the slow depthwise convolutions of `model` the faster backward pass; returns how many there were.

    Parameters, names and results of the forward pass stay what they were. It acts under bfloat16 autocast on a CPU only.
    """
    slow = [module for module in model.modules() if _is_slow(module)]
    for module in slow:
        module.forward = _forward.__get__(module)
    return len(slow)
