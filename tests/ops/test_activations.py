"""Activations behind batch norms give the same numbers and gradients, and keep less."""

import copy

import pytest
import torch
from torch import nn

from pixelwise.models import create_model
from pixelwise.ops.activations import speed_up_activations


def step(model, x, dtype=None):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        out = model(x)
    out.float().square().sum().backward()
    return out.detach(), [parameter.grad for parameter in model.parameters()]


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("backbone", "dtype"), [("tf_efficientnet_lite0", BF16), ("resnet18", None), ("torchvision/mobilenet_v2", BF16)]
)
def test_results_and_gradients_are_bit_identical(backbone, dtype):
    torch.manual_seed(0)
    plain = create_model("encoder_decoder", num_classes=2, backbone=backbone, widths=(8, 8))
    fast = copy.deepcopy(plain)
    assert speed_up_activations(fast) > 0
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    for mode in (True, False):
        (out, grads), (want, wanted) = step(fast.train(mode), x, dtype), step(plain.train(mode), x, dtype)
        assert torch.equal(out, want) and all(map(torch.equal, grads, wanted))
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0, 3.0, 6.0, 7.0])
def test_at_and_beyond_the_bounds_the_gradient_is_relu6_s(value):
    layer = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU6(inplace=True))
    assert speed_up_activations(layer) == 1
    found = []
    for act in (layer[1], nn.ReLU6()):
        x = torch.full((1, 1, 1, 1), value, requires_grad=True)
        out = act(x)
        out.backward()
        found.append(torch.stack([out.detach(), x.grad]))
    assert torch.equal(*(item.nan_to_num(9) for item in found))


def test_relu6_keeps_only_its_result():
    kept = []
    layer = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
    speed_up_activations(layer)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda item: kept.append(item) or item, lambda item: item):
        out = layer(x)
    large = [item for item in kept if item.shape == x.shape]
    assert len(large) == 2 and {item.data_ptr() for item in large} == {x.data_ptr(), out.data_ptr()}


def test_an_activation_that_may_change_what_others_read_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(inplace=True), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    assert speed_up_activations(model) == 0 and model[2].inplace and "forward" not in vars(model[1])
