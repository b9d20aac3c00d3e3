import pytest
import yaml
from pydantic import ValidationError

from pixelwise.errors import UsageError
from pixelwise.train import RunConfig, make_config, merge_options, parse_settings, read_config, train


def test_defaults_are_valid_and_mean_fifty_epochs():
    config = make_config({})
    assert config == RunConfig() and config.budget == ("epochs", 50)
    assert make_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(("key", "value"), [("minutes", 2.5), ("epochs", 3), ("steps", 7)])
def test_one_budget(key, value):
    assert make_config({key: value}).budget == (key, value)


@pytest.mark.parametrize(
    "given", [{"minutes": 1, "epochs": 2}, {"epochs": 1, "steps": 2}, {"minutes": 1, "epochs": 1, "steps": 1}]
)
def test_two_budgets_are_refused(given):
    with pytest.raises(UsageError, match=f"{' and '.join(given)} are budgets; give one of them"):
        make_config(given)


@pytest.mark.parametrize(
    ("typed", "meant"), [("batchsize", "batch_size"), ("learning_rate", "lr"), ("Epochs", "epochs")]
)
def test_an_unknown_option_gets_a_suggestion(typed, meant):
    with pytest.raises(UsageError, match=f"no training option '{typed}'") as caught:
        make_config({typed: 1})
    assert meant in str(caught.value)


def test_unknown_options_fail_in_python_too():
    with pytest.raises(ValidationError, match="batchsize"):
        RunConfig(batchsize=3)
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().lr = 1.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("minutes", 0), ("minutes", float("nan")), ("epochs", -1), ("epochs", 1.5), ("steps", 0), ("crop_px", 8),
        ("batch_size", 0), ("batch_size", "many"), ("scale", (2.0, 1.0)), ("scale", (0.0, 1.0)), ("scale", 1.0),
        ("scale", (1.0, float("inf"))), ("lr", float("inf")), ("focus", 1.1), ("flips", "diagonal"), ("photometric", 1.0),
        ("class_weights", "segnet"), ("dice", -1), ("label_smoothing", 1.0), ("lr", 0), ("lr", "fast"),
        ("encoder_lr", -0.1), ("weight_decay", -1), ("schedule", "step"), ("init", 3), ("warmup", 1.0),
        ("warmup", -0.1), ("poly_power", 0), ("clip", -1), ("ema", 1.0), ("precision", "fp16"), ("devices", 0),
        ("workers", -1), ("seed", -1), ("seed", 2**31), ("validate_every", 0), ("optimizer", "lamb"), ("bias_lr", -1),
        ("reduction", "none"), ("separation", -1), ("elastic", -0.1), ("stage_lr", 0), ("class_weights", [1, -1]),
        ("class_weights", [1, "x"]), ("momentum", 1.0), ("decay", 0), ("decay_epochs", 0), ("separation_sigma_px", 0),
        ("stages", 3), ("patience", 0), ("checkpoint_minutes", -1), ("max_val_images", 0), ("model", 3),
        ("options", [1]), ("options", 3),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(UsageError, match="the training options are not valid") as caught:
        make_config({key: value})
    assert key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("momentum", 0.99, "optimizer=sgd"),
        ("decay", 0.5, "schedule=exponential"),
        ("decay_epochs", 3, "schedule=exponential"),
        ("separation_sigma_px", 3, "separation"),
        ("stage_lr", 0.01, "stages"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(key, value, needed):
    with pytest.raises(UsageError, match=f"{key} means nothing without {needed}"):
        make_config({key: value})
    other, _, wanted = needed.partition("=")
    make_config({key: value, other: wanted or {"separation": 10, "stages": ["unet"]}[other]})


def test_the_recipes_of_the_papers_can_be_written():
    fcn = make_config(
        {
            "optimizer": "sgd",
            "lr": "1e-10",
            "momentum": 0.99,
            "weight_decay": 5e-4,
            "bias_lr": 2,
            "schedule": "constant",
            "warmup": 0,
            "reduction": "sum",
            "class_weights": "none",
            "stages": "fcn32s,fcn16s",
            "stage_lr": 0.01,
            "batch_size": 1,
            "ema": 0,
        }
    )
    assert (fcn.lr, fcn.stages, fcn.clip_norm) == (1e-10, ("fcn32s", "fcn16s"), 0)
    tiramisu = make_config({"optimizer": "rmsprop", "schedule": "exponential", "decay": 0.995, "weight_decay": 1e-4})
    assert (tiramisu.decay, tiramisu.decay_epochs, tiramisu.clip_norm) == (0.995, 1, 1)
    segnet = make_config({"class_weights": [0.2595, 0.1826, 4.564]})
    assert segnet.class_weights == (0.2595, 0.1826, 4.564)
    for config in (fcn, tiramisu, segnet):
        assert make_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_a_summed_loss_is_not_clipped_unless_asked_for():
    assert make_config({}).clip_norm == 1 and make_config({"clip": 0}).clip_norm == 0
    assert make_config({"reduction": "sum"}).clip_norm == 0
    assert make_config({"reduction": "sum", "clip": 5}).clip_norm == 5


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UsageError) as caught:
        make_config({"lr": -1, "batch_size": 0, "flips": "x"})
    assert all(key in str(caught.value) for key in ("lr", "batch_size", "flips"))


# -- files, --set, and both --


def test_settings_are_read_as_yaml():
    given = [
        "lr=1e-3",
        "batch_size=4",
        "flips=both",
        "scale=[0.5, 2]",
        "channels_last=false",
        "crop_px=null",
        "device=cuda:1",
    ]
    assert parse_settings(given) == {
        "lr": 0.001,
        "batch_size": 4,
        "flips": "both",
        "scale": [0.5, 2],
        "channels_last": False,
        "crop_px": None,
        "device": "cuda:1",
    }
    assert parse_settings([" lr = 3 "]) == {"lr": 3}
    assert parse_settings([]) == {}


def test_settings_reach_the_network_s_own_options():
    given = ["options.skip=add", "options.widths=[64, 32]", "options={finest: 8, skip: none}", "options.dropout=1e-1"]
    assert parse_settings(given) == {"options": {"skip": "none", "widths": [64, 32], "finest": 8, "dropout": 0.1}}


@pytest.mark.parametrize("given", ["lr", "", "lr:3"])
def test_a_setting_needs_an_equals_sign(given):
    with pytest.raises(UsageError, match="write it as key=value"):
        parse_settings([given])


@pytest.mark.parametrize(
    "given", ["lr=[1", "lr={", "lr=2001-99-99", "lr=!!python/object/apply:os.getcwd []", "lr=" + "[" * 1000]
)
def test_a_setting_that_is_no_yaml_is_refused(given):
    with pytest.raises(UsageError, match="the value cannot be read"):
        parse_settings([given])


@pytest.mark.parametrize("given", [["options=3"], ["options=text"], ["options=[a]", "options.skip=add"]])
def test_options_are_a_mapping(given):
    with pytest.raises(UsageError, match="options are the network's own fields"):
        parse_settings(given)


def test_files_are_read(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("model: unet\noptions: {widths: [8, 16]}\nlr: 0.01\nminutes: 3\n", encoding="utf-8")
    assert make_config(read_config(path)).options == {"widths": [8, 16]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold 'option: value' lines, not a NoneType"),
        (b"- lr", "not a list"),
        (b"lr: [1", "cannot be read as YAML"),
        (b"\xff\xfe\xfa", "cannot be read as YAML"),
        (b"lr: 2001-99-99", "cannot be read as YAML"),
        (b"lr: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        (b"[" * 1000, "cannot be read as YAML"),
    ],
)
def test_files_that_hold_no_options_are_refused(tmp_path, content, message):
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml: cannot be read as YAML"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(tmp_path)


def test_later_layers_win_and_options_merge():
    merged = merge_options(
        {"lr": 1, "options": {"skip": "add", "finest": 4}},
        {"options": None},
        {"lr": 2, "options": {"skip": "none"}},
        {"model": "m"},
    )
    assert merged == {"lr": 2, "model": "m", "options": {"skip": "none", "finest": 4}}
    assert merge_options() == {} and merge_options({"lr": 1}, {}) == {"lr": 1}


def test_merging_leaves_the_layers_alone():
    first, second = {"options": {"a": 1}}, {"options": {"b": 2}}
    merge_options(first, second)
    assert first == {"options": {"a": 1}} and second == {"options": {"b": 2}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("workers", 10**6), ("devices", 10**6), ("steps", 10**18), ("epochs", 10**18), ("minutes", 1e300),
        ("batch_size", 10**9), ("crop_px", 10**9), ("slices", 999_999), ("bands", [1] * 5000), ("scale", [1, 1e300]),
        ("lr", 1e300), ("elastic", 1e300), ("patience", 10**30), ("class_weights", [1e300, 1]), ("level", 10**9),
    ],
)  # fmt: skip
def test_what_no_machine_has_is_refused_with_the_limit_everywhere(key, value, tmp_path):
    (tmp_path / "big.yaml").write_text(yaml.safe_dump({key: value}))
    ways = ({key: value}, read_config(tmp_path / "big.yaml"), parse_settings([f"{key}={value}"]))
    for given in ways:
        with pytest.raises(UsageError, match=f"{key}.*(at most|less than or equal to)") as caught:
            make_config(given)
        assert len(str(caught.value)) < 1000
    with pytest.raises(ValidationError):
        RunConfig(**{key: value})


def test_more_processes_than_this_machine_can_use_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("pixelwise.train.run.processors", lambda: 2)
    for key, most in (("workers", 16), ("devices", 4)):
        with pytest.raises(UsageError, match=rf"{key}={most + 1}: this machine has 2 processors.*at most {most}"):
            train(tmp_path, RunConfig(device="cpu", **{key: most + 1}), out=tmp_path / "run")
