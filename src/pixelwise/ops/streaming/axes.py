"""Along one axis: which places of its input a span of an operation's output depends on."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pixelwise.ops.streaming.windows import Span


class Axis(Protocol):
    """How an operation maps one axis."""

    def need(self, out: Span) -> Span:
        """The places of the input that the places `out` of the output depend on, within the input."""
        ...


@dataclass(frozen=True)
class Same:
    """Place by place."""

    def need(self, out: Span) -> Span:
        return out


@dataclass(frozen=True)
class Sliding:
    """Windows of `kernel` places, `dilation` apart, that move by `stride`; `before` places of padding come first."""

    length: int
    kernel: int
    stride: int = 1
    before: int = 0
    dilation: int = 1

    def need_with_padding(self, out: Span) -> Span:
        """As `need`, with the places of the padding."""
        if out.length == 0:
            return Span(0, 0)
        start = out.start * self.stride - self.before
        return Span(start, (out.stop - 1) * self.stride - self.before + (self.kernel - 1) * self.dilation + 1)

    def need(self, out: Span) -> Span:
        return self.need_with_padding(out).clip(self.length)

    def padding(self, out: Span) -> tuple[int, int]:
        """How many places of padding come before and behind what is needed."""
        padded, inside = self.need_with_padding(out), self.need(out)
        if inside.length == 0:
            return padded.length, 0
        return inside.start - padded.start, padded.stop - inside.stop


@dataclass(frozen=True)
class Spreading:
    """Each place of the input goes to `kernel` places of the output, `stride` further for the next (transposed Sliding)."""

    length: int
    kernel: int
    stride: int = 1
    before: int = 0
    dilation: int = 1

    def need(self, out: Span) -> Span:
        if out.length == 0:
            return Span(0, 0)
        first = -(-(out.start + self.before - (self.kernel - 1) * self.dilation) // self.stride)
        return Span(first, (out.stop - 1 + self.before) // self.stride + 1).clip(self.length)

    def given(self, inside: Span) -> Span:
        """The places of the output that the places `inside` of the input go to."""
        start = inside.start * self.stride - self.before
        return Span(start, (inside.stop - 1) * self.stride - self.before + (self.kernel - 1) * self.dilation + 1)


@dataclass(frozen=True)
class Shift:
    """Every `step`-th place from `start` on."""

    start: int
    step: int = 1

    def need(self, out: Span) -> Span:
        if out.length == 0:
            return Span(0, 0)
        return Span(self.start + out.start * self.step, self.start + (out.stop - 1) * self.step + 1)


@dataclass(frozen=True)
class Reverse:
    """Back to front."""

    length: int

    def need(self, out: Span) -> Span:
        return Span(self.length - out.stop, self.length - out.start)


class Lookup:
    """Any place for any place: `places[o]` of the input for o of the output."""

    def __init__(self, places: Tensor) -> None:
        self.places = places.cpu()

    def need(self, out: Span) -> Span:
        if out.length == 0:
            return Span(0, 0)
        asked = self.places[out.start : out.stop]
        return Span(int(asked.min()), int(asked.max()) + 1)

    def relative(self, out: Span, device: torch.device) -> Tensor:
        """The places for `out`, counted from the first that is needed."""
        return (self.places[out.start : out.stop] - self.need(out).start).to(device)


class Interpolation:
    """Linear between two places, as torch computes it (in float32, so that far from the start the same rounding comes out).

    `align_corners` lets the ends fall together (else the areas of the outermost places do). `scale` is output over input,
    where the caller of torch gave it; else it follows from the lengths.
    """

    def __init__(self, length: int, target: int, align_corners: bool, scale: float | None) -> None:
        places = torch.arange(target, dtype=torch.float32)
        if align_corners:
            step = (length - 1) / (target - 1) if target > 1 else 0.0
            source = places * torch.tensor(step, dtype=torch.float32)
        else:
            step = 1 / scale if scale else length / target
            source = (torch.tensor(step, dtype=torch.float32) * (places + 0.5) - 0.5).clamp(min=0)
        self.low = source.floor().long().clamp(max=length - 1)
        self.high = (self.low + 1).clamp(max=length - 1)
        self.share = (source - self.low).clamp(0, 1)  # of the higher place
        factor = target // length
        self.factor = factor if target == factor * length and not align_corners and scale in (None, factor) else 0
        self.length = length

    def need(self, out: Span) -> Span:
        if out.length == 0:
            return Span(0, 0)
        if self.factor:  # a place more on each side: torch's own kernel treats the ends of what it is given as borders
            return Span(out.start // self.factor - 1, -(-out.stop // self.factor) + 1).clip(self.length)
        return Span(int(self.low[out.start]), int(self.high[out.stop - 1]) + 1)


class Nearest(Lookup):
    """The nearest place, as torch's mode "nearest" takes it: rounded down."""

    def __init__(self, length: int, target: int, scale: float | None) -> None:
        step = torch.tensor(1 / scale if scale else length / target, dtype=torch.float32)
        super().__init__((torch.arange(target, dtype=torch.float32) * step).floor().long().clamp(max=length - 1))
