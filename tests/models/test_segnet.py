import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.segnet import SegNet, SegNetConfig


@pytest.mark.parametrize(
    ("num_classes", "parameters"),
    [(11, 29_449_355), (12, 29_449_932), (21, 29_455_125), (38, 29_464_934)],  # CamVid, web demo, Pascal VOC, SUN
)
def test_parameters_of_the_paper(num_classes, parameters):
    row = describe_model("segnet", num_classes=num_classes)
    assert row["parameters"] == parameters
    assert row["stride"] == 32


def test_layers_of_the_release():
    with torch.device("meta"):
        model = create_model("segnet", num_classes=11)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(norms) == 25 and len(convolutions) == 26
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 25  # so there are some in the decoder
    assert sum(2 * norm.num_features for norm in norms) == 15_872
    assert sum(conv.weight.numel() + conv.bias.numel() for conv in convolutions) == 29_433_483
    assert list(dict(model.decoder[4].named_children())) == ["conv1_2_D", "bn1_2_D", "relu1_2_D", "conv1_1_D"]


def test_the_levels_at_360x480():
    with torch.device("meta"):
        model = create_model("segnet", num_classes=11)
        seen = []
        for stage in (*model.encoder, *model.decoder):
            stage.register_forward_hook(lambda _module, _args, out: seen.append(tuple(out.shape[1:])))
        model.decoder[0].register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape[1:])))
        model(torch.zeros(1, 3, 360, 480))
    # The poolings round up: 45 rows become 23, and 23 become 12. `upsample5` of the release is 23 x 30, `upsample4` 45 x 60.
    assert seen == [
        *[(64, 360, 480), (128, 180, 240), (256, 90, 120), (512, 45, 60), (512, 23, 30)],
        *[(512, 23, 30), (512, 23, 30), (256, 45, 60), (128, 90, 120), (64, 180, 240), (11, 360, 480)],
    ]


ENCODER = (("1_1", "1_2"), ("2_1", "2_2"), ("3_1", "3_2", "3_3"), ("4_1", "4_2", "4_3"), ("5_1", "5_2", "5_3"))
DECODER = (("5_3", "5_2", "5_1"), ("4_3", "4_2", "4_1"), ("3_3", "3_2", "3_1"), ("2_2", "2_1"), ("1_2", "1_1"))


def reference(state, image):
    """segnet_inference.prototxt in plain functions; a mask is where a value of the pooled map stands, cell by cell."""

    def conv(part, name, suffix, x):
        x = F.conv2d(x, state[f"{part}.conv{name}{suffix}.weight"], state[f"{part}.conv{name}{suffix}.bias"], padding=1)
        if (name, suffix) == ("1_1", "_D"):
            return x
        norm = f"{part}.bn{name}{suffix}"
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{norm}.weight"], state[f"{norm}.bias"]).relu()

    x, masks = image, []
    for stage, names in enumerate(ENCODER):
        for name in names:
            x = conv(f"encoder.{stage}", name, "", x)
        height, width = x.shape[-2:]
        x, mask = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        masks.append((mask, height, width))
    for step, names in enumerate(DECODER):
        mask, height, width = masks.pop()
        empty = torch.zeros(*x.shape[:2], height * width)
        x = empty.scatter(2, mask.flatten(2), x.flatten(2)).view(*x.shape[:2], height, width)
        for name in names:
            x = conv(f"decoder.{step}", name, "_D", x)
    return x


def random_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.2)):
                nn.init.uniform_(tensor, low, low + 1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(64, 64), (45, 75), (1, 1), (33, 2)])
def test_logits_equal_a_reference(size):
    torch.manual_seed(0)
    model = random_norms(create_model("segnet", num_classes=3, widths=(4, 5, 6, 7, 8)))
    image = torch.randn(2, 3, *size)
    logits = model(image)
    assert logits.std() > 0.01
    assert torch.allclose(logits, reference(model.state_dict(), image), atol=1e-5)


def test_weights_start_as_in_the_release():
    torch.manual_seed(0)
    model = SegNet(SegNetConfig(num_classes=20, widths=(16, 32, 32, 32, 32)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / module.weight[0].numel()), rel=0.1)
            assert (module.bias == 0).all()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_a_classifier_fills_the_encoder():
    with torch.device("meta"):
        model = create_model("segnet", num_classes=2)
        weights = model.weights_from_classifier(tv.vgg16_bn())
    state = model.state_dict()
    assert {name for name in state if name.startswith("encoder.")} == set(weights)
    assert all(weights[name].shape == state[name].shape for name in weights)
    assert model.classifiers[0] == "torchvision/vgg16_bn"


def test_wrong_fields_are_refused():
    with pytest.raises(UsageError, match=r"segnet: widths must be 5 positive numbers, not \(4, 4\)"):
        SegNetConfig(widths=(4, 4))
