import numpy as np
import pytest
import torch
from crops import augmentation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.data.transforms import PixelWeight, RandomWindow, draw_pixel, window_transform


def apply(transform, image, mask, seed=0):
    torch.manual_seed(seed)
    image, mask = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


@settings(deadline=None, max_examples=60)
@given(size=st.tuples(st.integers(1, 20), st.integers(1, 20)), window_px=st.integers(1, 45), seed=st.integers(0, 9999))
def test_the_window_lies_around_the_pixel_whose_class_it_has_and_borders_are_mirrored(size, window_px, seed):
    image = torch.randint(256, (2, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mask = torch.randint(3, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(seed)
    row, column = draw_pixel(mask)
    window, label = apply(RandomWindow(window_px), image, mask, seed)
    assert label.tolist() == [[mask[row, column]]] and label.dtype == torch.uint8
    # row i of the window is row - window_px // 2 + i of the image, reflected as numpy does
    margin = window_px // 2
    padded = np.pad(image.numpy(), ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    wanted = padded[:, row : row + window_px, column : column + window_px]
    assert window.dtype == torch.uint8
    assert np.array_equal(window.numpy(), wanted)
    assert (window[:, margin, margin] == image[:, row, column]).all()


def test_each_class_is_drawn_as_often_and_void_never():
    mask = torch.full((30, 40), 2, dtype=torch.uint8)
    mask[0, 0], mask[5:9], mask[20:] = 7, 0, IGNORE_INDEX
    torch.manual_seed(0)
    counts = {2: 0, 7: 0, 0: 0}
    for _ in range(600):
        _, label = RandomWindow(5)(tv_tensors.Image(torch.zeros(1, 30, 40)), tv_tensors.Mask(mask))
        counts[int(label)] += 1
    assert min(counts.values()) > 160


def test_every_pixel_of_a_class_can_be_drawn():
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1], [255, 1, 0]], dtype=torch.uint8)
    drawn = {draw_pixel(mask) for _ in range(100)}
    assert drawn == {(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)}


def test_a_mask_of_void_gives_a_void_label():
    window, label = apply(RandomWindow(9), torch.rand(3, 4, 6), torch.full((4, 6), IGNORE_INDEX, dtype=torch.uint8))
    assert window.shape == (3, 9, 9) and label.tolist() == [[IGNORE_INDEX]]


@pytest.mark.parametrize("flips", ["none", "horizontal", "both", "dihedral"])
def test_flips_and_colours_follow(flips):
    image = torch.randint(256, (3, 9, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.full((9, 30), 4, dtype=torch.uint8)
    transform = augmentation(window_px=7, flips=flips, photometric=0.2, mean=(0.4,) * 3, std=(0.2,) * 3)
    for seed in range(8):
        window, label = apply(transform, image, mask, seed)
        assert window.shape == (3, 7, 7) and window.dtype == torch.float32 and label.tolist() == [[4]]


@pytest.mark.parametrize("flips", ["both", "dihedral"])
def test_flips_keep_the_centre_of_an_odd_window(flips):
    colours = torch.arange(100).reshape(1, 10, 10).float()
    mask = torch.arange(100).reshape(10, 10).to(torch.uint8)
    transform = window_transform(window_px=5, flips=flips)
    for seed in range(8):
        window, label = apply(transform, colours, mask, seed)
        assert window[0, 2, 2] == label[0, 0]


def test_the_seed_decides_and_the_image_is_left_alone():
    image, mask = torch.rand(3, 30, 40), torch.randint(5, (30, 40), dtype=torch.uint8)
    before = image.clone()
    windows = [apply(RandomWindow(9), image, mask, seed) for seed in (3, 3, 4)]
    assert torch.equal(windows[0][0], windows[1][0]) and torch.equal(windows[0][1], windows[1][1])
    assert not torch.equal(windows[0][0], windows[2][0])
    windows[0][0].zero_()
    assert torch.equal(image, before)


def test_a_weight_per_pixel_goes_with_its_pixel():
    mask = tv_tensors.Mask(torch.arange(12, dtype=torch.uint8).reshape(3, 4))
    weight = PixelWeight(torch.arange(12.0).reshape(3, 4))
    _, label, chosen = RandomWindow(5)(tv_tensors.Image(torch.rand(3, 3, 4)), mask, weight)
    assert isinstance(chosen, PixelWeight) and not isinstance(label, PixelWeight)
    assert chosen.tolist() == [[float(label)]]
