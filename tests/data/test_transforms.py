import pytest
import torch
from crops import augmentation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.data.transforms import PixelWeight, RandomDihedral, RandomScaleCrop

OUTSIDE = -1e6  # no image holds it, so that what was filled shows


def apply(transform, image, mask, seed=0):
    """The image without the channel that says where it has data."""
    torch.manual_seed(seed)
    out, mask = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return out.as_subclass(Tensor)[: len(image)], mask.as_subclass(Tensor)


def coordinates(height, width):
    """An image that holds the row and the column of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns]).float()


def inner(mask, margin=4):
    """Pixels of known class whose neighbourhood is known too, and that are not at the edge; four pixels, since at the
    magnification of 4 what lies outside is mixed into so many."""
    void = (mask == IGNORE_INDEX).float()[None, None]
    near = torch.nn.functional.max_pool2d(void, 2 * margin + 1, stride=1, padding=margin)[0, 0] > 0
    near[:margin] = near[-margin:] = True
    near[:, :margin] = near[:, -margin:] = True
    return ~near


# -- RandomScaleCrop --


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop_px=st.integers(1, 64),
    scale=st.sampled_from([(1.0, 1.0), (0.3, 3.0), (0.5, 0.5), (4.0, 4.0)]),
    focus=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 9999),
)
def test_image_and_mask_stay_together(size, crop_px, scale, focus, seed):
    position = coordinates(*size)
    transform = RandomScaleCrop(crop_px, scale=scale, focus=0.0, fill=(OUTSIDE, OUTSIDE))
    for axis in (0, 1):  # the mask numbers the rows, then the columns
        image, mask = apply(transform, position, position[axis].to(torch.uint8), seed)
        assert image.shape == (2, crop_px, crop_px) and mask.shape == (crop_px, crop_px)
        assert mask.dtype == torch.uint8 and image.dtype == torch.float32
        sure = inner(mask)
        assert ((image[axis] - mask).abs()[sure] <= 0.51).all()
    focused = RandomScaleCrop(crop_px, scale=scale, focus=focus, fill=(OUTSIDE, OUTSIDE))
    image, mask = apply(focused, position, position[0].to(torch.uint8), seed)
    assert ((image[0] - mask).abs()[inner(mask)] <= 0.51).all()


@pytest.mark.parametrize("scale", [(0.4, 0.4), (1.7, 1.7), (0.3, 3.0)])
def test_mask_values_are_never_mixed(scale):
    mask = torch.tensor([0, 7, 200], dtype=torch.uint8)[
        torch.randint(3, (50, 61), generator=torch.Generator().manual_seed(0))
    ]
    transform = RandomScaleCrop(40, scale=scale, focus=0.5, fill=(0, 0, 0))
    for seed in range(20):
        _, out = apply(transform, torch.zeros(3, 50, 61), mask, seed)
        assert set(out.unique().tolist()) <= {0, 7, 200, IGNORE_INDEX}


def test_without_magnification_a_crop_is_a_window_of_the_image():
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    position = coordinates(50, 70).to(torch.uint8)
    _, rows = apply(RandomScaleCrop(32, fill=(0, 0, 0)), image, position[0], 3)
    out, columns = apply(RandomScaleCrop(32, fill=(0, 0, 0)), image, position[1], 3)
    top, left = int(rows[0, 0]), int(columns[0, 0])
    assert torch.equal(out, image[:, top : top + 32, left : left + 32])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_outside_the_image_is_fill_and_void(dtype):
    image = torch.full((3, 10, 14), 50).to(dtype)
    mask = torch.ones(10, 14, dtype=torch.uint8)
    transform = RandomScaleCrop(32, fill=(100.0, 110.0, 120.0))
    places = set()
    for seed in range(20):
        out, labels = apply(transform, image, mask, seed)
        known = labels == 1
        assert out.dtype == dtype and labels.dtype == torch.uint8
        assert known.sum() == 140 and (labels[~known] == IGNORE_INDEX).all()
        assert (out[:, known] == 50).all()
        assert torch.equal(out[:, ~known].float().unique(dim=1), torch.tensor([[100.0], [110.0], [120.0]]))
        places.add(tuple(known.nonzero()[0].tolist()))
    assert len(places) > 10  # the image is not always in the same corner


def test_a_crop_wider_than_the_image_but_not_as_high_fills_the_sides_only():
    _, labels = apply(RandomScaleCrop(16, fill=(0,)), torch.zeros(1, 40, 6), torch.zeros(40, 6, dtype=torch.uint8))
    assert (labels == 0).sum() == 16 * 6
    assert ((labels == 0).sum(1) == 6).all()


@pytest.mark.parametrize("scale", [(0.2, 0.2), (1.0, 1.0), (5.0, 5.0)])
def test_one_pixel_is_enough(scale):
    image, mask = torch.full((3, 1, 1), 9.0), torch.full((1, 1), 4, dtype=torch.uint8)
    out, labels = apply(RandomScaleCrop(8, scale=scale, focus=1.0, fill=(9.0,) * 3), image, mask)
    assert out.shape == (3, 8, 8) and torch.allclose(out, torch.tensor(9.0))
    assert set(labels.unique().tolist()) <= {4, IGNORE_INDEX}
    assert (labels == 4).sum() in (0, 1, 4, 9, 16, 25)
    if scale[0] >= 1:
        assert (labels == 4).any()


def test_five_float_channels_keep_their_range():
    image = torch.randn(5, 30, 30) * 1000 - 300
    out, _ = apply(
        RandomScaleCrop(24, scale=(1.5, 1.5), fill=(1.0, 2.0, 3.0, 4.0, 5.0)), image, torch.zeros(30, 30).byte()
    )
    assert out.shape == (5, 24, 24)
    assert (out.amin((1, 2)) < -300).all() and image.min() <= out.min() and out.max() <= image.max()


def test_magnification_is_drawn_evenly_in_its_logarithm():
    position, mask = coordinates(400, 400), torch.zeros(400, 400, dtype=torch.uint8)
    transform = RandomScaleCrop(64, scale=(0.5, 2.0), fill=(0, 0))
    factors = []
    for seed in range(120):
        image, _ = apply(transform, position, mask, seed)
        factors.append(1 / float(image[0, 40, 0] - image[0, 39, 0]))
    factors = torch.tensor(factors)
    assert factors.min() > 0.49 and factors.max() < 2.05
    assert 0.85 < factors.median() < 1.18  # an even draw of the factor itself would give 1.25
    assert 0.2 < (factors < 2 ** (-1 / 3)).float().mean() < 0.47


@pytest.mark.parametrize("place", [(0, 0), (99, 119), (50, 3), (31, 77)])
def test_focus_shows_rare_classes_as_often_as_common_ones(place):
    mask = torch.zeros(100, 120, dtype=torch.uint8)
    mask[place] = 1
    image = torch.zeros(1, 100, 120)
    seen = dict.fromkeys((0.0, 1.0), 0)
    for focus in seen:
        transform = RandomScaleCrop(16, focus=focus, fill=(0,))
        seen[focus] = sum(bool((apply(transform, image, mask, seed)[1] == 1).any()) for seed in range(60))
    assert seen[1.0] >= 18  # of 60: every second draw is of this class
    assert seen[0.0] <= 6


def test_a_class_alone_among_void_is_always_found_anywhere_in_the_crop():
    mask = torch.full((80, 80), IGNORE_INDEX, dtype=torch.uint8)
    mask[40, 33] = 2
    places = []
    for seed in range(40):
        _, labels = apply(RandomScaleCrop(16, focus=1.0, fill=(0,)), torch.zeros(1, 80, 80), mask, seed)
        places.append(tuple((labels == 2).nonzero()[0].tolist()))
    rows, columns = zip(*places, strict=True)
    assert min(rows) < 4 and max(rows) > 11 and min(columns) < 4 and max(columns) > 11


def test_a_mask_of_void_only_can_be_cropped():
    mask = torch.full((20, 20), IGNORE_INDEX, dtype=torch.uint8)
    _, labels = apply(RandomScaleCrop(8, focus=1.0, fill=(0,)), torch.zeros(1, 20, 20), mask)
    assert (labels == IGNORE_INDEX).all()


# -- the others --


def test_all_eight_symmetries_occur_and_take_the_mask_along():
    image = torch.arange(9.0).reshape(1, 3, 3)
    seen = set()
    for seed in range(100):
        out, mask = apply(RandomDihedral(), image, image[0].to(torch.uint8), seed)
        assert torch.equal(out[0], mask.float())
        seen.add(tuple(out.flatten().tolist()))
    assert len(seen) == 8
    assert all(rows[4] == 4 for rows in seen)


def test_unit_scale():
    whole = {"scale": (1.0, 1.0), "focus": 0, "flips": "none", "photometric": 0, "mean": (0.0,), "std": (1.0,)}
    steps = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8).expand(1, 3, 3)
    image, _ = apply(augmentation(**whole, crop_px=3, is_uint8=True), steps, steps[0])
    assert image[0, 0].tolist() == pytest.approx([0, 0.2, 1])
    floats = torch.tensor([[[-3.0, 0.5, 700.0]]]).expand(1, 3, 3)
    image, _ = apply(augmentation(**whole, crop_px=3, is_uint8=False), floats, steps[0])
    assert torch.equal(image, floats)


# -- all together --


def whole(**options):
    given = {
        "crop_px": 24,
        "scale": (0.6, 1.8),
        "focus": 0.5,
        "flips": "both",
        "photometric": 0.3,
        "mean": (0.4, 0.5, 0.6),
    }
    given |= {"is_uint8": True} | options
    return augmentation(**given, std=(1.0,) * len(given["mean"]))


def test_the_seed_decides_everything():
    image, mask = torch.randint(256, (3, 40, 50)).byte(), torch.randint(4, (40, 50)).byte()
    for flips in ("none", "horizontal", "both", "dihedral"):
        transform = whole(flips=flips)
        first, again, other = (apply(transform, image, mask, seed) for seed in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("flips", ["none", "horizontal", "both", "dihedral"])
def test_every_way_of_flipping_keeps_image_and_mask_together(flips):
    position = coordinates(60, 60)
    transform = whole(flips=flips, photometric=0, scale=(1.0, 1.0), is_uint8=False, mean=(OUTSIDE,) * 2)
    corners = set()
    for seed in range(60):
        image, mask = apply(transform, position, position[0].to(torch.uint8), seed)
        assert torch.equal(image[0], mask.float())
        down, right = (image[:, -1, 0] - image[:, 0, 0]).tolist(), (image[:, 0, -1] - image[:, 0, 0]).tolist()
        corners.add((*down, *right))
    assert len(corners) == {"none": 1, "horizontal": 2, "both": 4, "dihedral": 8}[flips]


def test_the_result_is_in_unit_scale_with_the_fill_where_nothing_is():
    image, mask = torch.full((3, 6, 6), 51, dtype=torch.uint8), torch.zeros(6, 6, dtype=torch.uint8)
    out, labels = apply(whole(photometric=0, scale=(1.0, 1.0)), image, mask)
    assert out.dtype == torch.float32 and labels.dtype == torch.uint8
    assert torch.allclose(out[:, labels == 0], torch.tensor(0.2))
    outside = out[:, labels == IGNORE_INDEX].mean(1)
    assert torch.allclose(outside, torch.tensor([0.4, 0.5, 0.6]), atol=1 / 255)


def test_float_images_of_five_channels_go_the_whole_way():
    image, mask = torch.randn(5, 30, 17) * 40, torch.randint(3, (30, 17)).byte()
    out, labels = apply(whole(is_uint8=False, mean=(0.0,) * 5, flips="dihedral"), image, mask)
    assert out.shape == (5, 24, 24) and labels.shape == (24, 24)
    assert torch.isfinite(out).all() and out.abs().max() > 10


# -- pixel weights, elastic deformation, windows --


@pytest.mark.parametrize("elastic", [0.0, 4.0])
@pytest.mark.parametrize("flips", ["none", "both", "dihedral"])
def test_pixel_weights_stay_with_their_labels(flips, elastic):
    mask = torch.randint(7, (40, 50), generator=torch.Generator().manual_seed(0)).byte()
    weights = 2.5 * mask.float() + 1
    transform = whole(flips=flips, elastic=elastic)
    sure = 0
    for seed in range(12):
        torch.manual_seed(seed)
        given = tv_tensors.Image(torch.zeros(3, 40, 50).byte()), tv_tensors.Mask(mask), PixelWeight(weights)
        _, labels, out = transform(*given)
        known = labels.as_subclass(Tensor) != IGNORE_INDEX
        assert out.shape == labels.shape == (24, 24) and out.dtype == torch.float32
        assert torch.equal(out.as_subclass(Tensor)[known], 2.5 * labels.as_subclass(Tensor)[known].float() + 1)
        sure += int(known.sum())
    assert sure > 12 * 200


def test_pixel_weights_do_not_change_what_is_drawn():
    image, mask = torch.randint(256, (3, 40, 50)).byte(), torch.randint(4, (40, 50)).byte()
    for flips in ("both", "dihedral"):
        transform = whole(flips=flips, elastic=3.0)
        plain = apply(transform, image, mask, 5)
        torch.manual_seed(5)
        weighed = transform(tv_tensors.Image(image), tv_tensors.Mask(mask), PixelWeight(torch.ones(40, 50)))
        assert all(torch.equal(a, b) for a, b in zip(plain, weighed, strict=False))


def test_weights_outside_the_image_are_zero():
    torch.manual_seed(0)
    given = tv_tensors.Mask(torch.ones(6, 6).byte()), PixelWeight(torch.full((6, 6), 3.0))
    _, labels, out = RandomScaleCrop(16, fill=(0,))(tv_tensors.Image(torch.zeros(1, 6, 6)), *given)
    assert isinstance(out, PixelWeight) and (out[labels == IGNORE_INDEX] == 0).all() and (out[labels == 1] == 3).all()


def test_elastic_deformation_bends_image_and_mask_alike():
    position = coordinates(64, 64)
    transform = whole(
        flips="none", photometric=0, scale=(1.0, 1.0), is_uint8=False, mean=(OUTSIDE,) * 2, elastic=3.0, crop_px=64
    )
    for seed in range(5):
        image, mask = apply(transform, position, position[0].to(torch.uint8), seed)
        known = mask != IGNORE_INDEX
        assert ((image[0] - mask).abs()[known] <= 0.51).all()
        assert (image[0] - position[0]).abs().max() > 1


@pytest.mark.parametrize("flips", ["none", "horizontal", "both", "dihedral"])
def test_a_window_is_around_the_pixel_whose_label_it_has(flips):
    position = coordinates(30, 40)
    transform = augmentation(window_px=7, flips=flips, photometric=0, mean=(0.0,) * 2, std=(1.0,) * 2)
    for seed in range(20):
        image, label = apply(transform, position, position[0].to(torch.uint8), seed)
        assert image.shape == (2, 7, 7) and label.shape == (1, 1) and image.dtype == torch.float32
        assert image[0, 3, 3] == label[0, 0]


def test_windows_show_each_class_as_often_and_come_in_unit_scale():
    mask = torch.zeros(30, 30).byte()
    mask[3, 4] = 1
    image = 255 * mask.expand(3, -1, -1)
    transform = augmentation(window_px=5, flips="both", photometric=0, mean=(0.0,) * 3, std=(1.0,) * 3)
    labels = []
    for seed in range(80):
        window, label = apply(transform, image, mask, seed)
        assert window.max() <= 1 and window[0, 2, 2] == label[0, 0]
        labels.append(int(label))
    assert 25 <= sum(labels) <= 55
