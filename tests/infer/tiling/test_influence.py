import pytest
import torch
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.infer.tiling import Region
from pixelwise.infer.tiling.halo import HaloTiles
from pixelwise.infer.tiling.influence import Influence, cut_radius, influence, like_a_photo
from pixelwise.models import create_model
from pixelwise.ops.cost import PassMemory
from pixelwise.ops.receptive_field import ReceptiveField, receptive_field


def column(*weights, before):
    """One row of scores is the sum of the `before` rows above it, itself and those below, by these weights."""
    kernel = torch.tensor(weights).view(1, 1, -1, 1)
    after = len(weights) - 1 - before
    field = ReceptiveField(bounded=True, stride=1, radius_px=(before, after, 0, 0), size_px=(len(weights), 1))
    return (lambda x: nn.functional.conv2d(nn.functional.pad(x, (0, 0, before, after)), kernel)), field


def test_the_change_is_that_of_what_lies_beyond():
    """With white images it is known: the squares of the weights beyond, over those of all weights."""
    run, field = column(0.1, 0.0, 0.2, 1.0, 0.4, before=3)
    found = influence(run, field, in_channels=1, images=3, broad_px=4000, draw=white)
    total = 0.01 + 0.04 + 1 + 0.16
    above = torch.tensor([0.05, 0.01, 0.01, 0.0]).div(total).sqrt()
    below = torch.tensor([0.16, 0.0]).div(total).sqrt()
    assert torch.allclose(found.sides[0], above, rtol=0.05) and torch.allclose(found.sides[1], below, rtol=0.05)
    assert [side.tolist() for side in found.sides[2:]] == [[0.0], [0.0]]
    assert found.radius(0.4, field.radius_px) == (1, 1, 0, 0)
    assert found.radius(0.1, field.radius_px) == (3, 1, 0, 0)
    assert found.radius(0.9, field.radius_px) == (0, 0, 0, 0)


def white(channels, height, width, generator):
    return torch.randn(channels, height, width, generator=generator)


def test_columns_are_told_from_rows():
    run, field = column(0.001, 1.0, before=1)
    turned = ReceptiveField(bounded=True, stride=1, radius_px=(0, 0, 1, 0), size_px=(1, 2))
    upright = influence(run, field, in_channels=1)
    across = influence(lambda x: run(x.transpose(2, 3)).transpose(2, 3), turned, in_channels=1)
    assert torch.equal(upright.sides[0], across.sides[2]) and torch.equal(upright.sides[3], across.sides[1])


def test_radii_are_whole_strides_and_never_more_than_the_field():
    sides = (torch.tensor([0.5, 0.2, 0.1, 0.0]),) * 4
    found = Influence(stride=16, sides=sides)
    most = (40, 48, 33, 7)
    assert found.radius(2.0, most) == (0, 0, 0, 0)
    assert found.radius(0.5, most) == (16, 16, 16, 7)
    assert found.radius(0.2, most) == (32, 32, 32, 7)
    assert found.radius(1e-9, most) == (40, 48, 33, 7)


def test_scores_that_overflow_keep_the_whole_halo():
    run, field = column(1.0, 1.0, 1.0, before=1)
    assert cut_radius(lambda x: run(x) / 0, field, 0.5, in_channels=1) == (1, 1, 0, 0)
    assert cut_radius(lambda x: run(x) * 0, field, 0.5, in_channels=1) == (0, 0, 0, 0)


def test_zero_is_the_whole_field_and_no_field_is_told():
    run, field = column(0.0, 1.0, 0.0, before=1)
    assert cut_radius(run, field, 0.0, in_channels=1) == field.radius_px
    for tolerance in (0.0, 0.1):
        with pytest.raises(UsageError, match="tolerance cuts the halo of a network whose receptive field has an end"):
            cut_radius(run, ReceptiveField(bounded=False), tolerance, in_channels=1)


def test_images_are_narrowed_to_the_memory():
    shapes = []

    def run(x):
        shapes.append(tuple(x.shape))
        return x

    field = ReceptiveField(bounded=True, stride=8, radius_px=(8, 8, 8, 8), size_px=(17, 17))
    memory = PassMemory(per_px=1.0)
    cut_radius(run, field, 0.1, in_channels=1, memory=memory, budget_bytes=32 * 64)
    assert shapes[0] == (1, 1, 32, 64) and max(height * width for *_, height, width in shapes) == 32 * 64
    with pytest.raises(UsageError, match="32 x 8 px must go through the network at once"):
        cut_radius(run, field, 0.1, in_channels=1, memory=memory, budget_bytes=32 * 8 - 1)


@pytest.fixture(scope="module")
def u_net():
    torch.manual_seed(0)
    model = create_model("unet", num_classes=4, widths=(4, 6, 8, 12), batch_norm=True).eval()
    return model, receptive_field(model)


def test_the_same_each_time(u_net):
    model, field = u_net
    state = torch.get_rng_state()
    first = influence(model, field, in_channels=3)
    assert torch.equal(torch.get_rng_state(), state)
    again = influence(model, field, in_channels=3)
    assert all(torch.equal(one, other) for one, other in zip(first.sides, again.sides, strict=True))
    assert all(bool((side[1:] <= side[:-1]).all()) for side in first.sides)


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-3])
def test_tiles_are_right_but_for_the_tolerance(u_net, tolerance):
    model, field = u_net
    radius = cut_radius(model, field, tolerance, in_channels=3)
    assert all(px % field.stride == 0 or px == most for px, most in zip(radius, field.radius_px, strict=True))
    size = 160
    image = like_a_photo(3, size, size, torch.Generator().manual_seed(5))
    with torch.inference_mode():
        right = model(image[None])[0]
    tiles = HaloTiles(
        model, field, PassMemory(1.0), in_channels=3, num_classes=4, height=size, width=size, tile_px=32, radius_px=radius
    )  # fmt: skip
    found = torch.full_like(right, torch.nan)
    for part in tiles.score(lambda y, x, h, w: image[:, y : y + h, x : x + w], Region(0, 0, size, size)):
        found[:, part.region.top : part.region.bottom, part.region.left : part.region.right] = part.values
    spread = right.var((1, 2)).mean().sqrt()
    change = (found - right).square().mean().sqrt() / spread
    assert float(change) <= tolerance
    if tolerance == 0.1:  # the halo was cut indeed
        assert float(change) > 1e-5 and max(radius) < max(field.radius_px)


def test_images_are_like_photos():
    image = like_a_photo(2, 60, 250, torch.Generator().manual_seed(1))
    assert torch.allclose(image.mean((1, 2)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(image.std((1, 2)), torch.ones(2), atol=1e-4)
    assert float((image[0] * image[1]).mean()) == pytest.approx(0.9, abs=0.05)  # channels are alike
    near, far = ((image[:, :, step:] - image[:, :, :-step]).std() for step in (1, 50))
    assert near < 0.75 * far
    assert like_a_photo(1, 1, 1, torch.Generator().manual_seed(1)).isfinite().all()
