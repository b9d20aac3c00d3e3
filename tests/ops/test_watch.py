import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.ops.watch import Map, run_on_meta, watch


class Fork(nn.Module):
    """Two ways, one of them a function with other arguments, and code that asks for sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Identity(), nn.Sequential())

    def forward(self, image):
        x = self.act(self.norm(self.conv(image)))
        if x.shape[-1] > 4:
            x = F.max_pool2d(x, 2)
        return torch.cat([x, self.inner(x)], 1)


def test_layers_and_functions_in_order_with_who_called_them():
    seen = watch(Fork(), torch.zeros(1, 3, 8, 6))
    names = [(call.path, call.name, call.inputs, call.outputs) for call in seen.calls]
    assert names == [
        ("conv", "Conv2d", (0,), (1,)),
        ("norm", "BatchNorm2d", (1,), (2,)),
        ("act", "ReLU", (2,), (3,)),
        ("", "max_pool2d", (3,), (4,)),
        ("inner.0", "Conv2d", (4,), (5,)),
        ("", "cat", (4, 5), (6,)),
    ]
    assert seen.returned == (6,) and seen.shapes[6] == (1, 8, 4, 3)
    assert seen.calls[3].args == (Map(3), 2) and seen.calls[5].args == ([Map(4), Map(5)], 1)


def test_what_works_in_place_makes_a_new_map():
    class InPlace(nn.Sequential):
        def forward(self, x):
            y = self[0](x) * 2
            y += x
            return F.relu(y, inplace=True)

    seen = watch(InPlace(nn.Identity()), torch.zeros(1, 1, 2, 2))
    assert [(call.inputs, call.outputs) for call in seen.calls] == [((0,), (1,)), ((1, 0), (2,)), ((2,), (3,))]


def test_the_network_stays_as_it_is():
    network = Fork().train()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    watch(network, torch.zeros(2, 3, 8, 8))
    assert network.training and not network.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_nothing_is_computed_and_no_random_number_drawn():
    network, image = nn.Sequential(Fork(), nn.Dropout()), torch.randn(1, 3, 8, 8)
    state = torch.get_rng_state()
    out = run_on_meta(network, image)
    assert out.is_meta and out.shape == (1, 8, 4, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_go_even_when_the_network_fails():
    network = Fork()
    with pytest.raises(RuntimeError):
        watch(network, torch.zeros(1, 5, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
