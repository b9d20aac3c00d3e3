import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model
from pixelwise.ops.batch_statistics import batch_statistics, running_averages_kept


def network(dropout=0.5):
    """With running averages that differ from any batch's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(dropout), nn.Conv2d(4, 6, 1), BatchNormAct2d(6)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -2, 2)
            nn.init.uniform_(module.running_var, 2, 5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def test_the_batch_at_hand_normalises_and_dropout_is_off():
    model, images = network().eval(), torch.randn(3, 3, 8, 9)
    with batch_statistics(model):
        out = model(images)
        assert torch.equal(model(images), out)
    trained = copy.deepcopy(model).train()
    trained[2].eval()
    assert torch.allclose(out, trained(images), atol=1e-6)
    assert not torch.allclose(out, model(images), atol=1e-2)
    mean, var = model[0](images).mean((0, 2, 3)), model[0](images).var((0, 2, 3), correction=0)
    x = (model[0](images) - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    x = model[3](x * model[1].weight[:, None, None])
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    assert torch.allclose(out, (x * model[4].weight[:, None, None]).relu(), atol=1e-5)


def test_a_prediction_depends_on_the_rest_of_the_batch():
    model, images = network().eval(), torch.randn(2, 3, 8, 9)
    with batch_statistics(model):
        assert not torch.allclose(model(images)[:1], model(images[:1]), atol=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_all_is_as_before(fails):
    model = network().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt) if fails else torch.no_grad(), batch_statistics(model):
        assert not any(module.training for module in model.modules())
        model(torch.randn(2, 3, 8, 9))
        if fails:
            raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_can_be_entered_twice():
    model, images = network(), torch.randn(2, 3, 8, 9)
    with batch_statistics(model):
        out = model(images)
        with batch_statistics(model):
            assert torch.equal(model(images), out)
        assert torch.equal(model(images), out)
    assert model[1].running_mean is not None and model.training


def test_one_value_has_no_variance():
    model = network()
    with pytest.raises(UsageError, match=r"\(1, 4, 1, 1\).*larger batch or larger images"), batch_statistics(model):
        model(torch.randn(1, 3, 3, 3))
    with batch_statistics(model):
        assert torch.isfinite(model(torch.randn(2, 3, 3, 3))).all()


def test_a_network_without_batch_norm_is_evaluated():
    model = create_model("unet", num_classes=2, tiny=True, dropout=0.5)
    image = torch.randn(1, 3, 16, 16)
    with batch_statistics(model):
        out = model(image)
    assert model.training and torch.equal(model.eval()(image), out)


def test_norms_of_vectors_count_too():
    norm, batch = nn.BatchNorm1d(2), torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    with batch_statistics(norm):
        assert torch.allclose(norm(batch), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_running_averages_kept_in_training(fails):
    model, images = network(dropout=0.0).train(), torch.randn(2, 3, 8, 9)
    wanted = copy.deepcopy(model)(images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    keys = model.state_dict().keys()
    with pytest.raises(ValueError) if fails else torch.enable_grad(), running_averages_kept(model):
        out = model(images)
        assert model.state_dict().keys() == keys
        if fails:
            raise ValueError
    assert torch.equal(out, wanted)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    out.sum().backward()
    model(images)
    assert model[1].num_batches_tracked == 1 and not torch.equal(model[1].running_mean, before["1.running_mean"])
