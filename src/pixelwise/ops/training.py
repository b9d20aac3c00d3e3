"""What a network gets before it is trained: faster gradients on CPUs, and a way around a fault of torch."""

import torch
from torch import Tensor, nn

from pixelwise.ops.activations import speed_up_activations
from pixelwise.ops.depthwise import speed_up_depthwise

FAULTY_INPUTS, SOUND_OUTPUTS = 2048, 16
"""In bfloat16 on CPUs with AMX, torch 2.14.1's backward pass of a convolution with a bias that has more channels in and
fewer out than these writes beyond the gradient of the bias, which damages the memory of the process; without a bias it does
not. FCN's scores of 4,096 channels are such a layer."""


def prepare_for_training(model: nn.Module) -> None:
    """Give `model` what acts under bfloat16 autocast on a CPU; parameters, names and results (to rounding) stay."""
    speed_up_depthwise(model)
    speed_up_activations(model)
    for module in model.modules():
        if type(module) is nn.Conv2d and module.bias is not None and _is_faulty(module):
            module.forward = _bias_apart.__get__(module)  # type: ignore[method-assign]


def _is_faulty(conv: nn.Conv2d) -> bool:
    return conv.in_channels // conv.groups > FAULTY_INPUTS and conv.out_channels < SOUND_OUTPUTS


def _bias_apart(self: nn.Conv2d, x: Tensor) -> Tensor:
    if self.bias is None or not (x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
        return type(self).forward(self, x)
    scores = self._conv_forward(x, self.weight, None)
    return scores + self.bias.to(scores.dtype)[:, None, None]
