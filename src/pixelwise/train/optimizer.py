"""The optimiser and the learning rates of the groups of parameters."""

from collections.abc import Iterator

import torch
from torch import nn

from pixelwise.train.config import RunConfig

CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.Linear)  # what has a bias that is no norm's


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimiser of a run; each group of parameters knows its `peak_lr`, which the schedule scales.

    The rate of what lies in the network's `encoder` is multiplied by `encoder_lr`, that of the biases of convolutions by
    `bias_lr`. Weights of more than one dimension are decayed: by AdamW on their own, by the others as a term l2 / 2 |w|^2 of
    the loss, as torch does it.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter, is_bias in _parameters(model):
        key = (name.startswith("encoder."), parameter.ndim > 1, is_bias and config.bias_lr != 1)
        groups.setdefault(key, []).append(parameter)
    rows = []
    for (is_encoder, is_weight, is_bias), parameters in groups.items():
        peak = config.lr * (config.encoder_lr if is_encoder else 1.0) * (config.bias_lr if is_bias else 1.0)
        # Norms and biases are not pulled towards zero: they scale, they do not select.
        decay = config.weight_decay if is_weight else 0.0
        rows.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    if config.optimizer == "sgd":
        return torch.optim.SGD(rows, lr=config.lr, momentum=config.momentum)
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
    return kinds[config.optimizer](rows)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter, and whether it is the bias of a convolution or linear layer; what is not trained is left out."""
    biases = {id(module.bias) for module in model.modules() if isinstance(module, CONVOLUTIONS)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, id(parameter) in biases
