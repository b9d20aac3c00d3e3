"""A network as a list of operations on maps, captured at one image size by torch.export; nothing is computed for it.

Everything that depends on the image must be a map: a tensor that has rows and columns, whose windows depend on windows of
other maps. Everything else (weights, tables, masks) is constant and is computed once.
"""

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pixelwise.errors import PixelwiseError
from pixelwise.ops.convolutionalize.capture import without_memory


class NotWindowed(PixelwiseError):
    """The network has an operation whose windows cannot be computed from windows: unknown, or one over the whole image."""


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

    def empty(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """A window of it that has no rows or no columns."""
        shape = list(self.shape)
        shape[self.axes[0]], shape[self.axes[1]] = size
        return torch.empty(shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Input:
    """Stands in an operation's arguments for the map with this number among its inputs."""

    index: int


@dataclass(eq=False)
class Call:
    """One operation: `op(*args, **kwargs)`, in which maps are `Input`s; `sources` are the steps that give them."""

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[int]
    inputs: list[Map]
    shapes: list[tuple[int, ...]]
    source_rules: list[Any]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by its place, or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def fill(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors in place of the inputs."""
        filled = pytree.tree_map_only(Input, lambda item: tensors[item.index], (self.args, self.kwargs))
        return filled[0], filled[1]

    def refusal(self, why: str) -> NotWindowed:
        """The error that this operation stands in the way."""
        return NotWindowed(f"{self.op} ({self.name}) cannot be computed window by window: {why}.")


RuleMaker = Callable[[Call], Any]


class Graph:
    """The operations from the image (1, C, H, W) to the logits, each with the rule that computes its windows.

    `rules` maps an operation's name to the maker of its rule. Batch norm and dropout in training mode are refused.

    Raises:
        NotWindowed: an operation has no rule, or its rule does not suit it, or torch.export cannot follow the code.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int, int, int], rules: Mapping[str, RuleMaker]) -> None:
        self.device = next((item.device for item in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.shape = shape
        program = _export(model, shape)
        self._state = _state_of(program, model)
        self.calls: list[Call | None] = [None]  # the image comes first
        self.rules: list[Any] = [None]
        self.maps: list[Map] = [Map(shape, (2, 3))]
        self._constants: dict[fx.Node, Any] = {}
        self._steps: dict[fx.Node, int] = {}
        self._makers = rules
        self._aliases = Aliases(program.graph)
        for node in program.graph.nodes:
            self._add(node)
        self._drop_unused()
        self.bases = self._bases()
        self.users: list[list[int]] = [[] for _ in self.calls]
        for step, call in enumerate(self.calls):
            if call is None or self.is_joined(step):
                continue
            for source in {base for item in call.sources for base in self.bases[item]}:
                self.users[source].append(step)

    def is_joined(self, step: int) -> bool:
        """Whether a step only joins the channels of others; it is never kept, but joined where it is used."""
        return getattr(self.rules[step], "joins", False) and step != self.last

    def _bases(self) -> list[list[int]]:
        """The steps whose maps, joined, are that of each step: itself, but for one that only joins others.

        Dense blocks join all that was before again and again; kept as they are, the same rows would wait in many maps.
        """
        bases: list[list[int]] = []
        for step, call in enumerate(self.calls):
            joined = call is not None and self.is_joined(step)
            bases.append([base for item in call.sources for base in bases[item]] if call and joined else [step])
        return bases

    def _add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name in self._state:
                self._constants[node] = self._state[node.name]
            else:
                self._steps[node] = 0
        elif node.op == "output":
            self._finish(node)
        elif node.op != "call_function":
            raise NotWindowed(f"{node.op} {node.target} ({node.name}) cannot be computed window by window.")
        elif str(node.target) == "aten._assert_tensor_metadata.default":
            return
        elif any(item in self._steps for item in node.all_input_nodes):
            for name in self._aliases.changed(node):
                self._refuse_if(self._aliases.is_used_after(name, node), node, name)
            self._add_call(node)
        elif self._is_for_itself(node):
            self._constants[node] = self._constant(node)

    def _is_for_itself(self, node: fx.Node) -> bool:
        """Whether an operation on constants changes only what no map looks at otherwise."""
        changed = self._aliases.changed(node)
        for name in changed:
            users = self._aliases.users_before(name, node)
            self._refuse_if(any(user in self._steps for user in users), node, name)
        if not any(name.op == "placeholder" for name in changed):
            return True
        # It counts its calls, say: the network's own numbers stay as they are.
        for name in (*changed, node):
            self._refuse_if(self._aliases.is_used_after(name, node), node, name)
        return False

    def _refuse_if(self, is_seen: bool, node: fx.Node, name: fx.Node) -> None:
        if is_seen:
            raise NotWindowed(
                f"{node.target} ({node.name}) cannot be computed window by window: it changes {name.name} in place, "
                "which is used otherwise too."
            )

    def _finish(self, node: fx.Node) -> None:
        leaves = pytree.tree_leaves(node.args)
        if len(leaves) != 1 or leaves[0] not in self._steps:
            raise NotWindowed("the network does not give one map of logits.")
        self.last = self._steps[leaves[0]]
        logits = self.maps[self.last]
        if (logits.height, logits.width) != self.shape[2:] or len(logits.shape) != 4:
            raise NotWindowed(f"the network gives {logits.shape} for an image of {self.shape}.")

    def _constant(self, node: fx.Node) -> Any:
        """The value of a step that does not depend on the image, on the device of the weights."""

        def real(item: Any) -> Any:
            return self._constants[item] if isinstance(item, fx.Node) else self._real_device(item)

        args, kwargs = pytree.tree_map(real, (node.args, dict(node.kwargs)), is_leaf=lambda x: isinstance(x, fx.Node))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _real_device(self, item: Any) -> Any:
        return self.device if isinstance(item, torch.device) and item.type == "meta" else item

    def _add_call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            self._add_chunk(node)
            return
        sources: list[int] = []

        def bind(item: Any) -> Any:
            if isinstance(item, fx.Node) and item in self._steps:
                sources.append(self._steps[item])
                return Input(len(sources) - 1)
            return self._constants[item] if isinstance(item, fx.Node) else self._real_device(item)

        args, kwargs = pytree.tree_map(bind, (node.args, dict(node.kwargs)), is_leaf=lambda x: isinstance(x, fx.Node))
        values = node.meta["val"]
        values = values if isinstance(values, tuple | list) else [values]
        shapes = [tuple(item.shape) for item in values]
        call = self._call(node, args, kwargs, sources, shapes)
        maker = self._makers.get(str(node.target))
        if maker is None:
            raise call.refusal("it is not known here, or needs the whole image at once")
        rule = maker(call)
        self._append(node, call, rule, Map(shapes[0], rule.axes, values[0].dtype))

    def _add_chunk(self, node: fx.Node) -> None:
        """One of several results of an operation."""
        source = self._steps[node.args[0]]  # type: ignore[index]
        whole, index = self.calls[source], int(node.args[1])  # type: ignore[arg-type]
        if whole is None or len(whole.shapes) <= index:
            raise NotWindowed(f"{node.name}: takes a part of what has no parts.")
        shape = whole.shapes[index]
        call = self._call(node, (Input(0), index), {}, [source], [shape])
        dtype = node.meta["val"].dtype
        self._append(node, call, self._makers["getitem"](call), Map(shape, self.maps[source].axes, dtype))

    def _call(self, node: fx.Node, args: Any, kwargs: Any, sources: list[int], shapes: list[tuple[int, ...]]) -> Call:
        maps, rules = [self.maps[item] for item in sources], [self.rules[item] for item in sources]
        return Call(node.name, node.target, args, kwargs, sources, maps, shapes, rules)

    def _append(self, node: fx.Node, call: Call, rule: Any, given: Map) -> None:
        if math.prod(given.shape) == 0:
            raise call.refusal("it gives an empty map")
        self._steps[node] = len(self.calls)
        self.calls.append(call)
        self.rules.append(rule)
        self.maps.append(given)

    def _drop_unused(self) -> None:
        """Leave out what the logits do not depend on."""
        used = {self.last}
        for step in range(self.last, 0, -1):
            call = self.calls[step]
            if step in used and call:
                used.update(call.sources)
        kept = sorted(used | {0})
        number = {old: new for new, old in enumerate(kept)}
        self.calls = [self.calls[old] for old in kept]
        self.rules = [self.rules[old] for old in kept]
        self.maps = [self.maps[old] for old in kept]
        for call in self.calls:
            if call:
                call.sources = [number[item] for item in call.sources]
        self.last = number[self.last]


def _export(model: nn.Module, shape: tuple[int, int, int, int]) -> Any:
    """The model captured on the device "meta", where weights and maps take no memory."""
    twin = without_memory(model)
    for module, hollow in zip(model.modules(), twin.modules(), strict=True):
        hollow.training = module.training
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
        constant = program.constants[target]
        if constant.is_meta:
            raise NotWindowed(
                f"{target}: the network makes this tensor while it runs; its content is not in the graph."
            )
        state[name] = constant
    return state


class Aliases:
    """Which steps of a graph of torch.export are names for the same numbers: a map and its views.

    Here every operation gives a new map, in-place ones too. That is right as long as nobody looks at the old names again.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        self._names: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            for key in _storages(node):
                self._names[key].append(node)

    def changed(self, node: fx.Node) -> list[fx.Node]:
        """The steps before an in-place operation whose numbers it changes; none for other operations."""
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            return []
        keys = {key for given in _written(node) for key in _storages(given)}
        return [name for key in keys for name in self._names[key] if self._order[name] < self._order[node]]

    def is_used_after(self, name: fx.Node, node: fx.Node) -> bool:
        """Whether a step behind `node` takes `name`."""
        return any(self._order[user] > self._order[node] for user in name.users)

    def users_before(self, name: fx.Node, node: fx.Node) -> list[fx.Node]:
        """The steps before `node` that take `name`."""
        return [user for user in name.users if self._order[user] < self._order[node]]


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operation writes to."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = [
        node.args[place] if place < len(node.args) else node.kwargs.get(item.name) for place, item in enumerate(schema)
    ]
    written = [value for value, item in zip(given, schema, strict=True) if item.alias_info and item.alias_info.is_write]
    return [value for value in pytree.tree_leaves(written) if isinstance(value, fx.Node)]


def _storages(node: fx.Node) -> set[int]:
    values = pytree.tree_leaves(node.meta.get("val"))
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}
