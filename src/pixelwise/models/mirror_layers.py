"""The mirror image of single layers: convolutions, poolings, norms.

A convolution from a to b channels becomes one from b to a; with a stride, a transposed one. Where it looks at one pixel of
each stride x stride (the shortcuts of a ResNet), its image is repeated over all of them, so that none stays empty. A pooling
becomes a transposed convolution of each channel by itself, which starts as interpolation. Reflected convolutions start with
He's weights, counted over the taps that feed one output; the scorer with smaller ones.
"""

import copy
import math
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from pixelwise.ops.resize import bilinear_kernel

Pair = tuple[int, int]
SCORE_GAIN = 0.01  # in place of He's 2: at the start, no class is much likelier than another


def reflect_conv(
    conv: nn.Conv2d, *, exact: bool, extra_in: int = 0, out_channels: int | None = None
) -> tuple[nn.Module, bool]:
    """A convolution from the map that `conv` gives to one like that which it takes, and whether its result must be cropped.

    `exact` says that the input of `conv` is always stride times as large as its output; else the result may be too large at
    the bottom and right. `extra_in` channels are stacked upon the map. With `out_channels` it gives scores: it has a bias
    and small weights.
    """
    channels, out = conv.out_channels + extra_in, out_channels or conv.in_channels
    options: dict[str, Any] = {
        "dilation": conv.dilation,
        "groups": 1 if out_channels else conv.groups,
        "bias": conv.bias is not None or out_channels is not None,
    }
    same = isinstance(conv, Conv2dSame) or conv.padding == "same"
    stride, kernel, padding = _pair(conv.stride), _pair(conv.kernel_size), _pair(0 if same else conv.padding)
    spans = [step * (size - 1) + 1 for step, size in zip(_pair(conv.dilation), kernel, strict=True)]
    layer: nn.Conv2d | nn.ConvTranspose2d
    if max(spans) == 1 or max(stride) == 1:
        # What a convolution without padding cuts off comes back: padding p turns into span - 1 - p.
        above, left = (span // 2 if same else span - 1 - pad for span, pad in zip(spans, padding, strict=True))
        layer = nn.Conv2d(channels, out, kernel, padding=(above, left), **options)
        more, crop = (0, 0), max(stride) > 1 and not exact
    else:
        if same:
            padding = _pair([(span - step) // 2 for span, step in zip(spans, stride, strict=True)])
        more, crop = _output_padding(spans, stride, padding, exact)
        layer = nn.ConvTranspose2d(channels, out, kernel, stride, padding, more, **options)
    _init(layer, 2.0 if out_channels is None else SCORE_GAIN)
    if max(spans) == 1 < max(stride):
        return nn.Sequential(layer, nn.Upsample(scale_factor=stride, mode="nearest")), crop
    return layer, crop


def reflect_pool(channels: int, kernel: int, stride: int, padding: int, *, exact: bool) -> tuple[nn.Module, bool]:
    """A transposed convolution of each channel by itself, that starts as interpolation; crop as of `reflect_conv`."""
    kernel = max(kernel, stride)
    more, crop = _output_padding([kernel] * 2, (stride, stride), (padding, padding), exact)
    layer = nn.ConvTranspose2d(channels, channels, kernel, stride, padding, more, groups=channels, bias=False)
    row = bilinear_kernel(kernel)[kernel // 2]
    for phase in range(stride):  # the taps that meet in one pixel: a constant map stays what it is
        row[phase::stride] /= row[phase::stride].sum()
    with torch.no_grad():
        layer.weight.copy_((row[:, None] * row).expand_as(layer.weight))
    return layer, crop


def at_width(layer: nn.Module, channels: int, width: int) -> nn.Module:
    """A copy of a norm or an activation with its starting values, for `width` channels in place of `channels`."""
    layer = copy.deepcopy(layer)
    for module in layer.modules() if channels != width else ():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.shape == (channels,):  # all alike at the start
                fresh = tensor.detach()[:1].repeat(width)
                setattr(module, name, nn.Parameter(fresh) if isinstance(tensor, nn.Parameter) else fresh)
        for attribute in ("num_features", "num_channels"):
            if getattr(module, attribute, None) == channels:
                setattr(module, attribute, width)
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (width,)
        if isinstance(module, nn.GroupNorm):
            module.num_groups = math.gcd(module.num_groups, width)
    return layer


def has_width(layer: nn.Module) -> bool:
    """Whether `at_width` can change the width of this layer: it holds single numbers for its channels, no matrices."""
    return all(tensor.ndim <= 1 for tensor in layer.parameters())


def _output_padding(spans: list[int], stride: Pair, padding: Pair, exact: bool) -> tuple[Pair, bool]:
    """What a transposed convolution must add at the end to give stride times its input, or more and be cropped."""
    more = [step + 2 * pad - span for span, step, pad in zip(spans, stride, padding, strict=True)]
    if exact and all(0 <= item < step for item, step in zip(more, stride, strict=True)):
        return _pair(more), False
    return _pair([step - 1 for step in stride]), True


def _pair(value: Any) -> Pair:
    """Height and width; a convolution called "valid" has no padding."""
    if isinstance(value, str):
        return 0, 0
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _init(layer: nn.Conv2d | nn.ConvTranspose2d, gain: float) -> None:
    """Gaussian weights of standard deviation sqrt(gain / fan in), no bias; He's for gain 2."""
    taps = math.prod(layer.kernel_size) * layer.in_channels / layer.groups
    if isinstance(layer, nn.ConvTranspose2d):
        taps /= math.prod(layer.stride)
    nn.init.normal_(layer.weight, std=(gain / taps) ** 0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
