"""Objects of rare classes come with their labels, cover labelled pixels only, and change nothing else."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from pixelwise.data.copy_paste import Found, Objects, Paste, rarities
from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.data.photometric import with_validity
from pixelwise.data.transforms import training_transform
from pixelwise.errors import UsageError

COLOURS = torch.tensor([[10, 60, 110, 160, 210], [20, 70, 120, 170, 220], [30, 80, 130, 180, 230]], dtype=torch.uint8)


def scene(seed: int, dtype: torch.dtype = torch.uint8, side: int = 60) -> tuple[Tensor, Tensor]:
    """An image whose colours say the class of each pixel, and its labels: ground, void, and squares of rare classes."""
    draws = np.random.default_rng(seed)
    mask = torch.zeros(side, side, dtype=torch.uint8)
    mask[:7] = IGNORE_INDEX
    for label in (1, 2, 3):
        y, x = draws.integers(10, side - 12, 2)
        mask[y : y + 9, x : x + 9] = label
    return COLOURS[:, mask.long().clamp(max=4)].to(dtype), mask


def objects(share: float = 1.0) -> tuple[Objects, list[tuple[Tensor, Tensor]]]:
    scenes = [scene(seed) for seed in range(4)]
    return Objects(share, (9000, 400, 200, 100), [[0, 1, 2, 3]] * 4), scenes


def paste(
    image: Tensor, mask: Tensor, found: Found, seed: int, scale: tuple[float, float] = (1.0, 1.0)
) -> list[Tensor]:
    torch.manual_seed(seed)
    given = tv_tensors.Image(image), tv_tensors.Mask(mask), found
    return [item.as_subclass(Tensor) for item in Paste(scale, (0.0, 0.0, 0.0))(*given)]


def test_rare_classes_are_drawn_in_inverse_proportion() -> None:
    made, scenes = objects()
    torch.manual_seed(0)
    drawn = [made.draw(scenes.__getitem__).label for _ in range(700)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 700
    assert torch.allclose(shares, torch.tensor([0, 1 / 7, 2 / 7, 4 / 7]), atol=0.06)
    assert rarities((50, 50)) == {} and rarities((0, 90, 10)) == {2: 1.0}


def test_an_object_is_one_region_of_its_class() -> None:
    made, scenes = objects()
    for seed in range(30):
        torch.manual_seed(seed)
        found = made.draw(scenes.__getitem__)
        inside = found.image[:, found.mask > 0]
        assert inside.shape[1] and (inside == COLOURS[:, found.label, None]).all()
        assert found.mask.shape == found.image.shape[1:]
        assert all(
            bool(line.any()) for side in (0, 1) for line in (found.mask.select(side, 0), found.mask.select(side, -1))
        )


def test_draws_depend_on_the_seed_alone_and_come_as_often_as_asked() -> None:
    made, scenes = objects(0.25)
    drawn = []
    for seed in (*range(200), *range(200)):
        torch.manual_seed(seed)
        drawn.append(made.draw(scenes.__getitem__))
    assert 30 < sum(found is not None for found in drawn[:200]) < 70
    for one, other in zip(drawn[:200], drawn[200:], strict=True):
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("has_validity", [False, True])
def test_pasted_pixels_come_with_their_labels_and_nothing_else_changes(dtype: torch.dtype, has_validity: bool) -> None:
    image, mask = scene(9, dtype)
    valid = mask != IGNORE_INDEX
    image = with_validity(image, valid) if has_validity else image
    before = image.clone(), mask.clone()
    places, made = set(), 0
    for seed in range(40):
        picture, labels = scene(seed, dtype)
        found = Found(picture[:, 8:50, 5:50], (labels[8:50, 5:50] == 2).byte(), 2)
        out, now = paste(image, mask, found, seed)
        changed = now != mask
        assert (now[changed] == 2).all()
        # The colours say the class everywhere, so pixels and labels moved together, and void and its colours stayed.
        known = now != IGNORE_INDEX
        assert torch.equal(out[:3, known], COLOURS[:, now[known].long()].to(dtype))
        assert torch.equal(known, valid) and torch.equal(out[:, ~known], image[:, ~known])
        assert torch.equal(out[3:], image[3:])
        made += int(changed.sum())
        places.update(map(tuple, changed.nonzero()[:1].tolist()))
    assert made > 1000 and len(places) > 20
    assert torch.equal(image, before[0]) and torch.equal(mask, before[1])


def test_numbers_without_data_are_not_pasted() -> None:
    image, mask = scene(0, torch.float32)
    picture, labels = scene(1, torch.float32)
    picture[:, labels == 0] = -3.4e38
    marked = with_validity(picture, labels != 0)
    for seed in range(10):
        out, _ = paste(image, mask, Found(marked, (labels == 3).byte(), 3), seed, (0.5, 2.0))
        assert out.shape == image.shape and out.min() >= 0 and out.max() <= 255


def test_magnified_objects_larger_than_the_crop_are_cut() -> None:
    image, mask = torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(20, 20, dtype=torch.uint8)
    found = Found(torch.full((3, 15, 90), 7, dtype=torch.uint8), torch.ones(15, 90, dtype=torch.uint8), 1)
    out, now = paste(image, mask, found, 0)
    assert int((now == 1).sum()) == 15 * 20 and torch.equal(out[0] == 7, now == 1)
    out, now = paste(image, mask, found, 0, (2.0, 2.0))
    assert (now == 1).all() and (out == 7).all()
    sizes = {int((paste(image, mask, found, seed, (0.2, 0.6))[1] == 1).any(1).sum()) for seed in range(40)}
    assert min(sizes) <= 4 and max(sizes) >= 8


def test_without_an_object_crops_are_those_of_a_transform_that_pastes_nothing() -> None:
    how = {"crop_px": 32, "scale": (0.6, 1.8), "focus": 0.5, "flips": "both", "fill": (0.5,) * 3, "is_uint8": True}
    image, mask = scene(0)
    for seed in range(5):
        made = []
        for pastes in (False, True):
            torch.manual_seed(seed)
            made.append(training_transform(**how, pastes=pastes)(tv_tensors.Image(image), tv_tensors.Mask(mask)))
        assert all(map(torch.equal, *made))


def test_without_a_rare_class_it_is_refused() -> None:
    with pytest.raises(UsageError, match="copy_paste: no class has less than an even share"):
        Objects(0.5, (100, 100), [[0], [0]])
    with pytest.raises(UsageError, match="in images that are read as a whole"):
        Objects(0.5, (900, 100), [[], []])
