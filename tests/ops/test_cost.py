import pytest
import torch
import torchvision
from torch import nn

from pixelwise.models import create_model
from pixelwise.ops.cost import PassMemory, measured_bytes, multiply_adds, peak_bytes


def test_vgg16_costs_what_its_table_says():
    with torch.device("meta"):
        model = torchvision.models.vgg16()
    # 15,346,630,656 of the convolutions, 119,537,664 of fc6 and fc7, 4,096,000 of fc8.
    assert multiply_adds(model, (1, 3, 224, 224)) == 15_470_264_320


def test_the_padded_unet_of_figure_1():
    with torch.device("meta"):
        model = create_model("unet", num_classes=2, in_channels=1)
    assert multiply_adds(model, (1, 1, 512, 512)) == 192_384_335_872


def test_counting_leaves_the_mode_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert multiply_adds(model, (2, 3, 4, 5)) == 2 * 12 * 20
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class _Branching(nn.Module):
    """Asks for the values of tensors, which a network without weights on "meta" cannot tell."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return y + 1 if y.mean() > 0 else y


def test_memory_of_a_pass_is_foretold_or_measured():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    with torch.inference_mode():
        assert peak_bytes(conv, (1, 3, 100, 100)) == 440_864
    assert measured_bytes(conv, (1, 3, 100, 100)) == 440_864
    assert PassMemory.of(conv, 3)(1, 1000, 1000) == pytest.approx(44e6, rel=0.01)
    assert PassMemory.of(_Branching(), 3)(1, 1000, 1000) == pytest.approx(28e6, rel=0.01)  # 3 maps, 2, and 2 of a sum


def test_an_error_of_the_network_is_not_taken_for_that():
    with pytest.raises(RuntimeError, match="channels"):
        PassMemory.of(nn.Conv2d(5, 8, 3), 3)
