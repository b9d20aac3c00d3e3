import itertools

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, LayerNorm2d, SqueezeExcite
from torch import nn

from pixelwise.models.mirror_decoder import at_width, has_width, reflect_conv, reflect_pool


def tie(reflected, conv):
    """The weights with which a reflected convolution is the adjoint of `conv`."""
    weight = conv.weight
    if isinstance(reflected, nn.Conv2d):
        groups = weight.unflatten(0, (conv.groups, -1))  # (g, out/g, in/g, h, w)
        weight = groups.transpose(1, 2).flatten(0, 1).flip(2, 3)
    reflected.weight.data.copy_(weight)


def assert_adjoint(layer, reflected, crop, x):
    """<layer(x), y> = <x, reflected(y)>: no pixel is shifted, lost or added."""
    out = layer(x)
    y = torch.randn_like(out)
    back = reflected(y)
    if crop:
        assert all(mine >= wanted for mine, wanted in zip(back.shape[2:], x.shape[2:], strict=True))
        back = back[..., : x.shape[2], : x.shape[3]]
    assert back.shape == x.shape
    assert torch.allclose((out * y).sum(), (x * back).sum(), rtol=1e-9)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (kernel, stride, padding, dilation)
        for kernel, stride, padding, dilation in itertools.product((1, 2, 3, 5, 7, 11), (1, 2, 4), (0, 1, 2, 3), (1, 2))
        if stride <= kernel and 2 * padding < kernel + 1 and padding <= dilation * (kernel - 1)
    ],
)
def test_a_reflected_convolution_is_the_adjoint_in_geometry(kernel, stride, padding, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups=2, bias=False, dtype=torch.float64)
    for height, width in ((32, 48), (33, 31), (30, 47)):
        x = torch.randn(2, 4, height, width, dtype=torch.float64)
        after = conv(x).shape[2:]
        exact = (height, width) == tuple(stride * length for length in after)
        reflected, crop = reflect_conv(conv, exact=exact)
        reflected.double()
        tie(reflected, conv)
        assert_adjoint(conv, reflected, crop, x)
        assert not (exact and crop) or 2 * padding + stride < dilation * (kernel - 1) + 1


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (7, 4)])
def test_convolutions_that_pad_as_they_need(kernel, stride):
    torch.manual_seed(0)
    conv = Conv2dSame(3, 5, kernel, stride, bias=False).double()
    reflected, crop = reflect_conv(conv, exact=True)
    reflected.double()
    tie(reflected, conv)
    assert_adjoint(conv, reflected, crop, torch.randn(1, 3, 16, 32, dtype=torch.float64))


def test_a_shortcut_of_one_pixel_in_four_reaches_all_four():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 1, stride=2, bias=False)
    reflected, crop = reflect_conv(conv, exact=True)
    y = torch.randn(1, 5, 4, 6)
    back = reflected(y)
    assert back.shape == (1, 3, 8, 12) and not crop
    for row, column in itertools.product(range(2), range(2)):
        assert torch.equal(back[..., row::2, column::2], reflected[0](y))
    assert reflect_conv(conv, exact=False)[1]


def test_channels_change_places_and_groups_stay():
    conv = nn.Conv2d(8, 24, 3, padding=1, groups=8)
    reflected, _ = reflect_conv(conv, exact=True)
    assert (reflected.in_channels, reflected.out_channels, reflected.groups) == (24, 8, 8)
    assert reflected.weight.numel() == conv.weight.numel() and reflected.bias.shape == (8,)


def test_a_stack_goes_in_and_scores_come_out():
    conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    reflected, _ = reflect_conv(conv, exact=True, extra_in=64, out_channels=11)
    assert (reflected.in_channels, reflected.out_channels) == (128, 11)
    assert (reflected.bias == 0).all()
    assert reflected(torch.randn(1, 128, 5, 6)).std() < 0.3  # scores start small


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(64, 128, 3, 2, 1),
        nn.Conv2d(128, 64, 3, 1, 1),
        nn.Conv2d(64, 64, 5, 2, 2, groups=64),
        nn.Conv2d(32, 64, 1),
    ],
)
def test_the_signal_keeps_its_variance(conv):
    torch.manual_seed(0)
    reflected, _ = reflect_conv(conv, exact=True)
    y = torch.randn(4, conv.out_channels, 16, 16).relu()
    assert 0.8 < reflected(y)[..., 4:-4, 4:-4].var() < 1.25


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 2, 0), (4, 2, 1), (2, 4, 0), (3, 3, 0)]
)
def test_a_reflected_pooling_keeps_a_constant_map(kernel, stride, padding):
    pool, x = nn.AvgPool2d(kernel, stride, padding), torch.zeros(1, 3, 24, 36)
    exact = x.shape[2:] == tuple(stride * length for length in pool(x).shape[2:])
    reflected, crop = reflect_pool(3, kernel, stride, padding, exact=exact)
    back = reflected(torch.ones_like(pool(x)))
    assert torch.allclose(back[..., 4:-8, 4:-8], torch.tensor(1.0))
    assert crop or back.shape == x.shape
    assert all(mine >= wanted - stride for mine, wanted in zip(back.shape[2:], x.shape[2:], strict=True))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(6), BatchNormAct2d(6), LayerNorm2d(6), nn.GroupNorm(3, 6), nn.PReLU(6), nn.SiLU(), nn.LayerNorm(6)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_norm_gets_another_width(layer):
    assert has_width(layer)
    wider = at_width(layer, 6, 10)
    image = torch.randn(2, 10, 4, 5)
    x = image.permute(0, 2, 3, 1) if type(layer) is nn.LayerNorm else image
    assert wider(x).shape == x.shape
    count = sum(tensor.numel() for tensor in layer.parameters())
    assert sum(tensor.numel() for tensor in wider.parameters()) == count * 10 // 6
    same = at_width(layer, 6, 6)
    assert same is not layer and type(same) is type(layer)


def test_a_gate_has_matrices_for_one_width():
    assert not has_width(SqueezeExcite(16))
