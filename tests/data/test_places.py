"""Pixels of a class in a mask that is not read as a whole: the same draws as from a mask in memory."""

import numpy as np
import pytest
import torch

from pixelwise.data.labels import LabelSpec, value_counts
from pixelwise.data.places import ClassPlaces, Places
from pixelwise.data.transforms import draw_pixel

SPEC = LabelSpec(
    names=("a", "b", "c"), colors=((0, 0, 0), (1, 1, 1), (2, 2, 2)), values=((0, 4), (1,), (7,)), ignore_values=(9,)
)


@pytest.mark.parametrize("block_px", [512, 4, 1])
def test_a_large_mask_gives_the_draws_of_one_in_memory(block_px):
    raw = np.random.default_rng(0).choice([0, 1, 4, 9], size=(37, 23), p=[0.3, 0.1, 0.2, 0.4]).astype(np.int32)
    places = Places(*raw.shape)
    places.block_px = block_px
    for top in range(0, 37, 10):
        strip = raw[top : top + 10]
        places.add(top, strip, value_counts(strip))
    labels = torch.from_numpy(SPEC.encode(raw))
    drawn, reads = ClassPlaces(places, SPEC), []

    def read(top, left, height, width):
        reads.append(height * width)
        return labels[top : top + height, left : left + width]

    for seed in range(60):
        torch.manual_seed(seed)
        wanted = draw_pixel(labels)
        torch.manual_seed(seed)
        assert drawn.draw(read) == wanted
    assert max(reads) <= block_px


def test_a_mask_of_void_gives_no_pixel():
    places = Places(4, 5)
    places.add(0, np.full((4, 5), 9), [9])
    assert ClassPlaces(places, SPEC).draw(lambda *_: torch.zeros(1, 1)) is None
