"""FCN-32s, FCN-16s and FCN-8s: a classifier made convolutional, its scores enlarged and joined by those of finer layers.

Paper:  Long, Shelhamer, Darrell. Fully Convolutional Networks for Semantic Segmentation. CVPR 2015 (arXiv:1411.4038).
        `FCN.forward` is figure 3; the geometry is that of the authors' release (shelhamer/fcn.berkeleyvision.org):
        100 px of padding, poolings that round up, crops at 19 (32s), 5 and 27 (16s), 5, 9 and 31 (8s).
Differs from the paper: by default, the upsampling. The paper learns the inner upsampling layers, from a bilinear start, and
        fixes the last one (section 4.1): `upsampling="inner"`. The release, from which the best published scores come,
        fixes all of them, and so does the default, "fixed"; "learnt" learns all. Without a classifier's weights the
        convolutions start from He et al.'s Gaussian (the paper deems training from scratch infeasible); scores start at
        zero, as there.
Shapes: N batch, C channels, K classes, H W image size; h w the grid of the coarsest scores: for 500 px it is 16.
"""

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn
from torch.nn.functional import relu

from pixelwise.errors import UsageError
from pixelwise.models.backbones import adapt_first_conv
from pixelwise.models.registry import check_fields, register_model
from pixelwise.models.vgg_encoder import DEPTHS, WIDTHS, check_shape, check_widths
from pixelwise.ops.convolutionalize import convolutionalize
from pixelwise.ops.pooling import CeilMaxPool2d
from pixelwise.ops.resize import crop_like
from pixelwise.ops.upsampling import bilinear_upsampling

Finest = Literal[8, 16, 32]
Upsampling = Literal["fixed", "inner", "learnt"]

PADDING_PX = 100  # of the first convolution: so that the 7x7 of fc6 finds room on an image of one pixel
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
        init_weights(self)

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
        paths, dense = _vgg16_layers(classifier), dict(convolutionalize(classifier).named_modules())
        layers = [(name, layer) for name, layer in self.named_children() if name.startswith(("conv", "fc"))]
        state: dict[str, Tensor] = {}
        for (name, layer), path in zip(layers, paths[:-1], strict=True):
            own, given = cast(nn.Conv2d, layer), cast(nn.Conv2d, dense[path])
            weight = given.weight.detach()
            if name == "conv1_1" and weight.shape[1] == 3 != own.in_channels:
                weight = adapt_first_conv(weight, own.in_channels)
            check_shape("fcn", f"{name}.weight", own.weight, weight)
            state |= {f"{name}.weight": weight, f"{name}.bias": cast(Tensor, given.bias).detach()}
        return state


def _vgg16_layers(classifier: nn.Module) -> list[str]:
    """The paths of the 16 layers with weights of a VGG-16, in order."""
    paths, order = [], ""
    for path, module in classifier.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            paths.append(path)
            order += "c"
        elif isinstance(module, nn.MaxPool2d):
            order += "p"
        elif any(True for _ in module.parameters(recurse=False)):
            order += "?"
    if order != "".join("c" * count + "p" for count in DEPTHS) + "ccc":
        raise UsageError(
            f"fcn: its trunk is a VGG-16 without batch norm (13 convolutions, 5 max poolings, 3 linear layers), and the "
            f"{type(classifier).__name__} given is another network. Pass torchvision's vgg16."
        )
    return paths


def init_weights(model: nn.Module) -> None:
    """Scores at zero, as in the paper; other convolutions from a Gaussian of deviation sqrt(2 / fan in), biases zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.startswith("score"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


PAPER = "Long, Shelhamer, Darrell. Fully Convolutional Networks for Semantic Segmentation. CVPR 2015"
TINY = {"widths": (4, 6, 8, 8, 8), "head_width": 16}
register_model("fcn32s", FCN, FCNConfig(finest=32), paper=PAPER, tiny=TINY)
register_model("fcn16s", FCN, FCNConfig(finest=16), paper=PAPER, tiny=TINY)
register_model("fcn8s", FCN, FCNConfig(finest=8), paper=PAPER, tiny=TINY)
register_model("fcn8s_at_once", FCN, FCNConfig(finest=8, at_once=True), paper=PAPER, tiny=TINY)
