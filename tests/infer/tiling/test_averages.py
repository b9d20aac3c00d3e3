import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pixelwise.infer.tiling.averages as module
from pixelwise.infer.options import Decision
from pixelwise.infer.tiling import Region, Scores
from pixelwise.infer.tiling.averages import (
    TRANSFORMS,
    Average,
    Ensemble,
    Transform,
    Transformed,
    average_bytes,
    on_sample,
    scored,
    tiles,
)
from pixelwise.infer.tiling.averages import averaged as averaged_function
from pixelwise.models import create_model
from pixelwise.ops.dropout import set_sample, spatial_dropout, with_spatial_dropout


def averaged(passes):
    average = Average()
    for item in passes:
        average.add(item)
    return average.result()


def reader(image):
    return lambda top, left, height, width: image[:, top : top + height, left : left + width]


def window_of(scores):
    """A member that knows the scores of the whole image."""
    return lambda read, region: scores[:, region.top : region.bottom, region.left : region.right]


def joined(scorer, read, region):
    values = torch.full((3, region.height, region.width), torch.nan)
    spread = torch.full((region.height, region.width), torch.nan)
    for part in scorer.score(read, region):
        rows = slice(part.region.top - region.top, part.region.bottom - region.top)
        columns = slice(part.region.left - region.left, part.region.right - region.left)
        assert bool(values[:, rows, columns].isnan().all())  # each pixel once
        values[:, rows, columns], spread[rows, columns] = part.values, part.spread
    return values, spread


@pytest.mark.parametrize("count", [1, 2, 7])
def test_means_are_those_of_all_passes_kept(count, monkeypatch):
    passes = torch.randn(count, 4, 9, 5) * 3
    values, spread = averaged(passes)
    p = passes.double().softmax(1)
    assert torch.allclose(values.double(), p.mean(0).log(), atol=1e-5)
    assert torch.allclose(values.softmax(0).double(), p.mean(0), atol=1e-6)
    assert torch.allclose(spread.double(), -(p * p.log()).sum(1).mean(0), atol=1e-5)
    monkeypatch.setattr(module, "_CHUNK", 40)
    banded = averaged(passes)
    assert torch.allclose(banded[0], values, atol=1e-6) and torch.allclose(banded[1], spread, atol=1e-6)


def test_equal_passes_change_nothing():
    scores = torch.randn(3, 5, 6)
    values, _ = averaged([scores] * 7)
    assert torch.equal(values, averaged([scores])[0])
    assert torch.equal(values.argmax(0), scores.argmax(0))


def test_sure_passes_stay_finite_and_disagreement_is_mutual_information():
    values, spread = averaged([torch.tensor([1e4, 0.0]).view(2, 1, 1), torch.tensor([0.0, 1e4]).view(2, 1, 1)])
    assert torch.allclose(values.flatten(), torch.tensor([0.5, 0.5]).log()) and float(spread) == 0
    values, spread = averaged([torch.tensor([1e4, 0.0, -math.inf]).view(3, 1, 1)])
    assert bool(torch.isfinite(values).all()) and values[0] == 0 and values[1] < -80


@settings(deadline=None, max_examples=30)
@given(classes=st.integers(1, 6), count=st.integers(1, 5), scale=st.sampled_from([0.0, 0.01, 1.0, 30.0]))
def test_mutual_information_is_between_zero_and_the_entropy(classes, count, scale):
    values, spread = averaged(torch.randn(count, classes, 3, 4) * scale)
    decision = Decision(num_classes=classes, maps=("entropy", "mutual_information", "max_probability"))
    maps = decision(Scores(Region(0, 0, 3, 4), values, spread))
    assert (maps["mutual_information"] >= 0).all() and (maps["entropy"] >= maps["mutual_information"] - 1e-6).all()
    assert (maps["entropy"] <= math.log(classes) + 1e-5).all()
    assert (maps["max_probability"] >= 1 / classes - 1e-6).all()
    raw = torch.special.entr(values.double().softmax(0)).sum(0) - spread
    assert float(raw.min()) > -1e-5  # not negative but for rounding
    if count == 1:
        assert (maps["mutual_information"] < 1e-5).all()


def test_overflow_is_not_hidden():
    scores = torch.zeros(2, 1, 2)
    scores[0, 0, 1] = math.nan
    values, spread = averaged([torch.zeros(2, 1, 2), scores])
    assert values.isnan().any(0).tolist() == [[False, True]] and spread.isnan().tolist() == [[False, True]]


def test_half_precision_is_averaged_in_float32():
    passes = torch.randn(5, 3, 4, 4).to(torch.bfloat16)
    values, spread = averaged(passes)
    assert values.dtype == spread.dtype == torch.float32
    assert torch.allclose(values.softmax(0), passes.float().softmax(1).mean(0), atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_tiles_cover_each_pixel_once_on_one_grid(data):
    top, left, height, width = (data.draw(st.integers(low, 30)) for low in (0, 0, 1, 1))
    side = data.draw(st.integers(1, 40))
    count = torch.zeros(60, 60)
    for tile in tiles(Region(top, left, height, width), side):
        assert tile.top // side == (tile.bottom - 1) // side and tile.left // side == (tile.right - 1) // side
        count[tile.top : tile.bottom, tile.left : tile.right] += 1
    wanted = torch.zeros(60, 60)
    wanted[top : top + height, left : left + width] = 1
    assert torch.equal(count, wanted)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_tile_size_and_region_change_nothing(data):
    height, width, side = (data.draw(st.integers(1, 12)) for _ in range(3))
    passes = torch.randn(3, 3, height, width)
    ensemble = Ensemble([window_of(item) for item in passes], num_classes=3, tile_px=side)
    whole = averaged(passes)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    region = Region(top, left, height - top, width - left)
    values, spread = joined(ensemble, None, region)
    assert torch.allclose(values, whole[0][:, top:, left:], atol=1e-6)
    assert torch.allclose(spread, whole[1][top:, left:], atol=1e-6)


def test_one_member_is_in_memory_at_a_time():
    alive = []

    def member(read, region):
        assert not [item for item in alive if item() is not None]
        import weakref

        scores = torch.zeros(2, region.height, region.width)
        alive.append(weakref.ref(scores))
        return scores

    ensemble = Ensemble([member] * 5, num_classes=2, tile_px=64, memory_bytes=1000)
    assert len(list(ensemble.score(None, Region(0, 0, 64, 64)))) == 1 and len(alive) == 5
    assert ensemble.memory_bytes == 1000 + average_bytes(2, 64, 64)


def test_windows_of_a_scorer_are_joined():
    class Rows:
        way, cost, memory_bytes = "rows", 1.0, 0

        def score(self, read, region):
            for top in range(region.top, region.bottom):
                yield Scores(Region(top, region.left, 1, region.width), read(top, region.left, 1, region.width))

    image = torch.randn(3, 7, 8)
    member = partial(scored, Rows(), Transform(), (7, 8))
    assert torch.equal(member(reader(image), Region(2, 1, 4, 5)), image[:, 2:6, 1:6])
    ensemble = Ensemble([member] * 2, num_classes=3, tile_px=3)
    values, _ = joined(ensemble, reader(image), Region(0, 0, 7, 8))
    assert torch.allclose(values.softmax(0), image.softmax(0), atol=1e-6)


def test_a_function_of_members_does_the_same_maths():
    torch.manual_seed(0)
    model, image = create_model("unet", tiny=True, num_classes=3).eval(), torch.rand(2, 3, 17, 22)
    members = [Transformed(model, item) for item in TRANSFORMS["d4"]]
    found = averaged_function(members)(image)
    values, spread = found[:, :-1], found[:, -1]
    with torch.no_grad():
        wanted = averaged([member(image) for member in members])
    assert values.shape == (2, 3, 17, 22) and spread.shape == (2, 17, 22)
    assert torch.equal(values, wanted[0]) and torch.equal(spread, wanted[1])
    assert not values.requires_grad


class Masked(nn.Module):
    """Dropout, then a score for each pixel: the network whose tiles are simplest."""

    def __init__(self):
        super().__init__()
        self.drop, self.score = nn.Dropout(0.5), nn.Conv2d(3, 3, 1)

    def forward(self, image):
        return self.score(self.drop(image))


def test_dropout_over_tiles_equals_dropout_over_the_image():
    torch.manual_seed(0)
    model = with_spatial_dropout(Masked(), seed=5)
    image = torch.rand(3, 13, 18)

    @torch.no_grad()
    def window(read, region):
        drop = model.drop
        x = read(region.top, region.left, region.height, region.width)[None]
        x = spatial_dropout(x, drop.p, drop.seed, drop.sample, 0, region.top, region.left, False)
        return model.score(x)[0]

    tiled = Ensemble([on_sample(model, sample, window) for sample in range(6)], num_classes=3, tile_px=5)
    values, spread = joined(tiled, reader(image), Region(0, 0, 13, 18))
    whole = averaged_function([on_sample(model, sample, model) for sample in range(6)])(image[None])[0]
    wanted_values, wanted_spread = whole[:-1], whole[-1]
    assert torch.allclose(values, wanted_values, atol=1e-5) and torch.allclose(spread, wanted_spread, atol=1e-5)
    with torch.no_grad():
        set_sample(model, 3)
        assert not torch.allclose(model(image[None])[0].softmax(0), values.softmax(0), atol=1e-2)
