"""What several tests need: no network, few threads, and a small data folder to train on."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may reach for a network


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 train, 4 val, 4 test images of a bright disc (class 1) on a dark, noisy ground (class 0), of several sizes."""
    root = tmp_path_factory.mktemp("toy")
    draws = np.random.default_rng(0)
    for split, count in {"train": 12, "val": 4, "test": 4}.items():
        for index in range(count):
            height, width = int(draws.integers(40, 60)), int(draws.integers(40, 60))
            row, column, radius = draws.integers(12, 28), draws.integers(12, 28), draws.integers(6, 12)
            y, x = np.mgrid[:height, :width]
            mask = ((y - row) ** 2 + (x - column) ** 2 < radius**2).astype(np.uint8)
            image = draws.integers(0, 90, (height, width, 3)) + 130 * mask[:, :, None]
            for kind, array in (("images", image.astype(np.uint8)), ("masks", mask)):
                path = root / split / kind / f"{split}_{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root
