"""What a network starts from: random numbers, a classifier's weights, a file, another run."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import timm
import torch
from timm.models import adapt_input_conv
from torch import nn

from pixelwise.data.check import Inspection, inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.errors import DataError, UsageError
from pixelwise.files import read_json, write_json
from pixelwise.infer.bundle import load_bundle, load_card
from pixelwise.models import create_model, registry
from pixelwise.models.backbones import backbone_normalisation
from pixelwise.train import RunConfig, make_config, train
from pixelwise.train.network import network_config, normalisation, start_network

IMAGENET = (0.485, 0.456, 0.406)
TINY = {"model": "segnet", "options": {"widths": [4] * 5}, "crop_px": 32, "batch_size": 2, "workers": 0}


@pytest.fixture(scope="module")
def inspection(toy_data: Path) -> Inspection:
    return inspect_data(open_data(toy_data))


@pytest.fixture(scope="module")
def trained(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny SegNet, with a normalisation that is not the data's own."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    train(toy_data, make_config({**TINY, "steps": 1}), out=out)
    card = read_json(out / "model.json") | {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    write_json(out / "model.json", card)
    return out


def start(inspection: Inspection, **values: object) -> object:
    torch.manual_seed(0)
    return start_network(make_config({**TINY, **values}), inspection, is_resumed=False)


# -- another run --


def test_a_run_gives_its_weights_and_its_normalisation(inspection: Inspection, trained: Path) -> None:
    made = start(inspection, init=str(trained))
    given, _ = load_bundle(trained)
    assert all(torch.equal(tensor, given.state_dict()[name]) for name, tensor in made.model.state_dict().items())
    assert (made.mean, made.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert made.loaded.startswith(f"segnet of {trained}: ") and "missing" not in made.loaded


@pytest.mark.parametrize(("scale", "is_far"), [(1.0, False), (0.6, False), (0.02, True), (300.0, True)])
def test_images_far_from_those_of_the_other_run_are_told(
    inspection: Inspection, trained: Path, scale: float, is_far: bool
) -> None:
    names = ("mean", "std", "low", "high")
    scaled = {name: tuple(scale * value for value in getattr(inspection.numbers, name)) for name in names}
    made = start(replace(inspection, numbers=replace(inspection.numbers, **scaled)), init=str(trained))
    assert ("are far from those it was trained on (uint8" in made.loaded) == is_far, made.loaded


def test_a_sibling_starts_from_it(inspection: Inspection, trained: Path) -> None:
    made = start(inspection, init=str(trained), model="bayesian_segnet")
    given, _ = load_bundle(trained)
    assert torch.equal(made.model.encoder[0][0].weight, given.encoder[0][0].weight)


def test_a_head_for_other_classes_stays_random_and_is_said(
    toy_data: Path, tmp_path: Path, inspection: Inspection, trained: Path
) -> None:
    other = tmp_path / "data"
    for path in toy_data.rglob("*.png"):
        (other / path.relative_to(toy_data)).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(toy_data)).write_bytes(path.read_bytes())
    (other / "classes.yaml").write_text("classes: [ground, disc, none, at, all]\n")
    made = start(inspect_data(open_data(other)), init=str(trained))
    given, _ = load_bundle(trained)
    assert "2 of another shape: decoder.4.conv1_1_D.weight (2, 4, 3, 3) for (5, 4, 3, 3)" in made.loaded
    assert torch.equal(made.model.encoder[0][0].weight, given.encoder[0][0].weight)
    assert made.model.decoder[4].conv1_1_D.weight.std() > 0


def with_classes(toy_data: Path, root: Path, text: str) -> Inspection:
    for path in toy_data.rglob("*.png"):
        (root / path.relative_to(toy_data)).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to(toy_data)).write_bytes(path.read_bytes())
    (root / "classes.yaml").write_text(f"classes:\n{text}")
    return inspect_data(open_data(root))


ONES = "  - {name: foreground, values: 1}\n  - {name: background, values: 0}\n"


@pytest.mark.parametrize("model", ["unet", "segnet", "fcn8s", "encoder_decoder"])
def test_what_belongs_to_a_class_is_taken_over_by_its_name(toy_data: Path, tmp_path: Path, model: str) -> None:
    """The same two classes in another order: the scores of every class are those of the run, at once."""
    options = {
        "unet": {"widths": [4, 6]}, "segnet": {"widths": [4] * 5}, "encoder_decoder": {"backbone": "test_resnet"},
        "fcn8s": {"widths": [4] * 5, "head_width": 8, "upsampling": "inner"},
    }[model]  # fmt: skip
    given = {"model": model, "options": options}
    run = train(toy_data, make_config({**TINY, **given, "steps": 1}), out=tmp_path / "run").folder
    turned = with_classes(toy_data, tmp_path / "turned", ONES)
    made = start(turned, init=str(run), **given)
    trained, _ = load_bundle(run)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(made.model.eval()(image), trained.eval()(image)[:, [1, 0]], atol=1e-5)
    assert "taken over by name: foreground, background" in made.loaded and "random" not in made.loaded


def test_a_class_that_the_run_does_not_know_starts_random_and_is_named(toy_data: Path, tmp_path: Path) -> None:
    given = {"model": "unet", "options": {"widths": [4, 6]}}
    run = train(toy_data, make_config({**TINY, **given, "steps": 1}), out=tmp_path / "run").folder
    trained, _ = load_bundle(run)
    rows = trained.score.weight
    others = "  - {name: tumour, values: 1}\n  - {name: tissue, values: 0}\n"
    made = start(with_classes(toy_data, tmp_path / "other", others), init=str(run), **given)
    assert "random: tumour, tissue (the other network knows background, foreground)" in made.loaded
    assert not torch.isin(made.model.score.weight, rows).any() and made.model.score.weight.std() > 0
    three = "  - {name: edge, values: 2}\n  - {name: foreground, values: 1}\n  - {name: background, values: 0}\n"
    made = start(with_classes(toy_data, tmp_path / "three", three), init=str(run), **given)
    assert "taken over by name: foreground, background; random: edge" in made.loaded
    assert torch.equal(made.model.score.weight[1:], rows[[1, 0]])
    assert not torch.isin(made.model.score.weight[0], rows).any()


def test_another_network_is_refused(inspection: Inspection, trained: Path) -> None:
    with pytest.raises(UsageError, match=r"segnet of .*trained does not belong to this network: .* 0 tensors fit"):
        start(inspection, init=str(trained), model="unet", options={"widths": [4, 6]})
    with pytest.raises(UsageError, match=r"does not belong to this network: .* of another shape"):
        start(inspection, init=str(trained), options={"widths": [4, 5, 6, 7, 8]})


def test_a_damaged_run_is_told(inspection: Inspection, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes((trained / "model.json").read_bytes())
    with pytest.raises(DataError, match=r"model.safetensors: there is no such file"):
        start(inspection, init=str(tmp_path))


@pytest.mark.parametrize("init", ["runs/none", "vgg61", "hf-hub:some/thing"])
def test_what_is_neither_a_run_nor_a_classifier_is_told(inspection: Inspection, init: str) -> None:
    with pytest.raises(UsageError, match=rf"--init {init}: is neither a run folder .* nor a classifier"):
        start(inspection, init=init)


def test_a_resumed_run_needs_nothing_from_where_it_started(inspection: Inspection) -> None:
    config = make_config({**TINY, "init": "gone/since/then"})
    assert start_network(config, inspection, is_resumed=True).loaded is None


def test_init_and_pretrained_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="init and pretrained both name the weights to start from"):
        make_config({"init": "vgg16", "pretrained": "auto"})


# -- a classifier --


@dataclass(frozen=True, kw_only=True)
class StemConfig:
    num_classes: int = 2
    in_channels: int = 3
    width: int = 16


class Stem(nn.Module):
    """A network that takes the first convolution and norm of a classifier."""

    stride = 1
    classifiers = ("test_resnet", "timm/test_efficientnet")

    def __init__(self, config: StemConfig) -> None:
        super().__init__()
        self.first = nn.Conv2d(config.in_channels, config.width, 3, padding=1, bias=False)
        self.score = nn.Conv2d(config.width, config.num_classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.score(self.first(image))

    def weights_from_classifier(self, classifier: nn.Module) -> dict[str, torch.Tensor]:
        first = next(module for module in classifier.modules() if isinstance(module, nn.Conv2d))
        weight = adapt_input_conv(self.first.in_channels, first.weight.detach())
        if weight.shape != self.first.weight.shape:
            raise UsageError(
                f"stem: the classifier's first convolution has another width than {self.first.out_channels}."
            )
        return {"first.weight": weight}


@pytest.fixture
def stem(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Registers `stem`, and a library that has weights for its classifiers; returns those of the first one."""
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    registry.register_model("stem", Stem, StemConfig(), paper="none", tiny={})
    states = {}
    for seed, name in enumerate(("test_resnet", "test_efficientnet")):
        torch.manual_seed(seed)
        states[name] = timm.create_model(name).state_dict()
    monkeypatch.setattr(
        "pixelwise.models.pretrained.library_weights",
        lambda name: (states[name.rpartition("/")[2]], f"library's {name}"),
    )
    return states


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "timm/test_efficientnet"])
def test_a_classifier_by_name_gives_its_weights_and_its_normalisation(
    inspection: Inspection, stem: dict[str, torch.Tensor], name: str
) -> None:
    bare = name.rpartition("/")[2]
    first = next(tensor for tensor in stem[bare].values() if tensor.ndim == 4)
    made = start(inspection, model="stem", init=name, options={"width": first.shape[0]})
    assert torch.equal(made.model.first.weight, first)
    assert "1 tensors fit; 2 missing: score.weight, score.bias" in made.loaded
    assert made.mean == backbone_normalisation(bare)[0] != inspection.mean


def test_pretrained_alone_is_the_first_of_its_classifiers(
    inspection: Inspection, stem: dict[str, torch.Tensor]
) -> None:
    made = start(
        inspection, model="stem", pretrained="auto", options={"width": len(stem["test_resnet"]["conv1.0.weight"])}
    )
    assert torch.equal(made.model.first.weight, stem["test_resnet"]["conv1.0.weight"])


def test_a_file_of_any_of_its_classifiers_or_of_the_network_itself_fits(
    inspection: Inspection, stem: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for name, state in stem.items():
        first = next(tensor for tensor in state.values() if tensor.ndim == 4)
        torch.save(state, tmp_path / f"{name}.pth")
        made = start(inspection, model="stem", pretrained=str(tmp_path / f"{name}.pth"), options={"width": len(first)})
        assert torch.equal(made.model.first.weight, first) and made.mean == backbone_normalisation(name)[0]
    own = create_model("stem", num_classes=2, width=32)
    torch.save(own.state_dict(), tmp_path / "own.pth")
    made = start(inspection, model="stem", pretrained=str(tmp_path / "own.pth"), options={"width": 32})
    assert torch.equal(made.model.score.weight, own.score.weight) and made.mean == inspection.mean


def test_a_classifier_that_does_not_fit_changes_nothing_and_is_told(
    inspection: Inspection, stem: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="stem: the classifier's first convolution has another width than 5"):
        start(inspection, model="stem", init="test_resnet", options={"width": 5})
    torch.save(timm.create_model("test_byobnet").state_dict(), tmp_path / "other.pth")
    message = (
        r"other.pth does not belong to this network nor to test_resnet nor to timm/test_efficientnet: .* 0 tensors"
    )
    with pytest.raises(UsageError, match=message):
        start(inspection, model="stem", pretrained=str(tmp_path / "other.pth"), options={})


def test_a_backbone_is_a_classifier_too(
    inspection: Inspection, stem: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"backbone": "test_resnet", "widths": [8, 8]}
    made = start(inspection, model="encoder_decoder", init="test_resnet", options=options)
    assert torch.equal(made.model.encoder.body.state_dict()["conv1.0.weight"], stem["test_resnet"]["conv1.0.weight"])
    with pytest.raises(UsageError, match=r"--init resnet18: the encoder is test_resnet. Choose --backbone resnet18"):
        start(inspection, model="encoder_decoder", init="resnet18", options=options)
    with pytest.raises(UsageError, match="--init resnet18: this network starts from no classifier"):
        start(inspection, model="unet", init="resnet18", options={"widths": [4, 6]})


# -- normalisation --


def test_weights_of_a_classifier_bring_its_normalisation(inspection: Inspection) -> None:
    assert normalisation("resnet18", inspection)[0] == IMAGENET
    assert normalisation("torchvision/vgg16", inspection)[0] == IMAGENET
    assert normalisation(None, inspection) == (inspection.mean, inspection.std)


def test_pretrained_weights_bring_it_also_to_the_default_backbone(
    inspection: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = timm.create_model("resnet18").state_dict()
    monkeypatch.setattr("pixelwise.models.pretrained.library_weights", lambda name: (state, name))
    config = make_config({"pretrained": "auto"})
    assert network_config(config, inspection)["backbone"] == "resnet18"
    assert start_network(config, inspection, is_resumed=False).mean == IMAGENET
    assert start_network(RunConfig(), inspection, is_resumed=False).mean == inspection.mean


def test_a_run_from_another_run_trains_and_records_it(toy_data: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = train(toy_data, make_config({**TINY, "steps": 1, "init": str(trained)}), out=out)
    assert load_card(out).mean == (0.1, 0.2, 0.3) == run.plan.mean
    assert run.plan.pretrained.startswith("segnet of ")
    assert train(toy_data, out=out, resume=True).plan.mean == run.plan.mean
