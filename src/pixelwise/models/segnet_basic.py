"""SegNet-Basic: four 7x7 convolutions down, four up, the poolings' indices between them.

Paper:  Badrinarayanan, Kendall, Cipolla. SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation.
        PAMI 2017 (arXiv:1511.00561), section 3.1; layer by layer as in the authors' segnet_basic_train.prototxt.
Differs from the paper: convolutions have biases (the authors' files have them, the text has not); batch norm keeps running
        statistics, where the authors compute them anew over the training set after training. The local response
        normalisation works on the values it gets: the authors' 0 ... 255 it divides by 1 to 3.3, while images normalised
        to a deviation of about 1 it leaves nearly as they are.
Shapes: N batch, C channels, K classes, H W image size; poolings round up, so 360x480 becomes 23x30 and 360x480 again.
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from pixelwise.models.registry import check_fields, register_model
from pixelwise.ops.unpool import max_pool_keeping_indices, max_unpool

DEPTH = 4  # poolings
KERNEL = 7


@dataclass(frozen=True, kw_only=True)
class SegNetBasicConfig:
    """The fields of a SegNet-Basic; all its convolutions have `width` channels."""

    num_classes: int = 11
    in_channels: int = 3
    width: int = 64

    def __post_init__(self) -> None:
        check_fields("segnet_basic", self, "width")


class SegNetBasic(nn.Module):
    """SegNet-Basic; layers bear the names of the authors' release (conv1 ... conv4, conv_decode4 ... conv_decode1)."""

    stride = 2**DEPTH

    def __init__(self, config: SegNetBasicConfig) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.encoder = nn.ModuleList(
            _conv_norm(f"conv{level}", config.width if level > 1 else config.in_channels, config.width, relu=True)
            for level in range(1, DEPTH + 1)
        )
        self.decoder = nn.ModuleList(
            _conv_norm(f"conv_decode{level}", config.width, config.width, relu=False) for level in range(DEPTH, 0, -1)
        )
        self.conv_classifier = nn.Conv2d(config.width, config.num_classes, 1)
        self.apply(_init)

    def forward(self, image: Tensor) -> Tensor:
        x, places = self.norm(image), []
        for stage in self.encoder:
            size = x.shape[-2:]
            x, indices = max_pool_keeping_indices(stage(x))  # (N, 64, H/2, W/2) ... (N, 64, H/16, W/16)
            places.append((indices, size))
        for stage in self.decoder:
            x = stage(max_unpool(x, *places.pop()))  # (N, 64, H/8, W/8) ... (N, 64, H, W)
        return self.conv_classifier(x)  # (N, K, H, W)


def _conv_norm(name: str, channels: int, width: int, *, relu: bool) -> nn.Sequential:
    """A 7x7 convolution that keeps the size, batch norm and, in the encoder only, ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers[name] = nn.Conv2d(channels, width, KERNEL, padding=KERNEL // 2)
    layers[f"{name}_bn"] = nn.BatchNorm2d(width)
    if relu:
        layers[f"{name}_relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def _init(module: nn.Module) -> None:
    """The prototxt's fillers: `msra` (arXiv:1502.01852) for convolutions, 1 and 0.001 for scale and shift of the norms."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.bias, 0.001)


PAPER = "Badrinarayanan, Kendall, Cipolla. SegNet. PAMI 2017"
register_model("segnet_basic", SegNetBasic, SegNetBasicConfig(), paper=PAPER, tiny={"width": 6})
