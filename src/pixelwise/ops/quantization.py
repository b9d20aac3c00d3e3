"""A folded network whose large convolutions multiply whole numbers of 8 bits: post-training static quantisation for CPUs.

A map x is held as uint8 q = x / scale + zero point, with a scale for the whole map that is known before; weights are int8
with a scale for each output channel (Jacob et al., CVPR 2018, arXiv:1712.05877, section 2; Krishnamoorthi, 2018,
arXiv:1806.08342, section 3). Sums are exact in 32 bits. The range of a map is the one whose squared error on sample images
is least, for a few outliers would cost all other numbers their digits.

Where one convolution alone looks at the result of another, that is handed over as uint8; elsewhere maps are bfloat16.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pixelwise.ops.folding import Folded, FoldedConv2d, pad_same, sole_followers
from pixelwise.ops.packed import PackedConvolution

LEVELS = 255
LEAST_CHANNELS = 16
"""Convolutions of fewer channels (of an image, to classes) gain nothing, and the first and the last layer lose most."""

LEAST_WORK = 2000
"""Multiply-adds for each number of a map, in a row of convolutions, from which on it pays to make it uint8 first."""

_KNOWN = ("none", "relu", "hardtanh", "hardswish", "swish")
_BLOCK = 1 << 17  # numbers that a thread quantises at once: they fit into its cache
_SAMPLES = 1 << 14  # of a map of an image
_CANDIDATES = 24  # ranges that are tried
_HUGE = 1e30  # times a number of the image is infinite, in float32, where that is beyond all images


def quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """The nearest of 256 levels: (N, C, H, W) -> uint8 of that shape, x / scale + zero_point; beyond them the outermost."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, dtype=torch.uint8)
    numbers, levels = (item.permute(0, 2, 3, 1).reshape(-1) for item in (x, out))
    shift, size = torch.tensor([zero_point + 0.5]), min(_BLOCK * torch.get_num_threads(), x.numel())
    floats, whole = torch.empty(size), torch.empty(size, dtype=torch.int16)
    for given, given_out in zip(numbers.split(size), levels.split(size), strict=True):
        found, cut = floats[: given.numel()].copy_(given), whole[: given.numel()]
        torch.add(shift, found, alpha=1 / scale, out=found)
        given_out.copy_(cut.copy_(found.clamp_(0, LEVELS)))  # torch is three times slower from float32 to uint8
    return out


class PackedInt8Convolution:
    """As `PackedConvolution`, of uint8 maps: x_scale and x_zero are the input's, out_scale and out_zero the result's.

    The result is uint8, or bfloat16 where `out_scale` is 0.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: Any, dilation: Any, groups: int, weight_scale: Tensor,
        x_scale: float, x_zero: int, out_scale: float, out_zero: int, activation: str, numbers: list[float],
    ) -> None:  # fmt: skip
        self.weight, self.bias, self.geometry, self.weight_scale = (
            weight,
            bias,
            (stride, dilation, groups),
            weight_scale,
        )
        self.given, self.zeros = (x_scale, x_zero), torch.zeros(weight.shape[0], dtype=torch.int32)
        kind = torch.uint8 if out_scale else torch.bfloat16
        self.result = (out_scale or 1.0, out_zero, kind, activation, numbers, "")
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor, padding: Any) -> Tensor:
        """uint8 (N, C, H, W), with rows and columns of zeros around it -> (N, C', H', W')."""
        stride, dilation, groups = self.geometry
        geometry = (stride, padding, dilation, groups)
        if self._packed is None:
            self._packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.weight_scale, *self.given, *geometry, list(x.shape)
            )
        return torch.ops.onednn.qconv2d_pointwise(
            x, *self.given, self._packed, self.weight_scale, self.zeros, self.bias, *geometry, *self.result
        )


def has_int8() -> bool:
    """Whether this processor multiplies 8-bit numbers faster than others (AVX512-VNNI or AMX), and torch lets it."""
    found = torch.cpu.get_capabilities()
    is_there = bool(found.get("avx512_vnni") or found.get("amx_int8"))
    return is_there and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")


# What a network is exported with, where maps have no numbers (ops/streaming).
@torch.library.custom_op("pixelwise::quantize", mutates_args=(), tags=(torch.Tag.pointwise,))
def _quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return quantized(x, scale, zero_point)


@_quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("pixelwise::int8_convolution", mutates_args=())
def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, weight_scale: Tensor, x_scale: float, x_zero: int, out_scale: float, out_zero: int, activation: str,
    numbers: list[float],
) -> Tensor:  # fmt: skip
    more = (weight_scale, x_scale, x_zero, out_scale, out_zero, activation, numbers)
    return PackedInt8Convolution(weight, bias, stride, dilation, groups, *more)(x, padding)


@_convolution.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, weight_scale: Tensor, x_scale: float, x_zero: int, out_scale: float, out_zero: int, activation: str,
    numbers: list[float],
) -> Tensor:  # fmt: skip
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    size = [(side + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, gap in sides]
    return x.new_empty(x.shape[0], weight.shape[0], *size, dtype=torch.uint8 if out_scale else torch.bfloat16)


class QuantizedConv2d(nn.Module):
    """A folded convolution on uint8: (N, C, H, W), which is made uint8 if it is not yet -> (N, C', H', W').

    Args:
        conv: what it computes.
        given: the range of its input.
        result: the range of its result, which is uint8 then; None for bfloat16.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, conv: FoldedConv2d, given: tuple[float, float], result: tuple[float, float] | None) -> None:
        super().__init__()
        weight = conv.weight.float()
        largest = weight.abs().amax(dim=(1, 2, 3))
        scale = torch.where(largest > 0, largest, torch.ones_like(largest)) / 127
        self.register_buffer("weight", (weight / scale[:, None, None, None]).round().to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.float())
        self.pads_same, self.kernel_size, self.padding = conv.pads_same, conv.kernel_size, conv.padding
        self.stride, self.dilation, self.groups = list(conv.stride), list(conv.dilation), conv.groups
        if self.pads_same:
            self.padding = (0, 0)
        name, numbers = ("none", ()) if conv.activation is None else conv.activation[:2]
        self.given = levels_of(given)
        self.more: Any = (*self.given, *((0.0, 0) if result is None else levels_of(result)), name, list(numbers))
        self._packed: PackedInt8Convolution | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def forward(self, x: Tensor) -> Tensor:
        is_real = PackedConvolution.is_possible(x)
        if x.dtype != torch.uint8:
            x = (quantized if is_real else _quantize)(x, *self.given)
        if self.pads_same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation, self.given[1])
        padding = list(self.padding)
        if not is_real:
            geometry = (self.stride, padding, self.dilation, self.groups)
            return _convolution(x, self.weight, self.bias, *geometry, self.weight_scale, *self.more)
        if self._packed is None:
            more = (self.stride, self.dilation, self.groups, self.weight_scale, *self.more)
            self._packed = PackedInt8Convolution(self.weight, self.bias, *more)
        return self._packed(x, padding)


class Quantized(Folded):
    """A quantised network: float32 (N, C, H, W) -> logits float32 (N, K, H, W).

    uint8 knows neither NaN nor infinity, so scores are made NaN where the image is not finite, or beyond all images.
    """

    def forward(self, image: Tensor) -> Tensor:
        scores = super().forward(image)
        if PackedConvolution.is_possible(image):
            span = torch.stack(image.aminmax())  # NaN where a number is
            if bool((span * _HUGE).isfinite().all()):
                return scores
        return scores + (image * _HUGE * 0).sum(dim=1, keepdim=True)  # (N, 1, H, W): 0, or NaN


def levels_of(span: tuple[float, float]) -> tuple[float, int]:
    """(scale, zero point) that lay 256 levels over a range (low, high); 0 is one of them."""
    low, high = min(0.0, span[0]), max(0.0, span[1])
    scale = (high - low) / LEVELS or 1.0
    return scale, round(-low / scale)


def quantizable(folded: Folded, in_channels: int) -> dict[str, str]:
    """The convolutions that gain by 8 bits, each with the one that takes its result as uint8; "" for none."""
    convs = {name: item for name, item in folded.model.named_modules() if _is_possible(item)}
    after = {one: other for one, other in sole_followers(folded, in_channels).items() if {one, other} <= convs.keys()}
    found: dict[str, str] = {}
    for name in [name for name in convs if name not in after.values()]:
        chain = [name]
        while chain[-1] in after:
            chain.append(after[chain[-1]])
        while chain and _work([convs[item] for item in chain]) < LEAST_WORK:
            chain.pop(0)
        found |= dict(zip(chain, [*chain[1:], ""], strict=False))
    return found


def _is_possible(module: nn.Module) -> bool:
    if not isinstance(module, FoldedConv2d) or module.is_transposed or isinstance(module.padding, str):
        return False
    is_depthwise = module.groups == module.weight.shape[0] and module.weight.shape[1] == 1
    is_known = module.activation is None or module.activation[0] in _KNOWN
    channels = min(module.weight.shape[0], module.weight.shape[1] * module.groups)
    return is_known and channels >= LEAST_CHANNELS and (module.groups == 1 or is_depthwise)


def _work(chain: list[FoldedConv2d]) -> float:
    """Multiply-adds of convolutions in a row for each number that the first is given."""
    work, size = 0.0, 1.0
    for conv in chain:
        steps = math.prod(conv.stride)
        work += size * math.prod((conv.weight.shape[0], *conv.kernel_size)) / (steps * conv.groups)
        size *= conv.weight.shape[0] / (conv.weight.shape[1] * conv.groups * steps)
    return work


@torch.inference_mode()
def calibrated(folded: Folded, images: Iterable[Tensor], in_channels: int) -> dict[str, tuple[float, float]]:
    """The range of the input of every convolution that is to be quantised, by its name, from sample images.

    Args:
        folded: the network, on a CPU.
        images: normalised, each float32 (N, C, H, W), as the network is given them.
        in_channels: C.
    """
    samples: dict[str, list[Tensor]] = {name: [] for name in quantizable(folded, in_channels)}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            step = max(1, math.isqrt(x.numel() // _SAMPLES))
            low, high = x.aminmax()
            samples[name].append(torch.cat([x[..., ::step, ::step].flatten(), low[None], high[None]]).float())

        return hook

    hooks: list[RemovableHandle] = [
        folded.model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in samples
    ]
    try:
        for image in images:
            folded(image.contiguous(memory_format=torch.channels_last))
    finally:
        for item in hooks:
            item.remove()
    return {name: best_range(torch.cat(found)) for name, found in samples.items()}


def best_range(numbers: Tensor) -> tuple[float, float]:
    """(low, high), 0 among them, of the 256 levels from which the numbers differ least, in the mean of squares."""
    low, high = min(0.0, float(numbers.min())), max(0.0, float(numbers.max()))
    best, least = (low, high), math.inf
    for step in range(_CANDIDATES):
        share = 1 - step / (_CANDIDATES * 1.1)
        scale, zero = levels_of((low * share, high * share))
        near = ((numbers / scale + zero).round().clamp(0, LEVELS) - zero) * scale
        error = float((near - numbers).square().mean())
        if error < least:
            best, least = (low * share, high * share), error
    return best


def quantize(folded: Folded, ranges: Mapping[str, tuple[float, float]], in_channels: int) -> Quantized:
    """The network with 8-bit convolutions; `folded` stays as it is.

    Args:
        folded: in bfloat16, on a CPU that `has_int8`.
        ranges: as `calibrated` gives them, for all that are `quantizable`.
        in_channels: C.

    Example:
        >>> from pixelwise.ops.folding import fold
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 256, 3), nn.ReLU(), nn.Conv2d(256, 2, 1))
        >>> folded = fold(model.eval(), torch.rand(1, 3, 64, 64), torch.bfloat16)
        >>> ranges = calibrated(folded, [torch.rand(1, 3, 20, 20)], in_channels=3)
        >>> [type(item).__name__ for item in quantize(folded, ranges, in_channels=3).model]
        ['FoldedConv2d', 'Identity', 'QuantizedConv2d', 'Identity', 'FoldedConv2d']
    """
    chosen = quantizable(folded, in_channels)
    kept = {id(item): item for name in chosen for item in folded.model.get_submodule(name).buffers()}
    twin = copy.deepcopy(folded.model, kept)
    for name, following in chosen.items():
        conv: Any = twin.get_submodule(name)
        result = ranges[following] if following else None
        twin.set_submodule(name, QuantizedConv2d(conv, ranges[name], result))
    return Quantized(twin, folded.dtype).eval()
