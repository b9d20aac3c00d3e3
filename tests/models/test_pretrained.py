import os
import pickle
import urllib.error
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
import torchvision.models as tv
from safetensors.torch import save_file

from pixelwise.errors import UsageError
from pixelwise.models import create_model, list_models, model_info
from pixelwise.models.pretrained import (
    library_weights,
    load_classifier,
    load_network,
    load_pretrained,
    match_state,
    read_state,
)

DATA = Path(os.environ.get("PIXELWISE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
MOBILENET = DATA.parent / "weights" / "mobilenet_v2-b0353104.pth"
BACKBONE = "test_resnet"
FIRST = "conv1.0.weight"


@pytest.fixture(scope="module")
def classifier():
    """The state of a whole classifier, as its owner would publish it."""
    torch.manual_seed(1)
    return timm.create_model(BACKBONE).state_dict()


def network(in_channels=3, backbone=BACKBONE):
    torch.manual_seed(0)
    return create_model("encoder_decoder", num_classes=2, in_channels=in_channels, backbone=backbone, widths=(8, 8))


def saved(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def trunk(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def assert_encoder_is(model, state, *, but=()):
    own = model.encoder.state_dict()
    assert len(own) == len(trunk(state))
    for name, tensor in trunk(state).items():
        if name not in but:
            assert torch.equal(own[f"body.{name}"], tensor), name


def assert_unchanged(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_with_the_library_s_names_fits(classifier, tmp_path, suffix):
    model = network()
    decoder = copy_of(model.steps)
    loaded = load_pretrained(model, saved(tmp_path / f"weights{suffix}", classifier))
    assert_encoder_is(model, classifier)
    assert not loaded.missing and not loaded.mismatched and not loaded.adapted and not loaded.by_order
    assert set(loaded.unused) == {"fc.weight", "fc.bias"}
    assert len(loaded.fitted) == len(trunk(classifier))
    assert (
        loaded.summary() == f"weights{suffix}: {len(loaded.fitted)} tensors fit; 2 not used: {', '.join(loaded.unused)}"
    )
    assert_unchanged(model.steps, decoder)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"model.encoder.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module.model.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    ],
)
def test_wrappers_are_seen_through(classifier, tmp_path, wrap):
    model = network()
    assert not load_pretrained(model, saved(tmp_path / "weights.pth", wrap(classifier))).missing
    assert_encoder_is(model, classifier)


def test_other_names_in_the_same_order_with_the_same_shapes_fit(classifier, tmp_path):
    counted = (name for name in classifier if not name.endswith("num_batches_tracked"))
    renamed = {f"layer_{index}": classifier[name] for index, name in enumerate(counted)}
    model = network()
    loaded = load_pretrained(model, saved(tmp_path / "other.pth", renamed))
    assert loaded.by_order and not loaded.missing and not loaded.mismatched
    assert "paired by order, all shapes agree" in loaded.summary()
    assert len(loaded.unused) == 2  # the head
    assert_encoder_is(model, classifier, but=[name for name in classifier if name.endswith("num_batches_tracked")])


@pytest.mark.parametrize("change", ["swapped", "one missing", "one reshaped"])
def test_other_names_in_another_order_are_refused(classifier, tmp_path, change):
    rows = [tensor for name, tensor in classifier.items() if not name.endswith("num_batches_tracked")]
    if change == "swapped":
        rows[0], rows[5] = rows[5], rows[0]
    elif change == "one missing":
        del rows[3]
    else:
        rows[0] = rows[0].flatten()
    model = network()
    before = copy_of(model)
    with pytest.raises(UsageError, match=r"other.pth does not belong to test_resnet"):
        load_pretrained(model, saved(tmp_path / "other.pth", {f"w{index}": row for index, row in enumerate(rows)}))
    assert_unchanged(model, before)


@pytest.mark.parametrize("in_channels", [1, 4])
@pytest.mark.parametrize("renamed", [False, True])
def test_the_first_convolution_is_adapted_to_the_image(classifier, tmp_path, in_channels, renamed):
    given = {name: tensor for name, tensor in classifier.items() if not name.endswith("num_batches_tracked")}
    if renamed:
        given = {f"w{index}": tensor for index, tensor in enumerate(given.values())}
    model = network(in_channels)
    loaded = load_pretrained(model, saved(tmp_path / "weights.pth", given))
    assert loaded.adapted == (f"body.{FIRST}",) and not loaded.mismatched and not loaded.missing
    assert f"body.{FIRST} adapted to the image's channels" in loaded.summary()
    weight, rgb = model.encoder.state_dict()[f"body.{FIRST}"], classifier[FIRST]
    wanted = rgb.sum(1, keepdim=True) if in_channels == 1 else rgb[:, [0, 1, 2, 0]] * 3 / 4
    assert torch.allclose(weight, wanted)
    counters = [name for name in classifier if name.endswith("num_batches_tracked")]
    assert_encoder_is(model, classifier, but=[FIRST, *counters])
    if in_channels == 1:  # a grey image gives what the same picture in RGB gave
        grey, three = torch.rand(1, 1, 32, 32), network()
        load_pretrained(three, tmp_path / "weights.pth")
        for ours, theirs in zip(
            model.eval().encoder(grey), three.eval().encoder(grey.expand(-1, 3, -1, -1)), strict=True
        ):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_weights_of_a_whole_network_of_our_own_fit(tmp_path):
    torch.manual_seed(3)
    trained = create_model("unet", num_classes=2, tiny=True)
    path = saved(tmp_path / "model.safetensors", trained.state_dict())
    same, other = create_model("unet", num_classes=2, tiny=True), create_model("unet", num_classes=5, tiny=True)
    assert not load_pretrained(same, path).missing
    assert_unchanged(same, trained.state_dict())
    loaded = load_pretrained(other, path)  # other classes: all but the scores
    assert loaded.mismatched == ("score.weight (2, 4, 1, 1) for (5, 4, 1, 1)", "score.bias (2,) for (5,)")
    assert "2 of another shape: score.weight (2, 4, 1, 1) for (5, 4, 1, 1), score.bias" in loaded.summary()
    assert torch.equal(other.down[0][0].weight, trained.down[0][0].weight)


# -- another network --


def test_a_network_of_its_own_kind_gives_everything():
    torch.manual_seed(3)
    trained, fresh = (create_model("unet", num_classes=2, tiny=True) for _ in range(2))
    loaded = load_network(fresh, trained, "a run")
    assert_unchanged(fresh, trained.state_dict())
    assert not loaded.missing and not loaded.mismatched and loaded.summary().startswith("a run: ")


def test_heads_and_first_convolutions_of_other_counts_stay_random():
    # Few enough tensors that its head and its first convolution are more than a tenth of them.
    options = {"widths": (4, 6)}
    torch.manual_seed(3)
    trained, fresh = (create_model("unet", num_classes=n, in_channels=c, **options) for n, c in ((2, 5), (3, 4)))
    loaded = load_network(fresh, trained, "a run")
    assert [row.split(" ")[0] for row in loaded.mismatched] == ["down.0.0.weight", "score.weight", "score.bias"]
    assert torch.equal(fresh.down[1][0].weight, trained.down[1][0].weight)
    rgb = create_model("unet", num_classes=3, in_channels=3, **options)
    assert load_network(fresh, rgb, "an RGB run").adapted == ("down.0.0.weight",)


SIBLINGS = [
    ("fcn32s", "fcn16s"),
    ("fcn16s", "fcn8s"),
    ("fcn32s", "fcn8s"),
    ("fcn8s", "fcn8s_at_once"),
    ("segnet", "bayesian_segnet"),
    ("segnet_basic", "bayesian_segnet_basic"),
    ("enet_encoder", "enet"),
]


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize(("first", "second"), SIBLINGS)
def test_siblings_start_from_each_other(first, second, classes):
    torch.manual_seed(3)
    known = {item.name for item in fields(model_info(first).config)}
    tiny = {key: value for key, value in model_info(second).tiny.items() if key in known}
    trained = create_model(first, num_classes=3, **tiny)
    fresh = create_model(second, num_classes=classes, tiny=True)
    loaded = load_network(fresh, trained, first)
    assert not loaded.adapted and (classes != 3 or not loaded.mismatched)
    given, own = trained.state_dict(), fresh.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in loaded.fitted)


@pytest.mark.parametrize("name", list_models())
def test_every_network_starts_from_its_like_for_other_classes(name):
    # On the meta device: what fits is a matter of names and shapes.
    with torch.device("meta"):
        trained, fresh = (create_model(name, num_classes=classes, tiny=True) for classes in (4, 9))
    assert not load_network(fresh, trained, "a run").missing


def test_a_network_of_other_widths_or_names_is_refused():
    fresh = create_model("unet", num_classes=2, tiny=True)
    before = copy_of(fresh)
    with pytest.raises(UsageError, match=r"a run does not belong to this network: .* of another shape"):
        load_network(fresh, create_model("unet", num_classes=2, widths=(5, 7, 9)), "a run")
    with pytest.raises(UsageError, match=r"a run does not belong to this network: .* 1 tensors fit"):
        load_network(fresh, network(), "a run")
    assert_unchanged(fresh, before)


def test_a_name_that_is_the_same_wins_over_one_that_is_alike():
    target = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 2), "encoder": torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})}
    )
    given = {name: torch.full_like(tensor, index) for index, (name, tensor) in enumerate(target.state_dict().items())}
    loaded, state = match_state(target, given, reference=None, source="a file")
    assert all(torch.equal(state[name], tensor) for name, tensor in given.items()) and not loaded.unused


def test_a_network_that_starts_from_no_classifier_says_so():
    with pytest.raises(UsageError, match="--init vgg16: this network starts from no classifier"):
        load_classifier(create_model("unet", num_classes=2, tiny=True), "vgg16")


def test_vgg16_starts_a_segnet(monkeypatch):
    """Real widths: the encoder's 13 convolutions are those of the classifier, bit for bit."""
    draws = torch.Generator().manual_seed(0)
    whole = {
        name: torch.rand(shape, generator=draws) if name.startswith("features.") else torch.zeros(1).expand(shape)
        for name, shape in VGG16.items()
    }
    monkeypatch.setattr("pixelwise.models.pretrained.library_weights", lambda name: (whole, f"library's {name}"))
    with torch.device("meta"):
        model = create_model("segnet", num_classes=3)
    model.to_empty(device="cpu")
    loaded = load_classifier(model, "vgg16")
    assert (loaded.classifier, loaded.source) == ("torchvision/vgg16", "library's torchvision/vgg16")
    assert len(loaded.fitted) == 26
    assert torch.equal(model.encoder[4].conv5_3.weight, whole["features.28.weight"])


with torch.device("meta"):
    VGG16 = {name: tensor.shape for name, tensor in tv.vgg16().state_dict().items()}


# -- refused --


@pytest.mark.parametrize(
    "foreign",
    [
        lambda: {"a": torch.zeros(3), "b": torch.zeros(4, 4)},
        lambda: timm.create_model("test_efficientnet").state_dict(),
        lambda: create_model("unet", num_classes=2, tiny=True).state_dict(),
    ],
)
def test_a_file_of_another_network_is_refused_and_nothing_changes(tmp_path, foreign):
    model = network()
    before = copy_of(model)
    with pytest.raises(UsageError, match=r"foreign.pth does not belong to test_resnet: foreign.pth: .* tensors fit"):
        load_pretrained(model, saved(tmp_path / "foreign.pth", foreign()))
    assert_unchanged(model, before)


def test_a_sibling_is_refused_although_most_names_and_many_shapes_agree(tmp_path):
    model = network(backbone="resnet10t")
    before = copy_of(model)
    with pytest.raises(UsageError, match=r"does not belong to resnet10t: .* tensors fit; .* of another shape: "):
        load_pretrained(model, saved(tmp_path / "sibling.pth", timm.create_model("resnet14t").state_dict()))
    assert_unchanged(model, before)


def test_matching_changes_nothing_and_says_which_shapes_differ():
    target = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2))
    before = copy_of(target)
    given = {"0.weight": torch.ones(4, 3, 3, 3), "1.weight": torch.ones(5, 4), "extra": torch.ones(1)}
    loaded, state = match_state(target, given, reference=None, source="a file")
    assert set(state) == {"0.weight"} == set(loaded.fitted)
    assert loaded.mismatched == ("1.weight (5, 4) for (2, 4)",)
    assert loaded.missing == ("0.bias", "1.bias") and loaded.unused == ("extra",)
    assert_unchanged(target, before)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("write", ["torch", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, write):
    path, mark = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"weight": torch.zeros(2), "evil": Evil(mark)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(UsageError, match=r"evil.pth: cannot be read as weights .* plain tensors"):
        read_state(path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(tmp_path, suffix):
    whole = saved(tmp_path / f"whole{suffix}", {f"layer{i}.weight": torch.rand(3, 4) for i in range(5)}).read_bytes()
    draws = torch.Generator().manual_seed(0)
    damaged = [b"", b"\n", b"<html>not found</html>", whole[: len(whole) // 2], whole[:-1], b"\0" * 64, os.urandom(200)]
    for _ in range(60):
        noisy = bytearray(whole)
        for place in torch.randint(min(len(whole), 600), (4,), generator=draws).tolist():
            noisy[place] = int(torch.randint(256, (), generator=draws))
        damaged.append(bytes(noisy))
    path = tmp_path / f"damaged{suffix}"
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in read_state(path).values())
        except UsageError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= 7


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(3), {"state_dict": {}}, "text"])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=r"odd.pth"):
        read_state(tmp_path / "odd.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"--pretrained .*none.pth: there is no such file"):
        load_pretrained(network(), tmp_path / "none.pth")
    with pytest.raises(UsageError, match="there is no such file"):
        load_pretrained(network(), tmp_path)


# -- the owner's weights --


@pytest.fixture
def empty_caches(monkeypatch, tmp_path):
    """No weights on this machine, and no network."""

    def refuse(*_args, **_options):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("backbone", ["test_resnet", "torchvision/mnasnet0_5"])
def test_without_network_and_cache_the_library_s_weights_are_a_clear_error(empty_caches, backbone):
    model = network(backbone=backbone)
    before = copy_of(model)
    with pytest.raises(UsageError, match=r"in no cache and .* could not fetch them .*--pretrained FILE, or leave"):
        load_pretrained(model, "auto")
    assert_unchanged(model, before)


def test_a_damaged_file_in_the_cache_is_a_clear_error(empty_caches):
    empty_caches.mkdir(parents=True)
    url = tv.MNASNet0_5_Weights.DEFAULT.url
    (empty_caches / Path(url).name).write_bytes(b"half a file")
    with pytest.raises(UsageError, match="could not fetch them"):
        library_weights("torchvision/mnasnet0_5")


def test_a_library_without_weights_says_so(empty_caches):
    with pytest.raises(UsageError, match="timm has no pretrained weights for efficientnet_b6"):
        library_weights("efficientnet_b6")


def test_a_network_without_a_backbone_has_no_owner_to_ask():
    with pytest.raises(UsageError, match="this network has none of its own: pass --pretrained FILE"):
        load_pretrained(create_model("unet", num_classes=2, tiny=True), "auto")


needs_mobilenet = pytest.mark.skipif(
    not MOBILENET.is_file(), reason=f"needs {MOBILENET}: set PIXELWISE_DATA to the folder of real data"
)


@needs_mobilenet
def test_a_file_in_torchvision_s_cache_needs_no_network(empty_caches):
    empty_caches.mkdir(parents=True)
    (empty_caches / MOBILENET.name).symlink_to(MOBILENET)
    given, label = library_weights("torchvision/mobilenet_v2")
    assert label == "torchvision MobileNet_V2_Weights.IMAGENET1K_V1 (licence BSD-3-Clause)"
    model = network(backbone="torchvision/mobilenet_v2")
    loaded = load_pretrained(model, "auto")
    assert (
        not loaded.missing
        and not loaded.mismatched
        and set(loaded.unused) == {"classifier.1.weight", "classifier.1.bias"}
    )
    assert torch.equal(model.encoder.state_dict()["body.features.0.0.weight"], given["features.0.0.weight"])


@needs_mobilenet
def test_the_trunk_with_real_weights_is_the_real_classifier_s():
    model = network(backbone="torchvision/mobilenet_v2").eval()
    assert not load_pretrained(model, MOBILENET).missing
    with torch.device("meta"):
        whole = tv.mobilenet_v2()
    whole.load_state_dict(read_state(MOBILENET), assign=True)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model.encoder(image)[-1], whole.eval().features(image), atol=1e-4)


@needs_mobilenet
def test_timm_s_twin_takes_torchvision_s_file_by_order():
    model = network(backbone="mobilenetv2_100").eval()
    loaded = load_pretrained(model, MOBILENET)
    assert loaded.by_order and not loaded.missing and not loaded.mismatched
