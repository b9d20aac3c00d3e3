"""FC-DenseNet-56, -67 and -103, "the Tiramisu": dense blocks on the way down and up, with concatenating skips.

Paper:  Jégou, Drozdzal, Vázquez, Romero, Bengio. The One Hundred Layers Tiramisu: Fully Convolutional DenseNets for Semantic
        Segmentation. CVPR Workshops 2017 (arXiv:1611.09326). `FCDenseNet.forward` is figure 1; the geometry (pooling that
        drops an odd last row, enlarged maps cut to the skip's size) and the initialisation are those of the authors' code.
Differs from the paper: images shorter or narrower than the coarsest stride (32 px at five poolings) cannot be pooled that
        often and have their last row and column repeated up to it; all others keep the authors' geometry. Evaluation uses
        running averages; the authors used the statistics of each batch (`pixelwise.ops.batch_statistics`). The softmax is
        the loss's.
Parameters: 9,322,091 for FC-DenseNet-103 at 11 classes; the 9.4 million of the paper's table 3 count running averages too.
Shapes: N batch, C channels, K classes, H W image size; h = floor(H / 2) and so on down; widths are those of FC-DenseNet-103.
"""

import contextlib
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixelwise.errors import UsageError
from pixelwise.models.registry import check_fields, register_model
from pixelwise.ops.batch_statistics import running_averages_kept
from pixelwise.ops.resize import crop_like, pad_to_multiple

EPSILON = 1e-4  # of batch norm in the authors' framework, Lasagne


@dataclass(frozen=True, kw_only=True)
class FCDenseNetConfig:
    """The fields of an FC-DenseNet.

    `layers` counts the layers of each dense block in order: down, bottleneck, up. `memory_efficient` computes each dense
    layer a second time in the backward pass instead of keeping its maps: less memory, more time, the same results.
    """

    num_classes: int = 11
    in_channels: int = 3
    growth: int = 16  # maps that each layer adds (k)
    layers: tuple[int, ...] = (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4)
    first_width: int = 48
    dropout: float = 0.2
    memory_efficient: bool = False

    def __post_init__(self) -> None:
        if len(self.layers) < 3 or len(self.layers) % 2 == 0 or min(self.layers) < 1:
            raise UsageError(
                "fcdensenet: layers must be an odd number of at least 3 positive numbers (down, bottleneck, up), not "
                f"{self.layers}."
            )
        check_fields("fcdensenet", self, "growth", "first_width")


class DenseLayer(nn.Module):
    """Batch norm, ReLU, convolution, dropout over all maps made so far (table 1)."""

    def __init__(self, channels: int, width: int, kernel: int, config: FCDenseNetConfig) -> None:
        super().__init__()
        self.memory_efficient = config.memory_efficient
        self.norm = nn.BatchNorm2d(channels, eps=EPSILON)
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, *maps: Tensor) -> Tensor:
        if self.memory_efficient and self.training and torch.is_grad_enabled():
            return self._recomputed(*maps)
        return self._layer(*maps)

    def _layer(self, *maps: Tensor) -> Tensor:
        stack = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        return self.dropout(self.conv(self.norm(stack).relu()))

    def _recomputed(self, *maps: Tensor) -> Tensor:
        """`_layer`, computed again in the backward pass: the same dropout, and running averages that count it once."""
        is_first = True

        def run(*maps: Tensor) -> Tensor:
            nonlocal is_first
            counted, is_first = is_first, False
            with contextlib.nullcontext() if counted else running_averages_kept(self):
                return self._layer(*maps)

        return checkpoint(run, *maps, use_reentrant=False)


class DenseBlock(nn.Module):
    """Layers that each see the block's input and the maps of all layers before (figure 2).

    Gives (N, channels + layers * growth, h, w) if it keeps its input, else the new maps (N, layers * growth, h, w).
    """

    def __init__(self, channels: int, layers: int, config: FCDenseNetConfig, *, keeps_input: bool) -> None:
        super().__init__()
        self.keeps_input = keeps_input
        self.layers = nn.ModuleList(
            DenseLayer(channels + index * config.growth, config.growth, 3, config) for index in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(*maps))
        return torch.cat(maps if self.keeps_input else maps[1:], dim=1)


class FCDenseNet(nn.Module):
    """Fully convolutional DenseNet."""

    def __init__(self, config: FCDenseNetConfig) -> None:
        super().__init__()
        growth, pools = config.growth, len(config.layers) // 2
        self.stride = 2**pools
        self.first = nn.Conv2d(config.in_channels, config.first_width, 3, padding=1)
        self.down, self.transitions_down = nn.ModuleList(), nn.ModuleList()
        width, skip_widths = config.first_width, []
        for layers in config.layers[:pools]:
            self.down.append(DenseBlock(width, layers, config, keeps_input=True))
            width += layers * growth
            skip_widths.append(width)
            self.transitions_down.append(nn.Sequential(DenseLayer(width, width, 1, config), nn.MaxPool2d(2)))
        self.bottleneck = DenseBlock(width, config.layers[pools], config, keeps_input=False)
        self.up, self.transitions_up = nn.ModuleList(), nn.ModuleList()
        for index, (before, layers) in enumerate(pairwise(config.layers[pools:]), start=1):
            self.transitions_up.append(nn.ConvTranspose2d(before * growth, before * growth, 3, stride=2))
            width = before * growth + skip_widths[-index]
            self.up.append(DenseBlock(width, layers, config, keeps_input=index == pools))
        self.score = nn.Conv2d(width + config.layers[-1] * growth, config.num_classes, 1)
        self.apply(_init_he_uniform)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(pad_to_multiple(image, 1, at_least=self.stride))  # (N, 48, H, W)
        skips = []
        for block, transition in zip(self.down, self.transitions_down, strict=True):
            skips.append(block(x))  # (N, 112, H, W) ... (N, 656, H/16, W/16)
            x = transition(skips[-1])  # (N, 112, H/2, W/2) ... (N, 656, H/32, W/32)
        x = self.bottleneck(x)  # (N, 240, H/32, W/32): the new maps only
        for transition, block, skip in zip(self.transitions_up, self.up, reversed(skips), strict=True):
            enlarged = crop_like(transition(x), skip)  # 2n + 1 rows cut to the skip's 2n or 2n + 1
            x = block(
                torch.cat([enlarged, skip], dim=1)
            )  # (N, 192, H/16, W/16) ... the last one's stack (N, 256, H, W)
        return crop_like(self.score(x), image)  # (N, K, H, W)


def _init_he_uniform(module: nn.Module) -> None:
    """Uniform weights within sqrt(6 / fan in) (He et al. 2015, as Lasagne's HeUniform); biases start at zero."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


PAPER = "Jégou, Drozdzal, Vázquez, Romero, Bengio. The One Hundred Layers Tiramisu. CVPR Workshops 2017"
TINY = {"growth": 4, "layers": (2,) * 11, "first_width": 8}
register_model("fcdensenet56", FCDenseNet, FCDenseNetConfig(growth=12, layers=(4,) * 11), paper=PAPER, tiny=TINY)
register_model("fcdensenet67", FCDenseNet, FCDenseNetConfig(growth=16, layers=(5,) * 11), paper=PAPER, tiny=TINY)
register_model("fcdensenet103", FCDenseNet, FCDenseNetConfig(), paper=PAPER, tiny=TINY)
