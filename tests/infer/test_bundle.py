import json
import math
from dataclasses import asdict, replace
from hashlib import sha256

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pixelwise.data.labels import LabelSpec
from pixelwise.data.numbers import Numbers
from pixelwise.errors import DataError
from pixelwise.files import write_json
from pixelwise.infer.bundle import ModelCard, load_bundle, load_card, save_bundle
from pixelwise.models import create_model

SPEC = LabelSpec(names=("sky", "road"), colors=((10, 20, 250), (90, 80, 70)), values=((3,), (4, 7)), ignore_values=(9,))
CONFIG = {"tiny": True, "num_classes": 2, "in_channels": 3}
CARD = ModelCard(
    model="unet",
    config=CONFIG,
    labels=SPEC,
    mean=(0.4, 0.5, 0.1 + 0.2),
    std=(0.2, 0.3, 0.25),
    data={"fingerprint": "ab" * 32, "name": "streets", "images": {"train": 3}},
    versions={"pixelwise": "0.1.0"},
    scores={"val": {"miou": 0.5}},
)


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    save_bundle(tmp_path, create_model("unet", **CONFIG), CARD)
    return tmp_path


def rewrite_card(run, change):
    content = json.loads((run / "model.json").read_text())
    change(content)
    (run / "model.json").write_text(json.dumps(content))


def rewrite_weights(run, change):
    """Change the tensors and keep the hash of the card right, as somebody hostile would."""
    state = safetensors.torch.load_file(run / "model.safetensors")
    change(state)
    safetensors.torch.save_file(state, run / "model.safetensors")
    digest = sha256((run / "model.safetensors").read_bytes()).hexdigest()
    rewrite_card(run, lambda content: content.update(weights_sha256=digest))


def test_what_is_saved_is_loaded(tmp_path):
    torch.manual_seed(1)
    model = create_model("unet", **CONFIG).to(memory_format=torch.channels_last)
    saved = save_bundle(tmp_path, model, CARD)
    loaded, card = load_bundle(tmp_path)
    assert card == saved == replace(CARD, weights_sha256=saved.weights_sha256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_resolved_config_rebuilds_the_network(tmp_path):
    from dataclasses import asdict

    model = create_model("unet", **CONFIG)
    save_bundle(tmp_path, model, replace(CARD, config=asdict(model.config)))
    loaded, card = load_bundle(tmp_path)
    assert loaded.config == model.config
    assert card.config == asdict(model.config)


class _Draws(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [str(func)] * (torch.Tag.nondeterministic_seeded in func.tags)
        return func(*args, **(kwargs or {}))


# fcn8s has tensors that are not among its weights, so it is built with memory too.
@pytest.mark.parametrize("name", ["fcn8s", "segnet", "linknet", "enet"])
def test_no_weights_are_drawn_for_a_network_that_has_its_own(tmp_path, name):
    torch.manual_seed(2)
    model = create_model(name, **CONFIG).eval()
    save_bundle(tmp_path, model, replace(CARD, model=name))
    with _Draws() as draws:
        loaded = load_bundle(tmp_path)[0]
    assert not draws.seen
    image = torch.rand(1, 3, 40, 50)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))


def test_saving_and_loading_leave_the_random_state_alone(run):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model, card = load_bundle(run)
    save_bundle(run, model, card)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_leaves_the_model_alone(tmp_path):
    model = create_model("unet", **CONFIG).train()
    save_bundle(tmp_path, model, CARD)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


NUMBERS = Numbers(mean=(0.4,) * 3, std=(0.2,) * 3, low=(0.0,) * 3, high=(1.0,) * 3, dtypes=("uint8", "float32"))


@pytest.mark.parametrize("card", [CARD, replace(CARD, numbers=NUMBERS)], ids=["earlier versions", "with numbers"])
def test_card_survives_json_exactly(card):
    assert ModelCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_what_is_no_run_folder_is_refused(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(DataError, match=r"run: (is not a folder|holds no model\.json)"):
        load_bundle(tmp_path / "run")


HUGE = 10**4000
BAD_VALUES = {
    "model": [None, 3, "", "../x", "unet\n", "nosuchmodel", "a" * 1000, ["unet"], {}],
    "config": [None, [], "x", {}, {**CONFIG, "num_classes": 3}, {**CONFIG, "in_channels": "3"}, {**CONFIG, "nope": 1}]
    + [
        {**CONFIG, "tiny": value}
        for value in (HUGE, 1e300, math.nan, "hf-hub:somebody/model", "/etc/passwd", "../x", {"a": 1})
    ]
    + [{**CONFIG, "tiny": [[[[[1]]]]]}, {**CONFIG, "tiny": [1] * 5000}, {**CONFIG, "x" * 1000: HUGE}],
    "labels": [None, [], {}, {"names": 3}, "sky", 1.5],
    "mean": [
        None,
        [],
        "0.5",
        [0.5],
        [0.5, 0.5, None],
        [0.5, 0.5, HUGE],
        [math.nan] * 3,
        [math.inf] * 3,
        [True] * 3,
        {},
    ],
    "std": [None, [], [0.0] * 3, [-1.0] * 3, [math.nan] * 3, [0.5] * 4, [[0.5]] * 3, [0.5] * 100_000],
    "data": [None, [], 3],
    "versions": [None, "1.0"],
    "scores": [None, [0.5]],
    "weights_sha256": [None, "", 3, "0" * 63, "../../etc", "Z" * 64, HUGE],
    "numbers": [[], "x", {}, {"mean": [1.0] * 3}]
    + [
        asdict(NUMBERS) | change
        for change in (
            {"std": [0.0] * 3},
            {"low": [0.0]},
            {"high": [math.inf] * 3},
            {"mean": None},
            {"dtypes": "x"},
            {"dtypes": [HUGE]},
            {"dtypes": ["x" * 1000]},
            {"extra": 1},
        )
    ],
    "format": [None, 0, 2, True, "1", HUGE, [], math.nan],
}


@pytest.mark.parametrize("key", BAD_VALUES)
def test_hostile_values_in_the_card_are_refused(run, key):
    good = (run / "model.json").read_text()
    for value in BAD_VALUES[key]:
        (run / "model.json").write_text(good)
        rewrite_card(run, lambda content, value=value: content.update({key: value}))
        with pytest.raises(DataError) as caught:
            load_bundle(run)
        assert str(run) in str(caught.value), value
        assert len(str(caught.value)) < 1500, value


@pytest.mark.parametrize("key", CARD.to_dict())
def test_missing_and_unknown_keys_are_refused(run, key):
    rewrite_card(run, lambda content: content.pop(key))
    with pytest.raises(DataError, match=key):
        load_card(run)
    rewrite_card(run, lambda content: content.update({key: CARD.to_dict()[key], "extra": 1}))
    with pytest.raises(DataError):
        load_card(run)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000], ids=range(9)
)
def test_cards_that_are_no_mapping_are_refused(run, content):
    (run / "model.json").write_bytes(content)
    with pytest.raises(DataError, match=r"model\.json"):
        load_bundle(run)


def test_damaged_or_foreign_weights_are_noticed_by_their_hash(run):
    path = run / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], b"", whole[:-4] + b"\0\0\1\0", whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"sha256.*resume the training"):
            load_bundle(run)
    path.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: there is no such file"):
        load_bundle(run)


def killed(*_):
    raise KeyboardInterrupt


def test_a_network_that_was_saved_by_half_is_the_new_one_with_its_own_card(run, monkeypatch):
    monkeypatch.setattr("pixelwise.infer.bundle.write_json", killed)
    new = create_model("unet", **CONFIG)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(run, new, replace(CARD, scores={"val": {"miou": 0.75}}))
    loaded, card = load_bundle(run)
    assert card.scores == {"val": {"miou": 0.75}} == load_card(run).scores
    assert card.weights_sha256 == sha256((run / "model.safetensors").read_bytes()).hexdigest()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in new.state_dict().items())
    assert json.loads((run / "model.json").read_text())["scores"] == {"val": {"miou": 0.5}}


def test_the_weights_alone_are_enough_and_tell_when_they_are_damaged(run):
    (run / "model.json").unlink()
    path = run / "model.safetensors"
    whole = path.read_bytes()
    assert load_card(run) == replace(CARD, weights_sha256=sha256(whole).hexdigest())
    for place in (9, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"holds no model\.json"):
            load_bundle(run)


def test_folders_of_earlier_versions_are_read_and_their_two_files_must_belong_together(run):
    path = run / "model.safetensors"
    rewrite_weights(run, lambda state: None)  # safetensors alone writes no card into it
    assert b"card" not in path.read_bytes()[:3000]
    assert load_bundle(run)[1].scores == CARD.scores
    before = (run / "model.json").read_text()
    rewrite_weights(run, lambda state: state.update({name: tensor * 2 for name, tensor in state.items()}))
    (run / "model.json").write_text(before)
    with pytest.raises(DataError, match="different moments of a run"):
        load_bundle(run)


def test_a_card_that_was_edited_is_followed(run):
    rewrite_card(run, lambda card: card.update(mean=[0.1, 0.1, 0.1]))
    assert load_bundle(run)[1].mean == (0.1, 0.1, 0.1)


def first_float(state):
    return next(name for name, tensor in state.items() if tensor.is_floating_point() and tensor.ndim == 4)


def poison(state):
    state[first_float(state)].view(-1)[0] = math.nan


def lengthen(state):
    name = first_float(state)
    state[name] = torch.cat([state[name], state[name]])


def to_integers(state):
    name = first_float(state)
    state[name] = state[name].to(torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(first_float(state)), "lacks 1 tensors"),
        (lambda state: state.update({"evil\n" * 100: torch.zeros(1)}), "unknown 1 tensors"),
        (lambda state: state.clear(), "lacks"),
        (lengthen, "but the network"),
        (to_integers, "int64"),
        (poison, "NaN"),
    ],
)
def test_tensors_that_are_not_the_networks_are_refused(run, change, message):
    rewrite_weights(run, change)
    with pytest.raises(DataError, match=message) as caught:
        load_bundle(run)
    assert str(caught.value).startswith(str(run / "model.safetensors"))


def test_weights_that_are_no_safetensors_are_refused(run):
    for content in (b"", b"x" * 100, b"\xff" * 100, (2**40).to_bytes(8, "little") + b"{}", b"\x80\x04pickle"):
        (run / "model.safetensors").write_bytes(content)
        digest = sha256(content).hexdigest()
        rewrite_card(run, lambda card, digest=digest: card.update(weights_sha256=digest))
        with pytest.raises(DataError, match="not a safetensors file"):
            load_bundle(run)


def test_half_precision_weights_are_accepted(run):
    def halve(state):
        state.update({name: value.half() for name, value in state.items() if value.is_floating_point()})

    rewrite_weights(run, halve)
    model, _ = load_bundle(run)
    assert next(model.parameters()).dtype == torch.float32


def test_damaged_bundles_end_in_one_error_or_in_the_same_network(run):
    """Seeded damage to either file, with the hash repaired so that the checks behind it are reached."""
    rng = np.random.default_rng(7)
    files = {name: (run / name).read_bytes() for name in ("model.json", "model.safetensors")}
    refused = 0
    for _ in range(120):
        name = str(rng.choice(list(files)))
        content = bytearray(files[name])
        header = len(content) if name == "model.json" else min(len(content), 3000)
        for place in rng.integers(0, header, rng.integers(1, 4)):
            content[place] = int(rng.integers(0, 256))
        if rng.random() < 0.2:
            del content[int(rng.integers(0, len(content))) :]
        for other, whole in files.items():
            (run / other).write_bytes(content if other == name else whole)
        if name == "model.safetensors":
            digest = sha256(content).hexdigest()
            rewrite_card(run, lambda card, digest=digest: card.update(weights_sha256=digest))
        try:
            load_bundle(run)
        except DataError as error:
            refused += 1
            assert str(run) in str(error)
    assert refused > 60


def test_a_huge_network_is_refused_before_memory_is_taken(run):
    rewrite_card(run, lambda card: card["config"].update(widths=[1_000_000] * 5))
    with pytest.raises(DataError):
        load_bundle(run)


def test_a_card_keeps_hundreds_of_bands_and_wide_intensities_but_no_network_of_a_million_layers(tmp_path, monkeypatch):
    monkeypatch.setattr("pixelwise.models.registry.MAX_TENSORS", 200)
    reading = {"bands": tuple(range(1, 401)), "intensity": (0.0, 5e6)}
    made = create_model("unet", num_classes=2, tiny=True)
    labels = LabelSpec(names=("a", "b"), colors=((0, 0, 0), (9, 9, 9)), values=((0,), (1,)))
    config = {"num_classes": 2, "in_channels": 3, "widths": (4, 6)}
    card = ModelCard(model="unet", config=config, labels=labels, mean=(0.0,) * 3, std=(1.0,) * 3, reading=reading)
    saved = save_bundle(tmp_path, made, card)
    assert load_card(tmp_path).reading == reading
    for model, options, why in (
        ("unet", {"widths": [8] * 1000}, "widths holds 1,000 values; at most 256"),
        ("fcdensenet56", {"layers": [10**6, 4, 4]}, "more than [0-9,]+ tensors"),
        ("fullres_cnn", {"kernel": 999_999}, "at most 80 GiB are possible"),
    ):
        config = {"num_classes": 2, "in_channels": 3} | options
        write_json(tmp_path / "model.json", saved.to_dict() | {"model": model, "config": config})
        with pytest.raises(DataError, match=f"cannot be built from this config: .*{why}"):
            load_bundle(tmp_path)
