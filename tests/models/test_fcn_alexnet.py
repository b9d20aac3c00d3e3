import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.fcn import FCNAlexNetConfig


def filled(**config):
    """A tiny one without zeros among its weights, in eval mode."""
    torch.manual_seed(0)
    model = create_model("fcn_alexnet", tiny=True, num_classes=3, **config).eval().requires_grad_(False)
    nn.init.normal_(model.score_fr.weight)
    if config.get("upsampling") == "learnt":
        model.upscore.weight.add_(0.01 * torch.randn_like(model.upscore.weight))
    return model


def test_parameters_of_the_release():
    row = describe_model("fcn_alexnet", num_classes=21)
    assert (row["parameters"], row["stride"]) == (56_954_261, 32)
    assert describe_model("fcn_alexnet", num_classes=21, upsampling="learnt")["parameters"] == 58_704_590


def test_parameters_of_the_layers():
    with torch.device("meta"):
        model = create_model("fcn_alexnet", num_classes=21)
    counts = {name: sum(item.numel() for item in layer.parameters()) for name, layer in model.named_children()}
    assert (counts["fc6"], counts["fc7"], counts["score_fr"]) == (37_752_832, 16_781_312, 86_037)
    assert model.fc6.weight.shape == (4096, 256, 6, 6)
    assert [model.get_submodule(f"conv{index}").groups for index in range(1, 6)] == [1, 2, 1, 2, 2]


def test_every_size_from_1_to_600_comes_out_as_it_went_in():
    with torch.device("meta"):
        model = create_model("fcn_alexnet", tiny=True, num_classes=2)
    for size in range(1, 601, 2):  # odd heights, even widths
        assert model(torch.zeros(1, 3, size, 601 - size, device="meta")).shape == (1, 2, size, 601 - size)


def test_without_padding_500_px_give_10_x_10_scores_since_poolings_round_up():
    with torch.device("meta"):
        model = create_model("fcn_alexnet", tiny=True, num_classes=2)
    model.conv1.padding = (0, 0)  # as in the paper's comparison of times; padded by 100 px: 16 x 16
    seen = []
    model.score_fr.register_forward_hook(lambda _m, _a, out: seen.append(tuple(out.shape[2:])))
    model(torch.zeros(1, 3, 500, 500, device="meta"))
    model.conv1.padding = (100, 100)
    model(torch.zeros(1, 3, 500, 500, device="meta"))
    assert seen == [(10, 10), (16, 16)]


def test_the_receptive_field_of_table_1_and_the_crop_that_centres_it():
    with torch.device("meta"):
        model = create_model("fcn_alexnet", num_classes=21)
    field, jump, centre = 1, 1, 0.0
    for name in ("conv1", "pool", "conv2", "pool", "conv3", "conv4", "conv5", "pool", "fc6"):
        layer = model.get_submodule(name)
        kernel, stride, padding = (
            value if isinstance(value, int) else value[0] for value in (layer.kernel_size, layer.stride, layer.padding)
        )
        field += (kernel - 1) * jump
        centre += ((kernel - 1) / 2 - padding) * jump
        jump *= stride
    assert (field, jump) == (355, 32)
    assert (63 - 1) / 2 - centre == 18


def test_scores_lie_on_the_centres_of_what_they_see():
    """Where the grid is symmetric about the image, mirrored kernels on a mirrored image give mirrored logits."""
    model, mirrored = filled(), filled()
    for module in mirrored.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(module.weight.flip(2, 3))
    image = torch.randn(1, 3, 59, 91)  # 27 + 32 and 27 + 64: no window is cut
    assert torch.allclose(mirrored(image.flip(2, 3)), model(image).flip(2, 3), atol=1e-5)


def reference(state, image):
    """The release's layer table in plain functions, in Caffe's terms."""

    def conv(name, x, groups=1, **geometry):
        weight, bias = state[f"{name}.weight"].chunk(groups), state[f"{name}.bias"].chunk(groups)
        parts = zip(x.chunk(groups, 1), weight, bias, strict=True)
        return torch.cat([F.conv2d(part, w, b, **geometry) for part, w, b in parts], 1)

    def pool(x):
        missing = [(math.ceil((length - 3) / 2) * 2 + 3) - length for length in (x.shape[3], x.shape[2])]
        return F.max_pool2d(F.pad(x, (0, missing[0], 0, missing[1]), value=-1e9), 3, 2)

    def norm(x):
        squares = F.pad(x**2, (0, 0, 0, 0, 2, 2))
        total = sum(squares[:, shift : shift + x.shape[1]] for shift in range(5))
        return x / (1 + 1e-4 / 5 * total) ** 0.75

    x = norm(pool(conv("conv1", image, stride=4, padding=100).relu()))
    x = norm(pool(conv("conv2", x, groups=2, padding=2).relu()))
    x = conv("conv3", x, padding=1).relu()
    x = conv("conv4", x, groups=2, padding=1).relu()
    x = pool(conv("conv5", x, groups=2, padding=1).relu())
    x = conv("score_fr", conv("fc7", conv("fc6", x).relu()).relu())
    row = torch.tensor([1 - abs(index - 31) / 32 for index in range(63)])
    full = state.get("upscore.weight", torch.eye(x.shape[1])[:, :, None, None] * torch.outer(row, row))
    x = F.conv_transpose2d(x, full, stride=32)
    return x.narrow(2, 18, image.shape[2]).narrow(3, 18, image.shape[3])


@pytest.mark.parametrize("upsampling", ["fixed", "learnt"])
def test_logits_equal_a_reference(upsampling):
    model = filled(upsampling=upsampling)
    image = 20 * torch.randn(2, 3, 41, 67)  # large, so that the normalisation across channels shows
    wanted = reference(model.state_dict(), image)
    assert wanted.std() > 0.1
    assert torch.allclose(model(image), wanted, atol=1e-5 * wanted.abs().max(), rtol=1e-5)


def test_weights_start_as_stated():
    torch.manual_seed(0)
    model = create_model("fcn_alexnet", num_classes=3, widths=(48, 64, 64, 64, 64), head_width=64)
    assert not model.score_fr.weight.any() and not model.score_fr.bias.any()
    for path, layer in model.named_children():
        if isinstance(layer, nn.Conv2d) and path != "score_fr":
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.1)
            assert not layer.bias.any()


def test_no_classifier_of_the_libraries_is_this_one():
    assert create_model("fcn_alexnet", tiny=True, num_classes=2).classifiers == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("upsampling", "nearest"),
        ("widths", (4, 4, 4)),
        ("widths", (4, 5, 4, 4, 4)),
        ("head_width", 0),
        ("dropout", -0.1),
    ],
)
def test_impossible_fields_are_named(field, value):
    with pytest.raises(UsageError, match=f"fcn_alexnet: {field} must be"):
        FCNAlexNetConfig(**{field: value})
