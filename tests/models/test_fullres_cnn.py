import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.ops.cost import multiply_adds
from pixelwise.ops.receptive_field import receptive_field


def test_parameters_of_the_default():
    # 27 * 64, 7 times 576 * 64, norms 8 * 128, scores 576 * 2 + 2
    row = describe_model("fullres_cnn", num_classes=2)
    assert row["parameters"] == 1_728 + 258_048 + 1_024 + 1_154
    assert row["stride"] == 1


@pytest.mark.parametrize(
    ("widths", "kernel", "field"), [((4, 5, 6), 3, 9), ((4,), 5, 9), ((3, 3), 1, 1), ((2, 3), 7, 19)]
)
def test_what_it_sees_and_what_it_costs(widths, kernel, field):
    model = create_model("fullres_cnn", num_classes=3, widths=widths, kernel=kernel)
    assert model.receptive_field_px == field
    found = receptive_field(model)
    assert (found.size_px, found.stride, found.radius_px) == ((field, field), 1, (field // 2,) * 4)
    assert multiply_adds(model, (1, 3, 11, 20)) == 11 * 20 * model.multiply_adds_per_px


def test_the_default_sees_19_pixels_and_costs_17_billion_multiply_adds_for_a_small_image():
    with torch.device("meta"):
        model = create_model("fullres_cnn", num_classes=2)
    assert model.receptive_field_px == 19
    assert multiply_adds(model, (1, 3, 256, 256)) == 256**2 * 260_928 == 17_100_177_408


@pytest.mark.parametrize("batch_norm", [True, False])
def test_logits_equal_a_reference(batch_norm):
    torch.manual_seed(0)
    model = create_model("fullres_cnn", num_classes=3, widths=(4, 5), kernel=5, batch_norm=batch_norm).eval()
    state = model.state_dict()
    x = image = torch.randn(2, 3, 9, 14)
    for index in (0, 3) if batch_norm else (0, 2):
        x = F.conv2d(x, state[f"layers.{index}.weight"], state.get(f"layers.{index}.bias"), padding=2)
        x = (x / math.sqrt(1 + 1e-5) if batch_norm else x).relu()  # a norm that has seen nothing
    wanted = F.conv2d(x, state["score.weight"], state["score.bias"], padding=2)
    assert torch.allclose(model(image), wanted, atol=1e-5)


def test_there_are_only_convolutions_and_every_map_has_the_size_of_the_image():
    model = create_model("fullres_cnn", num_classes=2, widths=(4, 4), batch_norm=False)
    assert {type(module) for module in model.layers} == {nn.Conv2d, nn.ReLU}
    sizes = set()
    for module in model.modules():
        module.register_forward_hook(lambda _module, _args, out: sizes.add(tuple(out.shape[-2:])))
    model(torch.zeros(1, 3, 6, 9))
    assert sizes == {(6, 9)}


@pytest.mark.parametrize(
    ("config", "message"),
    [({"widths": ()}, "widths must be positive"), ({"kernel": 4}, "kernel must be an odd number")],
)
def test_a_wrong_field_is_told(config, message):
    with pytest.raises(UsageError, match=message):
        create_model("fullres_cnn", num_classes=2, **config)
