"""Blended tiles against the definition: every pixel the average of its windows' logits, weighted, whatever is asked for."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixelwise.infer.tiling import Region
from pixelwise.infer.tiling.blend import BlendedTiles, starts, window_weights
from pixelwise.ops.cost import PassMemory

BLENDS = ("gaussian", "cosine", "uniform")
overlaps = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9])


def tiles_of(run, size, *, channels=1, classes=1, **options):
    options = {"window_px": 32, **options}
    return BlendedTiles(
        run, PassMemory(8.0), in_channels=channels, num_classes=classes, height=size[0], width=size[1], **options
    )


def reader(image):
    def read(top, left, height, width):
        assert 0 <= top <= top + height <= image.shape[1] and 0 <= left <= left + width <= image.shape[2]
        return image[:, top : top + height, left : left + width].clone()

    return read


def scored(tiles, image, region=None, classes=1):
    """The scores of a region, of which every pixel must come once."""
    region = region or Region(0, 0, *image.shape[1:])
    found = torch.full((classes, region.height, region.width), torch.nan)
    for part in tiles.score(reader(image), region):
        window = part.region
        assert part.values.dtype == torch.float32 and part.values.shape == (classes, window.height, window.width)
        rows = slice(window.top - region.top, window.bottom - region.top)
        columns = slice(window.left - region.left, window.right - region.left)
        assert found[:, rows, columns].shape == part.values.shape
        assert bool(found[:, rows, columns].isnan().all())
        found[:, rows, columns] = part.values
    assert not bool(found.isnan().any())
    return found


def regions(draw, height, width):
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Region(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))


class Centred(nn.Module):
    """Logits that depend on the window: what the mean of the window leaves of the image, and the place in the window."""

    def forward(self, image):
        height, width = image.shape[-2:]
        place = torch.arange(height)[:, None] / height + torch.arange(width) / width
        return torch.cat([image - image.mean((2, 3), keepdim=True), place.expand(len(image), 1, -1, -1)], 1)


def blended(run, image, window_px, overlap, weights, classes):
    """By the definition, with the whole image in memory, in float64."""
    _, height, width = image.shape
    size = (min(window_px, height), min(window_px, width))
    weight = window_weights(size, weights).double()
    total, sums = (
        torch.zeros(classes, height, width, dtype=torch.float64),
        torch.zeros(height, width, dtype=torch.float64),
    )
    for top in starts(height, size[0], overlap):
        for left in starts(width, size[1], overlap):
            part = (..., slice(top, top + size[0]), slice(left, left + size[1]))
            total[part] += run(image[part][None])[0].double() * weight
            sums[part] += weight
    return (total / sums).float()


@settings(deadline=None, max_examples=80, derandomize=True)
@given(data=st.data(), overlap=overlaps, blend=st.sampled_from(BLENDS))
def test_one_more_stays_one_more(data, overlap, blend):
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    window_px = data.draw(st.integers(1, 80) if overlap < 0.9 else st.integers(20, 80))
    image = torch.rand(1, height, width, generator=torch.Generator().manual_seed(height * width)) * 10 - 5
    budget = data.draw(st.sampled_from([None, 1, 20_000, 60_000]))
    tiles = tiles_of(
        lambda x: x + 1,
        (height, width),
        window_px=window_px,
        overlap=overlap,
        weights=blend,
        budget_bytes=budget,
    )
    region = regions(data.draw, height, width)
    expected = image[:, region.top : region.bottom, region.left : region.right] + 1
    assert torch.allclose(scored(tiles, image, region), expected, atol=2e-5, rtol=0)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data(), overlap=overlaps, blend=st.sampled_from(BLENDS))
def test_averages_are_those_of_the_definition_for_any_region(data, overlap, blend):
    height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    window_px = data.draw(st.integers(8, 40))
    image = torch.randn(2, height, width, generator=torch.Generator().manual_seed(height + 100 * width))
    budget = data.draw(st.sampled_from([None, 1, 40_000]))
    options = {"window_px": window_px, "overlap": overlap, "weights": blend}
    tiles = tiles_of(Centred(), (height, width), channels=2, classes=3, budget_bytes=budget, **options)
    expected = blended(Centred(), image, window_px, overlap, blend, 3)
    assert torch.allclose(scored(tiles, image, classes=3), expected, atol=1e-5)
    region = regions(data.draw, height, width)
    part = expected[:, region.top : region.bottom, region.left : region.right]
    assert torch.allclose(scored(tiles, image, region, classes=3), part, atol=1e-5)


@settings(max_examples=150, derandomize=True)
@given(length=st.integers(1, 3000), share=st.floats(0.001, 1), overlap=st.floats(0, 0.9))
@example(length=10, share=0.1, overlap=0.9)
@example(length=1, share=1.0, overlap=0.0)
def test_windows_cover_all_evenly_and_symmetrically(length, share, overlap):
    window = max(1, int(length * share))
    found = starts(length, window, overlap)
    assert found[0] == 0 and found[-1] == length - window
    gaps = [later - start for start, later in pairwise(found)]
    step = max(1, int(window * (1 - overlap)))
    assert all(1 <= gap <= step for gap in gaps)  # so none overlaps less than was asked for, and none comes twice
    assert not gaps or max(gaps) - min(gaps) <= 2
    mirrored = [length - window - start for start in reversed(found)]
    middle = len(found) // 2 if len(found) % 2 and (length - window) % 2 else None  # which then has no middle pixel
    assert all(
        start == other for place, (start, other) in enumerate(zip(found, mirrored, strict=True)) if place != middle
    )
    assert len(found) == 1 + math.ceil((length - window) / step)  # and no more than needed


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (32, 48), (129, 64)])
def test_gaussian_weights_are_the_importance_map_of_monai(size):
    # monai.data.utils.compute_importance_map(size, mode="gaussian", sigma_scale=0.125): along each side of length s,
    # exp(-x^2 / (2 (0.125 s)^2)) for x = -(s - 1) / 2, ..., (s - 1) / 2; multiplied; and at least 0.001.
    expected = torch.empty(size)
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = row - (size[0] - 1) / 2, column - (size[1] - 1) / 2
            value = math.exp(-(y**2) / (2 * (0.125 * size[0]) ** 2)) * math.exp(-(x**2) / (2 * (0.125 * size[1]) ** 2))
            expected[row, column] = max(value, 1e-3)
    assert torch.allclose(window_weights(size, "gaussian"), expected, rtol=1e-5)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (64, 33)])
def test_weights_are_symmetric_and_fall_to_the_border(blend, size):
    weights = window_weights(size, blend)
    assert weights.dtype == torch.float32 and weights.shape == size
    assert torch.equal(weights, weights.flip(0)) and torch.equal(weights, weights.flip(1))
    assert weights.min() >= 1e-3 and weights.max() <= 1
    half = weights[: (size[0] + 1) // 2, size[1] // 2]
    assert bool((half.diff() >= 0).all())
    assert blend != "uniform" or bool((weights == 1).all())


def test_numbers_of_sixteen_bits_do_not_overflow():
    image = torch.full((1, 40, 50), 60_000.0, dtype=torch.float16)
    tiles = tiles_of(lambda x: x.half(), (40, 50), window_px=16, overlap=0.75)
    assert torch.allclose(scored(tiles, image), torch.full((1, 40, 50), 60_000.0), rtol=1e-3)
    image = torch.rand(1, 40, 50)
    tiles = tiles_of(lambda x: x.bfloat16(), (40, 50), window_px=16, overlap=0.75, weights="uniform")
    assert torch.allclose(scored(tiles, image), image.bfloat16().float(), atol=1e-6)  # summed in float32


def test_an_image_smaller_than_the_window_is_one_window():
    image, sizes = torch.randn(2, 9, 13), []

    def run(x):
        sizes.append(tuple(x.shape))
        return Centred()(x)

    tiles = tiles_of(run, (9, 13), channels=2, classes=3, window_px=512)
    assert tiles.cost == 1
    assert torch.allclose(scored(tiles, image, classes=3), Centred()(image[None])[0], atol=1e-5)
    assert sizes == [(1, 2, 9, 13)]


def test_the_cost_is_that_of_the_windows():
    seen = []

    def run(x):
        seen.append(x[:, 0].numel())
        return x

    for budget in (None, 70_000):  # with the smaller one, columns are done in groups
        seen.clear()
        tiles = tiles_of(run, (90, 130), window_px=32, overlap=0.25, budget_bytes=budget)
        scored(tiles, torch.rand(1, 90, 130))
        assert tiles.cost == pytest.approx(sum(seen) / (90 * 130))
    assert tiles.group_px < 130


def test_errors_of_reading_come_out():
    def read(top, left, height, width):
        if top > 40:
            raise OSError("the disk is gone")
        return torch.zeros(1, height, width)

    with pytest.raises(OSError, match="the disk is gone"):
        list(tiles_of(lambda x: x, (100, 100)).score(read, Region(0, 0, 100, 100)))


class Largest(TorchDispatchMode):
    """Bytes of the largest memory behind any tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [item.untyped_storage().nbytes() for item in tree_leaves(out) if isinstance(item, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return out


@pytest.mark.parametrize("height", [400, 1600])
def test_nothing_is_of_the_size_of_the_scores(height):
    classes, width, window = 20, 48, 32
    tiles = tiles_of(lambda x: x.expand(-1, classes, -1, -1), (height, width), classes=classes)
    with Largest() as largest:
        for part in tiles.score(
            lambda top, left, rows, columns: torch.rand(1, rows, columns), Region(0, 0, height, width)
        ):
            assert part.values.shape[1] <= window
    # the band is the largest, and it does not grow with the image
    assert largest.bytes == 4 * (classes + 1) * window * width < 4 * classes * height * width / 10


@pytest.mark.parametrize("budget", [10**5, 10**6])
def test_columns_in_groups_keep_to_the_budget(budget):
    tiles = tiles_of(lambda x: x, (3000, 40_000), classes=10, window_px=32, budget_bytes=budget)
    one = tiles_of(lambda x: x, (3000, 32), classes=10, window_px=32)
    assert tiles.memory_bytes <= max(budget, one.memory_bytes)
    assert tiles.group_px < 40_000
