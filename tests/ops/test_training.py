"""A network that is prepared for training computes what it did."""

import pytest
import torch
from torch import nn

from pixelwise.ops.training import prepare_for_training


@pytest.mark.parametrize(("channels", "classes", "is_apart"), [(2049, 3, True), (2048, 3, False), (2049, 16, False)])
def test_no_convolution_computes_a_bias_gradient_that_damages_memory(
    channels: int, classes: int, is_apart: bool
) -> None:
    torch.manual_seed(0)
    conv, image = nn.Conv2d(channels, classes, 1), torch.randn(2, channels, 5, 6)
    exact = conv(image)
    exact.square().mean().backward()
    wanted = [item.grad.clone() for item in conv.parameters()]
    conv.zero_grad()
    prepare_for_training(conv)
    with torch.autocast("cpu", torch.bfloat16):
        scores = conv(image)
    assert (type(scores.grad_fn).__name__ == "AddBackward0") == is_apart
    assert torch.allclose(scores.float(), exact, atol=0.02)
    if is_apart or classes == 16:  # the others may be wrong on other processors only
        scores.float().square().mean().backward()
        for item, gradient in zip(conv.parameters(), wanted, strict=True):
            assert torch.allclose(item.grad, gradient, atol=0.02 * float(gradient.abs().max()) + 1e-4)
    assert torch.equal(conv(image), exact)  # without autocast nothing changes
