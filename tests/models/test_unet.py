import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.models import create_model, describe_model
from pixelwise.models.unet import UNet, UNetConfig


@pytest.mark.parametrize(
    ("in_channels", "num_classes", "batch_norm", "parameters"),
    [
        (3, 11, False, 31_032_395),
        (1, 2, False, 31_030_658),  # the network of figure 1
        (3, 11, True, 31_038_283),  # 5,888 channels: two numbers of a norm for one of a bias
    ],
)
def test_parameters_of_the_paper(in_channels, num_classes, batch_norm, parameters):
    row = describe_model("unet", num_classes=num_classes, in_channels=in_channels, batch_norm=batch_norm)
    assert row["parameters"] == parameters
    assert row["stride"] == 16


def test_the_levels_of_figure_1():
    with torch.device("meta"):
        model = create_model("unet", num_classes=2, in_channels=1)
        seen = []
        for block in (*model.down, *model.up):
            block.register_forward_hook(lambda _module, _args, out: seen.append(tuple(out.shape[1:])))
        model(torch.zeros(1, 1, 512, 512))
    down = [(64, 512, 512), (128, 256, 256), (256, 128, 128), (512, 64, 64), (1024, 32, 32)]
    assert seen == down + down[-2::-1]


def reference(state, image, levels):
    """The same network in plain functions, for sizes that need no padding."""

    def block(name, x):
        for index in (0, 2):
            x = F.conv2d(x, state[f"{name}.{index}.weight"], state[f"{name}.{index}.bias"], padding=1).relu()
        return x

    skips = [block("down.0", image)]
    for level in range(1, levels):
        skips.append(block(f"down.{level}", F.max_pool2d(skips[-1], 2)))
    x = skips.pop()
    for step, skip in enumerate(reversed(skips)):
        x = F.conv_transpose2d(x, state[f"up_conv.{step}.weight"], state[f"up_conv.{step}.bias"], stride=2)
        x = block(f"up.{step}", torch.cat([x, skip], 1))
    return F.conv2d(x, state["score.weight"], state["score.bias"])


def test_logits_equal_a_reference():
    torch.manual_seed(0)
    model = create_model("unet", num_classes=3, widths=(4, 5, 6, 7)).eval()
    image = torch.randn(2, 3, 24, 40)
    assert torch.allclose(model(image), reference(model.state_dict(), image, 4), atol=1e-5)


def test_other_sizes_are_the_padded_image_cut():
    torch.manual_seed(0)
    model = create_model("unet", num_classes=3, widths=(4, 5, 6)).eval()
    image = torch.randn(1, 3, 21, 30)
    padded = F.pad(image, (0, 2, 0, 3), mode="replicate")
    assert torch.equal(model(image), model(padded)[..., :21, :30])


def test_weights_start_as_in_the_paper_and_keep_the_signal():
    torch.manual_seed(0)
    model = UNet(UNetConfig(num_classes=8, widths=(32, 64, 128)))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            wanted = math.sqrt(2 / layer.weight[0].numel())
        elif isinstance(layer, nn.ConvTranspose2d):
            wanted = math.sqrt(2 / layer.in_channels)
        else:
            continue
        assert layer.weight.std().item() == pytest.approx(wanted, rel=0.1)
        assert (layer.bias == 0).all()
    assert 0.1 < model(torch.randn(1, 3, 32, 32)).std() < 10


def test_dropout_acts_at_the_end_of_the_contracting_path_in_training_only():
    torch.manual_seed(0)
    model = create_model("unet", num_classes=2, widths=(4, 8), dropout=0.5)
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)] == ["dropout"]
    image = torch.randn(1, 3, 16, 16)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


def test_batch_norm_replaces_the_bias():
    model = create_model("unet", num_classes=2, widths=(4, 8), batch_norm=True)
    for block in (*model.down, *model.up):
        kinds = [type(layer) for layer in block]
        assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
        assert block[0].bias is None and block[3].bias is None
