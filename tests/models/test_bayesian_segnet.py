import pytest
import torch
import torchvision.models as tv
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.bayesian_segnet import BayesianSegNetBasicConfig, BayesianSegNetConfig

NAMES = ["bayesian_segnet", "bayesian_segnet_basic"]


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("bayesian_segnet", 11, 29_449_355),
        ("bayesian_segnet", 21, 29_455_125),
        ("bayesian_segnet_basic", 11, 1_416_587),
    ],
)
def test_parameters_of_the_paper(name, num_classes, parameters):
    assert describe_model(name, num_classes=num_classes)["parameters"] == parameters


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # after pool3, pool4, pool5 and the decoder's stages 5, 4, 3; at 360x480
        ("bayesian_segnet", [(45, 60), (23, 30), (12, 15), (23, 30), (45, 60), (90, 120)]),
        # after pool3, pool4 and the decoder's stages 4, 3
        ("bayesian_segnet_basic", [(45, 60), (23, 30), (45, 60), (90, 120)]),
    ],
)
def test_dropout_stands_where_the_authors_put_it(name, sizes):
    with torch.device("meta"):
        model = create_model(name, num_classes=11)
        seen = []
        model.dropout.register_forward_hook(lambda _module, _args, out: seen.append(tuple(out.shape[-2:])))
        model(torch.zeros(2, 3, 360, 480))
    assert seen == sizes
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5]


class Half(nn.Module):
    """Instead of dropout: half of everything, so that it shows where it acts."""

    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_on_the_stages_outputs(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, tiny=True).eval().requires_grad_(False)
    model.dropout = Half()
    plain = create_model(name.removeprefix("bayesian_"), num_classes=3, tiny=True).eval().requires_grad_(False)
    plain.load_state_dict(model.state_dict())  # and so its state is that of the plain network
    levels = len(plain.encoder)
    # Halved after pooling = halved before it; a decoder's stages, coarsest first, are those of the levels 5, 4, 3, ...
    for stage in (*plain.encoder[2:], *plain.decoder[: levels - 2]):
        stage.register_forward_hook(lambda _module, _args, out: out / 2)
    image = torch.randn(1, 3, 45, 75)
    assert torch.allclose(model(image), plain(image), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_pass_is_the_plain_networks(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, tiny=True).eval()
    plain = create_model(name.removeprefix("bayesian_"), num_classes=3, tiny=True).eval()
    plain.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 33, 50)
    assert torch.equal(model(image), plain(image))
    model.train()
    assert not torch.equal(model(image), model(image))


@pytest.mark.parametrize("name", NAMES)
def test_sampling_equals_a_direct_computation(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, tiny=True).eval()
    image = torch.randn(2, 3, 20, 33)
    mean, uncertainty = model.sample(image, samples=6, seed=5)
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    model.dropout.train()
    with torch.no_grad():
        stored = torch.stack([model(image).softmax(1) for _ in range(6)])
    torch.random.set_rng_state(state)
    assert torch.allclose(mean, stored.mean(0), atol=1e-6)
    assert torch.allclose(uncertainty, stored.var(0, correction=0).mean(1), atol=1e-7)
    assert uncertainty.shape == (2, 20, 33) and uncertainty.max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_without_dropout_the_mean_is_the_prediction(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, tiny=True, dropout=0.0).train()
    image = torch.randn(1, 3, 20, 33)
    mean, uncertainty = model.sample(image, samples=3)
    assert model.training and model.encoder.training and model.dropout.training
    assert not uncertainty.any()
    with torch.no_grad():
        assert torch.equal(mean, model.eval()(image).softmax(1))


def test_vgg_weights_fit_as_in_segnet():
    with torch.device("meta"):
        model = create_model("bayesian_segnet", num_classes=2)
        weights = model.weights_from_classifier(tv.vgg16_bn())
    assert set(weights) == {name for name in model.state_dict() if name.startswith("encoder.")}
    assert not hasattr(create_model("bayesian_segnet_basic", num_classes=2, tiny=True), "weights_from_classifier")


def test_wrong_fields_are_refused():
    with pytest.raises(UsageError, match=r"bayesian_segnet: dropout must be a share .* not 1"):
        BayesianSegNetConfig(dropout=1.0)
    with pytest.raises(UsageError, match=r"bayesian_segnet_basic: dropout must be a share .* not -0.5"):
        BayesianSegNetBasicConfig(dropout=-0.5)
    with pytest.raises(UsageError, match="widths must be 5 positive numbers"):
        BayesianSegNetConfig(widths=(4,))
    with pytest.raises(UsageError, match="width must be at least 1"):
        BayesianSegNetBasicConfig(width=0)
