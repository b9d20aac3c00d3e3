import pytest
import torch
import torch.nn.functional as F

from pixelwise.ops.resize import FixedBilinear, bilinear_upsampling, crop_like

SHAPES = [(4, 2), (16, 8), (32, 16), (63, 32), (64, 32)]  # all that the FCN papers use


@pytest.mark.parametrize(("kernel", "stride"), SHAPES)
def test_fixed_equals_the_full_kernel_with_bilinear_filters_on_its_diagonal(kernel, stride):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 5)
    learnt = bilinear_upsampling(3, kernel=kernel, stride=stride, learnt=True)
    fixed = bilinear_upsampling(3, kernel=kernel, stride=stride, learnt=False)
    assert learnt.weight.shape == (3, 3, kernel, kernel) and learnt.bias is None
    assert fixed(x).shape == (2, 3, 2 * stride + kernel, 4 * stride + kernel)
    assert torch.allclose(fixed(x), learnt(x), atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), SHAPES)
def test_it_interpolates_linearly_between_the_centres(kernel, stride):
    ramp = torch.arange(6.0).expand(1, 1, 6, 6)
    up = FixedBilinear(1, kernel=kernel, stride=stride)(ramp)[0, 0, up_middle(kernel, stride)]
    centres = torch.arange(up.shape[0], dtype=torch.float)
    inside = (centres >= (kernel - 1) / 2) & (centres <= 5 * stride + (kernel - 1) / 2)
    wanted = (centres - (kernel - 1) / 2) / stride  # cell i lies at i * stride + (kernel - 1) / 2
    assert torch.allclose(up[inside], wanted[inside], atol=1e-5)


def up_middle(kernel, stride):
    return 2 * stride + kernel // 2


def test_the_fixed_kernel_is_no_part_of_the_state_and_moves_with_the_module():
    up = FixedBilinear(21, kernel=64, stride=32)
    assert not list(up.parameters()) and not up.state_dict()
    assert up.to(torch.float64).row.dtype == torch.float64


def test_gradients_flow_through_the_fixed_kernel():
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    up = FixedBilinear(2, kernel=4, stride=2).double()
    assert torch.autograd.gradcheck(up, x)


def test_a_crop_starts_at_its_offset():
    x = torch.arange(2 * 7 * 9).view(1, 2, 7, 9)
    assert torch.equal(crop_like(x, torch.zeros(1, 3, 4, 5), 2), x[:, :, 2:6, 2:7])


def test_bilinear_upsampling_agrees_with_torch_inside():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 6)
    up = FixedBilinear(2, kernel=16, stride=8)(x)[..., 4:-4, 4:-4]
    wanted = F.interpolate(x, scale_factor=8, mode="bilinear", align_corners=False)
    assert torch.allclose(up[..., 4:-4, 4:-4], wanted[..., 4:-4, 4:-4], atol=1e-5)  # the border fades to zero
