"""FCN-GoogLeNet: GoogLeNet without its average pooling, a 1x1 score, enlarged in one step of 32.

Paper:  Long, Shelhamer, Darrell. Fully Convolutional Networks for Semantic Segmentation. CVPR 2015 (arXiv:1411.4038),
        table 1, on the network of Szegedy et al. Going Deeper with Convolutions. CVPR 2015 (arXiv:1409.4842), table 1, as
        the Caffe model zoo has it: no batch norm, normalisation across channels, poolings that round up.
Differs from the paper: it prints no geometry for this network, and the authors released none. Here it is made as theirs:
        100 px of padding, and the crop that puts the centre of a score on the centre of its receptive field. That centre
        lies at pixel -67 for the first score, so a kernel of 64x64 (centre 31.5) would need a crop at 98.5; as for AlexNet,
        whose windows are odd too, it is 63x63 (centre 31), and the crop is 98. Weights start from He et al.'s Gaussian and
        the scores at zero, where the authors start from Caffe's GoogLeNet; torchvision's has batch norms and other
        kernels, so its weights do not fit: `classifiers` is empty. The two auxiliary losses are left out, as in the paper.
Shapes: N batch, C channels, K classes, H W image size; h w the coarsest grid: for 500 px it is 21.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.fcn import PADDING_PX, PAPER, init_weights
from pixelwise.models.registry import check_fields, register_model
from pixelwise.ops.pooling import CeilMaxPool2d
from pixelwise.ops.resize import crop_like
from pixelwise.ops.upsampling import bilinear_upsampling

Upsampling = Literal["fixed", "learnt"]
CROP = 98


@dataclass(frozen=True, kw_only=True)
class FCNGoogLeNetConfig:
    """The fields of an FCN-GoogLeNet; `width` multiplies the channels of every layer."""

    num_classes: int = 21
    in_channels: int = 3
    upsampling: Upsampling = "fixed"
    width: float = 1.0
    dropout: float = 0.4  # of single values, before the score

    def __post_init__(self) -> None:
        check_fields("fcn_googlenet", self)
        if not 0 < self.width < float("inf"):
            raise UsageError(f"fcn_googlenet: width must be more than 0, not {self.width}.")


class Inception(nn.Module):
    """Four views of a map, concatenated: 1x1, 3x3 and 5x5 convolutions, and 3x3 max pooling; a ReLU after each.

    `widths`: of the 1x1, of the 3x3 and the 5x5 with the 1x1 that narrows before each, of the 1x1 after pooling.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, three_reduce, three, five_reduce, five, pooled = widths
        self.conv1x1 = nn.Conv2d(channels, one, 1)
        self.conv3x3_reduce = nn.Conv2d(channels, three_reduce, 1)
        self.conv3x3 = nn.Conv2d(three_reduce, three, 3, padding=1)
        self.conv5x5_reduce = nn.Conv2d(channels, five_reduce, 1)
        self.conv5x5 = nn.Conv2d(five_reduce, five, 5, padding=2)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.pool_proj = nn.Conv2d(channels, pooled, 1)
        self.channels = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        three = self.conv3x3(F.relu(self.conv3x3_reduce(x)))
        five = self.conv5x5(F.relu(self.conv5x5_reduce(x)))
        return F.relu(torch.cat([self.conv1x1(x), three, five, self.pool_proj(self.pool(x))], dim=1))


class FCNGoogLeNet(nn.Module):
    """GoogLeNet's 22 layers with weights, one score every 32 px, bilinear to the image."""

    stride = 32
    classifiers: tuple[str, ...] = ()

    def __init__(self, config: FCNGoogLeNetConfig) -> None:
        super().__init__()

        def wide(*channels: int) -> tuple[int, ...]:
            return tuple(max(1, round(item * config.width)) for item in channels)

        def inception(before: Inception, *widths: int) -> Inception:
            return Inception(before.channels, wide(*widths))

        (narrow, channels) = wide(64, 192)
        self.conv1 = nn.Conv2d(config.in_channels, narrow, 7, stride=2, padding=PADDING_PX)
        self.conv2_reduce = nn.Conv2d(narrow, narrow, 1)
        self.conv2 = nn.Conv2d(narrow, channels, 3, padding=1)
        self.pool = CeilMaxPool2d(3, 2)
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.inception_3a = Inception(channels, wide(64, 96, 128, 16, 32, 32))
        self.inception_3b = inception(self.inception_3a, 128, 128, 192, 32, 96, 64)
        self.inception_4a = inception(self.inception_3b, 192, 96, 208, 16, 48, 64)
        self.inception_4b = inception(self.inception_4a, 160, 112, 224, 24, 64, 64)
        self.inception_4c = inception(self.inception_4b, 128, 128, 256, 24, 64, 64)
        self.inception_4d = inception(self.inception_4c, 112, 144, 288, 32, 64, 64)
        self.inception_4e = inception(self.inception_4d, 256, 160, 320, 32, 128, 128)
        self.inception_5a = inception(self.inception_4e, 256, 160, 320, 32, 128, 128)
        self.inception_5b = inception(self.inception_5a, 384, 192, 384, 48, 128, 128)
        self.dropout = nn.Dropout(config.dropout)
        self.score_fr = nn.Conv2d(self.inception_5b.channels, config.num_classes, 1)
        learnt = config.upsampling == "learnt"
        self.upscore = bilinear_upsampling(config.num_classes, kernel=63, stride=32, learnt=learnt)
        init_weights(self)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.conv1(image))  # (N, 64, H1, W1), H1 = floor((H + 193) / 2) + 1
        x = self.norm(self.pool(x))  # (N, 64, H1/2, W1/2)
        x = F.relu(self.conv2(F.relu(self.conv2_reduce(x))))  # (N, 192, H1/2, W1/2)
        x = self.pool(self.norm(x))  # (N, 192, H1/4, W1/4)
        x = self.inception_3b(self.inception_3a(x))  # (N, 256, H1/4, W1/4), then (N, 480, H1/4, W1/4)
        x = self.inception_4a(self.pool(x))  # (N, 512, H1/8, W1/8)
        x = self.inception_4d(self.inception_4c(self.inception_4b(x)))  # (N, 528, H1/8, W1/8)
        x = self.inception_4e(x)  # (N, 832, H1/8, W1/8)
        x = self.inception_5b(self.inception_5a(self.pool(x)))  # (N, 832, h, w), then (N, 1024, h, w)
        scores = self.upscore(self.score_fr(self.dropout(x)))  # (N, K, 32h + 31, 32w + 31)
        return crop_like(scores, image, CROP)  # (N, K, H, W)


register_model("fcn_googlenet", FCNGoogLeNet, FCNGoogLeNetConfig(), paper=PAPER, tiny={"width": 0.125})
