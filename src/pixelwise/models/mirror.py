"""Any classification network as the encoder, flipped: its decoder is its mirror image.

Paper:  no single one. SegNet (arXiv:1511.00561) and DeconvNet (arXiv:1505.04366) flipped VGG-16, LinkNet (arXiv:1707.03718)
        the outline of ResNet-18; this flips convolutional classifiers of timm and torchvision. The rule stands at the top of
        `mirror_decoder.py`, and `Mirror.reflection()` lists what became of which part.
Differs from the papers: `backbone="vgg16_bn", skip="none"` is SegNet, layer by layer. LinkNet's decoder blocks are lighter
        than the residual blocks of its encoder; here, they are the same.
Skips join the decoder's map at the place, width and size of the encoder's: "add" adds it (LinkNet); "concat" stacks it, and
        the next convolution takes both (U-Net, arXiv:1505.04597) if it is a plain one, else a 3x3 convolution with the
        trunk's norm and activation does first; "reduce" stacks it and returns to the width by a 1x1 convolution.
Shapes: N batch, C channels, K classes, H W image size.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate, groupby, takewhile
from typing import Literal

import torch
from torch import Tensor, nn

from pixelwise.models.backbones import PROBE_PX, create_backbone, create_trunk, smallest_px
from pixelwise.models.mirror_chain import Chain, Part
from pixelwise.models.mirror_decoder import Level, at_width, has_width, plan
from pixelwise.models.registry import check_fields, register_model
from pixelwise.ops.pooling import MaxPoolKeepingIndices
from pixelwise.ops.resize import crop_like, pad_to_multiple

Skip = Literal["none", "add", "concat", "reduce"]
Up = Literal["unpool", "transposed"]
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, kw_only=True)
class MirrorConfig:
    """The fields of a mirrored network."""

    num_classes: int = 2
    in_channels: int = 3
    backbone: str = "resnet18"
    skip: Skip = "add"
    up: Up = "unpool"  # of max pooling whose windows do not overlap; other poolings are always transposed convolutions

    def __post_init__(self) -> None:
        check_fields("mirror", self)


class Join(nn.Module):
    """Where the encoder's map of the same place meets the decoder's."""

    def __init__(self, skip: Skip, mix: nn.Module | None) -> None:
        super().__init__()
        self.skip, self.mix = skip, mix

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.skip == "none":
            return x
        if self.skip == "add":
            return skip + x  # in this order, the graph of an exported AlexNet takes all sizes
        both = torch.cat([x, skip], dim=1)  # (N, 2 channels, h, w)
        return both if self.mix is None else self.mix(both)


@dataclass(frozen=True)
class Row:
    """A part of the encoder and its mirror image; prints as one line."""

    encoder: str  # path of the part in the encoder
    kind: str  # its class
    decoder: str  # what stands for it in the decoder
    channels: tuple[int, int]  # in and out, in the encoder
    back: tuple[int, int]  # in and out, in the decoder
    stride: int  # by how much the encoder's part shrinks the map, and the decoder's enlarges it

    def __str__(self) -> str:
        there, back = (f"{before:>4} -> {after:<4}" for before, after in (self.channels, self.back))
        return f"{self.encoder:<24} {self.kind:<22} {there} 1/{self.stride} | {self.decoder:<34} {back} x{self.stride}"


class Mirror(nn.Module):
    """A trunk and its mirror image, which takes its last map back to the image's size, a level for each of its maps."""

    def __init__(self, config: MirrorConfig) -> None:
        super().__init__()
        self.encoder = create_backbone(config.backbone, in_channels=config.in_channels)
        self.stride = max(self.encoder.strides)
        trunk = create_trunk(config.backbone, in_channels=config.in_channels)
        levels = zip(self.encoder.channels, self.encoder.strides, strict=True)
        chain = Chain(trunk, (config.in_channels, PROBE_PX, 2 * PROBE_PX), config.backbone, levels)
        pools = self._keep_indices(chain) if config.up == "unpool" else {}
        steps = plan(chain)
        self._rows = _rows(chain, steps, config.num_classes, pools)
        self.decoder, self.joins = nn.ModuleList(), nn.ModuleList()
        ends = {target: chain.after(target) for target in chain.maps[:-1]}  # whose mirror images lead to these maps
        stacked = 0  # channels that the skip of the level before leaves on top
        for target in (*chain.maps[-2::-1], chain.image):
            level = Level(chain, target, pools, config.num_classes)
            x, reached = level.x, False
            while steps and not (reached and steps[0].kind != "keep"):
                step = steps.pop(0)
                x = level.write(step, x, extra_in=stacked)
                reached, stacked = reached or step is ends.get(target), 0
            self.decoder.append(level.module(x))
            if target is not chain.image:
                takes_both = steps[0].kind == "conv" and steps[0].layer.groups == 1
                stacked = chain.width(target) if config.skip == "concat" and takes_both else 0
                mix = None if stacked else _mix(chain, config.skip, chain.width(target))
                self.joins.append(Join(config.skip, mix))
        self.smallest_px = 1  # while the least is looked for
        self.smallest_px = smallest_px(self, self.stride, config.in_channels, config.backbone)

    def forward(self, image: Tensor) -> Tensor:
        padded = pad_to_multiple(image, self.stride, at_least=self.smallest_px)
        maps = self.encoder(padded)  # (N, 64, H/2, W/2) ... (N, 512, H/32, W/32) for a ResNet-18
        x = maps[-1]
        for level, join, skip in zip(self.decoder, self.joins, maps[-2::-1], strict=False):
            x = join(level(x, skip), skip)  # (N, 256, H/16, W/16) ... (N, 64, H/2, W/2)
        scores = self.decoder[-1](x, padded)  # (N, K, H, W)
        return crop_like(scores, image)

    def reflection(self) -> list[Row]:
        """Each part of the encoder with its mirror image, from the image inwards; the decoder runs backwards."""
        return list(self._rows)

    def _keep_indices(self, chain: Chain) -> dict[str, MaxPoolKeepingIndices]:
        """Let the encoder's poolings remember where the maxima stood; returns them by path."""
        pools = {}
        for part in chain.parts:
            if part.keeps_places:
                pools[part.path] = MaxPoolKeepingIndices(part.layer, channels=chain.width(part.output))
                self.encoder.body.set_submodule(part.path, pools[part.path])
        return pools


def _mix(chain: Chain, skip: Skip, width: int) -> nn.Module | None:
    """What returns from a stack of two maps to the width of one."""
    if skip in ("none", "add"):
        return None
    if skip == "reduce":
        return nn.Conv2d(2 * width, width, 1)
    # The norm and activation of the first convolution.
    first = takewhile(lambda part: part.kind == "keep", chain.parts[1:])
    widened = [part for part in first if part.layer is not None and has_width(part.layer)]
    layers = [at_width(part.layer, chain.width(part.output), width) for part in widened]
    has_norm = any(True for layer in layers for _ in layer.parameters())
    conv = nn.Conv2d(2 * width, width, 3, padding=1, bias=not has_norm)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(conv, *layers)


def _rows(chain: Chain, steps: list[Part], num_classes: int, unpooled: Collection[str]) -> list[Row]:
    """A row for each block of the trunk that has a mirror image, from the image inwards."""
    movers = [step for step in reversed(steps) if step.kind != "keep"]
    rows: list[Row] = []
    for path, group in groupby(movers, lambda part: _owner(chain, part)):
        parts = list(group)
        source, target = parts[0].source, parts[-1].target
        channels = chain.width(source), chain.width(target)
        kind = type(chain.network.get_submodule(path)).__name__
        back = channels[1], channels[0] if rows else num_classes
        stride = round(chain.size(source)[0] / chain.size(target)[0])
        rows.append(Row(path or "(whole)", kind, _image(parts, kind, unpooled), channels, back, stride))
    return rows


def _owner(chain: Chain, part: Part) -> str:
    """The block that a part belongs to: the outermost module that is no mere container and holds no other block."""
    blocks = [other.path for other in chain.parts if other.kind in ("block", "ways")]
    around = part.path.split(".")[:-1] if part.kind not in ("block", "ways") else []
    for path in accumulate(around, "{}.{}".format):
        is_container = type(chain.network.get_submodule(path)) in _CONTAINERS
        if not is_container and not any(block.startswith(path + ".") for block in blocks):
            return path
    return part.path


def _image(parts: list[Part], kind: str, unpooled: Collection[str]) -> str:
    """What stands for a block in the decoder, in words."""
    part = parts[0]
    if part.kind == "block":
        return f"{kind}, fresh"
    if part.kind == "pool" and len(parts) == 1:
        kernel, stride, _ = part.geometry
        size = max(kernel, stride)
        return "unpooling by indices" if part.path in unpooled else f"ConvTranspose2d {size}x{size}, per channel"
    if part.kind != "conv" or len(parts) > 1 or type(part.layer).__name__ != kind:
        return f"{kind} reflected"
    height, width = part.layer.kernel_size
    if max(part.layer.stride) == 1:
        return f"Conv2d {height}x{width}"
    return "Conv2d 1x1, repeated" if max(height, width) == 1 else f"ConvTranspose2d {height}x{width}"


PAPER = "any timm or torchvision classifier, reflected; after SegNet, DeconvNet, LinkNet"
register_model("mirror", Mirror, MirrorConfig(), paper=PAPER, tiny={"backbone": "test_resnet"})
