import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.segnet import SegNetBasic, SegNetBasicConfig


def test_parameters_of_the_paper():
    row = describe_model("segnet_basic", num_classes=11)
    assert row["parameters"] == 1_416_587
    assert row["stride"] == 16


def test_layers_of_the_release():
    with torch.device("meta"):
        model = create_model("segnet_basic", num_classes=11)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size for conv in convolutions] == [(7, 7)] * 8 + [(1, 1)]
    assert sum(conv.weight.numel() + conv.bias.numel() for conv in convolutions) == 1_415_563
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 8
    assert not any(isinstance(module, nn.ReLU) for module in model.decoder.modules())
    assert sum(isinstance(module, nn.ReLU) for module in model.encoder.modules()) == 4


def test_the_levels_at_360x480():
    with torch.device("meta"):
        model = create_model("segnet_basic", num_classes=11)
        seen = []
        for stage in (*model.encoder, *model.decoder):
            stage.register_forward_hook(lambda _module, _args, out: seen.append(tuple(out.shape[-2:])))
        assert model(torch.zeros(1, 3, 360, 480)).shape == (1, 11, 360, 480)
    down = [(360, 480), (180, 240), (90, 120), (45, 60)]
    assert seen == down + down[::-1]


def test_a_cell_of_the_last_pooling_sees_106_pixels():
    model = SegNetBasic(SegNetBasicConfig(in_channels=1, width=1)).eval()
    for name, parameter in model.named_parameters():  # nothing negative, so that no ReLU hides what is seen
        nn.init.zeros_(parameter) if "bias" in name else nn.init.ones_(parameter)
    seen = []
    model.decoder[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.eye(256)[:, None, None, :])  # one bright pixel in each image, all in a row
    cell = seen[0][:, 0, 0, 2 * 8 : 2 * 9].amax(dim=1)  # unpooled: two columns for each cell
    assert (cell > 0).sum() == 106


def reference(state, image):
    """segnet_basic_inference.prototxt in plain functions."""

    def conv_bn(part, name, x):
        x = F.conv2d(x, state[f"{part}.{name}.weight"], state[f"{part}.{name}.bias"], padding=3)
        norm = f"{part}.{name}_bn"
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{norm}.weight"], state[f"{norm}.bias"])

    channels = image.shape[1]
    squares = torch.stack([image[:, max(0, c - 2) : c + 3].square().sum(1) for c in range(channels)], dim=1)
    x = image / (1 + 1e-4 / 5 * squares) ** 0.75
    masks = []
    for level in (1, 2, 3, 4):
        x = conv_bn(f"encoder.{level - 1}", f"conv{level}", x).relu()
        height, width = x.shape[-2:]
        x, mask = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        masks.append((mask, height, width))
    for level in (4, 3, 2, 1):
        mask, height, width = masks.pop()
        empty = torch.zeros(*x.shape[:2], height * width)
        x = empty.scatter(2, mask.flatten(2), x.flatten(2)).view(*x.shape[:2], height, width)
        x = conv_bn(f"decoder.{4 - level}", f"conv_decode{level}", x)
    return F.conv2d(x, state["conv_classifier.weight"], state["conv_classifier.bias"])


@pytest.mark.parametrize(("channels", "scale"), [(3, 1.0), (3, 127.0), (7, 1.0)])
def test_logits_equal_a_reference(channels, scale):
    torch.manual_seed(0)
    model = create_model("segnet_basic", num_classes=3, in_channels=channels, width=4).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.2)):
                nn.init.uniform_(tensor, low, low + 1)
            nn.init.constant_(module.running_var, scale if module is model.encoder[0].conv1_bn else 1.0)
    image = scale * torch.randn(2, channels, 45, 75)
    logits = model(image)
    assert torch.allclose(logits, reference(model.state_dict(), image), atol=1e-5 * logits.abs().max().item())


def test_weights_start_as_in_the_release():
    torch.manual_seed(0)
    model = SegNetBasic(SegNetBasicConfig(num_classes=32, width=32))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / module.weight[0].numel()), rel=0.1)
            assert (module.bias == 0).all()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and torch.equal(module.bias, torch.full((32,), 0.001))


def test_wrong_fields_are_refused():
    with pytest.raises(UsageError, match="segnet_basic: width must be at least 1, not 0"):
        SegNetBasicConfig(width=0)
