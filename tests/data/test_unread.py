"""What of a data folder's images is not read is told before training."""

import numpy as np
import tifffile
from PIL import Image

from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data


def test_further_images_and_files_beside_are_warned_of(tmp_path):
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for name in ("a", "b"):
            image = draws.integers(0, 255, (12, 14, 3), dtype=np.uint8)
            tifffile.imwrite(tmp_path / split / "images" / f"{name}.tif", image, photometric="rgb")
            Image.fromarray(draws.integers(0, 2, (12, 14), dtype=np.uint8)).save(
                tmp_path / split / "masks" / f"{name}.png"
            )
    images = tmp_path / "train" / "images"
    tifffile.imwrite(images / "b.tif", np.zeros((5, 6, 3), np.uint8), photometric="rgb", append=True)
    for name in ("a", "b"):
        (images / f"{name}.tif.msk").write_bytes(b"II*\0")
    told = [problem.message for problem in inspect_data(open_data(tmp_path)).problems if problem.severity == "warning"]
    assert any("b.tif: it holds 2 images that differ" in message for message in told)
    beside = [message for message in told if "which pixels hold data" in message]
    assert len(beside) == 1 and "a.tif, train/images/b.tif: a file *.msk beside it is not read" in beside[0]
