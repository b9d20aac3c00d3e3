"""What a verb does not import, for the user waits for it: guarded by names, since times depend on the machine."""

import subprocess
import sys

import numpy as np
from PIL import Image

from pixelwise.models import list_models, model_info

CHECK = """
import sys
from pixelwise.cli import main

for words in {commands}:
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == 0

from pixelwise.models import create_model
import torch

for name in {names}:
    with torch.device("meta"):  # as a run is loaded: before its weights are there
        create_model(name, num_classes=3)
heavy = ("timm", "torchvision", "scipy", "matplotlib", "lightning", "tensorboard", "jinja2", "sklearn", "rasterio")
print("HEAVY", [name for name in (*heavy, "torch._dynamo", "sympy", "triton") if name in sys.modules])
"""


def test_a_look_at_data_and_a_small_photo_wait_for_torch_alone(bundles, toy_data, tmp_path):
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    names = [name for name in list_models() if not hasattr(model_info(name).config, "backbone")]
    assert len(names) > 10
    photo, out = str(tmp_path / "photo.png"), str(tmp_path / "out")
    commands = [["inspect", str(toy_data)], ["predict", str(bundles[3]), photo, "--out", out, "--device", "cpu"]]
    code = CHECK.format(names=names, commands=commands)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert (tmp_path / "out" / "photo.png").exists()
