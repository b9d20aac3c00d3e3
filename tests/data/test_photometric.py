"""The numbers of training images: each band in its own mean and spread, and pixels without data at the mean."""

import pytest
import torch
from crops import augmentation, recolored
from torch import Tensor
from torchvision import tv_tensors

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.data.photometric import packed, with_validity

MEAN, STD = (0.4, 0.5, 0.3, 0.6, 0.2), (0.2, 0.1, 0.3, 0.25, 0.15)
UNITS = {  # factor and offset of each band: what is measured, and in which unit, means nothing
    "photo": ((1.0, 1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0, 0.0)),
    "kelvin": ((20.0,) * 5, (280.0,) * 5),
    "counts": ((3e-3,) * 5, (0.33,) * 5),
    "decibel": ((15.0,) * 5, (-25.0,) * 5),
    "reflectance and metres": ((1.0, 1.0, 1.0, 20.0, 90.0), (0.0, 0.0, 0.0, 290.0, 1500.0)),
    "turned": ((-1.0,) * 5, (0.0,) * 5),
}


def apply(transform, image, mask, seed=0):
    torch.manual_seed(seed)
    image, mask = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def pixels(channels, side=30):
    draws = torch.Generator().manual_seed(3)
    image = torch.randn(channels, side, side, generator=draws) * 0.2 + 0.4
    return image, torch.randint(3, (side, side), generator=draws).byte()


def in_unit(name, channels):
    factor, offset = (torch.tensor(values[:channels]) for values in UNITS[name])
    mean, std = torch.tensor(MEAN[:channels]) * factor + offset, torch.tensor(STD[:channels]) * factor.abs()
    return factor[:, None, None], offset[:, None, None], {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}


@pytest.mark.parametrize("name", list(UNITS)[1:-1])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("kind", ["crops", "windows"])
def test_augmentation_is_the_same_in_every_unit(name, channels, kind):
    """The network, which sees deviations from the mean, is shown the same crops whatever the unit of the bands."""
    image, mask = pixels(channels)

    def seen(unit, seed):
        factor, offset, norm = in_unit(unit, channels)
        if kind == "crops":
            how = {"crop_px": 20, "scale": (0.5, 2.0), "focus": 0.5, "is_uint8": False, "elastic": 2.0}
            transform = augmentation(**how, flips="both", photometric=0.5, **norm)
        else:
            transform = augmentation(window_px=9, flips="both", photometric=0.5, **norm)
        out, _ = apply(transform, image * factor + offset, mask, seed)
        mean, std = (torch.tensor(norm[key])[:, None, None] for key in ("mean", "std"))
        return (out - mean) / std

    for seed in range(6):
        assert torch.allclose(seen(name, seed), seen("photo", seed), atol=2e-3), seed


@pytest.mark.parametrize("name", UNITS)
def test_no_band_moves_by_more_than_its_own_spread_allows(name):
    factor, offset, norm = in_unit(name, 4)
    image, mask = pixels(4)
    image = image * factor + offset
    mean, std = (torch.tensor(norm[key])[:, None, None] for key in ("mean", "std"))
    z = (image - mean) / std
    shifts = []
    for seed in range(30):
        out, labels = apply(recolored(0.3, **norm), image, mask, seed)
        assert torch.equal(labels, mask) and out.dtype == torch.float32
        moved = (out - mean) / std - z
        assert (moved.abs() <= 0.3 * z.abs() + 0.3 + 1e-3).all()
        shifts.append(float(moved.mean()))
    assert min(shifts) < -0.1 and max(shifts) > 0.1  # and it does move


def test_photometric_keeps_grey_grey_and_strength_zero_changes_nothing():
    grey, mask = torch.rand(1, 8, 8).expand(3, 8, 8).clone(), torch.zeros(8, 8).byte()
    out, _ = apply(recolored(0.5, (0.4,) * 3, (0.2,) * 3), grey, mask)
    assert torch.allclose(out[0], out[1], atol=1e-4) and torch.allclose(out[0], out[2], atol=1e-4)
    image = torch.rand(3, 8, 8)
    assert torch.allclose(apply(recolored(0.0, MEAN[:3], STD[:3]), image, mask)[0], image, atol=1e-5)


# -- pixels without data --


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("garbage", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["crops", "windows"])
def test_pixels_without_data_come_out_at_the_mean_and_touch_no_neighbour(dtype, garbage, kind):
    """Image of one colour with a hole: everything is that colour, changed as a whole, or exactly the mean."""
    image, mask = torch.full((2, 40, 40), 0.8), torch.ones(40, 40, dtype=torch.uint8)
    valid = torch.ones(40, 40, dtype=torch.bool)
    valid[:, 15:], mask[:, 15:] = False, IGNORE_INDEX
    image[:, ~valid] = garbage
    image = (image * 255).to(dtype) if dtype == torch.uint8 else image
    mean = torch.tensor((0.4, 0.5))
    norm = {"mean": (0.4, 0.5), "std": (0.2, 0.2)}
    if kind == "crops":
        how = {"crop_px": 16, "scale": (1.0, 1.0), "focus": 0.0, "is_uint8": dtype == torch.uint8}
        transform = augmentation(**how, flips="dihedral", photometric=0.5, **norm)
    else:
        transform = augmentation(window_px=21, flips="dihedral", photometric=0.5, **norm)
    seen = set()
    for seed in range(20):
        out, labels = apply(transform, with_validity(image, valid), mask, seed)
        assert len(out) == 2
        is_mean = (out == mean[:, None, None]).all(dim=0)
        if kind == "crops":
            assert torch.equal(is_mean, labels == IGNORE_INDEX)
        seen.update(is_mean.unique().tolist())
        rest = out[:, ~is_mean]
        assert rest.numel() == 0 or float(rest.std(dim=1).max()) < 1e-5
    assert seen == {True, False}


@pytest.mark.parametrize("scale", [0.5, 1.7, 4.0])
def test_resampling_mixes_no_missing_number_into_its_neighbours(scale):
    image, mask = torch.full((1, 30, 30), 300.0), torch.ones(30, 30, dtype=torch.uint8)
    valid = torch.rand(30, 30, generator=torch.Generator().manual_seed(0)) < 0.8
    image[:, ~valid], mask[~valid] = -3.4e38, IGNORE_INDEX
    how = {"crop_px": 24, "scale": (scale, scale), "focus": 0.0, "is_uint8": False, "elastic": 3.0}
    transform = augmentation(**how, flips="none", photometric=0, mean=(290.0,), std=(5.0,))
    for seed in range(5):
        out, _ = apply(transform, with_validity(image, valid), mask, seed)
        assert out.min() >= 290 and out.max() <= 300 + 1e-3


def test_what_lies_outside_a_crop_is_the_mean_whatever_the_colours_do():
    image, mask = torch.full((3, 6, 6), 200, dtype=torch.uint8), torch.zeros(6, 6, dtype=torch.uint8)
    how = {"crop_px": 16, "scale": (1.0, 1.0), "focus": 0.0, "flips": "both", "is_uint8": True}
    transform = augmentation(**how, photometric=0.5, mean=(0.413, 0.5, 0.6), std=(0.2,) * 3)
    out, labels = apply(transform, image, mask)
    outside = out[:, labels == IGNORE_INDEX]
    assert outside.shape == (3, 16 * 16 - 36)
    assert torch.equal(outside, torch.tensor([[0.413], [0.5], [0.6]]).expand_as(outside))


def test_an_image_with_data_everywhere_gets_no_further_channel():
    image = torch.rand(3, 4, 5)
    assert with_validity(image, None) is image
    assert packed(image, 3).shape == (4, 5, 3)
    marked = with_validity((image * 255).byte(), image[0] > 0.5)
    assert marked.shape == (4, 4, 5) and set(marked[3].unique().tolist()) == {0, 255}
