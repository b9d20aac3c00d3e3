"""The promise of bounded memory, kept by the command line in a process of its own on an image that is large for it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from pixelwise.data.labels import LabelSpec
from pixelwise.formats import Source, SourceInfo
from pixelwise.infer import load, plan_batch, run_batch
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.estimates import finishing_bytes, pipeline_bytes, room_for_maps
from pixelwise.infer.options import JobOptions
from pixelwise.infer.prefetch import WindowReader, kept_bytes
from pixelwise.infer.store import MOST_BYTES, DiskStore
from pixelwise.infer.tiling import Region
from pixelwise.models import create_model

MIB, GIB = 1 << 20, 1 << 30
TILE = 512

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small U-Net with random weights."""
    torch.manual_seed(0)
    spec = LabelSpec(names=("a", "b", "c"), colors=((9, 0, 0), (0, 9, 0), (0, 0, 9)), values=((0,), (1,), (2,)))
    config = {"num_classes": 3, "in_channels": 3, "widths": (4, 8)}
    card = ModelCard(model="unet", config=config, labels=spec, mean=(0.5,) * 3, std=(0.25,) * 3)
    folder = tmp_path_factory.mktemp("run")
    save_bundle(folder, create_model("unet", **config), card)
    return folder


def write_image(path, height, width):
    """A tiled BigTIFF that is never in memory as a whole."""
    kinds = np.random.default_rng(0).integers(0, 256, (3, TILE // 8, TILE // 8, 3)).astype(np.uint8)
    kinds = kinds.repeat(8, axis=1).repeat(8, axis=2)
    count = -(-height // TILE) * -(-width // TILE)
    tifffile.imwrite(
        path, (kinds[index % 3] + np.uint8(index % 7) for index in range(count)), shape=(height, width, 3), dtype=np.uint8,
        bigtiff=True, tile=(TILE, TILE), photometric="rgb", compression="zlib", compressionargs={"level": 1}, metadata=None,
    )  # fmt: skip


@contextmanager
def predicting(*arguments):
    """`pixelwise predict` in a process of its own, on one core; its lines of text grow while it runs."""
    code = "import sys; from pixelwise.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "predict", *map(str, arguments), "--precision", "float32", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        said = []
        reader = threading.Thread(target=lambda: said.extend(process.stderr))
        reader.start()
        try:
            yield process, said
        finally:
            process.kill()
            reader.join()


def peak_bytes(process):
    """The most resident memory that a process has taken when it ends."""
    peak = 0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))])
        time.sleep(0.02)
    return peak


@linux
def test_memory_is_below_2_gib_and_was_told_before(tmp_path, run):
    side = 8000
    write_image(tmp_path / "scene.tif", side, side)
    with predicting(run, tmp_path / "scene.tif", "--out", tmp_path / "labels") as (process, said):
        peak = peak_bytes(process)
    assert process.returncode == 0, said
    found = re.search(
        r"scene\.tif: (.*), 1\.00x the multiply-adds of one pass, at most ([0-9.]+) GiB of memory", said[0]
    )
    assert found, said
    assert found[1].startswith("stripes of ")
    assert peak < 2 * GIB
    assert 0.8 <= float(found[2]) * GIB / peak <= 1.2

    labels = tifffile.memmap(tmp_path / "unpacked.tif", shape=(side, side), dtype=np.uint8)
    tifffile.imread(tmp_path / "labels" / "scene.tif", out=labels)
    image = tifffile.imread(tmp_path / "scene.tif", selection=(slice(4000, 4500), slice(7500, 8000)))
    crop = load(run, precision="float32").predict(image).labels
    assert np.array_equal(labels[4064:4436, 7564:], crop[64:436, 64:])  # the radius is 22 px


@linux
def test_a_process_that_was_killed_goes_on_where_it_was(tmp_path, run):
    height, width = 3000, 2500
    write_image(tmp_path / "scene.tif", height, width)
    out = tmp_path / "labels"
    with predicting(run, tmp_path / "scene.tif", "--out", out, "--maps", "entropy", "--memory", "100MiB") as (
        process,
        said,
    ):
        while not list(out.glob(".scene.tif.store-*/entropy-*")):  # the last of the first part
            assert process.poll() is None, said
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not [path for path in out.rglob("*.tif") if not path.name.startswith(".")]
    predictor = load(run, precision="float32")
    expected = predictor.predict(tmp_path / "scene.tif").labels

    [folder] = out.glob(".scene.tif.store-*")
    info = SourceInfo(location="a", format="tiff", height=height, width=width, channels=3, dtype="uint8")
    store = DiskStore(folder, info, {"labels": np.dtype(np.uint8), "entropy": np.dtype(np.float32)})
    first, *others = store.missing(0)
    assert not others
    assert 0 < store.done_px < height * width
    assert np.array_equal(store.rows("labels", 0, 0, first.top), expected[: first.top])
    [name] = (path.name for path in folder.glob("labels-0-0-*"))
    bottom = int(name.split("-")[3])
    twos = np.full((bottom, width), 2, dtype=np.uint8)  # what is finished is not computed again, so other labels stay
    store.add(0, Region(0, 0, bottom, width), {"labels": twos, "entropy": np.zeros((bottom, width), np.float32)})

    options = JobOptions(maps=("entropy",))
    [outcome] = run_batch(predictor, plan_batch([tmp_path / "scene.tif"], out, options=options))
    assert outcome.status == "done", outcome.message
    labels = tifffile.imread(out / "scene.tif")
    assert (labels[:bottom] == 2).all()
    assert np.array_equal(labels[bottom:], expected[bottom:])
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "scene.tif",
        "scene_entropy.tif",
    ]
    assert not list(out.glob(".scene.tif.store-*"))


class Blank(Source):
    """An image without content, of any size; counts the bytes of the windows that it gives."""

    def __init__(self, side, block_px=(TILE, TILE), dtype="uint8"):
        self.info = SourceInfo(
            location="blank.tif", format="tiff", height=side, width=side, channels=3, dtype=dtype, block_px=block_px
        )  # fmt: skip

    def read(self, top, left, height, width, plane=0):
        return np.broadcast_to(np.zeros(1, dtype=self.info.dtype), (height, width, 3))

    def fingerprint(self):
        return "0"

    def check_unchanged(self):
        pass


@pytest.mark.parametrize("side", [700, 8000, 30_000])
@pytest.mark.parametrize("block_px", [(512, 512), (256, 256), (1, 1 << 20), (64, 64)])
@pytest.mark.parametrize("rows", [16, 100, 256])
def test_the_reader_keeps_no_more_than_it_says(side, block_px, rows):
    source = Blank(side, block_px)
    most = 0
    with closing(WindowReader(source)) as reader:
        for top in range(0, min(side, 6000), rows):
            reader.read(top, 0, min(rows, side - top), side)
            kept = [future.result().size for future in reader._chunks.values()]
            most = max(most, sum(kept))
    assert most <= kept_bytes(source.info)


def test_maps_get_what_the_rest_of_the_process_leaves(monkeypatch):
    monkeypatch.setattr("pixelwise.infer.estimates.memory_now", lambda: 800 * MIB)
    small, large, wide = Blank(1000), Blank(30_000), Blank(60_000, dtype="float32")
    assert room_for_maps(small) == GIB
    assert 800 * MIB + pipeline_bytes(large) + room_for_maps(large) < 2 * GIB
    assert room_for_maps(wide) == 512 * MIB  # less would be of no use
    assert pipeline_bytes(small) == pipeline_bytes(small, in_one_window=True) == 1000 * 1000 * 3 + MOST_BYTES


def test_outputs_made_of_finished_labels_are_part_of_what_is_told():
    image = Blank(8000)
    plain = finishing_bytes(image, JobOptions())
    assert plain == MOST_BYTES
    assert finishing_bytes(image, JobOptions(min_area_px=9)) > plain
    picture = finishing_bytes(image, JobOptions(overlay=True))
    assert picture == finishing_bytes(Blank(4000), JobOptions(overlay=True)) > 400 * MIB
