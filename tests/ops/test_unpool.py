import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pixelwise.ops.unpool import MaxPoolKeepingIndices


@settings(deadline=None, max_examples=30)
@given(
    kernel=st.integers(2, 4),
    height=st.integers(4, 19),
    width=st.integers(4, 19),
    ceil=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_maximum_returns_to_its_place(kernel, height, width, ceil, seed):
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) + 0.1
    plain = nn.MaxPool2d(kernel, ceil_mode=ceil)
    pool = MaxPoolKeepingIndices(plain, channels=3)
    maxima = pool(x)
    assert torch.equal(maxima, plain(x))
    back = pool.unpool(maxima)
    assert back.shape == x.shape
    kept = back != 0
    assert torch.equal(back[kept], x[kept])
    assert kept.sum() == maxima.numel()
    assert torch.equal(plain(back), maxima)


def test_other_values_go_where_the_maxima_stood():
    pool = MaxPoolKeepingIndices(nn.MaxPool2d(2), channels=1)
    pool(torch.tensor([[[[1.0, 9.0], [3.0, 4.0]]]]))
    assert pool.unpool(torch.tensor([[[[-5.0]]]])).tolist() == [[[[0.0, -5.0], [0.0, 0.0]]]]


def test_the_gradient_reaches_the_places_of_the_maxima():
    pool = MaxPoolKeepingIndices(nn.MaxPool2d(2), channels=1)
    x = torch.tensor([[[[1.0, 9.0], [3.0, 4.0]]]], requires_grad=True)
    pool.unpool(pool(x)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[[[0.0, 1.0], [0.0, 0.0]]]]


def test_the_places_serve_once():
    pool = MaxPoolKeepingIndices(nn.MaxPool2d(2), channels=1)
    with pytest.raises(RuntimeError, match="follows a forward pass"):
        pool.unpool(torch.zeros(1, 1, 1, 1))
    pool(torch.zeros(1, 1, 2, 2))
    pool.unpool(torch.zeros(1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="one unpooling"):
        pool.unpool(torch.zeros(1, 1, 1, 1))


def test_a_copy_has_places_of_its_own():
    pool = MaxPoolKeepingIndices(nn.MaxPool2d(2), channels=1)
    pool(torch.zeros(1, 1, 2, 2))
    other = copy.deepcopy(pool)
    other(torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]))
    assert pool.unpool(torch.ones(1, 1, 1, 1))[0, 0, 0, 0] == 1
    assert other.unpool(torch.ones(1, 1, 1, 1))[0, 0, 1, 1] == 1
