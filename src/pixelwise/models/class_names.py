"""The numbers of a network that belong to single classes, taken over into a network of other classes by the classes' names.

Which they are is found out, not listed: the axes of its tensors that grow when the network gets one class more.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pixelwise.models.registry import model_info


def class_axes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The axes of each tensor of a network's state that have an entry for each class; tensors without any are left out.

    Example:
        >>> from pixelwise.models import create_model
        >>> class_axes(create_model("unet", tiny=True, num_classes=3))
        {'score.weight': (0,), 'score.bias': (0,)}
    """
    config: Any = model.config
    build = model_info(str(model.registered_name)).build
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        larger = build(replace(config, num_classes=config.num_classes + 1)).state_dict()
    found = {}
    for name, tensor in model.state_dict().items():
        pairs = enumerate(zip(tensor.shape, larger[name].shape, strict=True))
        axes = tuple(axis for axis, (one, other) in pairs if one != other)
        if axes and all(tensor.shape[axis] == config.num_classes for axis in axes):
            found[name] = axes
    return found


def by_class_name(
    model: nn.Module, trained: nn.Module, names: Sequence[str], trained_names: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """The state of `trained` for `model`, whose classes are `names`, and a remark on its classes ("" if they are the same).

    The entries of a class that only `model` knows are those that `model` has already.
    """
    theirs = dict(trained.state_dict())
    if tuple(names) == tuple(trained_names):
        return theirs, ""
    known = [name for name in names if name in trained_names]
    to = torch.tensor([index for index, name in enumerate(names) if name in known], dtype=torch.long)
    origin = torch.tensor([trained_names.index(name) for name in known], dtype=torch.long)
    own, own_axes, their_axes = model.state_dict(), class_axes(model), class_axes(trained)
    state = dict(theirs)
    for name, axes in own_axes.items():
        if their_axes.get(name) != axes or not (known or theirs[name].shape == own[name].shape):
            continue
        front = range(len(axes))
        filled = own[name].clone()
        into, source = filled.movedim(axes, tuple(front)), theirs[name].movedim(axes, tuple(front))
        if known and into.shape[len(axes) :] == source.shape[len(axes) :]:
            into[_grid(to, len(axes))] = source[_grid(origin, len(axes))].to(into)
        state[name] = filled
    random = [name for name in names if name not in known]
    told = [f"taken over by name: {', '.join(known)}"] * bool(known) + [f"random: {', '.join(random)}"] * bool(random)
    return state, f"scores of classes {'; '.join(told)} (the other network knows {', '.join(trained_names)})"


def _grid(index: Tensor, axes: int) -> tuple[Tensor, ...]:
    """Indices of all combinations of `index` along the first `axes` axes."""
    return tuple(index.reshape([-1 if place == axis else 1 for place in range(axes)]) for axis in range(axes))
