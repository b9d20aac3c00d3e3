"""What became of which part of an encoder, as rows to print."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from pixelwise.models.chain import Chain, Part
from pixelwise.models.reflection import Step

CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Row:
    """A part of the encoder and its mirror image.

    Attributes:
        encoder: path of the part in the encoder.
        kind: its class.
        decoder: what stands for it in the decoder.
        channels: in and out, in the encoder.
        back: in and out, in the decoder.
        stride: by how much the encoder's part shrinks the map, and the decoder's enlarges it.
    """

    encoder: str
    kind: str
    decoder: str
    channels: tuple[int, int]
    back: tuple[int, int]
    stride: int

    def __str__(self) -> str:
        there = f"{self.channels[0]:>4} -> {self.channels[1]:<4}"
        back = f"{self.back[0]:>4} -> {self.back[1]:<4}"
        name = f"{self.encoder:<24} {self.kind:<22}"
        return f"{name} {there} 1/{self.stride} | {self.decoder:<34} {back} x{self.stride}"


def describe(chain: Chain, steps: list[Step], num_classes: int, unpooled: Iterable[str]) -> list[Row]:
    """A row for each block of the trunk that has a mirror image, from the image inwards.

    Args:
        chain: the trunk.
        steps: what was planned for it.
        num_classes: K, for the scorer.
        unpooled: paths of the poolings that keep their indices.
    """
    kept = set(unpooled)
    movers = [step.part for step in reversed(steps) if step.part.kind != "keep"]
    rows: list[Row] = []
    for path, group in groupby(movers, lambda part: _owner(chain, part)):
        parts = list(group)
        source, target = parts[0].source, parts[-1].target
        channels = chain.width(source), chain.width(target)
        kind = type(chain.network.get_submodule(path)).__name__
        rows.append(
            Row(
                encoder=path or "(whole)",
                kind=kind,
                decoder=_image(parts, kind, kept),
                channels=channels,
                back=(channels[1], channels[0] if rows else num_classes),
                stride=round(chain.size(source)[0] / chain.size(target)[0]),
            )
        )
    return rows


def _owner(chain: Chain, part: Part) -> str:
    """The block that a part belongs to: the outermost module that is no mere container and holds no other block."""
    if part.kind in ("block", "ways"):
        return part.path
    levels = part.path.split(".")
    for end in range(1, len(levels)):
        path = ".".join(levels[:end])
        inside = [other for other in chain.parts if other.path.startswith(path + ".")]
        is_container = type(chain.network.get_submodule(path)) in CONTAINERS
        if not is_container and all(other.kind not in ("block", "ways") for other in inside):
            return path
    return part.path


def _image(parts: list[Part], kind: str, kept: set[str]) -> str:
    part = parts[0]
    if part.kind == "block":
        return f"{kind}, fresh"
    if part.kind == "pool" and len(parts) == 1:
        kernel, stride, _ = part.geometry
        size = max(kernel, stride)
        return "unpooling by indices" if part.path in kept else f"ConvTranspose2d {size}x{size}, per channel"
    if part.kind != "conv" or len(parts) > 1 or type(part.conv).__name__ != kind:
        return f"{kind} reflected"
    height, width = part.conv.kernel_size
    if max(part.conv.stride) == 1:
        return f"Conv2d {height}x{width}"
    return "Conv2d 1x1, repeated" if max(height, width) == 1 else f"ConvTranspose2d {height}x{width}"
