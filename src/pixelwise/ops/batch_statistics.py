"""Batch norm by the statistics of the batch at hand, as some authors evaluated; and a second pass that leaves no trace.

Batch norm in training divides by the mean and variance of the batch, and keeps running averages of both for later. Most
networks are evaluated with the running averages. The authors of FC-DenseNet (arXiv:1611.09326) evaluated theirs with the
statistics of each batch of test images, so their scores depend on what else is in the batch: repeat them with
`batch_statistics` and their batch size; for a prediction that depends on its own image only, use the running averages.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of all of them, timm's fused ones too

from pixelwise.errors import UsageError


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, `model` evaluates with every batch norm normalising by the batch at hand.

    Everything else is as in evaluation: dropout is off. Running averages are neither read nor changed. Afterwards, also
    after an error, each module is in the mode it was in. A network without batch norm is simply evaluated.
    The network is changed in place meanwhile, so no other thread may use it, and its `state_dict` lacks the running
    averages. A map with one value per channel (one image, one cell) has no variance and is a UsageError.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = _norms(model)
    kept = [(norm, norm.running_mean, norm.running_var) for norm in norms]
    hooks = [norm.register_forward_pre_hook(_check_values) for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.running_mean = norm.running_var = None  # without them, torch takes the batch's in evaluation too
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, mean, var in kept:
            norm.running_mean, norm.running_var = mean, var
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def running_averages_kept(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, passes in training mode leave the running averages of `model` and their counters as they are.

    For passes that repeat one already counted: recomputation in the backward pass would update them a second time.
    """
    names = ("running_mean", "running_var", "num_batches_tracked")
    kept = [(norm, name, getattr(norm, name)) for norm in _norms(model) for name in names]
    try:
        for norm, name, value in kept:  # copies take the update; the graph needs tensors of the same shapes
            setattr(norm, name, None if value is None else value.clone())
        yield
    finally:
        for norm, name, value in kept:
            setattr(norm, name, value)


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _check_values(norm: nn.Module, args: tuple[Any, ...]) -> None:
    x: Tensor = args[0]
    if x.ndim > 1 and x.numel() == x.shape[1]:
        raise UsageError(
            f"batch statistics: a batch norm was given maps of shape {tuple(x.shape)}, one value per channel, and one value "
            "has no variance. Use a larger batch or larger images, or evaluate with the running averages."
        )
