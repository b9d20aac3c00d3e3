"""Every code block of README and docs runs, on a small data folder in the place the text names."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from pixelwise.cli import main
from pixelwise.data.labels import LabelSpec
from pixelwise.train import RunConfig, make_config, read_config

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What takes half an hour for a reader takes two steps here; everything else runs as it is printed.
SHORTER = {
    "--minutes 30": "--steps 2",
    "RunConfig(minutes=30)": "RunConfig(steps=2, crop_px=32, batch_size=2, workers=0)",
    "--epochs 50": "--steps 2 --set options.widths=[4,6] --set crop_px=32",
    "--backbone resnet18": "--backbone resnet10t",
}


def blocks(kind: str) -> list[tuple[str, str]]:
    found = [(page.name, text) for page in PAGES for name, text in FENCE.findall(page.read_text()) if name == kind]
    for old, new in SHORTER.items():
        found = [(page, text.replace(old, new)) for page, text in found]
    return found


@pytest.fixture
def desk(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(toy_data, tmp_path / "data" / "street")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_pages_runs(desk: Path) -> None:
    found = blocks("python")
    assert found
    for page, text in found:
        exec(compile(text, page, "exec"), {})
    assert (desk / "labels.png").exists()


def test_the_commands_of_the_pages_run(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        line.removeprefix("$ ") for _, text in blocks("console") for line in text.splitlines() if line[:2] == "$ "
    ]
    ours = [shlex.split(command) for command in commands if command.startswith("pixelwise ")]
    assert len(ours) >= 8
    for _, *arguments in ours:
        run = Path(arguments[arguments.index("--out") + 1]) if arguments[0] == "train" else None
        if run is not None and run.exists() and "--resume" not in arguments:
            shutil.rmtree(run)  # two pages train into the same folder
        small = ["--set", "crop_px=32", "--set", "batch_size=2", "--set", "workers=0"]
        with pytest.raises(SystemExit) as done:
            main([*arguments, *(small if run is not None and "--resume" not in arguments else [])])
        assert done.value.code in (0, None), (arguments, capsys.readouterr())


def test_the_yaml_of_the_pages_is_read(tmp_path: Path) -> None:
    from pixelwise import load_labels

    for _, text in blocks("yaml"):
        (tmp_path / "classes.yaml").write_text(text)
        assert isinstance(load_labels(tmp_path / "classes.yaml"), LabelSpec)


def test_every_training_option_is_documented() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    assert not [name for name in RunConfig.model_fields if f"`{name}`" not in text]


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_every_recipe_is_a_valid_configuration() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert make_config(read_config(path)).budget
        assert "Measured:" in path.read_text()
