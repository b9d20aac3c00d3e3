"""What every registered network must do, from the moment it is registered."""

import copy
import functools
import json
import random
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.export import Dim

import pixelwise.models
from pixelwise.models import create_model, describe_model, list_models

DRAWS = random.Random(0)
# Heights and widths 1 to 129, each once, in another order.
SIZES = list(zip(range(1, 130), DRAWS.sample(range(1, 130), 129), strict=True))
K = 3

pytestmark = pytest.mark.parametrize("name", list_models())


@functools.cache
def evaluated(name: str, in_channels: int = 3) -> nn.Module:
    """Shared by the tests, which must not change it."""
    torch.manual_seed(0)
    model = create_model(name, tiny=True, num_classes=K, in_channels=in_channels)
    # So that no branch is off, as it is where a last norm or a score starts at zero.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_logits_have_the_size_of_the_image(name):
    for size in SIZES:
        logits = evaluated(name)(noise(1, 3, *size))
        assert logits.shape == (1, K, *size) and logits.dtype == torch.float32
        assert torch.isfinite(logits).all(), size


@pytest.mark.parametrize("classes", [1, 2, 30])
def test_any_number_of_classes(name, classes):
    model = create_model(name, tiny=True, num_classes=classes).eval()
    assert model(noise(2, 3, 40, 33)).shape == (2, classes, 40, 33)


@pytest.mark.parametrize("in_channels", [1, 3, 4, 7])
def test_any_number_of_channels(name, in_channels):
    model = evaluated(name, in_channels)
    image = noise(1, in_channels, 33, 31)
    logits = model(image)
    assert logits.shape == (1, K, 33, 31)
    for channel in range(in_channels):  # each of them counts
        changed = image.clone()
        changed[:, channel] += 1
        assert not torch.allclose(model(changed), logits)
    with pytest.raises(RuntimeError):
        model(noise(1, in_channels + 1, 33, 31))


def test_every_parameter_learns(name):
    model = copy.deepcopy(evaluated(name)).requires_grad_(True).train()
    # Three images: a norm over a map of one pixel has one value of each, and of two it makes -1 and 1, without gradient.
    logits = model(noise(3, 3, 96, 64))
    (logits * noise(3, K, 96, 64)).sum().backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None, parameter
        assert torch.isfinite(tensor.grad).all(), parameter
        assert tensor.grad.abs().max() > 0, parameter


def test_a_model_is_its_config_and_its_state(name):
    model = evaluated(name)
    config = json.loads(json.dumps(asdict(model.config)))
    other = create_model(name, **config)
    assert other.config == model.config
    other.load_state_dict(load(save({key: value.contiguous() for key, value in model.state_dict().items()})))
    image = noise(1, 3, 37, 50)
    assert torch.equal(other.eval()(image), model(image))


def test_the_config_is_frozen_and_plain(name):
    config = evaluated(name).config
    with pytest.raises(AttributeError):
        config.num_classes = 7
    assert {"num_classes", "in_channels"} <= {item.name for item in fields(config)}
    assert (config.num_classes, config.in_channels) == (K, 3)
    hash(config)


def test_a_model_exported_once_gives_the_same_logits_at_other_sizes(name):
    model, image = evaluated(name), noise(1, 3, 70, 93)
    # Torch fixes a dimension that can be 1, so every map must keep more: images of twice the coarsest stride.
    sizes = {axis: Dim(side, min=max(2, 2 * model.stride), max=4096) for axis, side in ((2, "height"), (3, "width"))}
    exported = torch.export.export(model, (image,), dynamic_shapes={"image": sizes}).module()
    for size in ((70, 93), (64, 128), (129, 67)):
        other = noise(1, 3, *size)
        assert torch.allclose(exported(other), model(other), atol=1e-5), size


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(name):
    model, images = evaluated(name), noise(3, 3, 40, 33)
    together = model(images)
    for index in range(3):
        alone = model(images[index : index + 1])
        assert torch.allclose(alone[0], together[index], atol=1e-5)
        assert torch.equal(alone[0].argmax(0), together[index].argmax(0))


def test_memory_format_precision_and_copies_change_nothing(name):
    model, image = evaluated(name), noise(1, 3, 64, 48)
    logits = model(image)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert torch.allclose(other(image.contiguous(memory_format=torch.channels_last)), logits, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(image)
    assert torch.isfinite(rough).all() and (rough.float() - logits).abs().mean() < 0.1 * logits.abs().mean() + 0.02


def test_evaluating_leaves_the_state_alone(name):
    model = evaluated(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(noise(1, 3, 20, 20))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_random_weights_come_from_the_seed(name):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(create_model(name, tiny=True, num_classes=K).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_a_description_allocates_nothing_and_knows_the_paper(name):
    row = describe_model(name)
    assert row["name"] == name and row["paper"] and row["parameters"] > 0
    assert row["stride"] & (row["stride"] - 1) == 0
    rows = json.loads((Path(pixelwise.models.__file__).parent / "table.json").read_text("utf-8"))
    remake = "`pixelwise models` prints another row; run `python -m pixelwise.models.table` and look at what changed"
    assert [entry for entry in rows if entry["name"] == name] == [row], remake
    assert [entry["name"] for entry in rows] == list_models(), remake
