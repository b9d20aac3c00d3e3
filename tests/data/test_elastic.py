import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from pixelwise.data.transforms import RandomElastic
from pixelwise.errors import UsageError
from pixelwise.ops.resize import mirror_pad


def apply(transform, image, mask, seed=0):
    torch.manual_seed(seed)
    image, mask = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def displacements(transform, height, width, seed=0):
    """(2, H, W): how far the rows and the columns that are read lie from the pixel's own."""
    torch.manual_seed(seed)
    params = transform.make_params([tv_tensors.Mask(torch.zeros(height, width))])
    return torch.stack([params["rows"] - torch.arange(height)[:, None], params["columns"] - torch.arange(width)])


def coordinates(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns]).float()


def test_displacements_are_normal_with_ten_pixels_at_the_nine_points():
    drawn = torch.stack([displacements(RandomElastic(), 41, 61, seed)[:, ::20, ::30] for seed in range(300)])
    assert drawn.shape == (300, 2, 3, 3)
    assert (drawn.std(0) - 10).abs().max() < 2 and drawn.mean(0).abs().max() < 2
    flat = drawn.flatten(1).T.corrcoef() - torch.eye(18)
    assert flat.abs().max() < 0.25  # each vector by itself
    torch.manual_seed(7)
    field = torch.randn(1, 2, 3, 3)[0] * 10
    assert torch.allclose(displacements(RandomElastic(), 41, 61, 7)[:, ::20, ::30], field, atol=1e-4)


def test_between_the_points_the_displacement_is_bicubic():
    # Keys' cubic convolution with a = -0.75, as torch's; the point beyond the border repeats the border's
    field = displacements(RandomElastic(3.0), 5, 5, seed=1)
    first, middle, last = field[:, 0, ::2].unbind(-1)
    weights = [-0.09375, 0.59375, 0.59375, -0.09375]
    wanted = sum(w * value for w, value in zip(weights, (first, first, middle, last), strict=True))
    assert torch.allclose(field[:, 0, 1], wanted, atol=1e-4)


def test_finer_grids_have_more_points():
    field = displacements(RandomElastic(5.0, grid=5), 81, 81)
    torch.manual_seed(0)
    assert torch.allclose(field[:, ::20, ::20], torch.randn(1, 2, 5, 5)[0] * 5, atol=1e-4)


def test_image_and_mask_move_together():
    position = coordinates(80, 120)
    stripes = (position[1] // 10).to(torch.uint8)
    last = torch.tensor([79, 119])[:, None, None]
    for seed in range(5):
        image, mask = apply(RandomElastic(), position, stripes, seed)
        place = position + displacements(RandomElastic(), 80, 120, seed)
        inside = ((place.round() >= 0) & (place.round() <= last)).all(0)
        assert 0.5 < inside.float().mean() < 1
        assert torch.equal(mask == 255, ~inside)
        assert torch.equal(mask[inside], (place[1].round() // 10)[inside].to(torch.uint8))
        # An image of coordinates tells where each pixel came from; half a pixel beyond the border is mirrored already.
        mirrored = last - (last - place.abs()).abs()
        assert torch.allclose(image[:, inside], mirrored[:, inside], atol=1e-3)


def test_outside_the_image_is_mirrored():
    image = torch.rand(2, 30, 40)
    transform = RandomElastic(25.0)
    out, mask = apply(transform, image, torch.zeros(30, 40, dtype=torch.uint8), seed=3)
    place = coordinates(30, 40) + displacements(transform, 30, 40, seed=3) + 100
    padded = mirror_pad(image[None], 100, 100, 100, 100)[0]
    rows, columns = place.floor().long()
    down, right = place - place.floor()
    wanted = (
        padded[:, rows, columns] * (1 - down) * (1 - right)
        + padded[:, rows + 1, columns] * down * (1 - right)
        + padded[:, rows, columns + 1] * (1 - down) * right
        + padded[:, rows + 1, columns + 1] * down * right
    )
    assert (mask == 255).any()
    assert torch.allclose(out, wanted, atol=1e-3)


def test_no_displacement_changes_nothing():
    image, mask = torch.randint(256, (3, 33, 50)).byte(), torch.randint(4, (33, 50)).byte()
    out, labels = apply(RandomElastic(0.0), image, mask)
    assert torch.equal(out, image) and torch.equal(labels, mask)
    floats = torch.randn(5, 33, 50)
    assert torch.allclose(apply(RandomElastic(0.0), floats, mask)[0], floats, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (64, 5)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_size_and_type(size, dtype):
    image, mask = torch.full((4, *size), 90).to(dtype), torch.full(size, 3, dtype=torch.uint8)
    out, labels = apply(RandomElastic(), image, mask)
    assert out.shape == image.shape and out.dtype == dtype and torch.allclose(out.float(), torch.tensor(90.0))
    assert labels.shape == size and labels.dtype == torch.uint8 and set(labels.unique().tolist()) <= {3, 255}


def test_labels_stay_labels_and_the_seed_decides():
    image, mask = torch.rand(1, 60, 60), (torch.randint(2, (60, 60)) * 7).byte()
    first, again, other = (apply(RandomElastic(), image, mask, seed) for seed in (1, 1, 2))
    assert set(first[1].unique().tolist()) <= {0, 7, 255}
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_weights_go_with_the_labels_and_are_zero_outside():
    class Weight(tv_tensors.Mask):
        pass

    mask = torch.randint(4, (50, 70)).byte()
    torch.manual_seed(0)
    labels, weights = RandomElastic()(tv_tensors.Mask(mask), Weight(mask / 2 + 1))
    assert type(weights) is Weight and weights.dtype == torch.float32
    inside = labels != 255
    assert (weights[~inside] == 0).all() and torch.equal(weights[inside], labels[inside] / 2 + 1)


def test_what_is_neither_image_nor_mask_passes():
    torch.manual_seed(0)
    _, _, name = RandomElastic()(tv_tensors.Image(torch.rand(1, 8, 8)), tv_tensors.Mask(torch.zeros(8, 8)), "a.png")
    assert name == "a.png"


@pytest.mark.parametrize(("options", "message"), [({"sigma_px": -1}, "at least 0, not -1"), ({"grid": 1}, "2, not 1")])
def test_what_cannot_be_drawn_is_told(options, message):
    with pytest.raises(UsageError, match=message):
        RandomElastic(**options)
