import pytest
import torch
import torch.nn.functional as F

from pixelwise.ops.dense import max_pool_dense


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_it_is_max_pooling_with_stride_1(kernel, dilation):
    x = torch.randn(2, 3, 20, 17, generator=torch.Generator().manual_seed(0))
    assert torch.equal(max_pool_dense(x, kernel, dilation), F.max_pool2d(x, kernel, stride=1, dilation=dilation))


def test_gradients_reach_the_maxima():
    x = torch.tensor([[[[1.0, 5.0, 2.0], [3.0, 4.0, 9.0]]]], requires_grad=True)
    max_pool_dense(x, 2).sum().backward()
    assert x.grad.tolist() == [[[[0, 1, 0], [0, 0, 1]]]]
