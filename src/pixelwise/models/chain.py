"""A classifier's trunk read as a chain of parts, from one watched pass: what changes the map, and what only acts on it.

The chain is found in the pass, not in a list of class names. A part has one map going in and one coming out: a layer, a
block that keeps width and size (a residual block, say), or a piece with several ways through it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Literal

from torch import nn

from pixelwise.errors import UsageError
from pixelwise.ops.watch import Call, Pass

# keep: acts on a map and leaves its width and size (norm, activation, dropout, a gate such as squeeze-and-excitation).
# block: keeps width and size, too, but mixes pixels or channels. ways: several ways from one map to another.
Kind = Literal["keep", "conv", "pool", "block", "ways", "add", "cat"]

SUMS, CATS = ("add", "add_"), ("cat", "concat")  # the names of torch's functions


@dataclass(frozen=True, eq=False)
class Part:
    """A piece of the trunk.

    Attributes:
        kind: what it is.
        path: of the module; of a function, the module that calls it.
        calls: what ran in it.
        inputs: numbers of the maps that go in; one, unless it adds or concatenates.
        output: number of the map that comes out.
        inner: of `ways`, the parts between its two maps, in order.
        lead: of `ways`, the parts of the same module that act on its input before the ways part.
        trail: of `ways`, the parts of the same module that act on its output after the ways met.
        is_function: whether it is one function, called by the module at `path`.
    """

    kind: Kind
    path: str
    calls: tuple[Call, ...]
    inputs: tuple[int, ...]
    output: int
    inner: tuple["Part", ...] = ()
    lead: tuple["Part", ...] = ()
    trail: tuple["Part", ...] = ()
    is_function: bool = False

    @property
    def source(self) -> int:
        """Number of the first map that goes in."""
        return self.lead[0].inputs[0] if self.lead else self.inputs[0]

    @property
    def target(self) -> int:
        """Number of the last map that comes out."""
        return self.trail[-1].output if self.trail else self.output

    @property
    def conv(self) -> nn.Conv2d:
        """The layer of a `conv` part."""
        layer = self.calls[0].layer
        if not isinstance(layer, nn.Conv2d):
            raise TypeError(f"{self.path} is no convolution")
        return layer

    @property
    def geometry(self) -> tuple[int, int, int]:
        """Kernel, stride and padding of a `pool` part, the larger of height and width."""
        call, names = self.calls[0], ("kernel_size", "stride", "padding")
        if call.layer is not None:
            given: list[Any] = [getattr(call.layer, name, None) for name in names]
        else:
            placed = [*call.args[1:4], None, None, None]
            given = [call.kwargs.get(name, item) for name, item in zip(names, placed, strict=False)]
        kernel, stride, padding = (max(item) if isinstance(item, list | tuple) else item for item in given)
        return kernel or 2, stride or kernel or 2, padding or 0

    @property
    def keeps_places(self) -> bool:
        """Whether it is a max pooling whose windows do not overlap, so that each maximum has one place to go back to."""
        layer = self.calls[0].layer
        plain = isinstance(layer, nn.MaxPool2d) and layer.dilation in (1, (1, 1))
        return self.kind == "pool" and plain and self.geometry == (self.geometry[0], self.geometry[0], 0)


class Chain:
    """The chain of parts from the image to the last of the given maps.

    Args:
        network: whose pass was watched.
        seen: the pass.
        last: number of the map at which the trunk ends.
        label: what to call the network in errors.

    Raises:
        UsageError: a part has no mirror image; it is named.

    Example:
        >>> import torch
        >>> from pixelwise.ops.watch import watch
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        >>> chain = Chain(network, watch(network, torch.zeros(1, 3, 32, 64)), last=3, label="example")
        >>> [part.kind for part in chain.parts]
        ['conv', 'keep', 'pool']
    """

    def __init__(self, network: nn.Module, seen: Pass, last: int, label: str) -> None:
        self.network, self.seen, self.last, self.label = network, seen, last, label
        calls = _leading_to(seen.calls, last)
        self._users: dict[int, list[Call]] = {}
        for call in calls:
            for number in call.inputs:
                self._users.setdefault(number, []).append(call)
        self.parts = self._with_their_norms(self._in_a_row(list(self._parts(calls, ""))))

    def width(self, number: int) -> int:
        """Channels of a map."""
        return self.seen.shapes[number][1]

    def size(self, number: int) -> tuple[int, ...]:
        """Height and width of a map in cells."""
        return self.seen.shapes[number][2:]

    def refuse(self, call: Call, what: str = "has no mirror image") -> UsageError:
        """The error that names a call."""
        owner = type(self.network.get_submodule(call.path)).__name__ if call.path else "its forward"
        who = f"{call.path} ({owner})" if call.layer is not None else f"{call.name} in {call.path or 'it'} ({owner})"
        return UsageError(
            f"mirror: backbone {self.label!r} cannot be reflected: {who} {what}. Convolutions, poolings, sums, "
            "concatenations and whatever keeps width and size of a map have one. Choose such a backbone (resnet18, "
            "vgg16_bn, densenet121, efficientnet_b0, convnext_tiny, ...), or --model encoder_decoder."
        )

    def _parts(self, calls: list[Call], prefix: str) -> Iterator[Part]:
        """The smallest pieces that stand as they are: layers, functions, and modules that keep their map."""
        for path, group in _children(calls, prefix):
            if path == prefix or (len(group) == 1 and group[0].layer is not None):
                for call in group:
                    yield from self._single(call)
            elif self._keeps(group) and not self._is_chain(group, path):
                inputs, outputs = self._ends(group)
                kind: Kind = "block" if any(self._mixes(call) for call in group) else "keep"
                yield Part(kind, path, tuple(group), tuple(inputs), outputs[0])
            else:
                yield from self._parts(group, path)

    def _single(self, call: Call) -> Iterator[Part]:
        if len(call.outputs) != 1 or len(self.seen.shapes[call.outputs[0]]) != 4:
            raise self.refuse(call)
        inputs, output = tuple(dict.fromkeys(call.inputs)), call.outputs[0]
        if isinstance(call.layer, nn.Conv2d):
            kind: Kind = "conv"
        elif call.name in SUMS + CATS and len(call.inputs) > 1:
            kind = "cat" if call.name in CATS else "add"
            self._check_join(call, kind)
            inputs = call.inputs
        elif len(inputs) != 1:
            raise self.refuse(call, "joins maps in a way that has no mirror image")
        elif self.seen.shapes[inputs[0]] == self.seen.shapes[output] and not isinstance(call.layer, nn.Linear):
            kind = "keep"
        elif self._pools(call):
            kind = "pool"
        else:
            raise self.refuse(call)
        yield Part(kind, call.path, (call,), inputs, output, is_function=call.layer is None)

    def _check_join(self, call: Call, kind: Kind) -> None:
        shapes = [self.seen.shapes[number] for number in call.inputs]
        out = self.seen.shapes[call.outputs[0]]
        whole = out[1] == sum(shape[1] for shape in shapes) if kind == "cat" else all(shape == out for shape in shapes)
        if not whole or any(shape[2:] != out[2:] for shape in shapes):
            raise self.refuse(call, "joins maps in a way that has no mirror image")

    def _pools(self, call: Call) -> bool:
        """Whether it makes the map smaller by a whole factor and leaves its channels apart."""
        before, after = self.seen.shapes[call.inputs[0]], self.seen.shapes[call.outputs[0]]
        layer_pools = call.layer is None or not any(True for _ in call.layer.parameters())
        return before[1] == after[1] and layer_pools and "pool" in call.name.lower() and before[2] > after[2] > 1

    def _ends(self, group: list[Call]) -> tuple[list[int], list[int]]:
        """Maps that enter a group of calls, and maps that leave it."""
        made = {number for call in group for number in call.outputs}
        inside = set(group)
        inputs = dict.fromkeys(number for call in group for number in call.inputs if number not in made)
        leaving = [
            number
            for number in sorted(made)
            if number == self.last or any(user not in inside for user in self._users.get(number, ()))
        ]
        return list(inputs), leaving

    def _keeps(self, group: list[Call]) -> bool:
        inputs, outputs = self._ends(group)
        if len(inputs) != 1 or len(outputs) != 1:
            return False
        before, after = self.seen.shapes[inputs[0]], self.seen.shapes[outputs[0]]
        return before == after and len(after) == 4

    def _is_chain(self, group: list[Call], prefix: str) -> bool:
        """Whether a module does no more than call its children one after the other."""
        children = list(_children(group, prefix))
        if any(path == prefix for path, _ in children):
            return False
        ends = [self._ends(calls) for _, calls in children]
        return all(len(inputs) == len(outputs) == 1 for inputs, outputs in ends) and all(
            before[1] == after[0] for before, after in pairwise(ends)
        )

    def _mixes(self, call: Call) -> bool:
        """Whether a layer with weights works on whole maps (and not on the averages of a gate)."""
        shape = self.seen.shapes[call.outputs[0]]
        if isinstance(call.layer, nn.Conv2d):
            return shape[-1] * shape[-2] > 1
        return isinstance(call.layer, nn.Linear) and len(shape) > 2

    def _in_a_row(self, parts: list[Part]) -> list[Part]:
        """The parts one after the other; those that run side by side become one part of kind `ways`."""
        last_use = {number: index for index, part in enumerate(parts) for number in part.inputs}
        chain: list[Part] = []
        waiting: list[Part] = []
        for index, part in enumerate(parts):
            waiting.append(part)
            start = chain[-1].output if chain else 0
            inside = {start, *(item.output for item in waiting[:-1])}
            if any(last_use.get(number, -1) > index for number in inside):
                continue
            if len(waiting) == 1 and part.kind not in ("add", "cat"):
                chain.append(part)
            else:
                path = _common([item.path for item in waiting])
                calls = tuple(call for item in waiting for call in item.calls)
                chain.append(Part("ways", path, calls, (start,), part.output, tuple(waiting)))
            waiting = []
        return chain

    def _with_their_norms(self, chain: list[Part]) -> list[Part]:
        """Norms and activations that belong to the module of a part with several ways go with it."""
        taken: list[Part] = []
        for part in chain:
            before = taken[-1] if taken else None
            if part.kind == "keep" and before and before.kind == "ways" and _is_in(part.path, before.path):
                taken[-1] = replace(before, trail=(*before.trail, part))
                continue
            lead: list[Part] = []
            while part.kind == "ways" and taken and taken[-1].kind == "keep" and _is_in(taken[-1].path, part.path):
                lead.insert(0, taken.pop())
            taken.append(replace(part, lead=tuple(lead)) if lead else part)
        return taken


def _leading_to(calls: list[Call], last: int) -> list[Call]:
    """The calls without which the map `last` would not be."""
    same: dict[int, int] = {}  # a list of one map, concatenated, is that map (DenseNet's first layers)
    renamed = []
    for call in calls:
        call = replace(call, inputs=tuple(same.get(number, number) for number in call.inputs))
        if call.name in CATS and len(call.inputs) == 1:
            same[call.outputs[0]] = call.inputs[0]
        else:
            renamed.append(call)
    needed, kept = {last}, []
    for call in reversed(renamed):
        if needed.intersection(call.outputs):
            needed.update(call.inputs)
            kept.append(call)
    return kept[::-1]


def _children(calls: list[Call], prefix: str) -> Iterator[tuple[str, list[Call]]]:
    """Successive calls of one child of a module; functions that the module itself calls stand under its own path."""

    def child(call: Call) -> str:
        if call.path == prefix:
            return prefix
        return prefix + "." * bool(prefix) + call.path.removeprefix(prefix).lstrip(".").split(".")[0]

    for path, group in groupby(calls, child):
        yield path, list(group)


def _common(paths: list[str]) -> str:
    """The innermost module that holds all."""
    pieces = [path.split(".") for path in paths]
    shared: list[str] = []
    for level in zip(*pieces, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _is_in(path: str, owner: str) -> bool:
    return bool(owner) and (path == owner or path.startswith(owner + "."))
