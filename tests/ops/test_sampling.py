import pytest
import torch
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.ops.dropout import sample_with_dropout, seeded


def network(dropout=0.5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(8, 4, 1)
    )


IMAGE = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def passes(model, samples, seed):
    """The same passes, all kept."""
    model.eval()
    model[3].train()
    with torch.no_grad(), seeded(IMAGE.device, seed):
        return torch.stack([model(IMAGE).softmax(1) for _ in range(samples)])


@pytest.mark.parametrize("samples", [1, 2, 9])
def test_mean_and_variance_are_those_of_the_stored_samples(samples):
    model = network()
    stored = passes(model, samples, seed=3).double()
    mean, uncertainty = sample_with_dropout(model, IMAGE, samples=samples, seed=3)
    assert mean.shape == (2, 4, 6, 5) and uncertainty.shape == (2, 6, 5)
    assert torch.allclose(mean.double(), stored.mean(0), atol=1e-6)
    assert torch.allclose(uncertainty.double(), stored.var(0, correction=0).mean(1), atol=1e-7)
    assert torch.allclose(mean.sum(1), torch.ones(2, 6, 5))


def test_without_dropout_nothing_varies():
    model = network(dropout=0.0)
    mean, uncertainty = sample_with_dropout(model, IMAGE, samples=5)
    assert torch.equal(uncertainty, torch.zeros(2, 6, 5))
    with torch.no_grad():
        assert torch.equal(mean, model.eval()(IMAGE).softmax(1))


def test_the_mean_converges():
    model = network()
    mean, _ = sample_with_dropout(model, IMAGE, samples=2500, seed=0)

    def error(samples):
        runs = [sample_with_dropout(model, IMAGE, samples=samples, seed=seed)[0] for seed in range(1, 9)]
        return (torch.stack(runs) - mean).square().mean().sqrt()

    ratio = error(10) / error(250)
    assert 3.5 < ratio < 6.5  # the square root of 25


def test_a_seed_makes_it_repeatable_and_leaves_the_random_numbers_alone():
    model = network()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again = (sample_with_dropout(model, IMAGE, samples=3, seed=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], sample_with_dropout(model, IMAGE, samples=3, seed=2)[0])
    free = [sample_with_dropout(model, IMAGE, samples=3)[0] for _ in range(2)]
    assert not torch.equal(*free)


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_state_are_afterwards_what_they_were(training):
    model = network().train(training)
    model[1].eval()  # a frozen norm
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    mean, _ = sample_with_dropout(model, IMAGE, samples=3)
    assert not mean.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError):
        sample_with_dropout(model, torch.zeros(1, 5, 4, 4), samples=3)
    assert [module.training for module in model.modules()] == modes


def test_norms_use_their_running_statistics():
    model = network(dropout=0.0).train()
    nn.init.constant_(model[1].running_mean, 5.0)
    mean, _ = sample_with_dropout(model, IMAGE, samples=2)
    with torch.no_grad():
        assert torch.equal(mean, model.eval()(IMAGE).softmax(1))


def test_few_samples_and_networks_without_dropout_are_refused():
    with pytest.raises(UsageError, match="samples must be at least 1, not 0"):
        sample_with_dropout(network(), IMAGE, samples=0)
    with pytest.raises(UsageError, match="Conv2d has no dropout layers"):
        sample_with_dropout(nn.Conv2d(3, 2, 1), IMAGE)


def test_half_precision_is_averaged_in_float32():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        mean, uncertainty = sample_with_dropout(model, IMAGE, samples=4)
    assert mean.dtype == uncertainty.dtype == torch.float32
