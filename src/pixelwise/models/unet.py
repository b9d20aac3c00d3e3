"""U-Net: a contracting path, an expanding path, and skips that concatenate.

Paper:  Ronneberger, Fischer, Brox. U-Net: Convolutional Networks for Biomedical Image Segmentation. MICCAI 2015
        (arXiv:1505.04597). `UNet.forward` is figure 1.
Differs from the paper: the 3x3 convolutions are padded, so that a 512x512 image gives a 512x512 map and nothing is cropped
        at the skips; images of other sizes are padded to the next multiple of the coarsest stride (16 at five widths).
Shapes: N batch, C channels, K classes, H W image size.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.registry import register_model
from pixelwise.ops.resize import crop_like, pad_to_multiple


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The fields of a U-Net; `widths` are the channels of each level, finest first."""

    num_classes: int = 2
    in_channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    batch_norm: bool = False
    dropout: float = 0.0  # at the end of the contracting path (section 3.1 of the paper)

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise UsageError(f"unet: widths must be at least two positive numbers, not {self.widths}.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"unet: dropout is a share of at least 0 and less than 1, not {self.dropout}.")


def double_conv(channels_in: int, width: int, batch_norm: bool) -> nn.Sequential:
    """Two 3x3 convolutions, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for channels in (channels_in, width):
        layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net with padded convolutions.

    Example:
        >>> model = UNet(UNetConfig(num_classes=2, in_channels=1, widths=(4, 8)))
        >>> tuple(model(torch.zeros(1, 1, 5, 7)).shape)
        (1, 2, 5, 7)
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        widths = config.widths
        self.stride = 2 ** (len(widths) - 1)
        self.down = nn.ModuleList(
            double_conv(before, width, config.batch_norm) for before, width in pairwise((config.in_channels, *widths))
        )
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(config.dropout)
        upwards = list(pairwise(widths[::-1]))
        self.up_conv = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for coarse, fine in upwards)
        self.up = nn.ModuleList(double_conv(2 * fine, fine, config.batch_norm) for _, fine in upwards)
        self.score = nn.Conv2d(widths[0], config.num_classes, 1)
        self.apply(_init_he)

    def forward(self, image: Tensor) -> Tensor:
        x = pad_to_multiple(image, self.stride)
        skips = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)  # (N, 64, H, W) ... (N, 1024, H/16, W/16)
            skips.append(x)
        x = self.dropout(x)
        for up_conv, block, skip in zip(self.up_conv, self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([up_conv(x), skip], dim=1))  # (N, 512, H/8, W/8) ... (N, 64, H, W)
        return crop_like(self.score(x), image)  # (N, K, H, W)


def _init_he(module: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / fan in) (section 3 of the paper)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # torch counts the fan of a transposed 2x2 stride-2 convolution over all 4 taps; one of them feeds each output.
        fan_in = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_channels
        nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


register_model(
    "unet",
    UNet,
    UNetConfig(),
    paper="Ronneberger, Fischer, Brox. U-Net. MICCAI 2015",
    tiny={"widths": (4, 6, 8)},
)
