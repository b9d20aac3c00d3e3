"""The house as docs and design describe it: imports point down, the public names exist, the command line starts fast."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import api, cli

import pixelwise

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "pixelwise").rglob("*.py"))


def test_imports_point_down_only(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT / "src"), *sys.path])
    contracts = api.read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    assert [contract["type"] for contract in contracts] == ["layers"]
    code = cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert code == 0, capsys.readouterr().out


def test_every_part_stands_in_the_layers():
    text = (ROOT / "pyproject.toml").read_text()
    for path in (ROOT / "src" / "pixelwise").iterdir():
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists():
            assert f"pixelwise.{path.stem}" in text, f"{path.name} is in no layer"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_documented_and_of_a_size_to_read(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert not text or ast.get_docstring(tree), "the module has no docstring"
    assert text.count("\n") <= 360
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 60, f"{node.name} is too long to read"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {getattr(node, "module", None)} | {alias.name for alias in node.names}
            assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve"} or "UnpicklingError" in names


def test_the_page_on_architecture_lists_every_file():
    tree = (ROOT / "docs" / "architecture.md").read_text().rpartition("## Files")[2]
    folder, listed = "", []
    for line in tree.splitlines():
        name = line.split("  ")[0] if line[:1].strip() else line.split()[0] if line.strip() else ""
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            listed.append(folder + name if line.startswith(" ") else name)
    files = [path.relative_to(ROOT / "src" / "pixelwise").as_posix() for path in SOURCES if path.stem != "__init__"]
    assert sorted(listed) == sorted(files)


# Their examples stand with the functions that return them.
RESULTS = {"DataFolder", "Evaluation", "Inspection", "Run"}


def test_every_public_name_has_a_docstring_with_an_example_and_types():
    assert sorted(pixelwise.__all__) == pixelwise.__all__
    assert set(pixelwise.__all__) <= set(dir(pixelwise))
    finder = doctest.DocTestParser()
    without = []
    for name in pixelwise.__all__:
        item = getattr(pixelwise, name)
        item = item.train if name == "train" else item  # a package that can be called
        text = inspect.getdoc(item) or ""
        assert text, name
        is_error = inspect.isclass(item) and issubclass(item, Exception)
        if not finder.get_examples(text) and not is_error and name not in RESULTS:
            without.append(name)
        if inspect.isfunction(item):
            hints = inspect.signature(item)
            assert hints.return_annotation is not inspect.Signature.empty, name
            assert all(
                parameter.annotation is not inspect.Parameter.empty for parameter in hints.parameters.values()
            ), name
    assert not without


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'segment'"):
        pixelwise.segment  # noqa: B018


def test_train_can_be_called_whatever_was_imported_first():
    importlib.import_module("pixelwise.train.config")
    with pytest.raises(pixelwise.DataError, match="no such folder"):
        pixelwise.train("no/such/folder", pixelwise.RunConfig(steps=1), out="runs/none")


@pytest.mark.parametrize(
    "code",
    [
        "import pixelwise",
        "from pixelwise.cli import main; main(['train', '--help'])",
        "from pixelwise.cli import main; main(['models', 'unet*'])",
    ],
)
def test_starting_is_fast_because_nothing_heavy_is_imported(code):
    check = (
        "import sys, atexit\n"
        "heavy = ('torch', 'timm', 'lightning', 'matplotlib')\n"
        "atexit.register(lambda: print('HEAVY', [name for name in heavy if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
