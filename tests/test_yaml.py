"""YAML from outside: what no honest file holds is refused at once, whatever it would expand to."""

import os
import time

import pytest

from pixelwise.data.classes import load_labels
from pixelwise.errors import DataError, UsageError
from pixelwise.files import MAX_YAML_BYTES, read_yaml
from pixelwise.train.config import parse_settings, read_config

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "alias"),
        ("classes: [a, b]\nbase: &x {a: 1}\nother: {<<: *x}", "alias"),
        (f"classes: [{', '.join(map(str, range(1_000_000)))}]", "100,000 values"),
        ("[" * 100_000, "levels"),
        ("classes: [a]\nignore_index: " + ":".join(["59"] * 400_000), "characters"),  # a number of base 60
        ("classes: [a, b]\n" + "#" * (MAX_YAML_BYTES + 1), "bytes"),
    ],
    ids=["aliases", "merge", "million", "deep", "sexagesimal", "large"],
)
def test_what_would_take_minutes_is_refused_at_once(text, reason, tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    started = time.perf_counter()
    with pytest.raises(DataError, match=rf"classes\.yaml.*{reason}"):
        load_labels(path)
    with pytest.raises(UsageError, match=rf"--config .*{reason}"):
        read_config(path)
    assert time.perf_counter() - started < 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_a_device_and_a_folder_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "/dev/zero", tmp_path):
        with pytest.raises(DataError, match="no regular file"):
            read_yaml(path)


def test_an_honest_file_of_many_values_is_read(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(
        "classes:\n" + "".join(f"- {{name: c{i}, values: {list(range(i, 65_000, 254))}}}\n" for i in range(254))
    )
    assert load_labels(path).class_of(64_999) == 64_999 % 254


def test_settings_of_the_command_line_have_the_same_limits():
    with pytest.raises(UsageError, match="alias"):
        parse_settings(["options.x=[&a 1, *a]"])
