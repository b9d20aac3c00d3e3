"""What the in-place operations of a captured graph change besides the map that they give."""

from collections import defaultdict

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


class Aliases:
    """Which steps of a graph are names for the same numbers: a map and its views.

    Here every operation gives a new map, in-place ones too. That is right as long as nobody looks at the old names again.

    Args:
        graph: of torch.export, whose steps have their values without content in `meta["val"]`.
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
