"""What is frozen keeps its weights and its statistics, costs no gradient, and refuses what would be meaningless."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixelwise.data.check import Inspection, inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.errors import UsageError
from pixelwise.infer.bundle import load_bundle
from pixelwise.train import make_config, train
from pixelwise.train.module import make_optimizer
from pixelwise.train.network import frozen_parts, start_network, training_loss

TINY = {
    "model": "encoder_decoder",
    "options": {"backbone": "test_resnet", "widths": [8, 8]},
    "crop_px": 32,
    "batch_size": 2,
    "workers": 0,
}


@pytest.fixture(scope="module")
def inspection(toy_data: Path) -> Inspection:
    return inspect_data(open_data(toy_data))


@pytest.fixture(scope="module")
def first(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    train(toy_data, make_config({**TINY, "steps": 2}), out=out)
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_bundle(run)[0].state_dict()


def frozen_names(model: torch.nn.Module, freeze: str) -> set[str]:
    parts = set(frozen_parts(model, freeze))
    found = [name for name, module in model.named_modules() if module in parts]
    return {key for key in model.state_dict() if key.startswith(tuple(f"{name}." for name in found))}


@pytest.mark.parametrize("ema", [0.9, 0])
@pytest.mark.parametrize("freeze", ["stem", "encoder"])
def test_after_training_and_validations_the_frozen_part_is_what_it_was_and_all_else_is_not(
    toy_data: Path, first: Path, tmp_path: Path, freeze: str, ema: float
) -> None:
    config = {**TINY, "steps": 4, "freeze": freeze, "init": str(first), "validate_every": 0.5, "ema": ema}
    train(toy_data, make_config(config), out=tmp_path / "run")
    before, after = weights(first), weights(tmp_path / "run")
    names = frozen_names(load_bundle(first)[0], freeze)
    assert names and all(torch.equal(before[name], after[name]) for name in names)
    assert any(name.endswith("running_mean") for name in names)
    moved = [name for name in before if name not in names and before[name].is_floating_point()]
    assert all(not torch.equal(before[name], after[name]) for name in moved)


def test_the_stem_is_the_first_convolution_and_its_batch_norm(first: Path) -> None:
    model = load_bundle(first)[0]
    conv, norm = frozen_parts(model, "stem")
    assert isinstance(conv, torch.nn.Conv2d) and conv.in_channels == 3 and isinstance(norm, torch.nn.BatchNorm2d)
    assert frozen_names(model, "encoder") == {name for name in model.state_dict() if name.startswith("encoder.")}


def test_a_frozen_part_has_no_gradient_no_place_in_the_optimiser_and_keeps_no_activations(
    inspection: Inspection, first: Path
) -> None:
    kept = {}
    for freeze in ("none", "stem", "encoder"):
        config = make_config({**TINY, "freeze": freeze, "init": str(first)})
        model = start_network(config, inspection, is_resumed=False).model.train()
        for part in frozen_parts(model, freeze):
            part.eval()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.numel()) or x, lambda x: x):
            loss = training_loss(model, torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8))
        loss.backward()
        learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert learns == {name for name, _ in model.named_parameters()} - frozen_names(model, freeze)
        groups = make_optimizer(model, config).param_groups
        assert sum(len(group["params"]) for group in groups) == len(learns)
        kept[freeze] = sum(sizes)
    assert kept["encoder"] < kept["stem"] < kept["none"]


def test_resuming_a_frozen_run_gives_the_same_weights_bit_for_bit(toy_data: Path, first: Path, tmp_path: Path) -> None:
    config = make_config({**TINY, "steps": 6, "freeze": "encoder", "init": str(first), "checkpoint_minutes": 0})
    train(toy_data, config, out=tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(event: dict[str, object]) -> None:
        if event.get("step") == 4:
            raise Stopped

    with pytest.raises(Stopped):
        train(toy_data, config, out=tmp_path / "parts", report=stop)
    train(toy_data, config, out=tmp_path / "parts", resume=True)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"freeze": "encoder"}, "random without pretrained or init"),
        ({"freeze": "stem"}, "random without pretrained or init"),
        ({"freeze": "encoder", "init": "x", "encoder_lr": 0.1}, "encoder_lr means nothing with freeze=encoder"),
        ({"freeze": "decoder", "init": "x"}, "freeze"),
    ],
)
def test_freezing_what_is_random_or_unknown_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_config({**TINY, **options})


@pytest.mark.parametrize("freeze", ["stem", "encoder"])
def test_a_network_without_an_encoder_refuses_it(inspection: Inspection, freeze: str) -> None:
    config = make_config({"model": "unet", "options": {"widths": [4, 4, 4]}, "init": "resnet18", "freeze": freeze})
    with pytest.raises(UsageError, match="unet has no encoder of its own, so freeze means nothing"):
        start_network(config, inspection, is_resumed=False)
