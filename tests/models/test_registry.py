from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import count_parameters, create_model, list_models, model_config, model_info
from pixelwise.models.registry import register_model, suggestion


def test_the_networks_are_listed_in_order():
    assert {"unet", "encoder_decoder"} <= set(list_models())
    assert list_models() == sorted(list_models())
    assert list_models("u?et") == ["unet"] and list_models("nothing*") == []


@pytest.mark.parametrize(
    ("typed", "meant"), [("unett", "unet"), ("u-net", "unet"), ("encoderdecoder", "encoder_decoder")]
)
def test_a_misspelt_name_gets_a_suggestion(typed, meant):
    with pytest.raises(UsageError, match=f"no model called '{typed}'.*Did you mean {meant}.*pixelwise models"):
        create_model(typed, num_classes=2)


def test_a_name_like_nothing_gets_none():
    with pytest.raises(UsageError) as caught:
        model_info("zzzzzz")
    assert "Did you mean" not in str(caught.value)
    assert suggestion("zzz", ["unet"]) == ""


def test_a_name_is_registered_once():
    with pytest.raises(UsageError, match=r"'unet' is registered already .*Ronneberger"):
        register_model("unet", nn.Identity, None, paper="another", tiny={})
    assert model_info("unet").build.__name__ == "UNet"


def test_a_new_model_is_known_at_once(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int = 2
        in_channels: int = 3
        gain: float = 1.0

    monkeypatch.setattr("pixelwise.models.registry._MODELS", {})
    register_model(
        "one", lambda config: nn.Conv2d(config.in_channels, config.num_classes, 1), Config(), paper="none", tiny={}
    )
    assert list_models() == ["one"]
    assert create_model("one", num_classes=5, gain=2).config == Config(num_classes=5, gain=2)


@pytest.mark.parametrize(
    ("name", "key", "meant"),
    [("unet", "width", "widths"), ("unet", "batchnorm", "batch_norm"), ("encoder_decoder", "back_bone", "backbone")],
)
def test_an_unknown_option_gets_a_suggestion_and_the_list(name, key, meant):
    with pytest.raises(
        UsageError, match=rf"{name} has no option '{key}'. Did you mean {meant}.*Its options: num_classes,"
    ):
        create_model(name, num_classes=2, **{key: 1})


def test_an_option_of_another_network_is_not_ignored():
    with pytest.raises(UsageError, match="unet has no option 'backbone'"):
        create_model("unet", num_classes=2, backbone="resnet18")


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", None, True])
@pytest.mark.parametrize("key", ["num_classes", "in_channels"])
def test_counts_are_whole_and_positive(key, value):
    with pytest.raises(UsageError, match=f"{key} must be a whole number of at least 1"):
        create_model("unet", **{"num_classes": 2, key: value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {"widths": 64}),
        ("unet", {"widths": "abc"}),
        ("unet", {"widths": [8, 16.5]}),
        ("unet", {"widths": (True, 8)}),
        ("unet", {"widths": None}),
        ("unet", {"batch_norm": "maybe"}),
        ("unet", {"batch_norm": 1}),
        ("unet", {"dropout": "half"}),
        ("encoder_decoder", {"backbone": 3}),
        ("encoder_decoder", {"finest": 4.0}),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(name, options):
    (key,) = options
    with pytest.raises(UsageError, match=f"{name}: {key} must be of type "):
        create_model(name, num_classes=2, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet", {"widths": [8]}, "at least two positive numbers"),
        ("unet", {"widths": [8, 0]}, "at least two positive numbers"),
        ("unet", {"dropout": 1.5}, "dropout must be a share"),
        ("encoder_decoder", {"widths": []}, "widths must be positive"),
        ("encoder_decoder", {"skip": "sum"}, "skip must be one of .*add.* not 'sum'"),
        ("encoder_decoder", {"skip": ["add"]}, "skip must be one of"),
        ("encoder_decoder", {"up": "nearest"}, "up must be one of"),
        ("encoder_decoder", {"finest": 3}, "finest must be one of"),
    ],
)
def test_a_value_out_of_range_is_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        model_config(name, num_classes=2, **options)


def test_whole_numbers_pass_for_shares_and_lists_for_tuples():
    config = model_config("unet", num_classes=2, widths=[4, 8], dropout=0)
    assert config.widths == (4, 8) and config.dropout == 0
    assert model_config("unet", num_classes=2, tiny=True, widths=[4, 8]).widths == (4, 8)


def test_parameters_are_counted_if_they_train():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 6


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("unet", {"widths": (8,) * 1_000_000}, r"widths holds 1,000,000 values; at most 256"),
        ("unet", {"widths": (8, 10**9)}, r"widths is 1000000000; numbers up to 1,000,000"),
        ("unet", {"num_classes": 10**9}, r"num_classes is 1000000000; numbers up to 1,000,000"),
        ("encoder_decoder", {"backbone": "a" * 10**6}, r"backbone has 1,000,000 characters"),
        ("fcdensenet56", {"layers": (1_000_000, 4, 4)}, r"more than 200 tensors"),
        ("fullres_cnn", {"kernel": 999_999}, r"take [\d,.]+ GiB, but "),
        ("segnet", {"widths": (10**6,) * 5}, r"take [\d,.]+ GiB, but "),
        ("fullres_cnn", {"kernel": 999_999, "widths": (10**6,) * 8}, r"take [\d,.]+ GiB|beyond any memory"),
    ],
)
def test_the_cost_of_a_network_is_known_before_it_is_built(name, options, why, monkeypatch):
    monkeypatch.setattr("pixelwise.models.registry.MAX_TENSORS", 200)
    with pytest.raises(UsageError, match=why) as caught:
        create_model(name, **{"num_classes": 2} | options)
    assert len(str(caught.value)) < 400


def test_the_look_at_the_cost_changes_no_weight():
    torch.manual_seed(3)
    plain = model_info("unet").build(model_config("unet", num_classes=2, widths=(4, 8)))
    torch.manual_seed(3)
    looked = create_model("unet", num_classes=2, widths=(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), looked.parameters(), strict=True))
