"""The way is chosen by network and memory; averaged passes are the same numbers whichever way they are computed."""

import pytest
import torch
from torch import nn

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import UsageError
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.options import Tiling
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.tiling import Region, choose_scorer
from pixelwise.models import create_model

SPEC = LabelSpec(names=("a", "b", "c"), colors=((0, 0, 0), (9, 9, 9), (5, 5, 5)), values=((0,), (1,), (2,)))
HEIGHT, WIDTH = 141, 118


def predictor_of(name, **options):
    torch.manual_seed(0)
    config = {"tiny": True, "num_classes": 3, "in_channels": 3}
    model = create_model(name, **config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    card = ModelCard(model=name, config=config, labels=SPEC, mean=(0.5,) * 3, std=(0.2,) * 3)
    return Predictor(model, card, device="cpu", precision="float32", **options)


def scores_of(predictor, tiling, notes=None):
    image = torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    scorer = choose_scorer(predictor, HEIGHT, WIDTH, tiling, (notes if notes is not None else []).append)
    values, spread = torch.full((3, HEIGHT, WIDTH), torch.nan), torch.zeros(HEIGHT, WIDTH)
    read = lambda top, left, height, width: image[:, top : top + height, left : left + width]  # noqa: E731
    with torch.inference_mode():
        for part in scorer.score(read, Region(0, 0, HEIGHT, WIDTH)):
            rows = slice(part.region.top, part.region.bottom)
            columns = slice(part.region.left, part.region.right)
            assert bool(values[:, rows, columns].isnan().all())  # each pixel once
            values[:, rows, columns] = part.values
            spread[rows, columns] = part.spread if part.spread is not None else 0
    assert not bool(values.isnan().any())
    return scorer, values, spread


@pytest.mark.parametrize(
    ("tiling", "way"),
    [
        (Tiling(), "whole image"),
        (Tiling(tile_px=40), "stripes of 40 rows in 3 columns"),
        (Tiling(memory_bytes=1 << 20), "stripes"),
        (Tiling(tolerance=1e-3), "halo tiles"),
        (Tiling(blend="cosine", tile_px=64), "blended tiles"),
    ],
)
def test_the_way_follows_the_wishes_and_the_memory(tiling, way):
    predictor = predictor_of("unet")
    scorer, values, _ = scores_of(predictor, tiling)
    assert scorer.way.startswith(way) and scorer.cost >= 1
    if not tiling.blend and not tiling.tolerance:
        exact = scores_of(predictor, Tiling())[1]
        assert torch.allclose(values, exact, atol=1e-4)


@pytest.mark.parametrize("wish", [{"tta": "flips"}, {"tta": "d4"}, {"tta": "scales"}, {"samples": 3, "seed": 5}])
def test_averages_are_the_same_from_the_whole_image_and_from_tiles(wish):
    predictor = predictor_of("fcdensenet56" if "samples" in wish else "unet")
    whole, values, spread = scores_of(predictor, Tiling(**wish))
    tiles, tiled, tiled_spread = scores_of(predictor, Tiling(tile_px=67, **wish))
    assert "whole image" in whole.way and "tiles of 67 px" in tiles.way and tiles.cost > whole.cost > 2
    assert torch.allclose(tiled, values, atol=1e-4) and torch.allclose(tiled_spread, spread, atol=1e-4)
    assert torch.allclose(values.exp().sum(0), torch.ones(HEIGHT, WIDTH), atol=1e-5)
    assert float(spread.max()) > 0
    blended = scores_of(predictor, Tiling(blend="uniform", tile_px=512, **wish))  # one window: nothing to blend
    assert torch.allclose(blended[1], values, atol=1e-4) and torch.allclose(blended[2], spread, atol=1e-4)


def test_the_flips_are_those_of_the_image_itself():
    predictor = predictor_of("unet")
    image = torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    passes = []
    for axes in ([], [-2], [-1], [-2, -1]):
        with torch.inference_mode():
            passes.append(predictor.model(image.flip(axes)[None])[0].flip(axes).softmax(0))
    mean = torch.stack(passes).mean(0)
    assert torch.allclose(scores_of(predictor, Tiling(tta="flips"))[1].exp(), mean, atol=1e-5)


def test_more_scales_take_more_memory_than_flips():
    predictor = predictor_of("unet")
    assert (
        scores_of(predictor, Tiling(tta="scales"))[0].memory_bytes
        > scores_of(predictor, Tiling(tta="flips"))[0].memory_bytes
    )


def test_a_network_without_end_is_blended_and_says_why():
    class Global(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x) + x.mean((2, 3), keepdim=True)

    predictor = predictor_of("unet")
    predictor.model = Global(predictor.model).eval()
    for wish in ({}, {"tta": "flips"}):
        notes = []
        scorer = scores_of(predictor, Tiling(memory_bytes=1 << 20, **wish), notes)[0]
        assert "blended tiles" in scorer.way and "blended" in notes[0] and "mean" in notes[0]


def test_wishes_that_cannot_be_met():
    with pytest.raises(UsageError, match="no dropout"):
        scores_of(predictor_of("unet"), Tiling(samples=2))
    with pytest.raises(UsageError, match="tolerance cannot be combined"):
        Tiling(tolerance=1e-3, tta="flips")
    with pytest.raises(UsageError, match="statistics"):
        predictor_of("segnet", batch_statistics=True).predict(torch.zeros(3, HEIGHT, WIDTH), tile_px=50)


def test_what_was_found_is_kept_for_images_of_the_same_size():
    predictor = predictor_of("unet")
    first = choose_scorer(predictor, 300, 200, Tiling(tile_px=64))
    assert choose_scorer(predictor, 300, 200, Tiling(tile_px=64)) is first
    for height in range(301, 305):
        choose_scorer(predictor, height, 200, Tiling(tile_px=64))
    assert choose_scorer(predictor, 300, 200, Tiling(tile_px=64)) is not first and len(predictor.scorers) == 4
