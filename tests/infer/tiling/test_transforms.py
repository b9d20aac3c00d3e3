import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pixelwise.infer.tiling import Region
from pixelwise.infer.tiling.averages import TRANSFORMS, Transform, Transformed
from pixelwise.models import create_model

EXACT = [
    pytest.param(item, id=f"{name}{index}") for name in ("flips", "d4") for index, item in enumerate(TRANSFORMS[name])
]
ALL = [pytest.param(item, id=f"{name}{index}") for name in TRANSFORMS for index, item in enumerate(TRANSFORMS[name])]
SIZES = [(1, 1), (1, 7), (6, 1), (5, 8), (9, 4)]


def same_for_all_turns():
    """A convolution whose kernel looks the same from all sides: turned images give turned scores."""
    conv = nn.Conv2d(3, 2, 3, padding=1).eval()
    with torch.no_grad():
        turns = [torch.rot90(conv.weight, turn, (2, 3)) for turn in range(4)]
        conv.weight.copy_(sum(item + item.flip(3) for item in turns))
    return conv.requires_grad_(False)


@pytest.mark.parametrize("transform", EXACT)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_undone_is_what_was(transform, size):
    image = torch.rand(2, 3, *size)
    assert torch.equal(transform.undo(transform.apply(image), size), image)


@pytest.mark.parametrize("name, count", [("flips", 4), ("d4", 8)])
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_the_sets_hold_each_symmetry_once(name, count, size):
    image = torch.arange(size[0] * size[1], dtype=torch.float32).reshape(1, 1, *size)
    seen = {(tuple(item.shape), tuple(item.flatten().tolist())) for item in (t.apply(image) for t in TRANSFORMS[name])}
    assert len(seen) == count == len(TRANSFORMS[name])
    wanted = [image, image.flip(-1), image.flip(-2), image.flip(-1, -2)]
    if name == "d4":
        wanted += [torch.rot90(image, turn, (-2, -1)) for turn in range(4)]
    assert all((tuple(item.shape), tuple(item.flatten().tolist())) in seen for item in wanted)
    assert TRANSFORMS[name][0] == Transform()


def test_scales():
    image = torch.rand(1, 3, 10, 7)
    sizes = [tuple(item.apply(image).shape[2:]) for item in TRANSFORMS["scales"]]
    assert sizes == [(8, 5), (10, 7), (13, 9)]
    assert TRANSFORMS["scales"][1].apply(image) is image
    half = Transform(scale=0.5).apply(torch.tensor([[[[0.0, 2.0, 4.0, 6.0]] * 4]]))
    assert torch.equal(half, torch.tensor([[[[1.0, 5.0]] * 2]]))


@pytest.mark.parametrize("transform", ALL)
@pytest.mark.parametrize("size", SIZES)
def test_scores_have_the_size_of_the_image(transform, size):
    scores = Transformed(nn.Conv2d(3, 4, 1), transform)(torch.rand(2, 3, *size))
    assert scores.shape == (2, 4, *size) and bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("transform", EXACT)
def test_a_network_that_is_the_same_for_all_turns_is_not_changed(transform):
    model, image = same_for_all_turns(), torch.rand(1, 3, 6, 9)
    assert torch.allclose(Transformed(model, transform)(image), model(image), atol=1e-5)


@pytest.mark.parametrize("transform", ALL)
def test_constant_images_and_single_scores_are_kept(transform):
    assert torch.allclose(Transformed(nn.Identity(), transform)(torch.full((1, 1, 5, 4), 3.0)), torch.tensor(3.0))


def test_a_turned_image_gives_the_turned_scores_of_the_other_transform():
    """Position matters here: the mean over the flips of a network is the same for an image and its mirror image."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 3, padding=1).requires_grad_(False)
    image = torch.rand(1, 3, 6, 9)

    def mean(x):
        return torch.stack([Transformed(model, item)(x) for item in TRANSFORMS["d4"]]).mean(0)

    for turn in range(4):
        assert torch.allclose(mean(torch.rot90(image, turn, (2, 3))), torch.rot90(mean(image), turn, (2, 3)), atol=1e-6)


@pytest.mark.parametrize("transform", ALL)
def test_it_is_captured_at_a_fixed_size(transform):
    torch.manual_seed(0)
    model = Transformed(create_model("unet", tiny=True, num_classes=3).eval(), transform)
    image = torch.rand(1, 3, 20, 28)
    with torch.no_grad():
        wanted = model(image)
        for graph in (torch.export.export(model, (image,), strict=False).module(), make_fx(model)(image)):
            assert torch.allclose(graph(image), wanted, atol=1e-6)


def test_half_precision_and_the_mode_stay():
    model = Transformed(nn.Identity().train(), TRANSFORMS["scales"][0])
    assert model.training and not Transformed(nn.Identity().eval(), Transform()).training
    assert model(torch.rand(1, 2, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("transform", EXACT)
def test_windows_of_the_transformed_image_are_read_and_placed(transform):
    image = torch.arange(35.0).reshape(1, 5, 7)
    whole = transform.apply(image)
    read = transform.reader(lambda top, left, height, width: image[:, top : top + height, left : left + width], (5, 7))
    for region in (Region(0, 0, *whole.shape[1:]), Region(1, 2, 3, 2), Region(4, 4, 1, 1), Region(0, 1, 2, 4)):
        wanted = whole[:, region.top : region.bottom, region.left : region.right]
        assert torch.equal(read(region.top, region.left, region.height, region.width), wanted)
    for region in (Region(0, 0, 5, 7), Region(1, 2, 3, 2), Region(4, 6, 1, 1)):
        found = transform.place(region, (5, 7))
        window = whole[:, found.top : found.bottom, found.left : found.right]
        back = transform.undo(window, (region.height, region.width))
        assert torch.equal(back, image[:, region.top : region.bottom, region.left : region.right])
