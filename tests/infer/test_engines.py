import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pixelwise.data.labels import LabelSpec
from pixelwise.data.readers import read_mask
from pixelwise.errors import UsageError
from pixelwise.infer.batch import plan_batch, run_batch
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.engines.base import Labeller
from pixelwise.infer.engines.pieces import pieces
from pixelwise.infer.engines.ray import run as run_on_ray
from pixelwise.infer.engines.shared import SharedParts
from pixelwise.infer.parts import Parts
from pixelwise.infer.predictor import load
from pixelwise.infer.tiling import Region, Scores
from pixelwise.infer.tools import Tools
from pixelwise.models import create_model

SPEC = LabelSpec(names=("a", "b", "c"), colors=((250, 0, 0), (0, 250, 0), (0, 0, 250)), values=((0,), (1,), (2,)))
CONFIG = {"tiny": True, "num_classes": 3, "in_channels": 3}
HALO = 64
LOG = "PIXELWISE_TEST_LOG"


class SlowRows:
    """Bands of rows with a halo; every band is written down with the process that computed it, and takes its time."""

    way, cost, memory_bytes = "stripes", 1.0, 1 << 20

    def __init__(self, predictor, height, width):
        self.predictor, self.height, self.width = predictor, height, width

    def score(self, read, region):
        step = 64
        for top in range(region.top, region.bottom, step):
            bottom = min(top + step, region.bottom)
            y, end = max(0, top - HALO), min(self.height, bottom + HALO)
            scores = self.predictor.network(read(y, 0, end - y, self.width)[None])[0]
            if os.environ.get(LOG):
                with Path(os.environ[LOG]).open("a") as file:
                    file.write(f"{os.getpid()} {region.top} {top}\n")
                time.sleep(0.05)
            found = Region(top, region.left, bottom - top, region.width)
            yield Scores(found, scores[:, top - y : bottom - y, region.left : region.right])


def choose(predictor, height, width, tiling, note):
    return SlowRows(predictor, height, width)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    card = ModelCard(model="unet", config=CONFIG, labels=SPEC, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_bundle(folder, create_model("unet", **CONFIG), card)
    return folder


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    tifffile.imwrite(folder / "scene.tif", rng.integers(0, 256, (1280, 900, 3), dtype=np.uint8), tile=(256, 256))
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (30, 20 + index, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


@pytest.mark.parametrize(("height", "width", "planes"), [(1, 1, 1), (1000, 777, 3), (70_000, 300_000, 1), (64, 9, 2)])
def test_pieces_cover_every_pixel_once(height, width, planes):
    found = pieces(height, width, planes, 4)
    assert sum(region.height * region.width for _, region in found) == height * width * planes
    assert len(set(found)) == len(found)
    assert all(0 <= plane < planes and region.height > 0 for plane, region in found)
    assert all(region.bottom <= height and region.right <= width for _, region in found)
    assert all(region.height * region.width <= 3 * (64 << 20) for _, region in found)


def test_an_unknown_engine_is_refused(run, images, tmp_path):
    with pytest.raises(UsageError, match="there is no engine 'cloud'"):
        list(run_batch(load(run), plan_batch([images], tmp_path / "out"), engine="cloud"))


def wait_and_kill(log, stop):
    """Kill the first process that has computed three bands."""
    while not stop.is_set():
        lines = log.read_text().splitlines() if log.exists() else []
        pids = [line.split()[0] for line in lines]
        for pid in pids:
            if pids.count(pid) >= 3:
                os.kill(int(pid), signal.SIGKILL)
                return
        time.sleep(0.01)


def test_a_worker_of_ray_that_is_killed_loses_nothing(run, images, tmp_path, monkeypatch):
    import ray

    tools = replace(Tools.standard(), choose_scorer=choose)
    predictor = load(run, device="cpu", precision="float32")
    local = plan_batch([images], tmp_path / "local")
    expected = {outcome.path.name: outcome.status for outcome in run_batch(predictor, local, tools=tools)}
    assert sorted(expected.values()) == ["done"] * 4 + ["failed"]

    log = tmp_path / "log"
    monkeypatch.setenv(LOG, str(log))
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    labeller = Labeller(predictor=predictor, batch=plan_batch([images], tmp_path / "out"), tools=tools)
    stop = threading.Event()
    killer = threading.Thread(target=wait_and_kill, args=(log, stop))
    killer.start()
    try:
        outcomes = list(run_on_ray(labeller, workers=2, piece_px=256 * 900, spread_bytes=1 << 20))
    finally:
        stop.set()
        killer.join()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert {outcome.path.name: outcome.status for outcome in outcomes} == expected
    for name in ("scene.tif", "0.png", "1.png", "2.png"):
        assert np.array_equal(read_mask(tmp_path / "out" / name), read_mask(tmp_path / "local" / name))
    lines = log.read_text().split("\n")[:-1]
    bands = [line.split(" ", 1)[1] for line in lines]
    assert len(set(bands)) == 20
    assert len(bands) > 20 - 1  # something was computed again, unless the kill fell between two pieces
    assert max(bands.count(band) for band in bands) <= 2
    assert len({line.split()[0] for line in lines}) >= 2
    assert not list((tmp_path / "out").rglob(".*parts*"))
    again = Labeller(predictor=predictor, batch=plan_batch([images], tmp_path / "out"), tools=tools)
    assert len(lines) == len(log.read_text().split("\n")) - 1
    del again


def test_parts_meet_in_an_object_store(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").store.clear()
    kinds = {"labels": np.dtype(np.uint8)}
    halves = [Region(0, 0, 3, 4), Region(3, 0, 3, 4)]
    for name, region in zip(("one", "two"), halves, strict=True):
        folder = tmp_path / name / ".a.tif.parts-0123"
        parts, shared = Parts(folder, 6, 4, 1, kinds, only=(0, region)), SharedParts("memory://out", folder)
        shared.fetch(parts, near=(0, region))
        parts.write(0, region, {"labels": np.full((3, 4), region.top, dtype=np.uint8)})
        shared.send(parts, near=(0, region))
        shared.send(parts, near=(0, region))
        assert list(folder.iterdir()) == []
    folder = tmp_path / "driver" / ".a.tif.parts-0123"
    parts, shared = Parts(folder, 6, 4, 1, kinds), SharedParts("memory://out", folder)
    shared.fetch(parts)
    assert parts.rows("labels", 0, 0, 6)[:, 0].tolist() == [0, 0, 0, 3, 3, 3]
    shared.remove()
    shared.fetch(Parts(tmp_path / "none", 6, 4, 1, kinds))
    assert not fsspec.filesystem("memory").find("/out")
