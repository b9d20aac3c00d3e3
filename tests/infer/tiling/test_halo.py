import random
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.infer.tiling import Region
from pixelwise.infer.tiling.halo import BATCH_PX, Axis, HaloTiles
from pixelwise.models import create_model, list_models
from pixelwise.ops.cost import PassMemory
from pixelwise.ops.receptive_field import ReceptiveField, receptive_field

CLASSES = 3
MEMORY = PassMemory(per_px=100.0)


@cache
def network(name):
    torch.manual_seed(7)
    model = create_model(name, tiny=True, num_classes=CLASSES).eval()
    for parameter in model.parameters():
        if not parameter.any():  # scores that start as zeros would hide what is wrong
            nn.init.normal_(parameter, std=0.1)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.1)
    return model.requires_grad_(False), receptive_field(model)


def reader(image):
    return lambda top, left, height, width: image[:, top : top + height, left : left + width]


def halo_tiles(run, field, image, **options):
    channels, height, width = image.shape
    options = {"in_channels": channels, "num_classes": CLASSES, "height": height, "width": width} | options
    return HaloTiles(run, field, MEMORY, **options)


def joined(tiles, image, region=None):
    """The scores of a region, each pixel of which must come once."""
    region = region or Region(0, 0, *image.shape[1:])
    scores = torch.full((CLASSES, region.height, region.width), torch.nan)
    for part in tiles.score(reader(image), region):
        top, left = part.region.top - region.top, part.region.left - region.left
        assert min(top, left) >= 0 and part.values.dtype == torch.float32
        window = scores[:, top : top + part.region.height, left : left + part.region.width]
        assert window.shape == part.values.shape and bool(window.isnan().all())
        window.copy_(part.values)
    assert not scores.isnan().any()
    return scores


def assert_equal_but_for_rounding(found, right):
    largest = max(1.0, float(right.abs().max()))
    assert float((found - right).abs().max()) <= 1e-4 * largest
    other = found.argmax(0) != right.argmax(0)
    best = right.topk(2, dim=0).values
    assert bool(((best[0] - best[1])[other] <= 2e-4 * largest).all())  # a tie


@pytest.mark.parametrize("name", list_models())
def test_tiles_equal_one_pass(name):
    model, field = network(name)
    assert field.bounded
    chance = random.Random(name)
    for turned in (False, True):
        before, after = field.radius_px[2:] if turned else field.radius_px[:2]
        long = before + after + chance.randrange(4 * field.stride + 40)
        size = (long, chance.randint(1, 40))
        height, width = size[::-1] if turned else size
        image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(long))
        with torch.inference_mode():
            right = model(image[None])[0]
        assert float(right.std()) > 1e-4
        tiles = halo_tiles(
            model, field, image, tile_px=chance.randint(long // 4, long // 2), batch=chance.choice((1, 2, None))
        )
        top, left = chance.randrange(height), chance.randrange(width)
        region = Region(top, left, chance.randint(1, height - top), chance.randint(1, width - left))
        cut = right[:, region.top : region.bottom, region.left : region.right]
        assert_equal_but_for_rounding(joined(tiles, image, region), cut)


SMALL = ("unet", "patch_classifier", "segnet_basic")


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(SMALL),
    height=st.integers(1, 170),
    width=st.integers(1, 170),
    tile=st.integers(1, 150),
    batch=st.sampled_from([None, 1, 2, 5]),
    corner=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    share=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
@example("unet", 1, 1, 1, None, (0.0, 0.0), (1.0, 1.0))
@example("unet", 97, 3, 8, 5, (0.0, 0.0), (1.0, 1.0))
def test_any_size_tile_batch_and_region(name, height, width, tile, batch, corner, share):
    model, field = network(name)
    tile = max(tile, height // 4, width // 4)
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))
    with torch.inference_mode():
        right = model(image[None])[0]
    tiles = halo_tiles(model, field, image, tile_px=tile, batch=batch)
    top, left = int(corner[0] * height), int(corner[1] * width)
    region = Region(top, left, max(1, int(share[0] * (height - top))), max(1, int(share[1] * (width - left))))
    cut = right[:, region.top : region.bottom, region.left : region.right]
    assert_equal_but_for_rounding(joined(tiles, image, region), cut)


@settings(deadline=None, max_examples=200)
@given(
    length=st.integers(1, 3000),
    stride=st.sampled_from([1, 4, 12, 32]),
    before=st.integers(0, 400),
    after=st.integers(0, 400),
    shortest=st.sampled_from([0, 333, 800]),
    tile=st.integers(1, 40),
)
def test_cores_and_crops_start_on_the_stride_and_carry_the_halo(length, stride, before, after, shortest, tile):
    axis = Axis(length, stride, before, after, shortest)
    cores = axis.cores(tile * stride)
    assert [start for start, _ in cores] == [0, *(stop for _, stop in cores[:-1])] and cores[-1][1] == length
    for start, stop in cores:
        low, high = axis.crop(start, stop)
        assert start % stride == 0 and low % stride == 0 and stop - start <= tile * stride
        assert low == 0 or start - low >= before
        assert high == length or (high - stop >= after and high % stride == 0)
        assert high - low >= min(length, before + after + 1)
        assert 0 < low < high < length or high - low >= min(length, shortest)
    assert axis.sums(tile * stride)[0] == sum(high - low for low, high in (axis.crop(*core) for core in cores))


class Averages(nn.Module):
    """The mean of 3 x 3 pixels for each class, and what it was given."""

    def __init__(self, most_px=None):
        super().__init__()
        self.most_px, self.shapes = most_px, []

    def forward(self, x):
        if self.most_px is not None and x.shape[0] * x.shape[2] * x.shape[3] > self.most_px:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12345 bytes")
        self.shapes.append(tuple(x.shape))
        mean = nn.functional.avg_pool2d(x, 3, 1, 1)
        return torch.cat([mean, -mean, mean * 0], 1)


AVERAGES = ReceptiveField(bounded=True, stride=2, radius_px=(1, 1, 1, 1), size_px=(3, 3))


def test_the_cost_is_what_goes_through_the_network():
    run, image = Averages(), torch.randn(1, 61, 43)
    tiles = halo_tiles(run, AVERAGES, image, tile_px=9, batch=3)
    scores = joined(tiles, image)
    assert torch.allclose(scores, Averages()(image[None])[0], atol=1e-6)
    computed = sum(count * height * width for count, _, height, width in run.shapes)
    assert tiles.cost == pytest.approx(computed / (61 * 43))
    assert max(count for count, *_ in run.shapes) == 3


def test_a_region_computes_only_the_tiles_it_touches():
    run, image = Averages(), torch.randn(1, 64, 64)
    tiles = halo_tiles(run, AVERAGES, image, tile_px=16, batch=1)
    joined(tiles, image, Region(20, 20, 3, 3))
    assert run.shapes == [(1, 1, 20, 20)]


def test_other_errors_are_not_swallowed():
    def broken(x):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        joined(halo_tiles(broken, AVERAGES, torch.zeros(1, 8, 8)), torch.zeros(1, 8, 8))


def test_a_budget_that_holds_no_tile_is_told():
    with pytest.raises(UsageError, match=r"the smallest exact tile takes .* px with its halo\), and 0 MiB are allowed"):
        halo_tiles(Averages(), AVERAGES, torch.zeros(1, 80, 80), budget_bytes=100)


def test_a_field_without_end_is_told():
    with pytest.raises(UsageError, match="--blend gaussian"):
        halo_tiles(Averages(), ReceptiveField(bounded=False), torch.zeros(1, 8, 8))


@pytest.mark.parametrize("budget", [60_000, 200_000, 2_000_000])
def test_tiles_are_as_large_as_the_budget_allows(budget):
    image = torch.randn(1, 150, 130)
    tiles = halo_tiles(Averages(), AVERAGES, image, budget_bytes=budget)
    assert tiles.memory_bytes <= budget
    assert torch.allclose(joined(tiles, image), Averages()(image[None])[0], atol=1e-6)
    if budget == 2_000_000:
        assert tiles.cost < 1.2


def test_small_tiles_go_together_as_memory_allows():
    image = torch.zeros(1, 640, 640)
    alone = halo_tiles(Averages(), AVERAGES, image, tile_px=64, budget_bytes=1_000_000)
    many = halo_tiles(Averages(), AVERAGES, image, tile_px=64, budget_bytes=2**30)
    assert alone.batch == 1 and alone.memory_bytes <= 1_000_000
    assert many.batch == min(100, BATCH_PX // 68**2) and many.memory_bytes <= 2**30
    some = halo_tiles(Averages(), AVERAGES, image, tile_px=64, budget_bytes=4_000_000)
    assert 1 < some.batch < many.batch and some.memory_bytes <= 4_000_000
    assert halo_tiles(Averages(), AVERAGES, torch.zeros(1, 64, 64), tile_px=64).batch == 1


def test_a_cut_halo_changes_scores_near_the_cut_only():
    wide = ReceptiveField(bounded=True, stride=1, radius_px=(4, 4, 4, 4), size_px=(9, 9))
    image = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(1, 1, 9, 9) / 81

    def run(x):
        mean = nn.functional.conv2d(x, weights, padding=4)
        return torch.cat([mean, -mean, mean * 0], 1)

    right = run(image[None])[0]
    assert torch.allclose(joined(halo_tiles(run, wide, image, tile_px=20), image), right, atol=1e-6)
    tiles = halo_tiles(run, wide, image, tile_px=20, radius_px=(1, 1, 1, 1))
    assert tiles.cost == pytest.approx(21**2 / 20**2)
    difference = (joined(tiles, image) - right).abs().amax(0)
    assert float(difference.max()) > 1e-3
    assert float(difference[:17, :17].max()) < 1e-6 and float(difference[23:, 23:].max()) < 1e-6
