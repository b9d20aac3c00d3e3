"""SegNet and SegNet-Basic: an encoder, and a decoder that puts its maxima back where the poolings took them.

Paper:  Badrinarayanan, Kendall, Cipolla. SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation.
        PAMI 2017 (arXiv:1511.00561). `SegNet` is figure 2, layer by layer as in the authors' segnet_train.prototxt, on the
        encoder of VGG-16; `SegNetBasic` is section 3.1 and segnet_basic_train.prototxt, four 7x7 convolutions down, four up.
Differs from the paper: batch norm keeps running statistics, where the authors compute them anew over the training set after
        training. SegNet has no local contrast normalisation of the image (the authors' files have none either). The
        convolutions of SegNet-Basic have biases (the authors' files have them, the text has not); its local response
        normalisation works on the values it gets: the authors' 0 ... 255 it divides by 1 to 3.3, while images normalised to
        a deviation of about 1 it leaves nearly as they are.
Shapes: N batch, C channels, K classes, H W image size; poolings round up, so 360x480 becomes 12x15 (23x30 in SegNet-Basic)
        and 360x480 again.
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from pixelwise.models.registry import check_fields, register_model
from pixelwise.models.vgg_encoder import DEPTHS, WIDTHS, check_widths, vgg16_weights, vgg_encoder
from pixelwise.ops.pooling import max_pool_keeping_indices, max_unpool

BASIC_DEPTH = 4  # poolings
BASIC_KERNEL = 7


class Unpooling(nn.Module):
    """What both networks do: pool after each stage of the encoder, unpool before each stage of the decoder."""

    encoder: nn.ModuleList
    decoder: nn.ModuleList

    def down_and_up(self, x: Tensor) -> Tensor:
        """All stages, with the widths of SegNet: (N, C, H, W) -> (N, K, H, W)."""
        places = []
        for level, stage in enumerate(self.encoder, start=1):
            size = x.shape[-2:]
            x, indices = max_pool_keeping_indices(stage(x))  # (N, 64, H/2, W/2) ... (N, 512, H/32, W/32)
            x = self.drop(x, level)
            places.append((indices, size))
        for level, stage in zip(range(len(places), 0, -1), self.decoder, strict=True):
            x = stage(max_unpool(x, *places.pop()))  # (N, 512, H/16, W/16) ... (N, 64, H/2, W/2), (N, K, H, W)
            x = self.drop(x, level)
        return x

    def drop(self, x: Tensor, level: int) -> Tensor:
        """Where Bayesian SegNet has dropout."""
        return x


@dataclass(frozen=True, kw_only=True)
class SegNetConfig:
    """The fields of a SegNet; `widths` are the channels of the encoder's five stages, finest first."""

    num_classes: int = 11
    in_channels: int = 3
    widths: tuple[int, ...] = WIDTHS

    def __post_init__(self) -> None:
        check_widths("segnet", self.widths)


class SegNet(Unpooling):
    """SegNet; layers bear the names of the authors' release (conv1_1 ... conv5_3, conv5_3_D ... conv1_1_D)."""

    stride = 32
    classifiers = ("torchvision/vgg16_bn", "torchvision/vgg16")

    def __init__(self, config: SegNetConfig) -> None:
        super().__init__()
        self.encoder = vgg_encoder(config.in_channels, config.widths)
        self.decoder = nn.ModuleList(_decoder_stage(stage, config) for stage in (5, 4, 3, 2, 1))
        self.apply(_init_msra)

    def forward(self, image: Tensor) -> Tensor:
        return self.down_and_up(image)  # (N, K, H, W)

    def weights_from_classifier(self, classifier: nn.Module) -> dict[str, Tensor]:
        """Entries for this state from a VGG-16: the encoder's convolutions and, of one with batch norm, its norms.

        Raises:
            UsageError: the classifier is no VGG-16, or its widths are not these.
        """
        return vgg16_weights("segnet", self, ("encoder.",), classifier)


def _decoder_stage(stage: int, config: SegNetConfig) -> nn.Sequential:
    """The encoder's stage backwards: conv5_3_D, conv5_2_D, conv5_1_D; the last one narrows to the next finer stage.

    Of stage 1 it gives the classes, and has neither batch norm nor ReLU.
    """
    width = config.widths[stage - 1]
    narrow = config.widths[stage - 2] if stage > 1 else config.num_classes
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(DEPTHS[stage - 1], 0, -1):
        channels = narrow if index == 1 else width
        layers[f"conv{stage}_{index}_D"] = nn.Conv2d(width, channels, 3, padding=1)
        if (stage, index) != (1, 1):
            layers[f"bn{stage}_{index}_D"] = nn.BatchNorm2d(channels)
            layers[f"relu{stage}_{index}_D"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


@dataclass(frozen=True, kw_only=True)
class SegNetBasicConfig:
    """The fields of a SegNet-Basic; all its convolutions have `width` channels."""

    num_classes: int = 11
    in_channels: int = 3
    width: int = 64

    def __post_init__(self) -> None:
        check_fields("segnet_basic", self, "width")


class SegNetBasic(Unpooling):
    """SegNet-Basic; layers bear the names of the authors' release (conv1 ... conv4, conv_decode4 ... conv_decode1)."""

    stride = 2**BASIC_DEPTH

    def __init__(self, config: SegNetBasicConfig) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.encoder = nn.ModuleList(
            _conv_norm(f"conv{level}", config.width if level > 1 else config.in_channels, config.width, relu=True)
            for level in range(1, BASIC_DEPTH + 1)
        )
        self.decoder = nn.ModuleList(
            _conv_norm(f"conv_decode{level}", config.width, config.width, relu=False)
            for level in range(BASIC_DEPTH, 0, -1)
        )
        self.conv_classifier = nn.Conv2d(config.width, config.num_classes, 1)
        self.apply(_init_msra)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 0.001)

    def forward(self, image: Tensor) -> Tensor:
        x = self.down_and_up(self.norm(image))  # (N, 64, H, W)
        return self.conv_classifier(x)  # (N, K, H, W)


def _conv_norm(name: str, channels: int, width: int, *, relu: bool) -> nn.Sequential:
    """A 7x7 convolution that keeps the size, batch norm and, in the encoder only, ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers[name] = nn.Conv2d(channels, width, BASIC_KERNEL, padding=BASIC_KERNEL // 2)
    layers[f"{name}_bn"] = nn.BatchNorm2d(width)
    if relu:
        layers[f"{name}_relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def _init_msra(module: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / fan in), biases at zero (the prototxts' `msra`; arXiv:1502.01852)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


PAPER = "Badrinarayanan, Kendall, Cipolla. SegNet. PAMI 2017"
register_model("segnet", SegNet, SegNetConfig(), paper=PAPER, tiny={"widths": (8, 8, 12, 12, 12)})
register_model("segnet_basic", SegNetBasic, SegNetBasicConfig(), paper=PAPER, tiny={"width": 6})
