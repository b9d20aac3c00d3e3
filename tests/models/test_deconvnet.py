import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn
from torch.export import Dim

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.deconvnet import DeconvNet, DeconvNetConfig

TINY = {"widths": (4, 5, 6, 7, 8), "head_width": 9}


@pytest.mark.parametrize(("num_classes", "parameters"), [(21, 251_805_653), (11, 251_805_003)])
def test_parameters_of_the_paper(num_classes, parameters):
    row = describe_model("deconvnet", num_classes=num_classes)
    assert row["parameters"] == parameters
    assert row["stride"] == 32


def test_layers_of_the_release():
    with torch.device("meta"):
        model = create_model("deconvnet", num_classes=21)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    assert sum(layer.weight.numel() + layer.bias.numel() for layer in layers) == 251_772_245
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(2 * norm.num_features for norm in norms) == 33_408
    sizes = [layer.weight.numel() + layer.bias.numel() for layer in (model.fc6[0], model.fc7[0], model.fc6_deconv[0])]
    assert sizes == [102_764_544, 16_781_312, 102_760_960]
    widths = [
        [layer.out_channels for layer in stage if isinstance(layer, nn.ConvTranspose2d)] for stage in model.decoder
    ]
    assert widths == [[512, 512, 512], [512, 512, 256], [256, 256, 128], [128, 64], [64, 64]]


@pytest.mark.parametrize(("image", "rows", "columns"), [((224, 224), 7, 7), ((320, 480), 10, 15), ((1, 300), 7, 10)])
def test_the_levels(image, rows, columns):
    with torch.device("meta"):
        model = create_model("deconvnet", num_classes=21)
        seen = []
        for stage in (model.fc6, model.fc7, model.fc6_deconv, *model.decoder):
            stage.register_forward_hook(lambda _module, _args, out: seen.append(tuple(out.shape[1:])))
        assert model.eval()(torch.zeros(1, 3, *image)).shape == (1, 21, *image)
    head = (4096, rows - 6, columns - 6)
    assert seen[:3] == [head, head, (512, rows, columns)]
    widths = {2: 512, 4: 256, 8: 128, 16: 64, 32: 64}
    assert seen[3:] == [(width, rows * times, columns * times) for times, width in widths.items()]


def reference(state, image):
    """DeconvNet_inference_deploy.prototxt in plain functions, for sizes that need no padding.

    A transposed convolution of stride 1 is written as what it is: a convolution with the kernel turned round.
    """

    def block(name, norm, x, padding, transposed=False):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if transposed:
            weight, padding = weight.transpose(0, 1).flip(2, 3), weight.shape[-1] - 1 - padding
        x = F.conv2d(x, weight, bias, padding=padding)
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{norm}.weight"], state[f"{norm}.bias"]).relu()

    x, masks = image, []
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
        for index in range(1, depth + 1):
            name = f"{stage + 1}_{index}"
            x = block(f"encoder.{stage}.conv{name}", f"encoder.{stage}.bn{name}", x, 1)
        height, width = x.shape[-2:]
        x, mask = F.max_pool2d(x, 2, return_indices=True)
        masks.append((mask, height, width))
    x = block("fc6.0", "fc6.1", x, 0)
    x = block("fc7.0", "fc7.1", x, 0)
    x = block("fc6_deconv.0", "fc6_deconv.1", x, 0, transposed=True)
    for step, depth in enumerate((3, 3, 3, 2, 2)):
        mask, height, width = masks.pop()
        empty = torch.zeros(*x.shape[:2], height * width)
        x = empty.scatter(2, mask.flatten(2), x.flatten(2)).view(*x.shape[:2], height, width)
        for index in range(1, depth + 1):
            name = f"{5 - step}_{index}"
            x = block(f"decoder.{step}.deconv{name}", f"decoder.{step}.debn{name}", x, 1, transposed=True)
    return F.conv2d(x, state["seg_score.weight"], state["seg_score.bias"])


def drawn(**config):
    """A network whose every number is random and whose signal neither dies nor grows."""
    torch.manual_seed(0)
    model = create_model("deconvnet", num_classes=3, **(TINY | config))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.2)):
                nn.init.uniform_(tensor, low, low + 1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            fan_in = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.weight[:, 0].numel()
            fan_in = module.in_channels if module is model.fc6_deconv[0] else fan_in  # one window reaches each cell
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(224, 224), (256, 288)])
def test_logits_equal_a_reference(size):
    model, image = drawn(), torch.randn(2, 3, *size)
    logits = model(image)
    assert logits.std() > 0.1
    assert torch.allclose(logits, reference(model.state_dict(), image), atol=1e-5 * max(1, logits.abs().max().item()))


@pytest.mark.parametrize(("size", "below", "right"), [((40, 224), 184, 0), ((230, 257), 26, 31), ((1, 1), 223, 223)])
def test_other_sizes_are_the_padded_image_cut(size, below, right):
    model, image = drawn(), torch.randn(1, 3, *size)
    padded = F.pad(image, (0, right, 0, below), mode="replicate")
    assert torch.equal(model(image), model(padded)[..., : size[0], : size[1]])


def test_one_graph_serves_images_below_and_above_224_pixels():
    model = drawn()
    sizes = {2: Dim("height", min=33, max=4096), 3: Dim("width", min=33, max=4096)}
    exported = torch.export.export(model, (torch.randn(1, 3, 45, 70),), dynamic_shapes={"image": sizes}).module()
    for size in ((45, 70), (224, 224), (225, 100), (290, 330)):
        image = torch.randn(1, 3, *size)
        assert torch.allclose(exported(image), model(image), atol=1e-5)


def test_weights_start_as_in_the_release():
    torch.manual_seed(0)
    model = DeconvNet(DeconvNetConfig(num_classes=64, widths=(32, 32, 32, 32, 32), head_width=64))
    for name, module in model.named_modules():
        if isinstance(module, nn.ConvTranspose2d) or name == "seg_score":
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.1)
        elif isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / module.weight[0].numel()), rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0.001).all()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert (module.bias == 0).all()


def small_vgg(widths, head_width, batch_norm=True):
    """A VGG-16 of torchvision's layout with fewer channels."""
    plan = [item for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=True) for item in (*[width] * depth, "M")]
    with torch.device("meta"):
        classifier = tv.VGG(nn.Sequential())
    classifier.features = tv.vgg.make_layers(plan, batch_norm=batch_norm)
    classifier.classifier[0] = nn.Linear(widths[-1] * 49, head_width)
    classifier.classifier[3] = nn.Linear(head_width, head_width)
    classifier.classifier[6] = nn.Linear(head_width, 10)
    return classifier


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_classifier_fills_the_encoder_and_the_fully_connected_layers(batch_norm):
    torch.manual_seed(0)
    classifier = small_vgg(TINY["widths"], TINY["head_width"], batch_norm).eval()
    model = drawn()
    weights = model.weights_from_classifier(classifier)
    kinds = ("conv", "bn") if batch_norm else ("conv",)
    trunk = {
        name for name in model.state_dict() if name.startswith("encoder.") and name.split(".")[2].startswith(kinds)
    }
    assert set(weights) == trunk | {f"{name}.0.{key}" for name in ("fc6", "fc7") for key in ("weight", "bias")}
    model.load_state_dict(weights, strict=False)
    pool5 = torch.randn(1, TINY["widths"][-1], 7, 7)
    with torch.no_grad():
        fc6 = classifier.classifier[0](pool5.flatten(1))
        assert torch.allclose(model.fc6[0](pool5).flatten(1), fc6, atol=1e-5)
        assert torch.allclose(model.fc7[0](fc6[..., None, None]).flatten(1), classifier.classifier[3](fc6), atol=1e-5)


def test_other_classifiers_are_refused():
    model = drawn()
    with torch.device("meta"):
        resnet = tv.resnet18()
    with pytest.raises(UsageError, match=r"deconvnet: its encoder is that of VGG-16.*ResNet given is another network"):
        model.weights_from_classifier(resnet)
    with pytest.raises(UsageError, match=r"deconvnet: conv1_1.weight has the shape"):
        model.weights_from_classifier(small_vgg((5, 5, 6, 7, 8), 9))
    with pytest.raises(UsageError, match=r"deconvnet: fc6.weight has the shape"):
        model.weights_from_classifier(small_vgg(TINY["widths"], 10))
    headless = small_vgg(TINY["widths"], 9)
    headless.classifier = nn.Linear(8 * 49, 10)
    with pytest.raises(UsageError, match=r"3 linear layers.*the VGG given is another network"):
        model.weights_from_classifier(headless)


def test_wrong_fields_are_refused():
    with pytest.raises(UsageError, match="deconvnet: widths must be 5 positive numbers"):
        DeconvNetConfig(widths=(4, 4))
    with pytest.raises(UsageError, match="deconvnet: head_width must be at least 1, not 0"):
        DeconvNetConfig(head_width=0)
