import pytest
import torch
import torchvision.models as tv
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models.vgg_encoder import WIDTHS, check_widths, vgg16_weights, vgg_encoder


def filled(name):
    """A classifier whose tensors all hold other numbers; its linear layers, which play no part, take no memory."""
    with torch.device("meta"):
        classifier = tv.get_model(name)
    classifier.features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in classifier.features.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.05 + 0.001)
    return classifier


def run(encoder, image):
    x = image
    for stage in encoder:
        x = nn.functional.max_pool2d(stage(x), 2)
    return x


def encoder_weights(network, encoder, classifier):
    model = nn.ModuleDict({"encoder": encoder})
    model.classifiers = ("torchvision/vgg16_bn", "torchvision/vgg16")
    return vgg16_weights(network, model, ("encoder.",), classifier)


def test_with_the_weights_it_is_the_classifiers_trunk():
    classifier, encoder = filled("vgg16_bn"), vgg_encoder(3, WIDTHS)
    weights = encoder_weights("segnet", encoder, classifier)
    assert set(weights) == {f"encoder.{name}" for name in encoder.state_dict()}  # running statistics as well
    nn.ModuleDict({"encoder": encoder}).load_state_dict(weights)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(run(encoder.eval(), image), classifier.eval().features(image))


def test_a_plain_vgg_gives_its_convolutions_only():
    classifier, encoder = filled("vgg16"), vgg_encoder(3, WIDTHS)
    weights = encoder_weights("segnet", encoder, classifier)
    convolutions = [name for name in encoder.state_dict() if "conv" in name]
    assert list(weights) == [f"encoder.{name}" for name in convolutions] and len(weights) == 26
    for name, tensor in zip(convolutions, classifier.features.state_dict().values(), strict=True):
        assert torch.equal(weights[f"encoder.{name}"], tensor)
    assert sum(tensor.numel() for tensor in weights.values()) == 14_714_688  # the "14.7M" of the SegNet paper


@pytest.mark.parametrize("channels", [1, 4])
def test_the_first_convolution_is_adapted(channels):
    classifier, encoder = filled("vgg16"), vgg_encoder(channels, WIDTHS)
    weights = encoder_weights("segnet", encoder, classifier)
    first = weights["encoder.0.conv1_1.weight"]
    assert first.shape == (64, channels, 3, 3)
    if channels == 1:
        assert torch.allclose(first[:, 0], classifier.features[0].weight.sum(1))


def test_other_networks_are_refused():
    encoder = vgg_encoder(3, WIDTHS)
    for name in ("resnet18", "vgg19", "vgg13_bn"):
        with torch.device("meta"):
            classifier = tv.get_model(name)
        with pytest.raises(UsageError, match=r"segnet: its encoder is that of VGG-16.*torchvision/vgg16_bn"):
            encoder_weights("segnet", encoder, classifier)
    with pytest.raises(UsageError, match=r"segnet: conv1_1.weight has the shape \(8, 3, 3, 3\), and \(64, 3, 3, 3\)"):
        encoder_weights("segnet", vgg_encoder(3, (8, 8, 8, 8, 8)), filled("vgg16"))


@pytest.mark.parametrize("widths", [(), (4, 4, 4, 4), (4, 4, 0, 4, 4)])
def test_five_positive_widths(widths):
    with pytest.raises(UsageError, match="deconvnet: widths must be 5 positive numbers, not"):
        check_widths("deconvnet", widths)
