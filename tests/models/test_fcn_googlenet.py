import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.fcn import FCNGoogLeNetConfig, Inception

WITH_A_WINDOW = ["conv1", "pool", "conv2", "pool", "3a", "3b", "pool", "4a", "4b", "4c", "4d", "4e", "pool", "5a", "5b"]
BLOCKS = [f"inception_{name}" for name in WITH_A_WINDOW if name[0] in "345"]


def filled(**config):
    """A tiny one without zeros among its weights, in eval mode."""
    torch.manual_seed(0)
    model = create_model("fcn_googlenet", tiny=True, num_classes=3, **config).eval().requires_grad_(False)
    nn.init.normal_(model.score_fr.weight, std=0.1)
    if config.get("upsampling") == "learnt":
        model.upscore.weight.add_(0.01 * torch.randn_like(model.upscore.weight))
    return model


def test_parameters():
    row = describe_model("fcn_googlenet", num_classes=21)
    assert (row["parameters"], row["stride"]) == (5_995_077, 32)
    learnt = describe_model("fcn_googlenet", num_classes=21, upsampling="learnt")
    assert learnt["parameters"] - row["parameters"] == 21 * 21 * 63 * 63


def test_with_1000_classes_it_has_the_parameters_of_the_classifier():
    assert describe_model("fcn_googlenet", num_classes=1000)["parameters"] == 6_998_552


def test_the_channels_of_the_blocks():
    with torch.device("meta"):
        model = create_model("fcn_googlenet", num_classes=21)
    assert [model.get_submodule(name).channels for name in BLOCKS] == [256, 480, 512, 512, 512, 528, 832, 832, 1024]
    assert sum(isinstance(item, Inception) for item in model.modules()) == 9


def test_every_size_from_1_to_600_comes_out_as_it_went_in():
    with torch.device("meta"):
        model = create_model("fcn_googlenet", tiny=True, num_classes=2)
        for name in BLOCKS:  # which keep the size, as a 1x1 convolution does in a quarter of the time
            block = model.get_submodule(name)
            setattr(model, name, nn.Conv2d(block.conv1x1.in_channels, block.channels, 1))
    for size in range(1, 601, 2):  # odd heights, even widths
        assert model(torch.zeros(1, 3, size, 601 - size, device="meta")).shape == (1, 2, size, 601 - size)


def geometry(model):
    """Receptive field, stride, and the place in the image of the centre of the first score, in pixels."""
    field, jump, centre = 1, 1, 0.0
    for name in WITH_A_WINDOW:
        layer = model.get_submodule(name if name in ("conv1", "conv2", "pool") else f"inception_{name}.conv5x5")
        kernel, stride, padding = (
            value if isinstance(value, int) else value[0] for value in (layer.kernel_size, layer.stride, layer.padding)
        )
        field += (kernel - 1) * jump
        centre += ((kernel - 1) / 2 - padding) * jump
        jump *= stride
    return field, jump, centre


def test_the_receptive_field_of_table_1_counts_the_average_pooling():
    with torch.device("meta"):
        field, jump, _ = geometry(create_model("fcn_googlenet", num_classes=21))
    assert jump == 32
    assert field + (7 - 1) * 32 == 907


def test_the_crop_puts_each_output_on_its_pixel():
    with torch.device("meta"):
        model = create_model("fcn_googlenet", num_classes=21)
    _, _, centre = geometry(model)
    assert centre == -67
    # Row r of the enlarged map is the centre of score i where r = 32 i + 31; that score sees pixel 32 i - 67.
    for index in range(20):
        assert 32 * index + (63 - 1) / 2 - 98 == 32 * index + centre
    for block in (item for item in model.modules() if isinstance(item, Inception)):  # all its views have one centre
        for layer in (block.conv3x3, block.conv5x5, block.pool):
            sizes = [value if isinstance(value, int) else value[0] for value in (layer.kernel_size, layer.padding)]
            assert sizes[0] // 2 == sizes[1]


def test_scores_lie_on_the_centres_of_what_they_see():
    """Where the grid is symmetric about the image, mirrored kernels on a mirrored image give mirrored logits."""
    model, mirrored = filled(), filled()
    for module in mirrored.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(module.weight.flip(2, 3))
    image = torch.randn(1, 3, 27, 59)  # 27 and 27 + 32: no window is cut
    logits = model(image)
    assert logits.std() > 0.01
    assert torch.allclose(mirrored(image.flip(2, 3)), logits.flip(2, 3), atol=1e-5 * logits.abs().max())


def reference(state, image):
    """GoogLeNet's layer table in plain functions, in Caffe's terms."""

    def conv(name, x, **geometry):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **geometry).relu()

    def pool(x):
        missing = [(math.ceil((length - 3) / 2) * 2 + 3) - length for length in (x.shape[3], x.shape[2])]
        return F.max_pool2d(F.pad(x, (0, missing[0], 0, missing[1]), value=-1e9), 3, 2)

    def norm(x):
        squares = F.pad(x**2, (0, 0, 0, 0, 2, 2))
        total = sum(squares[:, shift : shift + x.shape[1]] for shift in range(5))
        return x / (1 + 1e-4 / 5 * total) ** 0.75

    def inception(name, x):
        name = f"inception_{name}"
        one = conv(f"{name}.conv1x1", x)
        three = conv(f"{name}.conv3x3", conv(f"{name}.conv3x3_reduce", x), padding=1)
        five = conv(f"{name}.conv5x5", conv(f"{name}.conv5x5_reduce", x), padding=2)
        pooled = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-1e9), 3, 1)
        return torch.cat([one, three, five, conv(f"{name}.pool_proj", pooled)], 1)

    x = norm(pool(conv("conv1", image, stride=2, padding=100)))
    x = pool(norm(conv("conv2", conv("conv2_reduce", x), padding=1)))
    x = pool(inception("3b", inception("3a", x)))
    for letter in "abcde":
        x = inception(f"4{letter}", x)
    x = inception("5b", inception("5a", pool(x)))
    x = F.conv2d(x, state["score_fr.weight"], state["score_fr.bias"])
    row = torch.tensor([1 - abs(index - 31) / 32 for index in range(63)])
    full = state.get("upscore.weight", torch.eye(x.shape[1])[:, :, None, None] * torch.outer(row, row))
    x = F.conv_transpose2d(x, full, stride=32)
    return x.narrow(2, 98, image.shape[2]).narrow(3, 98, image.shape[3])


@pytest.mark.parametrize("upsampling", ["fixed", "learnt"])
def test_logits_equal_a_reference(upsampling):
    model = filled(upsampling=upsampling)
    image = 20 * torch.randn(2, 3, 41, 67)  # large, so that the normalisation across channels shows
    wanted = reference(model.state_dict(), image)
    assert wanted.std() > 0.1
    assert torch.allclose(model(image), wanted, atol=1e-5 * wanted.abs().max(), rtol=1e-5)


def test_weights_start_as_stated():
    torch.manual_seed(0)
    model = create_model("fcn_googlenet", num_classes=3)
    assert not model.score_fr.weight.any() and not model.score_fr.bias.any()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and path != "score_fr":
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.1)
            assert not layer.bias.any()


def test_dropout_stands_before_the_score_as_in_the_classifier():
    model = create_model("fcn_googlenet", tiny=True, num_classes=2)
    assert model.dropout.p == 0.4 and FCNGoogLeNetConfig().dropout == 0.4
    assert create_model("fcn_googlenet", tiny=True, num_classes=2).classifiers == ()


@pytest.mark.parametrize(("field", "value"), [("upsampling", "nearest"), ("width", 0.0), ("dropout", 1.0)])
def test_impossible_fields_are_named(field, value):
    with pytest.raises(UsageError, match=f"fcn_googlenet: {field} must be"):
        FCNGoogLeNetConfig(**{field: value})
