"""What several tests of the command line need: small networks in run folders, and the program as a user calls it."""

import sys
from types import SimpleNamespace

import pytest
import torch

from pixelwise.cli import main
from pixelwise.data.labels import LabelSpec
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.models import create_model

SPEC = LabelSpec(
    names=("background", "road", "car"), colors=((0, 0, 0), (90, 80, 70), (250, 0, 0)), values=((0,), (1,), (2,))
)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Run folders of hardly trained networks, by the number of channels that they take."""
    folders = {}
    for channels in (1, 3):
        torch.manual_seed(channels)
        config = {"tiny": True, "num_classes": 3, "in_channels": channels}
        card = ModelCard(model="unet", config=config, labels=SPEC, mean=(0.5,) * channels, std=(0.25,) * channels)
        folders[channels] = tmp_path_factory.mktemp("runs") / str(channels)
        save_bundle(folders[channels], create_model("unet", **config), card)
    return folders


@pytest.fixture
def program(monkeypatch, capfd):
    """Run `pixelwise` in this process; gives the exit code, what was printed and what was complained about.

    The file descriptors are watched, so that lines of libraries written in C are seen too.
    """

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pixelwise", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "1000")
        try:
            main()
            code = 0
        except SystemExit as exited:
            code = exited.code or 0
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err + printed.out
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return call
