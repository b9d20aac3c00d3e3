"""How an operation's windows depend on those of its input: the base of all rules, and what it needs along one axis."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from pixelwise.ops.streaming.windows import Span, Window


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

    def given(self, inside: Span) -> Span:
        """The places, with those of the padding, that these windows cover."""
        start = inside.start * self.stride - self.before
        return Span(start, (inside.stop - 1) * self.stride - self.before + (self.kernel - 1) * self.dilation + 1)

    def need(self, out: Span) -> Span:
        return self.given(out).clip(self.length) if out.length else Span(0, 0)

    def padding(self, out: Span) -> tuple[int, int]:
        """How many places of padding come before and behind what is needed."""
        padded, inside = self.given(out) if out.length else Span(0, 0), self.need(out)
        if inside.length == 0:
            return padded.length, 0
        return inside.start - padded.start, padded.stop - inside.stop


class Spreading(Sliding):
    """The transpose: a place of the input goes to `kernel` places of the output, `stride` further for the next."""

    def need(self, out: Span) -> Span:
        if out.length == 0:
            return Span(0, 0)
        first = -(-(out.start + self.before - (self.kernel - 1) * self.dilation) // self.stride)
        return Span(first, (out.stop - 1 + self.before) // self.stride + 1).clip(self.length)

    def padding(self, out: Span) -> tuple[int, int]:
        return 0, 0  # the result is cut instead


class Lookup:
    """Any place for any place: `places[o]` of the input for o of the output."""

    def __init__(self, places: Tensor) -> None:
        self.places = places.cpu().numpy()

    def need(self, out: Span) -> Span:
        if out.length == 0:
            return Span(0, 0)
        asked = self.places[out.start : out.stop]
        return Span(int(asked.min()), int(asked.max()) + 1)

    def select(self, x: Tensor, axis: int, out: Span) -> Tensor:
        """The places `out` of what `need` gives; where they are a plain run, nothing is copied."""
        places = self.places[out.start : out.stop] - self.need(out).start
        if numpy.array_equal(places, numpy.arange(x.shape[axis])):
            return x
        return x.index_select(axis, torch.from_numpy(places).to(x.device))


class Rule:
    """Computes windows of an operation's map; `run` takes the windows that `need` names, one of each of `count` inputs.

    A map may be overwritten by an operation that alone needs it (`owned`) if its rule `gives_new` memory. What only `joins`
    the channels of others is never kept.
    """

    axes: tuple[int, int] = (2, 3)  # those of rows and columns in the result
    rows: Axis = Same()
    columns: Axis = Same()
    count = 1
    gives_new = joins = False
    macs = macs_of_input = 0  # multiply-adds for each place of the result, or of the input

    def need(self, out: Window) -> list[Window]:
        return [Window(self.rows.need(out.rows), self.columns.need(out.columns))] * self.count

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Any:
        raise NotImplementedError
