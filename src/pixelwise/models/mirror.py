"""Any classification network as the encoder, flipped: its decoder is its mirror image.

Paper:  no single one. SegNet (arXiv:1511.00561) and DeconvNet (arXiv:1505.04366) flipped VGG-16, LinkNet (arXiv:1707.03718)
        the outline of ResNet-18; this flips convolutional classifiers of timm and torchvision. The rule stands at the top of
        `reflection.py`, and `Mirror.reflection()` lists what became of which part.
Differs from the papers: `backbone="vgg16_bn", skip="none"` is SegNet, layer by layer. LinkNet's decoder blocks are lighter
        than the residual blocks of its encoder; here, they are the same.
Skips join the decoder's map at the place, width and size of the encoder's: "add" adds it (LinkNet); "concat" stacks it, and
        the next convolution takes both (U-Net, arXiv:1505.04597) if it is a plain one, else a 3x3 convolution with the
        trunk's norm and activation does first; "reduce" stacks it and returns to the width by a 1x1 convolution.
Shapes: N batch, C channels, K classes, H W image size.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.backbones import PROBE_PX, create_backbone, create_trunk
from pixelwise.models.chain import Chain, Part
from pixelwise.models.reflected_layers import at_width, has_width
from pixelwise.models.reflection import IMAGE, Level, plan
from pixelwise.models.reflection_table import Row, describe
from pixelwise.models.registry import register_model
from pixelwise.ops.resize import crop_like, pad_to_multiple
from pixelwise.ops.unpool import MaxPoolKeepingIndices
from pixelwise.ops.watch import run_on_meta, watch

Skip = Literal["none", "add", "concat", "reduce"]
Up = Literal["unpool", "transposed"]


@dataclass(frozen=True, kw_only=True)
class MirrorConfig:
    """The fields of a mirrored network."""

    num_classes: int = 2
    in_channels: int = 3
    backbone: str = "resnet18"
    skip: Skip = "add"
    up: Up = "unpool"  # of max pooling whose windows do not overlap; other poolings are always transposed convolutions

    def __post_init__(self) -> None:
        for key, allowed in (("skip", get_args(Skip)), ("up", get_args(Up))):
            if getattr(self, key) not in allowed:
                raise UsageError(f"mirror: {key} must be one of {allowed}, not {getattr(self, key)!r}.")


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


class Mirror(nn.Module):
    """A trunk and its mirror image, which takes its last map back to the image's size, a level for each of its maps.

    Example:
        >>> model = Mirror(MirrorConfig(num_classes=3, backbone="test_resnet")).eval()
        >>> tuple(model(torch.zeros(1, 3, 41, 30)).shape)
        (1, 3, 41, 30)
        >>> print(model.reflection()[-1])
        layer4.0                 BasicBlock              192 -> 96   1/2 | BasicBlock reflected                 96 -> 192  x2
    """

    def __init__(self, config: MirrorConfig) -> None:
        super().__init__()
        self.encoder = create_backbone(config.backbone, in_channels=config.in_channels)
        self.stride = max(self.encoder.strides)
        chain, maps = self._read(config)
        pools = self._keep_indices(chain) if config.up == "unpool" else {}
        steps = plan(chain)
        self._rows = describe(chain, steps, config.num_classes, pools)
        self.decoder, self.joins = nn.ModuleList(), nn.ModuleList()
        ends = {number: _after(chain, number) for number in maps[:-1]}  # whose mirror images lead to these maps
        stacked = 0  # channels that the skip of the level before leaves on top
        for target in (*maps[-2::-1], IMAGE):
            level = Level(chain, target, pools, config.num_classes)
            reached = False
            while steps and not (reached and steps[0].part.kind != "keep"):
                step = steps.pop(0)
                level.write(step, extra_in=stacked)
                reached, stacked = reached or step.part is ends.get(target), 0
            self.decoder.append(level.module())
            if target != IMAGE:
                takes_both = steps[0].part.kind == "conv" and steps[0].part.conv.groups == 1
                stacked = chain.width(target) if config.skip == "concat" and takes_both else 0
                mix = None if stacked else _mix(chain, config.skip, chain.width(target))
                self.joins.append(Join(config.skip, mix))
        self.smallest_px = self._smallest_px(config)

    def forward(self, image: Tensor) -> Tensor:
        padded = pad_to_multiple(image, self.stride, at_least=self.smallest_px)
        maps = self.encoder(padded)  # (N, 64, H/2, W/2) ... (N, 512, H/32, W/32) for a ResNet-18
        x = maps[-1]
        for level, join, skip in zip(self.decoder, self.joins, maps[-2::-1], strict=False):
            x = join(level(x, skip), skip)  # (N, 256, H/16, W/16) ... (N, 64, H/2, W/2)
        scores = self.decoder[-1](x, padded)  # (N, K, H, W)
        return crop_like(scores, image)

    def reflection(self) -> list[Row]:
        """Each part of the encoder with its mirror image, from the image inwards; a row can be printed.

        Returns:
            Rows; the decoder runs through them from the last to the first.
        """
        return list(self._rows)

    def _read(self, config: MirrorConfig) -> tuple[Chain, list[int]]:
        """The trunk as a chain, and the numbers of the encoder's maps in it, finest first."""
        fresh = create_trunk(config.backbone, in_channels=config.in_channels)
        image = torch.empty(1, config.in_channels, PROBE_PX, 2 * PROBE_PX, device="meta")
        try:
            seen = watch(fresh, image)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"mirror: backbone {config.backbone!r} does not take images of any size ({reason}). Choose another."
            ) from error
        found: dict[tuple[int, int], int] = {}  # the last map of each width and stride
        for number in [item for item in seen.returned if len(seen.shapes[item]) == 4] or seen.shapes:
            if len(shape := seen.shapes[number]) == 4:
                stride, across = (
                    2 ** round(math.log2(px / n)) for px, n in zip(image.shape[2:], shape[2:], strict=True)
                )
                if stride == across:  # a head may pool to squares
                    found[shape[1], stride] = number
        maps = [found.get(level, IMAGE) for level in zip(self.encoder.channels, self.encoder.strides, strict=True)]
        if IMAGE in maps:
            raise UsageError(
                f"mirror: backbone {config.backbone!r} cannot be reflected: its maps are not (N, C, H, W) inside. Choose a "
                "convolutional one (resnet18, vgg16_bn, ...), or --model encoder_decoder."
            )
        return Chain(fresh, seen, maps[-1], config.backbone), maps

    def _keep_indices(self, chain: Chain) -> dict[str, MaxPoolKeepingIndices]:
        """Let the encoder's poolings remember where the maxima stood; returns them by path."""
        pools = {}
        for part in chain.parts:
            if part.keeps_places:
                parent, _, child = f"body.{part.path}".rpartition(".")
                owner = self.encoder.get_submodule(parent)
                pools[part.path] = MaxPoolKeepingIndices(getattr(owner, child), channels=chain.width(part.output))
                setattr(owner, child, pools[part.path])
        return pools

    def _smallest_px(self, config: MirrorConfig) -> int:
        """The least multiple of the stride that the network takes; unpadded ones (AlexNet) need more than one."""
        reason = ""
        for size_px in range(self.stride, PROBE_PX + 1, self.stride):
            self.smallest_px = size_px
            try:
                run_on_meta(self, torch.empty(1, config.in_channels, size_px, size_px))
                return size_px
            except (AssertionError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
        raise UsageError(
            f"mirror: backbone {config.backbone!r} cannot be reflected: no image up to {PROBE_PX} px passes ({reason})."
        )


def _after(chain: Chain, number: int) -> Part:
    """The part of the chain that leads away from a map."""
    start = next((index for index, part in enumerate(chain.parts) if part.source == number), None)
    if start is None:
        call = next(call for call in chain.seen.calls if number in call.outputs)
        raise chain.refuse(call, "gives a map to the decoder from the middle of a part with several ways")
    return next(part for part in chain.parts[start:] if part.kind != "keep")


def _mix(chain: Chain, skip: Skip, width: int) -> nn.Module | None:
    """What returns from a stack of two maps to the width of one."""
    if skip in ("none", "add"):
        return None
    if skip == "reduce":
        return nn.Conv2d(2 * width, width, 1)
    layers: list[nn.Module] = []
    for part in chain.parts[1:]:
        if part.kind != "keep":
            break
        layer = None if part.is_function else chain.network.get_submodule(part.path)
        if layer is not None and has_width(layer):
            layers.append(at_width(layer, chain.width(part.output), width))
    has_norm = any(True for layer in layers for _ in layer.parameters())
    conv = nn.Conv2d(2 * width, width, 3, padding=1, bias=not has_norm)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(conv, *layers)


register_model(
    "mirror",
    Mirror,
    MirrorConfig(),
    paper="any timm or torchvision classifier, reflected; after SegNet, DeconvNet, LinkNet",
    tiny={"backbone": "test_resnet"},
)
