import pytest
import torch

from pixelwise.infer.tiling import Region, WholeImage
from pixelwise.ops.cost import PassMemory


def reader(image, seen=None):
    def read(top, left, height, width):
        if seen is not None:
            seen.append((top, left, height, width))
        return image[:, top : top + height, left : left + width]

    return read


def mean_free(x):
    """Logits for which each pixel of the image counts."""
    return x - x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("region", [Region(0, 0, 9, 7), Region(3, 2, 4, 5), Region(8, 6, 1, 1)])
def test_a_region_is_cut_from_the_pass_over_the_whole_image(region):
    image, seen = torch.randn(3, 9, 7), []
    scorer = WholeImage(mean_free, PassMemory(10.0), height=9, width=7)
    [scores] = scorer.score(reader(image, seen), region)
    expected = mean_free(image[None])[0][:, region.top : region.bottom, region.left : region.right]
    assert scores.region == region and torch.allclose(scores.values, expected, atol=1e-6) and scores.spread is None
    assert seen == [(0, 0, 9, 7)]


def test_what_it_takes_is_what_a_pass_takes():
    scorer = WholeImage(mean_free, PassMemory(per_px=10.0, per_side=2.0, fixed=5.0), height=9, width=7)
    assert (scorer.way, scorer.cost, scorer.memory_bytes) == ("whole image", 1.0, 10 * 63 + 2 * 16 + 5)


def test_scores_are_float32_without_gradients():
    weight = torch.ones(1, requires_grad=True)
    scorer = WholeImage(lambda x: (x * weight).half(), PassMemory(1.0), height=2, width=2)
    [scores] = scorer.score(reader(torch.ones(1, 2, 2, dtype=torch.float64)), Region(0, 0, 2, 2))
    assert scores.values.dtype == torch.float32 and not scores.values.requires_grad
