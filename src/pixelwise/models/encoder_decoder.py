"""Any classification network as the encoder, under a light decoder that climbs back one stride at a time.

Paper:  no single one. The choices are those of the field: adding skips (FCN, arXiv:1411.4038; LinkNet, arXiv:1707.03718;
        the lateral 1x1 of FPN, arXiv:1612.03144), concatenating them (U-Net, arXiv:1505.04597), concatenating and reducing
        by 1x1; resolution by bilinear interpolation, by transposed convolution that starts bilinear (FCN) or by unpooling
        with remembered indices (SegNet, arXiv:1511.00561).
The default (skips added, bilinear, up to a grid of 4 px) computes little on fine grids, where a decoder's time goes.
Shapes: N batch, C channels, K classes, H W image size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.backbones import PROBE_PX, Backbone, create_backbone, smallest_px
from pixelwise.models.registry import check_fields, register_model
from pixelwise.ops.cost import without_memory
from pixelwise.ops.pooling import MaxPoolKeepingIndices
from pixelwise.ops.resize import (
    CoarseLogits,
    bilinear_matrix,
    crop_like,
    learnt_bilinear,
    pad_to_multiple,
    upsample_to,
)

Skip = Literal["none", "add", "concat", "reduce"]
Up = Literal["bilinear", "transposed", "unpool"]


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """The fields of an encoder-decoder; `widths` are the decoder's channels, coarsest step first (the last one repeats)."""

    num_classes: int = 2
    in_channels: int = 3
    backbone: str = "resnet18"
    skip: Skip = "add"
    up: Up = "bilinear"
    widths: tuple[int, ...] = (128, 128, 64)
    finest: int = 4  # the grid in pixels on which classes are scored; from there to the image it is bilinear

    def __post_init__(self) -> None:
        check_fields("encoder_decoder", self)
        if self.finest not in (1, 2, 4, 8, 16, 32):
            raise UsageError(f"encoder_decoder: finest must be one of 1, 2, 4, 8, 16, 32, not {self.finest}.")
        if not self.widths or min(self.widths) < 1:
            raise UsageError(f"encoder_decoder: widths must be positive numbers, not {self.widths}.")


def conv_bn_relu(channels_in: int, width: int, kernel: int) -> nn.Sequential:
    """A convolution of odd `kernel` that keeps the size, batch norm, ReLU."""
    conv = nn.Conv2d(channels_in, width, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class UpStep(nn.Module):
    """One step of the decoder: narrow, enlarge to the skip's size, join the skip, convolve."""

    def __init__(
        self, channels: int, skip_channels: int, width: int, *, skip: Skip, up: Up, pool: MaxPoolKeepingIndices | None
    ) -> None:
        super().__init__()
        self.skip = skip
        self.pool = () if pool is None else (pool,)  # a tuple keeps the encoder's module out of this one's children
        inner = pool.channels if pool else width  # unpooling puts values back channel by channel
        self.narrow = conv_bn_relu(channels, inner, 1)
        self.enlarge = learnt_bilinear(inner, kernel=4, stride=2, padding=1) if up == "transposed" else None
        self.lateral = nn.Conv2d(skip_channels, inner, 1) if skip == "add" else None
        self.reduce = nn.Conv2d(inner + skip_channels, inner, 1) if skip == "reduce" else None
        self.mix = conv_bn_relu(inner + skip_channels if skip == "concat" else inner, width, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.narrow(x)
        if self.pool:
            x = self.pool[0].unpool(x)
        elif self.enlarge is not None:
            x = self.enlarge(x)
        x = upsample_to(x, skip.shape[-2:])
        if self.lateral is not None:
            x = x + self.lateral(skip)
        elif self.reduce is not None:
            x = self.reduce(torch.cat([x, skip], dim=1))
        elif self.skip == "concat":
            x = torch.cat([x, skip], dim=1)
        return self.mix(x)


class EncoderDecoder(nn.Module):
    """A backbone, a decoder step per stride down to `finest`, a 1x1 scorer, bilinear interpolation to the image."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.encoder = create_backbone(config.backbone, in_channels=config.in_channels)
        self.stride = max(self.encoder.strides)
        self.is_coarse = config.finest > 1
        self.smallest_px = smallest_px(self.encoder, self.stride, config.in_channels, config.backbone)
        pools = _remember_pools(self.encoder, config.in_channels) if config.up == "unpool" else {}
        levels = list(zip(self.encoder.channels, self.encoder.strides, strict=True))
        # The coarsest map is the start; every finer one down to `finest` is a step.
        skips = [(channels, stride) for channels, stride in levels[-2::-1] if stride >= config.finest]
        self.steps = nn.ModuleList()
        channels, coarse = levels[-1]
        for index, (skip_channels, stride) in enumerate(skips):
            width = config.widths[min(index, len(config.widths) - 1)]
            step = UpStep(channels, skip_channels, width, skip=config.skip, up=config.up, pool=pools.get(coarse))
            self.steps.append(step)
            channels, coarse = width, stride
        self.score = nn.Conv2d(channels, config.num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        padded = pad_to_multiple(image, self.stride, at_least=self.smallest_px)
        scores = self._scores(padded)  # (N, K, H/4, W/4)
        if scores.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            scores = (
                scores.float().contiguous()
            )  # enlarged class by class in float32: a third of the time, and more exact
        return crop_like(upsample_to(scores, padded.shape[-2:]), image)  # (N, K, H, W)

    def coarse_logits(self, image: Tensor) -> CoarseLogits:
        """What `forward` gives, before it is enlarged; for losses, if `is_coarse`."""
        padded = pad_to_multiple(image, self.stride, at_least=self.smallest_px)
        scores = self._scores(padded)  # (N, K, H/4, W/4)
        sizes = zip(scores.shape[-2:], padded.shape[-2:], image.shape[-2:], strict=True)
        rows, columns = (bilinear_matrix(grid, whole, image.device)[:size] for grid, whole, size in sizes)
        return CoarseLogits(scores, rows, columns)

    def _scores(self, padded: Tensor) -> Tensor:
        maps = self.encoder(padded)  # (N, 64, H/2, W/2) ... (N, 512, H/32, W/32) for a ResNet-18
        x = maps[-1]
        for step, skip in zip(self.steps, maps[-2::-1], strict=False):
            x = step(x, skip)  # (N, 128, H/16, W/16) ... (N, 64, H/4, W/4)
        return self.score(x)  # (N, K, H/4, W/4)


def _remember_pools(encoder: Backbone, in_channels: int) -> dict[int, MaxPoolKeepingIndices]:
    """Let the encoder's max poolings keep their indices; returns them by the stride of the map they give."""
    found: dict[str, tuple[int, int]] = {}
    hollow = without_memory(encoder).eval()
    for name, module in hollow.named_modules():
        if isinstance(module, nn.MaxPool2d) and module.kernel_size == module.stride == 2:
            module.register_forward_hook(
                lambda _module, _args, out, name=name: found.update({name: (PROBE_PX // out.shape[-1], out.shape[1])})
            )
    hollow(torch.empty(1, in_channels, PROBE_PX, PROBE_PX, device="meta"))
    if not found:
        raise UsageError(
            "encoder_decoder: up='unpool' puts values back where 2x2 max pooling took them, and this backbone has no such "
            "pooling. Use a VGG backbone, or up='bilinear' or 'transposed'."
        )
    pools = {}
    for name, (stride, width) in found.items():
        pools[stride] = MaxPoolKeepingIndices(encoder.get_submodule(name), channels=width)  # type: ignore[arg-type]
        encoder.set_submodule(name, pools[stride])
    return pools


PAPER = "any timm or torchvision classifier as the encoder; decoder after LinkNet, FPN, U-Net, SegNet"
TINY = {"backbone": "test_resnet", "widths": (8, 8)}
register_model("encoder_decoder", EncoderDecoder, EncoderDecoderConfig(), paper=PAPER, tiny=TINY)
