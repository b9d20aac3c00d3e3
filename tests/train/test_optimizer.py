import pytest
import torch
from torch import nn

from pixelwise.train import make_config
from pixelwise.train.module import make_optimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.score = nn.ConvTranspose2d(4, 2, 1)
        self.fixed = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def groups(**options):
    model = Net()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = make_optimizer(model, make_config(options))
    return {
        names[id(parameter)]: (group["peak_lr"], group["weight_decay"])
        for group in made.param_groups
        for parameter in group["params"]
    }


def test_by_default_weights_decay_and_all_learn_alike():
    assert groups() == {
        "encoder.0.weight": (1e-3, 1e-2),
        "encoder.0.bias": (1e-3, 0),
        "encoder.1.weight": (1e-3, 0),
        "encoder.1.bias": (1e-3, 0),
        "score.weight": (1e-3, 1e-2),
        "score.bias": (1e-3, 0),
    }
    assert len(make_optimizer(Net(), make_config({})).param_groups) == 4


def test_biases_of_convolutions_learn_twice_as_fast_those_of_norms_do_not():
    rates = {name: rate for name, (rate, _) in groups(lr=1e-10, bias_lr=2, encoder_lr=0.5).items()}
    assert rates["encoder.0.bias"] == pytest.approx(1e-10) and rates["score.bias"] == pytest.approx(2e-10)
    assert rates["encoder.0.weight"] == rates["encoder.1.bias"] == rates["encoder.1.weight"] == pytest.approx(0.5e-10)
    assert rates["score.weight"] == pytest.approx(1e-10)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_each_is_torch_s_own(name, kind):
    made = make_optimizer(Net(), make_config({"optimizer": name, "weight_decay": 5e-4}))
    assert type(made) is kind
    assert {group["weight_decay"] for group in made.param_groups} == {5e-4, 0.0}


def test_momentum_is_that_of_sgd():
    made = make_optimizer(Net(), make_config({"optimizer": "sgd", "momentum": 0.99}))
    assert {group["momentum"] for group in made.param_groups} == {0.99}
    assert make_optimizer(Net(), make_config({"optimizer": "sgd"})).param_groups[0]["momentum"] == 0.9


def test_sgd_with_decay_by_hand():
    model = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    made = make_optimizer(model, make_config({"optimizer": "sgd", "lr": 0.1, "momentum": 0.5, "weight_decay": 0.25}))
    for _ in range(2):
        made.zero_grad()
        model.weight.sum().backward()  # gradient 1
        made.step()
    # v1 = 1 + 0.25 * 2 = 1.5, w1 = 1.85; v2 = 0.5 * 1.5 + 1 + 0.25 * 1.85
    assert model.weight.item() == pytest.approx(1.85 - 0.1 * (0.75 + 1 + 0.4625))
