"""U-Net: a contracting path, an expanding path, and skips that concatenate.

Paper:  Ronneberger, Fischer, Brox. U-Net: Convolutional Networks for Biomedical Image Segmentation. MICCAI 2015
        (arXiv:1505.04597). `UNet.score_tile` is figure 1, `UNet.forward` the overlap-tile strategy of figure 2.
Differs from the paper: `unet_valid` in nothing; the share and the places of its dropout, which the paper leaves open, are
        those of the authors' release, whose network is not that of figure 1 otherwise (a last up-convolution to 128
        channels, a ReLU after each: 31,100,354 parameters for 31,030,658). `unet` pads the 3x3 convolutions, so that a
        512x512 image gives a 512x512 map and nothing is cropped at the skips, and has no dropout; images of other sizes are
        padded to the next multiple of the coarsest stride (16 at five widths). `skip`, `up` and `batch_norm` other than the
        defaults are variants that the paper does not have; with bilinear upsampling, which repeats the last row and column
        of a map, the scores of neighbouring tiles agree in their inner part only.
Shapes: N batch, C channels, K classes, H W image size; those of a tile are written for 572x572 in `unet_valid`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.registry import check_fields, register_model
from pixelwise.ops.resize import crop_like, mirror_pad, pad_to_multiple

Skip = Literal["concat", "add", "reduce"]
Up = Literal["transposed", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The fields of a U-Net; `widths` are the channels of each level, finest first."""

    num_classes: int = 2
    in_channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    batch_norm: bool = False  # after each 3x3 convolution, in place of its bias
    dropout: float = 0.0  # at the end of the contracting path (section 3.1 of the paper)
    dropout_levels: int = 1  # how many of the coarsest levels end with it; 2 in the authors' release
    valid: bool = False  # convolutions without padding, as in the paper
    skip: Skip = "concat"  # reduce: concatenated, then a 1x1 convolution to half the channels
    up: Up = "transposed"  # bilinear: a 1x1 convolution to half the channels, then bilinear upsampling

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise UsageError(f"unet: widths must be at least two positive numbers, not {self.widths}.")
        check_fields("unet", self)
        if not 1 <= self.dropout_levels <= len(self.widths):
            raise UsageError(f"unet: dropout_levels must be 1 to {len(self.widths)}, not {self.dropout_levels}.")


def double_conv(channels_in: int, width: int, batch_norm: bool, padding: int = 1) -> nn.Sequential:
    """Two 3x3 convolutions, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for channels in (channels_in, width):
        layers.append(nn.Conv2d(channels, width, 3, padding=padding, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class BilinearUp(nn.Conv2d):
    """A 1x1 convolution, then bilinear upsampling to twice the size.

    The two commute, since bilinear weights sum to one; this order takes a quarter of the multiply-adds.
    """

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__(coarse, fine, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = (2 * x.shape[-2], 2 * x.shape[-1])
        return F.interpolate(super().forward(x), size=size, mode="bilinear", align_corners=False)


def crop_centre(features: Tensor, border_px: int) -> Tensor:
    """`features` (N, C, H, W) without `border_px` pixels on each side."""
    height, width = features.shape[-2:]
    return features[..., border_px : height - border_px, border_px : width - border_px]


class UNet(nn.Module):
    """U-Net; with `valid`, of convolutions that lose their border, on mirrored images.

    Attributes:
        stride: of the coarsest level, in pixels.
        crops: pixels cut from each side of the skips, coarsest first: 4, 16, 40, 88 in `unet_valid`.
        border_px: how much smaller than the tile the scores are on each side: 92 in `unet_valid`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        widths, norm = config.widths, config.batch_norm
        self.stride = 2 ** (len(widths) - 1)
        self.valid, self.skip, self.dropout_levels = config.valid, config.skip, config.dropout_levels
        padding = 0 if config.valid else 1
        self.down = nn.ModuleList(
            double_conv(before, width, norm, padding) for before, width in pairwise((config.in_channels, *widths))
        )
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(config.dropout)
        upwards = list(pairwise(widths[::-1]))
        self.up_conv = nn.ModuleList(
            BilinearUp(coarse, fine) if config.up == "bilinear" else nn.ConvTranspose2d(coarse, fine, 2, stride=2)
            for coarse, fine in upwards
        )
        joined = 2 if config.skip == "concat" else 1
        self.up = nn.ModuleList(double_conv(joined * fine, fine, norm, padding) for _, fine in upwards)
        if config.skip == "reduce":
            self.reduce = nn.ModuleList(nn.Conv2d(2 * fine, fine, 1) for _, fine in upwards)
        self.score = nn.Conv2d(widths[0], config.num_classes, 1)
        self.apply(_init_he)
        # A block of two valid convolutions takes 2 px from each side, which are 4 px of the next finer level.
        steps = range(len(upwards))
        self.crops = tuple(12 * 2**step - 8 if config.valid else 0 for step in steps)
        self.border_px = 6 * self.stride - 4 if config.valid else 0

    def forward(self, image: Tensor) -> Tensor:
        if not self.valid:
            return crop_like(self._scores(pad_to_multiple(image, self.stride)), image)  # (N, K, H, W)
        (height, width), border = image.shape[-2:], self.border_px
        below, right = (_next_size(side, self.stride) - side for side in (height, width))
        tile = mirror_pad(image, border, border + right, border, border + below)
        return crop_like(self._scores(tile), image)  # (N, K, H, W)

    def score_tile(self, tile: Tensor) -> Tensor:
        """Figure 1 by itself: the scores of the pixels whose whole surroundings the tile holds; for training on tiles.

        Args:
            tile: (N, C, n, m). In `unet_valid`, n and m are 16k + 60 px, k >= 8: 188, 204, ..., 572, ...; in `unet`,
                multiples of 16.

        Returns:
            (N, K, n - 184, m - 184) in `unet_valid`, (N, K, n, m) in `unet`: in general, the tile without `border_px` on
            each side.

        Raises:
            UsageError: a size at which a pooling would lose a row or column, or nothing would be left.
        """
        first = (_next_size(1, self.stride) if self.valid else self.stride) + 2 * self.border_px
        if any(side < first or (side - first) % self.stride for side in tile.shape[-2:]):
            height, width = tile.shape[-2:]
            raise UsageError(
                f"unet: a tile's height and width must be {first} px or a multiple of {self.stride} px more, not "
                f"{height} x {width}. `forward` takes images of any size."
            )
        return self._scores(tile)

    def _scores(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)  # (N, 64, 568, 568) ... (N, 1024, 28, 28)
            if level >= len(self.down) - self.dropout_levels:
                x = self.dropout(x)
            skips.append(x)
        for step, (up_conv, block) in enumerate(zip(self.up_conv, self.up, strict=True)):
            skip = crop_centre(skips[-2 - step], self.crops[step])  # (N, 512, 56, 56) ... (N, 64, 392, 392)
            x = block(self._join(step, up_conv(x), skip))  # (N, 512, 52, 52) ... (N, 64, 388, 388)
        return self.score(x)  # (N, K, 388, 388)

    def _join(self, step: int, x: Tensor, skip: Tensor) -> Tensor:
        if self.skip == "add":
            return x + skip
        x = torch.cat([x, skip], dim=1)
        return self.reduce[step](x) if self.skip == "reduce" else x


def _next_size(side: int, stride: int) -> int:
    """The smallest number of pixels from `side` on that a map of scores can have: 4 more than a multiple of the stride."""
    return (side - 4 + stride - 1) // stride * stride + 4


def _init_he(module: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / fan in) (section 3 of the paper)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # torch counts the fan of a transposed 2x2 stride-2 convolution over all 4 taps; one of them feeds each output.
        fan_in = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_channels
        nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


PAPER = "Ronneberger, Fischer, Brox. U-Net. MICCAI 2015"
register_model("unet", UNet, UNetConfig(), paper=PAPER, tiny={"widths": (4, 6, 8)})
VALID = UNetConfig(valid=True, dropout=0.5, dropout_levels=2)
register_model("unet_valid", UNet, VALID, paper=PAPER, tiny={"widths": (4, 4, 6, 6, 8)})
