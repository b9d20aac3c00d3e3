"""FCN: a classifier made convolutional, its scores enlarged and joined by those of finer layers; on three classifiers.

Paper:  Long, Shelhamer, Darrell. Fully Convolutional Networks for Semantic Segmentation. CVPR 2015 (arXiv:1411.4038).
        `FCN.forward` is figure 3 (FCN-32s, FCN-16s, FCN-8s), the other two are those of table 1; the geometry is that of
        the authors' release (shelhamer/fcn.berkeleyvision.org): 100 px of padding, poolings that round up, bilinear
        kernels, crops at 19 (32s), 5 and 27 (16s), 5, 9 and 31 (8s), 18 (AlexNet).
Differs from the paper: by default, the upsampling. The paper learns the inner upsampling layers, from a bilinear start, and
        fixes the last one (section 4.1): `upsampling="inner"`. The release, from which the best published scores come,
        fixes all of them, and so does the default, "fixed"; "learnt" learns all. Without a classifier's weights the
        convolutions start from He et al.'s Gaussian (the paper deems training from scratch infeasible); scores start at
        zero, as there. torchvision's and timm's AlexNet is another network than Caffe's, from which the authors start (64
        ... 256 channels, no groups, no normalisation across channels), and so is their GoogLeNet (batch norms, other
        kernels): their weights do not fit, and `classifiers` is empty.
FCN-GoogLeNet: on the network of Szegedy et al. Going Deeper with Convolutions. CVPR 2015 (arXiv:1409.4842), table 1, as the
        Caffe model zoo has it: no batch norm, normalisation across channels, poolings that round up. The paper prints no
        geometry for it, and the authors released none. Here it is made as theirs: without its average pooling, 100 px of
        padding, and the crop that puts the centre of a score on the centre of its receptive field. That centre lies at
        pixel -67 for the first score, so a kernel of 64x64 (centre 31.5) would need a crop at 98.5; as for AlexNet, whose
        windows are odd too, it is 63x63 (centre 31), and the crop is 98. The two auxiliary losses are left out, as there.
Shapes: N batch, C channels, K classes, H W image size; h w the grid of the coarsest scores: for 500 px it is 16 (21 in
        FCN-GoogLeNet).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from pixelwise.errors import UsageError
from pixelwise.models.registry import check_fields, register_model
from pixelwise.models.vgg_encoder import WIDTHS, check_widths, vgg16_weights
from pixelwise.ops.pooling import CeilMaxPool2d
from pixelwise.ops.resize import bilinear_upsampling, crop_like

Finest = Literal[8, 16, 32]
Upsampling = Literal["fixed", "inner", "learnt"]
OneStep = Literal["fixed", "learnt"]

PADDING_PX = 100  # of the first convolution: so that the 7x7 of fc6 finds room on an image of one pixel
ALEXNET_CROP = 18  # the centre of the first score's 63x63 kernel, 31, less that of its receptive field in the image, 13
GOOGLENET_CROP = 98
AT_ONCE = (0.01, 0.0001)  # what pool4 and pool3 are multiplied by where all three streams are trained at once


@dataclass(frozen=True, kw_only=True)
class FCNConfig:
    """The fields of an FCN; `finest` is the finest grid in pixels on which classes are scored (32, 16 or 8)."""

    num_classes: int = 21
    in_channels: int = 3
    finest: Finest = 8
    at_once: bool = False  # FCN-8s trained in one stage: pool4 and pool3 are scaled by `AT_ONCE` before their scores
    upsampling: Upsampling = "fixed"  # which layers are learnt: none, the inner ones (the paper), or all
    widths: tuple[int, ...] = WIDTHS
    head_width: int = 4096  # fc6 and fc7
    dropout: float = 0.5  # of single values, after fc6 and fc7

    def __post_init__(self) -> None:
        check_fields("fcn", self, "head_width")
        if self.at_once and self.finest != 8:
            raise UsageError(f"fcn: at_once must be False with finest={self.finest}: only FCN-8s is trained so.")
        check_widths("fcn", self.widths)


class FCN(nn.Module):
    """A VGG-16 without its last layer, scores on grids of 32, 16 and 8 px, fused coarse to fine.

    Layers bear the names of the authors' release, equal in all variants, so that the state of a coarser one starts a
    finer one: what that lacks, the new scores, begins at zero.
    """

    stride = 32
    classifiers = ("torchvision/vgg16",)

    def __init__(self, config: FCNConfig) -> None:
        super().__init__()
        self.finest, classes, (w1, w2, w3, w4, w5) = config.finest, config.num_classes, config.widths
        self.scale_pool4, self.scale_pool3 = AT_ONCE if config.at_once else (1.0, 1.0)
        self.conv1_1 = nn.Conv2d(config.in_channels, w1, 3, padding=PADDING_PX)
        self.conv1_2 = nn.Conv2d(w1, w1, 3, padding=1)
        self.conv2_1 = nn.Conv2d(w1, w2, 3, padding=1)
        self.conv2_2 = nn.Conv2d(w2, w2, 3, padding=1)
        self.conv3_1 = nn.Conv2d(w2, w3, 3, padding=1)
        self.conv3_2 = nn.Conv2d(w3, w3, 3, padding=1)
        self.conv3_3 = nn.Conv2d(w3, w3, 3, padding=1)
        self.conv4_1 = nn.Conv2d(w3, w4, 3, padding=1)
        self.conv4_2 = nn.Conv2d(w4, w4, 3, padding=1)
        self.conv4_3 = nn.Conv2d(w4, w4, 3, padding=1)
        self.conv5_1 = nn.Conv2d(w4, w5, 3, padding=1)
        self.conv5_2 = nn.Conv2d(w5, w5, 3, padding=1)
        self.conv5_3 = nn.Conv2d(w5, w5, 3, padding=1)
        self.pool = CeilMaxPool2d(2, 2)
        self.fc6 = nn.Conv2d(w5, config.head_width, 7)
        self.fc7 = nn.Conv2d(config.head_width, config.head_width, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.score_fr = nn.Conv2d(config.head_width, classes, 1)
        inner, last = config.upsampling != "fixed", config.upsampling == "learnt"
        if config.finest <= 16:
            self.upscore2 = bilinear_upsampling(classes, kernel=4, stride=2, learnt=inner)
            self.score_pool4 = nn.Conv2d(w4, classes, 1)
        if config.finest == 8:
            self.upscore_pool4 = bilinear_upsampling(classes, kernel=4, stride=2, learnt=inner)
            self.score_pool3 = nn.Conv2d(w3, classes, 1)
            self.upscore8 = bilinear_upsampling(classes, kernel=16, stride=8, learnt=last)
        elif config.finest == 16:
            self.upscore16 = bilinear_upsampling(classes, kernel=32, stride=16, learnt=last)
        else:
            self.upscore = bilinear_upsampling(classes, kernel=64, stride=32, learnt=last)
        _init_weights(self)

    def forward(self, image: Tensor) -> Tensor:
        pool3, pool4, pool5 = self.trunk(image)
        scores = self.score_fr(self.head(pool5))  # (N, K, h, w), a score every 32 px
        if self.finest == 32:
            return crop_like(self.upscore(scores), image, 19)  # (N, K, H, W)
        scores = self.upscore2(scores)  # (N, K, 2h + 2, 2w + 2), every 16 px
        scores = scores + crop_like(self.score_pool4(self.scale_pool4 * pool4), scores, 5)
        if self.finest == 16:
            return crop_like(self.upscore16(scores), image, 27)  # (N, K, H, W)
        scores = self.upscore_pool4(scores)  # (N, K, 4h + 6, 4w + 6), every 8 px
        scores = scores + crop_like(self.score_pool3(self.scale_pool3 * pool3), scores, 9)
        return crop_like(self.upscore8(scores), image, 31)  # (N, K, H, W)

    def trunk(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps after pool3, pool4 and pool5; with H' = H + 198 they measure H'/8 ... H'/32, rounded up each time."""
        x = relu(self.conv1_1(image), inplace=True)  # (N, 64, H', W')
        x = self.pool(relu(self.conv1_2(x), inplace=True))  # (N, 64, H'/2, W'/2)
        x = relu(self.conv2_1(x), inplace=True)
        x = self.pool(relu(self.conv2_2(x), inplace=True))  # (N, 128, H'/4, W'/4)
        x = relu(self.conv3_1(x), inplace=True)
        x = relu(self.conv3_2(x), inplace=True)
        pool3 = self.pool(relu(self.conv3_3(x), inplace=True))  # (N, 256, H'/8, W'/8)
        x = relu(self.conv4_1(pool3), inplace=True)
        x = relu(self.conv4_2(x), inplace=True)
        pool4 = self.pool(relu(self.conv4_3(x), inplace=True))  # (N, 512, H'/16, W'/16)
        x = relu(self.conv5_1(pool4), inplace=True)
        x = relu(self.conv5_2(x), inplace=True)
        pool5 = self.pool(relu(self.conv5_3(x), inplace=True))  # (N, 512, H'/32, W'/32)
        return pool3, pool4, pool5

    def head(self, pool5: Tensor) -> Tensor:
        """fc7 of every 7x7 window of pool5 (N, 512, h + 6, w + 6) -> (N, 4096, h, w)."""
        x = self.dropout(relu(self.fc6(pool5), inplace=True))  # (N, 4096, h, w)
        return self.dropout(relu(self.fc7(x), inplace=True))

    def weights_from_classifier(self, classifier: nn.Module) -> dict[str, Tensor]:
        """Entries for this state from a VGG-16 of any library: 13 convolutions, and two linear layers as fc6 and fc7.

        Layers are told by their order and shapes. The last one is left out: the scores start at zero.

        Raises:
            UsageError: it is no plain VGG-16, or its widths differ from this network's.
        """
        return vgg16_weights("fcn", self, ("conv", "fc"), classifier)


@dataclass(frozen=True, kw_only=True)
class FCNAlexNetConfig:
    """The fields of an FCN-AlexNet; `widths` are the channels of its five first convolutions, all even (two groups)."""

    num_classes: int = 21
    in_channels: int = 3
    upsampling: OneStep = "fixed"
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
        _init_weights(self)

    def forward(self, image: Tensor) -> Tensor:
        x = relu(self.conv1(image))  # (N, 96, H1, W1), H1 = floor((H + 189) / 4) + 1
        x = self.norm(self.pool(x))  # (N, 96, H1/2, W1/2)
        x = relu(self.conv2(x))  # (N, 256, H1/2, W1/2)
        x = self.norm(self.pool(x))  # (N, 256, H1/4, W1/4)
        x = relu(self.conv3(x))  # (N, 384, H1/4, W1/4)
        x = relu(self.conv4(x))
        x = self.pool(relu(self.conv5(x)))  # (N, 256, h + 5, w + 5)
        x = self.dropout(relu(self.fc6(x)))  # (N, 4096, h, w)
        x = self.dropout(relu(self.fc7(x)))
        scores = self.upscore(self.score_fr(x))  # (N, K, 32h + 31, 32w + 31)
        return crop_like(scores, image, ALEXNET_CROP)  # (N, K, H, W)


@dataclass(frozen=True, kw_only=True)
class FCNGoogLeNetConfig:
    """The fields of an FCN-GoogLeNet; `width` multiplies the channels of every layer."""

    num_classes: int = 21
    in_channels: int = 3
    upsampling: OneStep = "fixed"
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
        three = self.conv3x3(relu(self.conv3x3_reduce(x)))
        five = self.conv5x5(relu(self.conv5x5_reduce(x)))
        return relu(torch.cat([self.conv1x1(x), three, five, self.pool_proj(self.pool(x))], dim=1))


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
        _init_weights(self)

    def forward(self, image: Tensor) -> Tensor:
        x = relu(self.conv1(image))  # (N, 64, H1, W1), H1 = floor((H + 193) / 2) + 1
        x = self.norm(self.pool(x))  # (N, 64, H1/2, W1/2)
        x = relu(self.conv2(relu(self.conv2_reduce(x))))  # (N, 192, H1/2, W1/2)
        x = self.pool(self.norm(x))  # (N, 192, H1/4, W1/4)
        x = self.inception_3b(self.inception_3a(x))  # (N, 256, H1/4, W1/4), then (N, 480, H1/4, W1/4)
        x = self.inception_4a(self.pool(x))  # (N, 512, H1/8, W1/8)
        x = self.inception_4d(self.inception_4c(self.inception_4b(x)))  # (N, 528, H1/8, W1/8)
        x = self.inception_4e(x)  # (N, 832, H1/8, W1/8)
        x = self.inception_5b(self.inception_5a(self.pool(x)))  # (N, 832, h, w), then (N, 1024, h, w)
        scores = self.upscore(self.score_fr(self.dropout(x)))  # (N, K, 32h + 31, 32w + 31)
        return crop_like(scores, image, GOOGLENET_CROP)  # (N, K, H, W)


def _init_weights(model: nn.Module) -> None:
    """Scores at zero, as in the paper; other convolutions from a Gaussian of deviation sqrt(2 / fan in), biases zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.startswith("score"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


PAPER = "Long, Shelhamer, Darrell. Fully Convolutional Networks for Semantic Segmentation. CVPR 2015"
TINY = {"widths": (4, 6, 8, 8, 8), "head_width": 16}
register_model("fcn32s", FCN, FCNConfig(finest=32), paper=PAPER, tiny=TINY)
register_model("fcn16s", FCN, FCNConfig(finest=16), paper=PAPER, tiny=TINY)
register_model("fcn8s", FCN, FCNConfig(finest=8), paper=PAPER, tiny=TINY)
register_model("fcn8s_at_once", FCN, FCNConfig(finest=8, at_once=True), paper=PAPER, tiny=TINY)
register_model(
    "fcn_alexnet", FCNAlexNet, FCNAlexNetConfig(), paper=PAPER, tiny={"widths": (6, 8, 8, 8, 8), "head_width": 16}
)
register_model("fcn_googlenet", FCNGoogLeNet, FCNGoogLeNetConfig(), paper=PAPER, tiny={"width": 0.125})
