import copy
import io

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from pixelwise.ops.depthwise import speed_up_depthwise

CASES = {
    "wide": nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False),
    "strided": nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False),
    "wide, strided, dilated": nn.Conv2d(6, 6, 5, stride=2, padding=4, dilation=2, groups=6, bias=False),
    "one side wide": nn.Conv2d(6, 6, (1, 5), padding=(0, 2), groups=6, bias=False),
    "same": Conv2dSame(6, 6, 5, groups=6, bias=False),
    "very wide": nn.Conv2d(6, 6, 7, padding=3, groups=6, bias=False),
    "wide, strided": nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6, bias=False),
    "unpadded": nn.Conv2d(6, 6, (5, 1), stride=(3, 2), groups=6, bias=False),
    "padded by more than half": nn.Conv2d(6, 6, 3, stride=2, padding=2, groups=6, bias=False),
    "same, wide, strided": Conv2dSame(6, 6, 5, stride=2, groups=6, bias=False),
    "same, strided far": Conv2dSame(6, 6, 5, stride=3, groups=6, bias=False),
    "same, even": Conv2dSame(6, 6, 4, groups=6, bias=False),
    "same, strided": Conv2dSame(6, 6, 3, stride=2, groups=6, bias=False),
}
SIZES = [(13, 18), (16, 16), (7, 1)]


def layers(name):
    torch.manual_seed(0)
    plain = copy.deepcopy(CASES[name])
    nn.init.normal_(plain.weight)
    fast = copy.deepcopy(plain)
    assert speed_up_depthwise(fast) == 1
    return plain, fast


def gradients(layer, x, *, bf16=True):
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = layer(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    return out.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_forward_is_bit_identical_and_gradients_are_those_of_float32(name, size):
    plain, fast = layers(name)
    x = torch.randn(2, 6, *size)
    reference, *_ = gradients(plain, x)
    out, grad_x, grad_weight = gradients(fast, x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, reference)
    assert grad_x.dtype == grad_weight.dtype == torch.float32
    # The gradient of the same values in float32; what comes in and what goes out has bfloat16's 8 bits.
    rounded = copy.deepcopy(plain)
    rounded.weight.data = plain.weight.data.bfloat16().float()
    _, want_x, want_weight = gradients(rounded, x.bfloat16().float(), bf16=False)
    for got, want in ((grad_x, want_x), (grad_weight, want_weight)):
        assert (got - want).abs().max() <= 0.01 * want.abs().max() + 1e-6


@pytest.mark.parametrize("name", CASES)
def test_without_autocast_or_gradient_it_is_the_layer_itself(name):
    plain, fast = layers(name)
    x = torch.randn(1, 6, 9, 10)
    for got, want in zip(gradients(fast, x, bf16=False), gradients(plain, x, bf16=False), strict=True):
        assert torch.equal(got, want)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), plain(x))


def test_a_frozen_layer_passes_the_gradient_on():
    _, fast = layers("strided")
    fast.weight.requires_grad_(False)
    x = torch.randn(1, 6, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        fast(x).float().sum().backward()
    assert x.grad is not None and fast.weight.grad is None


def test_a_copy_uses_its_own_weights():
    _, fast = layers("wide")
    model = nn.Sequential(fast)
    other = copy.deepcopy(model)
    nn.init.zeros_(other[0].weight)
    x = torch.randn(1, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert other(x).abs().max() == 0
        assert model(x).abs().max() > 0
        other(x).sum().backward()
    assert other[0].weight.grad is not None and fast.weight.grad is None


def test_names_and_values_of_the_state_stay():
    model = nn.Sequential(copy.deepcopy(CASES["wide"]), nn.BatchNorm2d(6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    speed_up_depthwise(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    buffer = io.BytesIO()
    torch.save(after, buffer)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),  # fast as it is
        nn.Conv2d(6, 6, 5, padding=2, bias=False),  # not depthwise
        nn.Conv2d(6, 12, 5, padding=2, groups=6, bias=False),  # a channel multiplier
        nn.Conv2d(6, 6, 5, padding=2, groups=6),  # a bias
        nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False, padding_mode="reflect"),
        nn.Conv2d(6, 6, 5, padding="same", groups=6, bias=False),
        nn.Conv1d(6, 6, 5, groups=6, bias=False),
    ],
)
def test_other_layers_are_left_alone(layer):
    assert speed_up_depthwise(nn.Sequential(layer)) == 0
    assert "forward" not in vars(layer)
