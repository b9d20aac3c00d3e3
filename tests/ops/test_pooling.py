import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from pixelwise.ops.pooling import CeilMaxPool2d, max_pool_dense


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 3)])
def test_it_is_torchs_ceil_mode_exported_or_not(kernel, stride):
    torch.manual_seed(0)
    pool = nn.Sequential(CeilMaxPool2d(kernel, stride))
    sides = {2: Dim("height", min=4, max=99), 3: Dim("width", min=4, max=99)}
    exported = torch.export.export(pool, (torch.randn(2, 3, 9, 14),), dynamic_shapes=({**sides},)).module()
    for height in range(4, 12):
        x = torch.randn(2, 3, height, 15 - height)
        wanted = F.max_pool2d(x, kernel, stride, ceil_mode=True)
        assert wanted.shape[2:] == (-((kernel - height) // stride) + 1, -((kernel - 15 + height) // stride) + 1)
        assert torch.equal(pool(x), wanted)
        assert torch.equal(exported(x), wanted)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_dense_pooling_is_max_pooling_with_stride_1(kernel, dilation):
    x = torch.randn(2, 3, 20, 17, generator=torch.Generator().manual_seed(0))
    assert torch.equal(max_pool_dense(x, kernel, dilation), F.max_pool2d(x, kernel, stride=1, dilation=dilation))


def test_gradients_reach_the_maxima_of_dense_pooling():
    x = torch.tensor([[[[1.0, 5.0, 2.0], [3.0, 4.0, 9.0]]]], requires_grad=True)
    max_pool_dense(x, 2).sum().backward()
    assert x.grad.tolist() == [[[[0, 1, 0], [0, 0, 1]]]]
