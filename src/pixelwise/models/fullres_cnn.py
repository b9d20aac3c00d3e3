"""The full-resolution network: convolutions only, at the image's own resolution from the first layer to the last.

Paper:  none; it is what one would wish for before counting: no pooling, as many maps out as classes, arg max per pixel.
        `FullResCNN.receptive_field_px` and `multiply_adds_per_px` say why the other networks exist: with 3x3 kernels every
        further layer shows it two more pixels and costs as much as any layer at full resolution.
Differs from the paper: nothing.
Shapes: N batch, C channels, K classes, H W image size.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.registry import register_model


@dataclass(frozen=True, kw_only=True)
class FullResCNNConfig:
    """The fields of a full-resolution network; `widths` are the channels of each layer before the scores."""

    num_classes: int = 2
    in_channels: int = 3
    widths: tuple[int, ...] = (64, 64, 64, 64, 64, 64, 64, 64)
    kernel: int = 3  # of every layer, the scores included
    batch_norm: bool = True

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise UsageError(f"fullres_cnn: widths must be positive numbers, not {self.widths}.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"fullres_cnn: kernel must be an odd number, so that sizes are kept, not {self.kernel}.")


class FullResCNN(nn.Module):
    """Convolutions of stride 1 with padding, so that every map has the size of the image."""

    stride = 1

    def __init__(self, config: FullResCNNConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in pairwise((config.in_channels, *config.widths)):
            layers.append(_conv(before, width, config.kernel, bias=not config.batch_norm))
            if config.batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers)
        self.score = _conv(config.widths[-1], config.num_classes, config.kernel, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        x = self.layers(image)  # (N, 64, H, W)
        return self.score(x)  # (N, K, H, W)

    @property
    def receptive_field_px(self) -> int:
        """Side of the square of pixels that the logits of a pixel depend on: kernel - 1 more with each layer."""
        return 1 + sum(conv.kernel_size[0] - 1 for conv in self._convs())

    @property
    def multiply_adds_per_px(self) -> int:
        """Multiplications (each with its addition) of the convolutions for each pixel of an image."""
        return sum(conv.weight.numel() for conv in self._convs())

    def _convs(self) -> list[nn.Conv2d]:
        return [module for module in self.modules() if isinstance(module, nn.Conv2d)]


def _conv(channels_in: int, width: int, kernel: int, *, bias: bool) -> nn.Conv2d:
    """A convolution that keeps the size, with the Gaussian start of He et al. (arXiv:1502.01852)."""
    conv = nn.Conv2d(channels_in, width, kernel, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


PAPER = "no paper: convolutions without pooling, what the other networks stand in for"
register_model("fullres_cnn", FullResCNN, FullResCNNConfig(), paper=PAPER, tiny={"widths": (6,) * 8})
