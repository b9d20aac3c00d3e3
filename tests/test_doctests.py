"""The examples in the docstrings run, on the package as it is installed."""

import doctest
import importlib
from pathlib import Path

import pytest

import pixelwise

# pytest's own --doctest-modules would import src/ beside an installed copy, and so have two of each module.
ROOT = Path(pixelwise.__file__).parent
MODULES = sorted(
    ".".join(("pixelwise", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_every_public_function_and_class_has_one():
    finder = doctest.DocTestFinder()
    examples = sum(bool(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert examples >= sum(callable(getattr(pixelwise, name)) for name in pixelwise.__all__)
