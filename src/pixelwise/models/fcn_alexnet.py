"""FCN-AlexNet: AlexNet made convolutional, its scores enlarged in one step of 32.

Paper:  Long, Shelhamer, Darrell. Fully Convolutional Networks for Semantic Segmentation. CVPR 2015 (arXiv:1411.4038),
        table 1; the network is that of the authors' release (shelhamer/fcn.berkeleyvision.org): 100 px of padding,
        poolings that round up, a bilinear kernel of 63x63, crop at 18.
Differs from the paper: nothing in the network. Its weights start from He et al.'s Gaussian and the scores at zero, where
        the authors start from Caffe's AlexNet. torchvision's and timm's AlexNet is another network (64 ... 256 channels, no
        groups, no normalisation across channels), whose weights do not fit: `classifiers` is empty.
Shapes: N batch, C channels, K classes, H W image size; h w the coarsest grid: for 500 px it is 16.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.fcn import PADDING_PX, PAPER, init_weights
from pixelwise.models.registry import check_fields, register_model
from pixelwise.ops.pooling import CeilMaxPool2d
from pixelwise.ops.resize import crop_like
from pixelwise.ops.upsampling import bilinear_upsampling

Upsampling = Literal["fixed", "learnt"]
CROP = 18  # the centre of the first score's 63x63 kernel, 31, less that of its receptive field in the image, 13


@dataclass(frozen=True, kw_only=True)
class FCNAlexNetConfig:
    """The fields of an FCN-AlexNet; `widths` are the channels of its five first convolutions, all even (two groups)."""

    num_classes: int = 21
    in_channels: int = 3
    upsampling: Upsampling = "fixed"
    widths: tuple[int, ...] = (96, 256, 384, 384, 256)
    head_width: int = 4096  # fc6 and fc7
    dropout: float = 0.5  # of single values, after fc6 and fc7

    def __post_init__(self) -> None:
        check_fields("fcn_alexnet", self, "head_width")
        if len(self.widths) != 5 or min(self.widths) < 2 or any(width % 2 for width in self.widths):
            raise UsageError(f"fcn_alexnet: widths must be five even numbers of at least 2, not {self.widths}.")


class FCNAlexNet(nn.Module):
    """AlexNet's eight layers as convolutions, one score every 32 px, bilinear to the image."""

    stride = 32
    classifiers: tuple[str, ...] = ()

    def __init__(self, config: FCNAlexNetConfig) -> None:
        super().__init__()
        first, second, third, fourth, fifth = config.widths
        self.conv1 = nn.Conv2d(config.in_channels, first, 11, stride=4, padding=PADDING_PX)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.conv4 = nn.Conv2d(third, fourth, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(fourth, fifth, 3, padding=1, groups=2)
        self.fc6 = nn.Conv2d(fifth, config.head_width, 6)
        self.fc7 = nn.Conv2d(config.head_width, config.head_width, 1)
        self.score_fr = nn.Conv2d(config.head_width, config.num_classes, 1)
        self.pool = CeilMaxPool2d(3, 2)
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.dropout = nn.Dropout(config.dropout)
        learnt = config.upsampling == "learnt"
        self.upscore = bilinear_upsampling(config.num_classes, kernel=63, stride=32, learnt=learnt)
        init_weights(self)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.conv1(image))  # (N, 96, H1, W1), H1 = floor((H + 189) / 4) + 1
        x = self.norm(self.pool(x))  # (N, 96, H1/2, W1/2)
        x = F.relu(self.conv2(x))  # (N, 256, H1/2, W1/2)
        x = self.norm(self.pool(x))  # (N, 256, H1/4, W1/4)
        x = F.relu(self.conv3(x))  # (N, 384, H1/4, W1/4)
        x = F.relu(self.conv4(x))
        x = self.pool(F.relu(self.conv5(x)))  # (N, 256, h + 5, w + 5)
        x = self.dropout(F.relu(self.fc6(x)))  # (N, 4096, h, w)
        x = self.dropout(F.relu(self.fc7(x)))
        scores = self.upscore(self.score_fr(x))  # (N, K, 32h + 31, 32w + 31)
        return crop_like(scores, image, CROP)  # (N, K, H, W)


TINY = {"widths": (6, 8, 8, 8, 8), "head_width": 16}
register_model("fcn_alexnet", FCNAlexNet, FCNAlexNetConfig(), paper=PAPER, tiny=TINY)
