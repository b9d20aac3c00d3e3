"""A network as a list of operations on maps, captured at one image size by torch.export; nothing is computed for it.

Everything that depends on the image must be a map: a tensor that has rows and columns, whose windows depend on windows of
other maps. Everything else (weights, tables, masks) is constant and is computed once.
"""

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pixelwise.errors import PixelwiseError
from pixelwise.ops.cost import without_memory
from pixelwise.ops.streaming.memory import Span, Window

NOTHING = Window(Span(0, 0), Span(0, 0))


def whole(height: int, width: int) -> Window:
    """The window that is a whole map."""
    return Window(Span(0, height), Span(0, width))


class NotWindowed(PixelwiseError):
    """The network has an operation whose windows cannot be computed from windows: unknown, or one over the whole image."""


class Axis:
    """How an operation maps one axis; here, place by place."""

    def need(self, out: Span) -> Span:
        """The places of the input that the places `out` of the output, at least one, depend on, within the input."""
        return out


class Rule:
    """Computes windows of an operation's map; `run` takes the windows that `need` names, one of each of `count` inputs.

    Of an operation that gives several maps, `run` gives them all. A map may be overwritten by an operation that alone needs
    it (`owned`) if its rule `gives_new` memory. What only `joins` the channels of others is never kept.
    """

    axes: tuple[int, int] = (2, 3)  # those of rows and columns in the result
    rows = Axis()
    columns = Axis()
    count = 1
    gives_new = joins = False
    macs = macs_of_input = 0  # multiply-adds for each place of the result, or of the input

    def need(self, out: Window) -> list[Window]:
        if 0 in out.size:
            return [NOTHING] * self.count
        return [Window(self.rows.need(out.rows), self.columns.need(out.columns))] * self.count

    def run(self, out: Window, tensors: list[Tensor], windows: list[Window], owned: bool = False) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Map:
    """The full size of a map, which of its axes are rows and columns, and its type of numbers (without autocast)."""

    shape: tuple[int, ...]
    axes: tuple[int, int]
    dtype: torch.dtype = torch.float32

    @property
    def height(self) -> int:
        """Rows."""
        return self.shape[self.axes[0]]

    @property
    def width(self) -> int:
        """Columns."""
        return self.shape[self.axes[1]]

    def empty(self, size: tuple[int, int], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """A window of it without its content."""
        shape = list(self.shape)
        shape[self.axes[0]], shape[self.axes[1]] = size
        return torch.empty(shape, dtype=dtype or self.dtype, device=device)


@dataclass(frozen=True)
class Input:
    """Stands in an operation's arguments for the map with this number among its inputs."""

    index: int


@dataclass(eq=False)
class Call:
    """One operation: `op(*args, **kwargs)`, in which maps are `Input`s; `sources` are the steps that give them.

    Of an operation that gives several maps, each is a call of its own, of that `index`.
    """

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[int]
    inputs: list[Map]
    source_rules: list[Rule]
    shape: tuple[int, ...]
    index: int | None = None

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by its place, or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def fill(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors in place of the inputs."""
        filled = pytree.tree_map_only(Input, lambda item: tensors[item.index], (self.args, self.kwargs))
        return filled[0], filled[1]

    def require_nchw(self) -> Map:
        """The first of its inputs, if all are maps (N, C, H, W)."""
        if any(item.axes != (2, 3) or len(item.shape) != 4 for item in self.inputs):
            raise self.refusal("its map is not (N, C, H, W)")
        return self.inputs[0]

    def refusal(self, why: str) -> NotWindowed:
        """The error that this operation stands in the way."""
        return NotWindowed(f"{self.op} ({self.name}) cannot be computed window by window: {why}.")


class Graph:
    """The operations from the image (1, C, H, W) to the logits, each with the rule that computes its windows.

    `rule_of` gives the rule of an operation. What has none, or cannot be followed by torch.export, is NotWindowed; so are
    batch norm and dropout in training mode.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int, int, int], rule_of: Callable[[Call], Rule]) -> None:
        self.device = next((item.device for item in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.shape, self._rule_of = shape, rule_of
        program = _export(model, shape)
        self.calls: list[Call | None] = [None]  # the image comes first
        self.rules = [Rule()]
        self.maps = [Map(shape, (2, 3))]
        self._steps: dict[fx.Node, int] = {}
        self._constants: dict[fx.Node, Any] = {}
        self.together: dict[int, list[int]] = {}  # the steps of an operation that gives several maps, at the first
        self._read(program, _state_of(program, model))
        self.bases = self._bases()
        self.users: list[list[int]] = [[] for _ in self.calls]
        for step, call in enumerate(self.calls):
            if call is not None and not self.is_joined(step):
                for source in self.sources(step):
                    self.users[source].append(step)

    def is_joined(self, step: int) -> bool:
        """Whether a step only joins the channels of others; it is never kept, but joined where it is used."""
        return self.rules[step].joins and step != self.last

    def sources(self, step: int) -> set[int]:
        """The steps whose kept rows an operation takes."""
        call = self.calls[step]
        return {base for source in call.sources for base in self.bases[source]} if call else set()

    def windows(self, region: Window) -> list[Window]:
        """The window of each map that a window of the logits depends on; the image's is the first."""
        needed = [NOTHING] * len(self.calls)
        needed[self.last] = region
        for step in range(self.last, 0, -1):
            for item in (alike := self.together.get(step, [])):  # what is computed together has one window
                needed[step] = needed[step].union(needed[item])
            for item in alike:
                needed[item] = needed[step]
            call = self.calls[step]
            if call is None or 0 in needed[step].size:
                continue
            for source, window in zip(call.sources, self.rules[step].need(needed[step]), strict=True):
                needed[source] = needed[source].union(window)
        return needed

    def _bases(self) -> list[list[int]]:
        """The steps whose maps, joined, are that of each step: itself, but for one that only joins others.

        Dense blocks join all that was before again and again; kept as they are, the same rows would wait in many maps.
        """
        bases: list[list[int]] = []
        for step, call in enumerate(self.calls):
            joined = call.sources if call and self.is_joined(step) else []
            bases.append([base for item in joined for base in bases[item]] or [step])
        return bases

    def _read(self, program: Any, state: dict[str, Tensor]) -> None:
        nodes = list(program.graph.nodes)
        names = _Names(nodes)
        needed = {nodes[-1]}  # for the logits
        for node in reversed(nodes):
            needed.update(node.all_input_nodes if node in needed else ())
        of_image: set[fx.Node] = set()
        for node in nodes:
            if node.name in state:
                self._constants[node] = state[node.name]
            elif node.op == "placeholder":
                self._steps[node] = 0
                of_image.add(node)
            elif node.op == "output":
                self._finish(node)
            elif node.op != "call_function":
                raise NotWindowed(f"{node.op} {node.target} ({node.name}) cannot be computed window by window.")
            elif of_image.intersection(node.all_input_nodes):
                of_image.add(node)
                names.refuse_later_use(node, names.changed(node))
                # Of a step that gives several maps, those are added that are picked from it.
                if node in needed and not isinstance(node.meta["val"], tuple | list):
                    self._add_call(node)
            elif names.is_for_itself(node, of_image) and node in needed:
                args, kwargs = self._filled(node, self._constants.__getitem__)
                self._constants[node] = node.target(*args, **kwargs)

    def _finish(self, node: fx.Node) -> None:
        leaves = pytree.tree_leaves(node.args)
        if len(leaves) != 1 or leaves[0] not in self._steps:
            raise NotWindowed("the network does not give one map of logits.")
        self.last = self._steps[leaves[0]]
        logits = self.maps[self.last]
        if (logits.height, logits.width) != self.shape[2:] or len(logits.shape) != 4:
            raise NotWindowed(f"the network gives {logits.shape} for an image of {self.shape}.")

    def _filled(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """The arguments of a step with values for nodes, and the device of the weights for "meta"."""

        def real(item: Any) -> Any:
            if isinstance(item, fx.Node):
                return value(item)
            return self.device if isinstance(item, torch.device) and item.type == "meta" else item

        return pytree.tree_map(real, (node.args, dict(node.kwargs)), is_leaf=lambda item: isinstance(item, fx.Node))

    def _add_call(self, node: fx.Node) -> None:
        picked: Any = node.args if node.target is operator.getitem else (node, None)
        origin, index = picked
        sources: list[int] = []

        def bind(item: fx.Node) -> Any:
            if item not in self._steps:
                return self._constants[item]
            sources.append(self._steps[item])
            return Input(len(sources) - 1)

        args, kwargs = self._filled(origin, bind)
        maps, rules = [self.maps[item] for item in sources], [self.rules[item] for item in sources]
        value, shape = node.meta["val"], tuple(node.meta["val"].shape)
        call = Call(origin.name, origin.target, args, kwargs, sources, maps, rules, shape, index)
        rule = self._rule_of(call)
        if math.prod(shape) == 0:
            raise call.refusal("it gives an empty map")
        self._steps[node] = len(self.calls)
        if index is not None:
            first = next(self._steps[item] for item in origin.users if item in self._steps)
            self.together.setdefault(first, []).append(len(self.calls))
        self.calls.append(call)
        self.rules.append(rule)
        self.maps.append(Map(shape, rule.axes, value.dtype))


def _export(model: nn.Module, shape: tuple[int, int, int, int]) -> Any:
    """The model captured on the device "meta", where weights and maps take no memory."""
    twin = without_memory(model)
    dtype = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
    try:
        with torch.no_grad():
            return torch.export.export(twin, (torch.empty(shape, dtype=dtype, device="meta"),), strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotWindowed(f"torch.export cannot follow the network: {reason[:200]}") from error


def _state_of(program: Any, model: nn.Module) -> dict[str, Tensor]:
    """The real parameters, buffers and constants by the names that the graph gives them."""
    signature = program.graph_signature
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    state = {
        name: named[target].detach()
        for name, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items()
    }
    for name, target in signature.inputs_to_lifted_tensor_constants.items():
        state[name] = program.constants[target]
        if state[name].is_meta:
            raise NotWindowed(
                f"{target}: the network makes this tensor while it runs; its content is not in the graph."
            )
    return state


class _Names:
    """Which steps of a graph of torch.export are names for the same numbers: a map and its views.

    Here every operation gives a new map, in-place ones too. That is right as long as nobody looks at the old names again.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._order = {node: place for place, node in enumerate(nodes)}
        self._of_storage: dict[int, list[fx.Node]] = defaultdict(list)
        for node in nodes:
            for key in _storages(node):
                self._of_storage[key].append(node)

    def changed(self, node: fx.Node) -> list[fx.Node]:
        """The steps before an in-place operation whose numbers it changes; none for other operations."""
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            return []
        written = [
            node.args[place] if place < len(node.args) else node.kwargs.get(item.name)
            for place, item in enumerate(node.target._schema.arguments)
            if item.alias_info and item.alias_info.is_write
        ]
        leaves = [item for item in pytree.tree_leaves(written) if isinstance(item, fx.Node)]
        keys = {key for item in leaves for key in _storages(item)}
        return [name for key in keys for name in self._of_storage[key] if self._order[name] < self._order[node]]

    def refuse_later_use(self, node: fx.Node, names: Iterable[fx.Node]) -> None:
        """Raise NotWindowed if a step behind `node` takes one of `names`."""
        self._refuse(node, names, lambda user: self._order[user] > self._order[node])

    def is_for_itself(self, node: fx.Node, of_image: set[fx.Node]) -> bool:
        """Whether an operation on constants changes only what no step on the image looks at otherwise."""
        changed = self.changed(node)
        self._refuse(node, changed, of_image.__contains__)
        if not any(name.op == "placeholder" for name in changed):
            return True
        # It counts its calls, say: the network's own numbers stay as they are.
        self.refuse_later_use(node, [*changed, node])
        return False

    def _refuse(self, node: fx.Node, names: Iterable[fx.Node], is_amiss: Callable[[fx.Node], bool]) -> None:
        for name in names:
            if any(is_amiss(user) for user in name.users):
                raise NotWindowed(
                    f"{node.target} ({node.name}) cannot be computed window by window: it changes {name.name} in place, "
                    "which is used otherwise too."
                )


def _storages(node: fx.Node) -> set[int]:
    values = pytree.tree_leaves(node.meta.get("val"))
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}
