import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from safetensors.torch import save_file
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import count_parameters, create_model, describe_model
from pixelwise.models.linknet import LinkNetConfig
from pixelwise.models.pretrained import load_pretrained


@pytest.mark.parametrize(
    ("num_classes", "parameters"), [(11, 11_535_659), (12, 11_535_788), (19, 11_536_691), (20, 11_536_820)]
)
def test_parameters_of_the_paper(num_classes, parameters):
    row = describe_model("linknet", num_classes=num_classes)
    assert row["parameters"] == parameters
    assert row["stride"] == 32


def test_the_levels_at_768x576_and_their_parameters():
    with torch.device("meta"):
        model = create_model("linknet", num_classes=11).eval()
        seen = []
        for block in (*model.decoder, model.tail, model.score):
            block.register_forward_hook(lambda _module, args, out: seen.append((args[0].shape[1:], out.shape[1:])))
        model(torch.zeros(1, 3, 576, 768))
    assert [(tuple(before), tuple(after)) for before, after in seen] == [
        ((512, 18, 24), (256, 36, 48)),
        ((256, 36, 48), (128, 72, 96)),
        ((128, 72, 96), (64, 144, 192)),
        ((64, 144, 192), (64, 144, 192)),  # to the input of stage 1, which halves nothing
        ((64, 144, 192), (32, 288, 384)),
        ((32, 288, 384), (11, 576, 768)),
    ]
    assert count_parameters(model.encoder) == 11_176_512
    assert count_parameters(model.decoder) == 329_888
    assert count_parameters(model.tail) + count_parameters(model.score) == 29_259
    decoder = [norm.eps for part in (model.decoder, model.tail) for norm in part.modules() if hasattr(norm, "eps")]
    assert decoder == [1e-3] * 12 + [1e-5, 1e-3]  # the first norm of the tail is the authors' exception


def reference(state, image):
    """model.lua in plain functions, on torchvision's ResNet-18 with the same weights."""
    trunk = tv.resnet18().eval()
    body = {name.removeprefix("encoder.body."): item for name, item in state.items() if name.startswith("encoder.")}
    missing, unexpected = trunk.load_state_dict(body, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected

    def full(name, x, stride=1, padding=0, output_padding=0):
        return F.conv_transpose2d(
            x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding, output_padding=output_padding
        )

    def conv(name, x, padding=0):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def norm_relu(name, x, eps=1e-3):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=eps).clamp(min=0)

    def decode(name, x, stride):
        x = norm_relu(f"{name}.1", conv(f"{name}.0", x))
        x = norm_relu(f"{name}.4", full(f"{name}.3", x, stride, 1, stride - 1))
        return norm_relu(f"{name}.7", conv(f"{name}.6", x))

    x = F.max_pool2d(trunk.bn1(trunk.conv1(image)).clamp(min=0), 3, 2, 1)

    def bypass(level, x):
        """A stage, all that is coarser, its decoder block; plus what came in."""
        out = getattr(trunk, f"layer{level}")(x)
        if level < 4:
            out = bypass(level + 1, out)
        return (decode(f"decoder.{4 - level}", out, 1 if level == 1 else 2) + x).clamp(min=0)

    x = bypass(1, x)
    x = norm_relu("tail.1", full("tail.0", x, 2, 1, 1), eps=1e-5)
    x = norm_relu("tail.4", conv("tail.3", x, padding=1))
    return full("score", x, 2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = create_model("linknet", num_classes=3)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return made.eval().requires_grad_(False)


def test_logits_equal_a_reference(model):
    image = torch.randn(2, 3, 64, 96)
    wanted = reference(model.state_dict(), image)
    assert wanted.std() > 0.01
    assert torch.allclose(model(image), wanted, atol=1e-5)


def test_other_sizes_are_the_padded_image_cut(model):
    image = torch.randn(1, 3, 37, 50)
    padded = F.pad(image, (0, 14, 0, 27), mode="replicate")
    assert torch.allclose(model(image), reference(model.state_dict(), padded)[..., :37, :50], atol=1e-5)


def test_the_same_network_on_torchvisions_resnet(model):
    other = create_model("linknet", num_classes=3, backbone="torchvision/resnet18").eval()
    assert other.state_dict().keys() == model.state_dict().keys()
    other.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(other(image), model(image), atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet10t", "resnet34", "resnet50"])
def test_other_resnets_are_encoders_too(backbone):
    with torch.device("meta"):
        other = create_model("linknet", num_classes=3, backbone=backbone).eval()
        assert other(torch.zeros(1, 3, 40, 70)).shape == (1, 3, 40, 70)


def test_weights_of_a_classifier_fill_the_encoder(tmp_path):
    torch.manual_seed(1)
    classifier = tv.resnet18()
    save_file(classifier.state_dict(), tmp_path / "resnet18.safetensors")
    made = create_model("linknet", num_classes=2)
    loaded = load_pretrained(made, tmp_path / "resnet18.safetensors")
    assert not loaded.missing and set(loaded.unused) == {"fc.weight", "fc.bias"}
    assert torch.equal(made.encoder.body.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)


def test_the_decoder_starts_as_in_the_authors_code():
    torch.manual_seed(0)
    made = create_model("linknet", num_classes=64)
    for part in (made.decoder, made.tail, made.score):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                wanted = math.sqrt(2 / (math.prod(layer.kernel_size) * layer.out_channels))
                assert layer.weight.std().item() == pytest.approx(wanted, rel=0.1)
            elif isinstance(layer, nn.BatchNorm2d):
                assert (layer.weight == 1).all() and (layer.bias == 0).all()


def test_impossible_configurations_are_refused():
    with pytest.raises(UsageError, match="linknet: tail_width must be"):
        LinkNetConfig(tail_width=0)
    for backbone in ("test_efficientnet", "test_vit"):
        with pytest.raises(UsageError, match=f"linknet: backbone must be a ResNet .* not '{backbone}'"):
            create_model("linknet", num_classes=2, backbone=backbone)
