"""What several tests need: no network, few threads, and a small data folder to train on."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may reach for a network


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes what the user's programs keep at home; processes that tests start do not either."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


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


@pytest.fixture(scope="module")
def s3():
    """A client of an S3 server on this machine, with the bucket "scans"; the environment leads every library to it."""
    import boto3  # here, for these are slow to load and few tests need them
    import s3fs
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="scans")
        yield client
        client.close()
        for system in list(s3fs.S3FileSystem._cache.values()):
            if system._s3 is not None:
                system.close_session(system.loop, system._s3)
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
