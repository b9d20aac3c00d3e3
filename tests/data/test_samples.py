"""Samples: two files become two tensors of the same size."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixelwise.data.labels import LabelSpec
from pixelwise.data.pairs import Pair
from pixelwise.data.samples import load_sample
from pixelwise.errors import DataError

LABELS = LabelSpec(names=("no", "yes"), colors=((0, 0, 0), (9, 9, 9)), values=((0,), (200,)), ignore_values=(7,))


def _pair(folder, image, mask):
    Image.fromarray(image).save(folder / "a.png")
    if mask is not None:
        Image.fromarray(mask).save(folder / "m.png")
    path = None if mask is None else folder / "m.png"
    return Pair(image=folder / "a.png", mask=path, split="train", group="a", name="a")


def test_tensors_have_the_shapes_and_types_that_transforms_want(tmp_path):
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    mask = np.zeros((4, 5), dtype=np.uint8)
    mask[0, :2] = 200, 7
    sample = load_sample(_pair(tmp_path, image, mask), LABELS)
    assert torch.equal(sample.image, torch.from_numpy(image).permute(2, 0, 1))
    assert sample.image.is_contiguous()
    assert sample.mask.dtype == torch.uint8
    assert sample.mask[0, :3].tolist() == [1, 255, 0]
    assert sample.name == "a"


def test_without_a_mask_there_is_none(tmp_path):
    sample = load_sample(_pair(tmp_path, np.zeros((4, 5), dtype=np.uint8), None), LABELS, channels=3)
    assert sample.mask is None
    assert sample.image.shape == (3, 4, 5)


@pytest.mark.parametrize(
    ("mask", "file", "part"),
    [
        (np.zeros((5, 4), dtype=np.uint8), "m.png", "4 x 5 px, but its image"),
        (np.full((4, 5), 3, dtype=np.uint8), "m.png", r"the mask holds value 3 \(20 px\)"),
        (np.full((4, 5, 3), 77, dtype=np.uint8), "m.png", "RGB"),
    ],
)
def test_what_does_not_fit_names_the_file(tmp_path, mask, file, part):
    pair = _pair(tmp_path, np.zeros((4, 5), dtype=np.uint8), mask)
    with pytest.raises(DataError, match=part) as error:
        load_sample(pair, LABELS)
    assert str(tmp_path / file) in str(error.value)


def test_missing_channels_name_the_image(tmp_path):
    pair = _pair(tmp_path, np.zeros((4, 5, 3), dtype=np.uint8), np.zeros((4, 5), dtype=np.uint8))
    with pytest.raises(DataError, match=r"a\.png: it has 3 channels, but 4 are wanted"):
        load_sample(pair, LABELS, channels=4)
