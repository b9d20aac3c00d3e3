"""The network that a classifier is turned into: a new graph over the classifier's own modules."""

from collections import Counter
from typing import Any

from torch import fx, nn

from pixelwise.ops.convolutionalize.capture import Capture, share


class NewNetwork:
    """A graph that is being built; `root` is a copy of the classifier's modules that shares their parameters."""

    def __init__(self, capture: Capture) -> None:
        self.capture, self.graph = capture, fx.Graph()
        self.root = share(capture.classifier)
        self._uses = Counter(str(node.target) for node in capture.graph.nodes if node.op == "call_module")

    def own_module(self, node: fx.Node) -> Any:
        """The module of a step, to be changed and given to `place`; other steps that use it keep theirs."""
        module = self.root.get_submodule(str(node.target))
        return share(module) if self._uses[str(node.target)] > 1 else module

    def value(self, node: fx.Node) -> fx.Node:
        """A parameter, a buffer, or a tensor that the code made while it was followed."""
        name = str(node.target)
        if "." not in name and not hasattr(self.root, name):
            made = getattr(self.capture.twin, name)
            if made.is_meta and not any(item.is_meta for item in self.capture.classifier.parameters()):
                raise self.capture.refusal(node, "its code computes with its parameters before it sees the image")
            self.root.register_buffer(name, made, persistent=False)
        return self.graph.node_copy(node)

    def place(self, node: fx.Node, module: nn.Module) -> str:
        """Put `module` where the step's was, or under a name of its own if other steps use that; returns its path."""
        if node.op == "call_module" and self._uses[str(node.target)] == 1:
            self.root.set_submodule(str(node.target), module)
            return str(node.target)
        path = node.name
        while hasattr(self.root, path):
            path += "_"
        self.root.add_module(path, module)
        return path
