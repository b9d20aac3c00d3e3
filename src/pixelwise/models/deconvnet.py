"""DeconvNet: VGG-16 with its fully connected layers, and the same backwards, of transposed convolutions and unpooling.

Paper:  Noh, Hong, Han. Learning Deconvolution Network for Semantic Segmentation. ICCV 2015 (arXiv:1505.04366).
        `DeconvNet.forward` is figure 2, layer by layer as in the authors' DeconvNet_inference_deploy.prototxt.
Differs from the paper: it is defined for object proposals of 224x224 px, whose scores the authors join; here an image of any
        size goes through at once, padded to a multiple of 32 px and to at least 224, with fc6 and fc7 as convolutions.
        Batch norm keeps running statistics, where the authors compute them anew over the training set after training.
Shapes: N batch, C channels, K classes, H W size of the padded image; 224x224 becomes 7x7, 1x1, 7x7 and 224x224 again.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.models.registry import check_fields, register_model
from pixelwise.models.vgg_encoder import DEPTHS, WIDTHS, check_widths, vgg16_weights, vgg_encoder
from pixelwise.ops.pooling import max_pool_keeping_indices, max_unpool
from pixelwise.ops.resize import crop_like, has_known_size, pad_to_multiple

WINDOW = 7  # cells that fc6 sees at once
SMALLEST_PX = 224  # 32 * WINDOW: the paper's image size, of which fc6 sees all


@dataclass(frozen=True, kw_only=True)
class DeconvNetConfig:
    """The fields of a DeconvNet; `widths` are the channels of the encoder's five stages, finest first."""

    num_classes: int = 21
    in_channels: int = 3
    widths: tuple[int, ...] = WIDTHS
    head_width: int = 4096  # fc6 and fc7

    def __post_init__(self) -> None:
        check_widths("deconvnet", self.widths)
        check_fields("deconvnet", self, "head_width")


class DeconvNet(nn.Module):
    """DeconvNet; layers bear the names of the authors' release (conv1_1 ... fc7, fc6_deconv, deconv5_1 ... seg_score).

    Batch norm sees one value per image at fc6 and fc7 where the image is not larger than 224x224 px: batches of 8 or
    more, as the authors took, keep it meaningful, and a batch of one cannot be trained on.
    """

    stride = 32
    classifiers = ("torchvision/vgg16_bn", "torchvision/vgg16")

    def __init__(self, config: DeconvNetConfig) -> None:
        super().__init__()
        coarsest, head = config.widths[-1], config.head_width
        self.encoder = vgg_encoder(config.in_channels, config.widths)
        self.fc6 = _norm_relu(nn.Conv2d(coarsest, head, WINDOW))
        self.fc7 = _norm_relu(nn.Conv2d(head, head, 1))
        self.fc6_deconv = _norm_relu(nn.ConvTranspose2d(head, coarsest, WINDOW))
        self.decoder = nn.ModuleList(_decoder_stage(stage, config.widths) for stage in (5, 4, 3, 2, 1))
        self.seg_score = nn.Conv2d(config.widths[0], config.num_classes, 1)
        self.apply(_init)
        nn.init.normal_(self.seg_score.weight, std=0.01)

    def forward(self, image: Tensor) -> Tensor:
        x, places = pad_to_multiple(image, self.stride, at_least=SMALLEST_PX), []
        for stage in self.encoder:
            size = x.shape[-2:]
            x, indices = max_pool_keeping_indices(stage(x))  # (N, 64, H/2, W/2) ... (N, 512, H/32, W/32)
            places.append((indices, size))
        x = self.head(x)  # (N, 512, H/32, W/32)
        for stage in self.decoder:
            x = stage(max_unpool(x, *places.pop()))  # (N, 512, H/16, W/16) ... (N, 64, H, W)
        return crop_like(self.seg_score(x), image)  # (N, K, and the size of the image)

    def head(self, pool5: Tensor) -> Tensor:
        """fc6, fc7 and fc6-deconv: (N, 512, h, w) -> (N, 512, h, w) for h, w >= 7."""
        if has_known_size(pool5):
            x = self.fc7(self.fc6(pool5))  # (N, 4096, h - 6, w - 6)
            return self.fc6_deconv(x)  # (N, 512, h, w)
        # A graph for all sizes must not meet a side of 1, which h = 7 gives: one window more each way, emptied afterwards.
        height, width = pool5.shape[-2:]
        x = self.fc7(self.fc6(F.pad(pool5, (0, 1, 0, 1))))  # (N, 4096, h - 5, w - 5)
        is_row, is_column = (
            torch.arange(side - WINDOW + 2, device=x.device) < side - WINDOW + 1 for side in (height, width)
        )
        x = x * (is_row[:, None] & is_column).to(x)
        return self.fc6_deconv(x)[..., :height, :width]  # (N, 512, h, w)

    def weights_from_classifier(self, classifier: nn.Module) -> dict[str, Tensor]:
        """Entries for this state from a VGG-16: its convolutions and norms, and its first two linear layers as fc6, fc7.

        Raises:
            UsageError: the classifier is no VGG-16, or its widths are not these.
        """
        return vgg16_weights("deconvnet", self, ("encoder.", "fc6.0", "fc7.0"), classifier)


def _norm_relu(layer: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True))


def _decoder_stage(stage: int, widths: tuple[int, ...]) -> nn.Sequential:
    """As many 3x3 transposed convolutions as the encoder's stage has; the last narrows to the next finer stage's width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width, narrow = widths[stage - 1], widths[max(stage - 2, 0)]
    for index in range(1, DEPTHS[stage - 1] + 1):
        channels = narrow if index == DEPTHS[stage - 1] else width
        layers[f"deconv{stage}_{index}"] = nn.ConvTranspose2d(width, channels, 3, padding=1)
        layers[f"debn{stage}_{index}"] = nn.BatchNorm2d(channels)
        layers[f"derelu{stage}_{index}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def _init(module: nn.Module) -> None:
    """The prototxt's fillers: deviation 0.01 for the decoder, 1 and 0.001 for scale and shift of the norms.

    The encoder, which the authors take from VGG-16, starts as VGG's successors do (arXiv:1502.01852).
    """
    if isinstance(module, nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.01)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.bias, 0.001)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


PAPER = "Noh, Hong, Han. Learning Deconvolution Network for Semantic Segmentation. ICCV 2015"
TINY = {"widths": (4, 4, 6, 6, 8), "head_width": 16}
register_model("deconvnet", DeconvNet, DeconvNetConfig(), paper=PAPER, tiny=TINY)
