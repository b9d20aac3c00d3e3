import copy
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

from pixelwise.ops.pooling import MaxPoolKeepingIndices, max_pool_keeping_indices, max_unpool


def test_the_four_maxima_of_the_lecture_return_to_their_own_cells():
    x = torch.tensor([[[[1.0, 9, 3, 2], [4, 5, 8, 7], [6, 1, 0, 10], [15, 3, 1, 4]]]])
    maxima, indices = max_pool_keeping_indices(x)
    assert maxima.tolist() == [[[[9, 8], [15, 10]]]]
    assert indices.tolist() == [[[[1, 6], [12, 11]]]]
    back = max_unpool(maxima, indices, x.shape[-2:])
    assert back.tolist() == [[[[0, 9, 0, 0], [0, 0, 8, 0], [0, 0, 0, 10], [15, 0, 0, 0]]]]


SIZES = {
    "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "height": st.integers(1, 13),
    "width": st.integers(1, 13),
    "seed": st.integers(0, 99),
}


def drawn(height, width, seed):
    """Few different values, so that windows have equal ones; none of them zero, some minus infinity."""
    draws = torch.randint(1, 6, (2, 3, height, width), generator=torch.Generator().manual_seed(seed)).float() - 3.5
    return draws.masked_fill(draws == -2.5, -math.inf)


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_maxima_stand_at_their_argmax_and_zeros_elsewhere(kernel, height, width, seed):
    x = drawn(height, width, seed)
    maxima, indices = max_pool_keeping_indices(x, kernel)
    back = max_unpool(maxima, indices, (height, width))
    want = torch.zeros_like(x)
    for top in range(0, height, kernel[0]):
        for left in range(0, width, kernel[1]):
            window = x[:, :, top : top + kernel[0], left : left + kernel[1]]
            value, place = window.flatten(2).max(dim=2)  # the first of equal values
            row, column = top + place // window.shape[3], left + place % window.shape[3]
            want.view(2, 3, -1).scatter_(2, (row * width + column)[..., None], value[..., None])
            assert torch.equal(maxima[:, :, top // kernel[0], left // kernel[1]], value)
    assert torch.equal(back, want)


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_the_gradient_flows_to_the_argmax_only(kernel, height, width, seed):
    x = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    weight = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    maxima, indices = max_pool_keeping_indices(x, kernel)
    (max_unpool(maxima, indices, (height, width)) * weight).sum().backward()
    is_maximum = torch.zeros(1, 2, height * width).scatter(2, indices.flatten(2), 1.0).view_as(x)
    assert torch.equal(x.grad, weight * is_maximum)


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_the_way_that_is_exported_gives_the_same(kernel, height, width, seed):
    x = drawn(height, width, seed)
    maxima, indices = max_pool_keeping_indices(x, kernel)
    with mock.patch("torch.compiler.is_exporting", return_value=True):
        others = max_pool_keeping_indices(x, kernel)
    assert torch.equal(others[0], maxima) and torch.equal(others[1], indices)


class Twice(nn.Module):
    def forward(self, x):
        once, first = max_pool_keeping_indices(x)
        twice, second = max_pool_keeping_indices(once, 3)
        return max_unpool(max_unpool(twice, second, once.shape[-2:]), first, x.shape[-2:])


def test_one_graph_serves_all_sizes():
    model, x = Twice(), torch.randn(1, 2, 15, 22)
    sizes = {2: Dim("height", min=7, max=4096), 3: Dim("width", min=7, max=4096)}
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": sizes}).module()
    for size in ((15, 22), (7, 7), (8, 31), (33, 20)):
        x = torch.randn(2, 2, *size)[:1]
        assert torch.equal(exported(x), model(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_precision_and_memory_format(memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 14).bfloat16().contiguous(memory_format=memory_format)
    maxima, indices = max_pool_keeping_indices(x)
    back = max_unpool(maxima, indices, x.shape[-2:])
    assert back.dtype == torch.bfloat16 and back.is_contiguous(memory_format=memory_format)
    assert torch.equal(back.float(), max_unpool(maxima.float(), indices, x.shape[-2:]))
    assert torch.equal(max_pool_keeping_indices(x.float())[1], indices)


def test_it_is_torchs_own_unpooling():
    torch.manual_seed(0)
    x, values = torch.randn(2, 3, 9, 14), torch.randn(2, 3, 5, 7)
    _, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    assert torch.equal(max_unpool(values, indices, (9, 14)), F.max_unpool2d(values, indices, 2, output_size=(9, 14)))


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
