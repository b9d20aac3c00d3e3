"""LinkNet: a ResNet-18 and a decoder block per stage, joined by adding what went into each stage.

Paper:  Chaurasia, Culurciello. LinkNet: Exploiting Encoder Representations for Efficient Semantic Segmentation. VCIP 2017
        (arXiv:1707.03718). `LinkNet.forward` is figure 1, `decoder_block` figure 3; details from the authors' code: the sum
        of block and skip passes a ReLU, also at the outermost block, whose skip is the stem's map after its max pooling.
Differs from the paper: images whose sides are no multiples of 32 have their last row and column repeated; other ResNets are
        allowed as the encoder. The encoder starts from random weights unless pretrained ones are asked for (the authors
        started from ImageNet).
Scores: the "IoU" column of the authors' tables for this network is their class-average accuracy (69.1 on CamVid); the mean
        intersection over union is the column called iIoU (55.8).
Shapes: N batch, C channels, K classes, H W image size.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.backbones import create_backbone
from pixelwise.models.registry import check_fields, register_model
from pixelwise.ops.resize import crop_like, pad_to_multiple

EPSILON = 1e-3  # of batch norm in the decoder's blocks


@dataclass(frozen=True, kw_only=True)
class LinkNetConfig:
    """The fields of a LinkNet; `backbone` is a ResNet of timm or torchvision, `tail_width` the channels at stride 2."""

    num_classes: int = 11
    in_channels: int = 3
    backbone: str = "resnet18"
    tail_width: int = 32

    def __post_init__(self) -> None:
        check_fields("linknet", self, "tail_width")


def decoder_block(channels: int, width: int, stride: int) -> nn.Sequential:
    """Narrow to a quarter, enlarge by `stride` (1 or 2), widen: (N, channels, h, w) to (N, width, stride h, stride w)."""
    inner = max(channels // 4, 1)
    return nn.Sequential(
        nn.Conv2d(channels, inner, 1),
        *_norm_relu(inner),
        nn.ConvTranspose2d(inner, inner, 3, stride=stride, padding=1, output_padding=stride - 1),
        *_norm_relu(inner),
        nn.Conv2d(inner, width, 1),
        *_norm_relu(width),
    )


def _norm_relu(width: int, eps: float = EPSILON) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(width, eps=eps), nn.ReLU(inplace=True)


class LinkNet(nn.Module):
    """LinkNet on a ResNet."""

    def __init__(self, config: LinkNetConfig) -> None:
        super().__init__()
        self.encoder = create_backbone(config.backbone, in_channels=config.in_channels)
        parts = ("maxpool", "layer1", "layer2", "layer3", "layer4")
        if self.encoder.strides != [2, 4, 8, 16, 32] or not all(hasattr(self.encoder.body, part) for part in parts):
            raise UsageError(
                f"linknet: backbone must be a ResNet (a stem, a max pooling and four stages), not {config.backbone!r}. "
                "Use resnet18, resnet34 or resnet50; --model encoder_decoder takes any other."
            )
        self.stride = 32
        stem, *stages = self.encoder.channels
        # Stage i takes what stage i - 1 gives, the first one the pooled stem; each block goes back to its stage's input.
        steps = [*pairwise(stages[::-1]), (stages[0], stem)]
        self.decoder = nn.ModuleList(
            decoder_block(channels, width, stride)
            for (channels, width), stride in zip(steps, (2, 2, 2, 1), strict=True)
        )
        self.tail = nn.Sequential(
            nn.ConvTranspose2d(stem, config.tail_width, 3, stride=2, padding=1, output_padding=1),
            *_norm_relu(config.tail_width, eps=1e-5),  # the one norm that the authors left at the default
            nn.Conv2d(config.tail_width, config.tail_width, 3, padding=1),
            *_norm_relu(config.tail_width),
        )
        self.score = nn.ConvTranspose2d(config.tail_width, config.num_classes, 2, stride=2)
        for part in (self.decoder, self.tail, self.score):
            part.apply(_init_fan_out)

    def forward(self, image: Tensor) -> Tensor:
        stem, *stages = self.encoder(pad_to_multiple(image, self.stride))  # (N, 64, H/2, W/2) ... (N, 512, H/32, W/32)
        pooled = self.encoder.get_submodule("body.maxpool")(stem)  # (N, 64, H/4, W/4): what stage 1 takes
        x = stages[-1]
        for block, skip in zip(self.decoder, (*stages[-2::-1], pooled), strict=True):
            x = (block(x) + skip).relu()  # (N, 256, H/16, W/16) ... (N, 64, H/4, W/4), twice
        x = self.tail(x)  # (N, 32, H/2, W/2)
        return crop_like(self.score(x), image)  # (N, K, H, W)


def _init_fan_out(module: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / (kernel area * channels out)), as in the authors' code."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)


PAPER = "Chaurasia, Culurciello. LinkNet. VCIP 2017"
TINY = {"backbone": "test_resnet", "tail_width": 8}
register_model("linknet", LinkNet, LinkNetConfig(), paper=PAPER, tiny=TINY)
