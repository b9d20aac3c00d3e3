"""SegNet: the encoder of VGG-16, and a decoder that puts its maxima back where the poolings took them.

Paper:  Badrinarayanan, Kendall, Cipolla. SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation.
        PAMI 2017 (arXiv:1511.00561). `SegNet.forward` is figure 2, layer by layer as in the authors' segnet_train.prototxt.
Differs from the paper: no local contrast normalisation of the image (the authors' files have none either); batch norm keeps
        running statistics, where the authors compute them anew over the training set after training.
Shapes: N batch, C channels, K classes, H W image size; poolings round up, so 360x480 becomes 12x15 and 360x480 again.
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from pixelwise.models.registry import register_model
from pixelwise.models.vgg_encoder import DEPTHS, WIDTHS, check_widths, encoder_weights, vgg_encoder
from pixelwise.ops.unpool import max_pool_keeping_indices, max_unpool


@dataclass(frozen=True, kw_only=True)
class SegNetConfig:
    """The fields of a SegNet; `widths` are the channels of the encoder's five stages, finest first."""

    num_classes: int = 11
    in_channels: int = 3
    widths: tuple[int, ...] = WIDTHS

    def __post_init__(self) -> None:
        check_widths("segnet", self.widths)


class SegNet(nn.Module):
    """SegNet; layers bear the names of the authors' release (conv1_1 ... conv5_3, conv5_3_D ... conv1_1_D)."""

    stride = 32
    classifiers = ("torchvision/vgg16_bn", "torchvision/vgg16")

    def __init__(self, config: SegNetConfig) -> None:
        super().__init__()
        self.encoder = vgg_encoder(config.in_channels, config.widths)
        self.decoder = nn.ModuleList(_decoder_stage(stage, config) for stage in (5, 4, 3, 2, 1))
        self.apply(init_msra)

    def forward(self, image: Tensor) -> Tensor:
        x, places = image, []
        for stage in self.encoder:
            size = x.shape[-2:]
            x, indices = max_pool_keeping_indices(stage(x))  # (N, 64, H/2, W/2) ... (N, 512, H/32, W/32)
            places.append((indices, size))
        for stage in self.decoder:
            x = stage(max_unpool(x, *places.pop()))  # (N, 512, H/16, W/16) ... (N, 64, H/2, W/2), (N, K, H, W)
        return x

    def weights_from_classifier(self, classifier: nn.Module) -> dict[str, Tensor]:
        """Entries for this state from a VGG-16: the encoder's convolutions and, of one with batch norm, its norms.

        Raises:
            UsageError: the classifier is no VGG-16, or its widths are not these.
        """
        return encoder_weights("segnet", self.encoder, classifier)


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


def init_msra(module: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / fan in), biases at zero (the prototxts' `msra`; arXiv:1502.01852)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


PAPER = "Badrinarayanan, Kendall, Cipolla. SegNet. PAMI 2017"
register_model("segnet", SegNet, SegNetConfig(), paper=PAPER, tiny={"widths": (8, 8, 12, 12, 12)})
