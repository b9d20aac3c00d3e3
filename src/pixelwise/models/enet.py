"""ENet: narrow bottlenecks that do most of their work at stride 8, and a short decoder that unpools.

Paper:  Paszke, Chaurasia, Kim, Culurciello. ENet: A Deep Neural Network Architecture for Real-Time Semantic Segmentation.
        2016 (arXiv:1606.02147). `ENet.forward` is table 1, the blocks are figure 2; which convolutions have a bias, and
        where dropout stands, are those of the authors' code. They train the encoder first, with a classifier at stride 8:
        `enet_encoder`.
Differs from the paper: images whose sides are no multiples of 8 have their last row and column repeated. Of images of other
        than 3 channels, up to three are pooled beside the initial convolution, which fills up to 16 maps. `enet_encoder`
        enlarges its scores bilinearly to the image (the authors shrink the labels; `score_grid` gives the scores as they
        are).
        Norms start at scale 1 (the authors' framework draws it between 0 and 1).
Scores: 68.3 on CamVid is class-average accuracy; the mean intersection over union is 51.3.
Shapes: N batch, C channels, K classes, H W image size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.registry import register_model
from pixelwise.ops.pooling import max_pool_keeping_indices, max_unpool
from pixelwise.ops.resize import crop_like, pad_to_multiple, upsample_to

STRIDE = 8
EPSILON = 1e-3  # of batch norm
SHALLOW = 5  # as many bottlenecks from the start have the lower share of dropout

Places = tuple[Tensor, torch.Size]  # where the maxima of a pooling stood, and the size of the map it pooled


@dataclass(frozen=True, kw_only=True)
class ENetConfig:
    """The fields of an ENet; `widths` are the channels at strides 2, 4 and 8, `dropout` is the share early and later."""

    num_classes: int = 11
    in_channels: int = 3
    widths: tuple[int, ...] = (16, 64, 128)
    dropout: tuple[float, ...] = (0.01, 0.1)

    def __post_init__(self) -> None:
        widths = self.widths
        if len(widths) != 3 or min(widths) < 4 or any(width % 4 for width in widths) or list(widths) != sorted(widths):
            raise UsageError(f"enet: widths must be three multiples of 4, none below the one before, not {widths}.")
        if len(self.dropout) != 2 or not all(0 <= share < 1 for share in self.dropout):
            raise UsageError(f"enet: dropout must be two shares of at least 0 and less than 1, not {self.dropout}.")


def regular(width: int) -> list[nn.Module]:
    """A 3x3 convolution."""
    return [nn.Conv2d(width, width, 3, padding=1)]


def dilated(dilation: int) -> Callable[[int], list[nn.Module]]:
    """A 3x3 convolution whose taps stand `dilation` cells apart."""
    return lambda width: [nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)]


def asymmetric(width: int) -> list[nn.Module]:
    """A 5x5 convolution as a row and a column of 5."""
    return [
        nn.Conv2d(width, width, (1, 5), padding=(0, 2), bias=False),
        nn.Conv2d(width, width, (5, 1), padding=(2, 0)),
    ]


def enlarging(width: int) -> list[nn.Module]:
    """A transposed 3x3 convolution that doubles height and width."""
    return [nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1)]


# Stages 2 and 3 of table 1, each this once.
CONTEXT = (regular, dilated(2), asymmetric, dilated(4), regular, dilated(8), asymmetric, dilated(16))


def relu(_width: int) -> nn.Module:
    """The decoder's activation."""
    return nn.ReLU(inplace=True)


def branch(
    channels: int,
    width: int,
    middle: Callable[[int], list[nn.Module]],
    *,
    activation: Callable[[int], nn.Module] = nn.PReLU,
    dropout: float = 0.0,
    step: int = 1,
) -> nn.Sequential:
    """The convolving side of a bottleneck: narrow to a quarter of `width` (by 2x2 at `step` 2), `middle`, widen."""
    inner = width // 4
    return nn.Sequential(
        nn.Conv2d(channels, inner, step, stride=step, bias=False),
        _norm(inner),
        activation(inner),
        *middle(inner),
        _norm(inner),
        activation(inner),
        nn.Conv2d(inner, width, 1, bias=False),
        _norm(width),
        *([nn.Dropout2d(dropout)] if dropout else []),
    )


def _norm(width: int) -> nn.Module:
    return nn.BatchNorm2d(width, eps=EPSILON)


class Bottleneck(nn.Module):
    """A branch beside the identity: (N, width, h, w) to the same."""

    def __init__(
        self,
        width: int,
        middle: Callable[[int], list[nn.Module]] = regular,
        *,
        activation: Callable[[int], nn.Module] = nn.PReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.branch = branch(width, width, middle, activation=activation, dropout=dropout)
        self.activation = activation(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + x)


class DownBottleneck(nn.Module):
    """A strided branch beside max pooling and maps of zeros: (N, channels, h, w) to (N, width, h/2, w/2)."""

    def __init__(self, channels: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.missing = width - channels
        self.branch = branch(channels, width, regular, dropout=dropout, step=2)
        self.activation = nn.PReLU(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Places]:
        maxima, indices = max_pool_keeping_indices(x, 2)
        shortcut = F.pad(maxima, (0, 0, 0, 0, 0, self.missing))
        return self.activation(self.branch(x) + shortcut), (indices, x.shape[-2:])


class UpBottleneck(nn.Module):
    """An enlarging branch beside unpooling: (N, channels, h, w) to (N, width, 2h, 2w)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.branch = branch(channels, width, enlarging, activation=relu)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), _norm(width))

    def forward(self, x: Tensor, places: Places) -> Tensor:
        return (self.branch(x) + max_unpool(self.shortcut(x), *places)).relu()


class InitialBlock(nn.Module):
    """A strided convolution beside the pooled image, 16 maps together: (N, C, H, W) to (N, 16, H/2, W/2) (figure 2a)."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.pooled = min(in_channels, 3)
        self.conv = nn.Conv2d(in_channels, width - self.pooled, 3, stride=2, padding=1)
        self.norm, self.activation = _norm(width), nn.PReLU(width)

    def forward(self, image: Tensor) -> Tensor:
        maps = [self.conv(image), F.max_pool2d(image[:, : self.pooled], 2)]
        return self.activation(self.norm(torch.cat(maps, dim=1)))


class Encoder(nn.Module):
    """Image (N, C, H, W), sides multiples of 8, to features (N, 128, H/8, W/8) and the places of two poolings."""

    def __init__(self, config: ENetConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.widths
        early, late = config.dropout
        self.initial = InitialBlock(config.in_channels, fine)
        self.down1 = DownBottleneck(fine, middle, dropout=early)
        self.stage1 = nn.Sequential(*(Bottleneck(middle, dropout=early) for _ in range(SHALLOW - 1)))
        self.down2 = DownBottleneck(middle, coarse, dropout=late)
        self.stage2 = nn.Sequential(*(Bottleneck(coarse, kind, dropout=late) for kind in CONTEXT))
        self.stage3 = nn.Sequential(*(Bottleneck(coarse, kind, dropout=late) for kind in CONTEXT))

    def forward(self, image: Tensor) -> tuple[Tensor, list[Places]]:
        x = self.initial(image)  # (N, 16, H/2, W/2)
        x, first = self.down1(x)  # (N, 64, H/4, W/4)
        x, second = self.down2(self.stage1(x))  # (N, 128, H/8, W/8)
        return self.stage3(self.stage2(x)), [first, second]


class ENet(nn.Module):
    """The encoder and the decoder that unpools."""

    stride = STRIDE

    def __init__(self, config: ENetConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.widths
        self.encoder = Encoder(config)
        self.up4 = UpBottleneck(coarse, middle)
        self.stage4 = nn.Sequential(*(Bottleneck(middle, activation=relu) for _ in range(2)))
        self.up5 = UpBottleneck(middle, fine)
        self.stage5 = Bottleneck(fine, activation=relu)
        self.score = nn.ConvTranspose2d(fine, config.num_classes, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        x, (first, second) = self.encoder(pad_to_multiple(image, STRIDE))  # (N, 128, H/8, W/8)
        x = self.stage4(self.up4(x, second))  # (N, 64, H/4, W/4)
        x = self.stage5(self.up5(x, first))  # (N, 16, H/2, W/2)
        return crop_like(self.score(x), image)  # (N, K, H, W)


class ENetEncoder(nn.Module):
    """The encoder with a classifier at stride 8: what is trained first; its `encoder` then starts an `ENet`."""

    stride = STRIDE

    def __init__(self, config: ENetConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.classifier = nn.Conv2d(config.widths[-1], config.num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        scores = self.score_grid(image)  # (N, K, H/8, W/8)
        rows, columns = scores.shape[-2:]
        return crop_like(upsample_to(scores, (STRIDE * rows, STRIDE * columns)), image)  # (N, K, H, W)

    def score_grid(self, image: Tensor) -> Tensor:
        """The scores of each cell of 8x8 pixels: (N, K, ceil(H / 8), ceil(W / 8))."""
        features, _ = self.encoder(pad_to_multiple(image, STRIDE))
        return self.classifier(features)


PAPER = "Paszke, Chaurasia, Kim, Culurciello. ENet. 2016 (arXiv:1606.02147)"
register_model("enet", ENet, ENetConfig(), paper=PAPER, tiny={"widths": (8, 16, 24)})
register_model("enet_encoder", ENetEncoder, ENetConfig(), paper=PAPER, tiny={"widths": (8, 16, 24)})
