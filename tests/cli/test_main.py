"""What all verbs share: help, exit codes, errors in one paragraph."""

import errno
import os
import sys

import pytest
import typer

import pixelwise.cli
from pixelwise.cli import main
from pixelwise.cli.options import with_flag_value
from pixelwise.errors import DataError, UsageError

VERBS = ["inspect", "train", "evaluate", "predict", "models", "heatmap", "quantize", "report", "demo"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Gives the exit code, what was printed and what was complained about."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        return (done.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def failing(monkeypatch):
    """Lets `pixelwise models` fail with an error of choice."""

    def arrange(error):
        def fail(_pattern):
            raise error

        monkeypatch.setattr("pixelwise.models.list_models", fail)

    return arrange


def test_help_lists_the_verbs(run):
    code, out, _ = run("--help")
    assert code == 0 and all(f"\n  {verb} " in out for verb in VERBS)
    assert {command.callback.__name__ for command in pixelwise.cli.app.registered_commands} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_shows_an_example(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0 and f"Example: pixelwise {verb}" in out


def test_no_verb_is_a_question_for_help(run):
    code, out, err = run()
    assert code == 2 and "Usage: pixelwise" in out + err


def test_the_version(run):
    code, out, _ = run("--version")
    assert code == 0 and out == f"pixelwise {pixelwise.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("segment",), "No such command 'segment'"),
        (("models", "--colour"), "No such option: --colour"),
        (("train",), "Missing argument 'DATA'"),
        (("train", "data"), "Missing option '--out'"),
        (("train", "data", "--out", "x", "--steps", "many"), "Invalid value for '--steps'"),
        (("models", "a", "b"), "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_two(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize("verb", ["inspect", "train", "evaluate", "predict", "report"])
def test_what_is_not_there_is_two(run, verb, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    more = {"train": ("--out", nowhere), "evaluate": (nowhere,), "predict": (nowhere, "--out", nowhere)}.get(verb, ())
    code, out, err = run(verb, nowhere, *more)
    assert code == 2 and err.startswith("pixelwise: ") and nowhere in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in out + err
    assert not (tmp_path / "nowhere").exists()


def test_errors_are_one_unbroken_paragraph_without_markup(run, failing, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    message = "/a/long/path/[bold]x[/bold].png: cannot be used, because of a reason that takes longer than a line."
    failing(DataError(message))
    assert run("models") == (2, "", f"pixelwise: {message}\n")


def test_debug_shows_where_it_came_from(failing):
    failing(UsageError("no"))
    with pytest.raises(UsageError, match="no"):
        main(["--debug", "models"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_disk_refuses_is_an_error_without_traceback(run, failing, number):
    failing(OSError(number, os.strerror(number), "runs/street/metrics.csv"))
    code, _, err = run("models")
    assert code == 2 and os.strerror(number) in err and "runs/street/metrics.csv" in err


def test_a_bug_keeps_its_traceback(failing):
    failing(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["models"])


def test_ctrl_c_is_130(run, failing):
    failing(KeyboardInterrupt())
    code, _, err = run("models")
    assert code == 130 and "Traceback" not in err


def test_verbs_choose_their_code(run, failing):
    failing(typer.Exit(1))
    assert run("models")[0] == 1


def test_the_models(run):
    code, out, _ = run("models")
    assert code == 0
    assert "31,032,395" in out and "Ronneberger" in out and "encoder_decoder" in out
    code, out, _ = run("models", "unet*")
    assert code == 0 and "unet" in out and "encoder_decoder" not in out
    code, _, err = run("models", "x*")
    assert code == 2 and "no model matches 'x*'. The models are " in err and "unet" in err


def test_the_command_line_of_the_process_is_the_default(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pixelwise", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("pixelwise ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train data --pretrained --out r", "train data --pretrained=auto --out r"),
        ("train --pretrained data --out r", "train --pretrained=auto data --out r"),
        ("train data --out r --pretrained", "train data --out r --pretrained=auto"),
        ("train data --pretrained w.pth", "train data --pretrained w.pth"),
        ("train data --pretrained a/W.SafeTensors -x", "train data --pretrained a/W.SafeTensors -x"),
        ("train data --pretrained auto", "train data --pretrained auto"),
        ("train data --pretrained=w", "train data --pretrained=w"),
        ("train data", "train data"),
        ("inspect data --write-classes", "inspect data --write-classes=auto"),
        ("inspect --write-classes data", "inspect --write-classes=auto data"),
        ("inspect data --write-classes my.yaml", "inspect data --write-classes my.yaml"),
    ],
)
def test_pretrained_is_a_flag_or_takes_a_weight_file(typed, meant):
    assert with_flag_value(typed.split()) == meant.split()


def test_pretrained_reaches_training_both_ways(monkeypatch, tmp_path, toy_data):
    seen = []

    def fake(_folder, config, **_options):
        seen.append(config.pretrained)
        raise UsageError("enough")

    monkeypatch.setattr("pixelwise.train.run.train", fake)
    monkeypatch.setattr("pixelwise.train.train", fake, raising=False)
    for words in (["--pretrained"], ["--pretrained", "w.pth"], ["--pretrained=w"], ["--steps", "1"]):
        with pytest.raises(SystemExit):
            main(["train", str(toy_data), "--out", str(tmp_path / "run"), *words])
    assert seen == ["auto", "w.pth", "w", None]
