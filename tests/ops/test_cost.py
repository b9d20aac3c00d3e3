import torch
import torchvision
from torch import nn

from pixelwise.models import create_model
from pixelwise.ops.cost import multiply_adds


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
