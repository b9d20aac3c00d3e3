"""What one forward pass costs, counted from the operations it really runs."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(model: nn.Module, shape: tuple[int, int, int, int]) -> int:
    """Multiplications (each with its addition) of the convolutions and matrix products in one forward pass.

    Norms, activations, pooling and fixed interpolation are not counted, as in the literature's figures.

    Args:
        model: on any device; on `meta` nothing is computed and no memory is needed.
        shape: (N, C, H, W) of the image.

    Example:
        >>> multiply_adds(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 10))  # 8 x 27 for each of 100 pixels
        21600
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = model.training
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model.eval()(torch.zeros(shape, device=device))
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2
