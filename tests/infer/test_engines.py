"""The engines: one Ray for all tests that need one; what workers and driver do is tested without it as well."""

import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.formats.opening import read_mask
from pixelwise.infer import plan_batch, run_batch
from pixelwise.infer.batch import OutputError
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.engines import cluster as ray_cluster
from pixelwise.infer.engines import ray as ray_engine
from pixelwise.infer.engines import worker
from pixelwise.infer.engines.local import Labeller, run_local
from pixelwise.infer.options import JobOptions, Tiling
from pixelwise.infer.outputs import OutFolder
from pixelwise.infer.predictor import load
from pixelwise.infer.tiling import Region, Scorer, Scores
from pixelwise.models import create_model

SPEC = LabelSpec(names=("a", "b", "c"), colors=((250, 0, 0), (0, 250, 0), (0, 0, 250)), values=((0,), (1,), (2,)))
CONFIG = {"tiny": True, "num_classes": 3, "in_channels": 3}
HALO = 64
LOG = "PIXELWISE_TEST_LOG"
SMALL_MEMORY = JobOptions(tiling=Tiling(memory_bytes=8 << 20))  # for which the scene is too large in one pass
BLOCKS = {"block_px": 128 * 450, "spread_bytes": 1 << 18}


class SlowRows(Scorer):
    """Bands of rows with a halo; every band is written down with the process that computed it, and takes its time."""

    way, cost, memory_bytes = "stripes", 1.0, 1 << 20

    def __init__(self, predictor, height, width):
        self.predictor, self.height, self.width = predictor, height, width

    def score(self, read, region):
        step = 64
        for top in range(region.top, region.bottom, step):
            bottom = min(top + step, region.bottom)
            y, end = max(0, top - HALO), min(self.height, bottom + HALO)
            scores = self.predictor.scores(read(y, 0, end - y, self.width)[None])[0]
            if self.height > 100 and os.environ.get(LOG):
                with Path(os.environ[LOG]).open("a") as file:
                    file.write(f"{os.getpid()} {region.top} {region.left} {top}\n")
                time.sleep(0.04)
            found = Region(top, region.left, bottom - top, region.width)
            yield Scores(found, scores[:, top - y : bottom - y, region.left : region.right])


@pytest.fixture(autouse=True)
def slow_rows(monkeypatch):
    """Large images are computed in bands of rows; of workers in other processes too."""
    monkeypatch.setattr("pixelwise.infer.pipeline.choose_scorer", choose)
    monkeypatch.setattr("pixelwise.infer.pipeline.ONE_PASS_PX", 10_000)


def choose(predictor, height, width, tiling, note):
    return SlowRows(predictor, height, width)


class SlowWorker(worker.Worker):
    """A worker that computes large images in bands; in its own process nothing is replaced."""

    def __init__(self, setting):
        import pixelwise.infer.pipeline

        pixelwise.infer.pipeline.choose_scorer = choose
        pixelwise.infer.pipeline.ONE_PASS_PX = 10_000
        super().__init__(setting)


def labeller_of(predictor, images, out, **changes):
    return Labeller(network=predictor, batch=plan_batch([images], out, options=SMALL_MEMORY), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    card = ModelCard(model="unet", config=CONFIG, labels=SPEC, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_bundle(folder, create_model("unet", **CONFIG), card)
    return folder


@pytest.fixture(scope="module")
def predictor(run):
    return load(run, device="cpu", precision="float32")


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    tifffile.imwrite(folder / "scene.tif", rng.integers(0, 256, (640, 450, 3), dtype=np.uint8), tile=(128, 128))
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (30, 20 + index, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


def statuses(outcomes):
    return {Path(outcome.path).name: outcome.status for outcome in outcomes}


DONE = {"scene.tif": "done", "0.png": "done", "1.png": "done", "2.png": "done", "broken.png": "failed"}
SKIPPED = {name: "skipped" if status == "done" else status for name, status in DONE.items()}


def same_labels(first, second):
    names = [name for name, status in DONE.items() if status == "done"]
    return all(np.array_equal(read_mask(first / name), read_mask(second / name)) for name in names)


# Blocks


def area(block):
    return block.planes * block.region.height * block.region.width


@given(
    st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 40), st.integers(1, 20), st.integers(1, 10**6),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_blocks_cover_every_pixel_once(height, width, planes, workers, block_px, strips):
    found = worker.blocks_of(height, width, planes, workers, block_px, (16, width if strips else 64))
    assert sum(area(piece) for piece in found) == height * width * planes
    assert len({(piece.plane, piece.region) for piece in found}) == len(found)
    assert all(piece.plane >= 0 and piece.plane + piece.planes <= planes for piece in found)
    assert all(piece.region.bottom <= height and piece.region.right <= width for piece in found)


@pytest.mark.parametrize("size", [(70_000, 300_000), (30_000, 30_000), (100_000, 4000)])
def test_blocks_of_huge_images_are_nearly_square(size):
    found = worker.blocks_of(*size, 1, 100)
    sides = [side for piece in found[: len(found) // 2] for side in (piece.region.height, piece.region.width)]
    assert max(sides) < 2 * min(sides)
    assert max(area(piece) for piece in found) < 80 << 20


# The local engine


def test_local_outcomes_come_in_order_and_broken_images_do_not_stop_the_others(predictor, images, tmp_path):
    outcomes = list(run_batch(predictor, plan_batch([images], tmp_path / "out")))
    assert statuses(outcomes) == DONE
    assert [outcome.path.name for outcome in outcomes] == sorted(DONE)
    assert statuses(run_batch(predictor, plan_batch([images], tmp_path / "out"))) == SKIPPED


def test_results_are_written_while_the_next_image_is_computed(predictor, images, tmp_path, monkeypatch):
    started, wrote = threading.Event(), []
    label, write = Labeller.label, OutFolder.write

    def watched(self, opened):
        if opened.pipeline.source.info.width == 21:
            started.set()
        return label(self, opened)

    def slow(self, pipeline, *rest):
        if pipeline.source.info.width == 20:
            assert started.wait(60)  # the image after this one is being computed
        wrote.append(threading.current_thread().name)
        write(self, pipeline, *rest)

    monkeypatch.setattr(Labeller, "label", watched)
    monkeypatch.setattr(OutFolder, "write", slow)
    (images / "scene.tif").unlink()
    found = statuses(run_batch(predictor, plan_batch([images], tmp_path / "out")))
    assert Counter(found.values()) == {"done": 3, "failed": 1}
    assert all(name.startswith("pixelwise-results") for name in wrote)


def test_a_full_disk_ends_the_local_engine(predictor, images, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    labeller = Labeller(network=predictor, batch=plan_batch([images], tmp_path / "out"))
    monkeypatch.setattr("pixelwise.files.os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        list(run_local(labeller, labeller.batch.tasks))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and ".pixelwise" not in path.parts]


def test_who_stops_early_leaves_no_image_open(predictor, images, tmp_path, monkeypatch):
    labeller = Labeller(network=predictor, batch=plan_batch([images], tmp_path / "out"))
    sources = []
    prepare = Labeller.prepare

    def watched(self, task, **options):
        opened = prepare(self, task, **options)
        source = opened.pipeline.source
        closed = source.close
        sources.append(source)
        monkeypatch.setattr(source, "close", lambda: (sources.remove(source), closed()))
        return opened

    monkeypatch.setattr(Labeller, "prepare", watched)
    running = run_local(labeller, labeller.batch.tasks, threads=3)
    next(running)
    running.close()
    assert sources == []


def test_an_unknown_engine_is_refused(predictor, images, tmp_path):
    with pytest.raises(UsageError, match="there is no engine 'cloud'"):
        list(run_batch(predictor, plan_batch([images], tmp_path / "out"), engine="cloud"))


# What the driver and its workers do, in this process


class ActorDied(Exception):
    """What Ray raises of a worker that died."""


class FakeRay:
    """Workers in this process, one after the other; `before` may change a job, or kill its worker."""

    def __init__(self):
        self.exceptions = SimpleNamespace(RayActorError=ActorDied, RayError=ActorDied)
        self.before, self.workers, self.jobs = (lambda job: job), 0, []

    def remote(self, worker):
        def start(setting):
            self.workers += 1
            made = worker(setting)
            return SimpleNamespace(run=SimpleNamespace(remote=lambda job: Reference((made, job))))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, running, num_returns):
        return running[:1], running[1:]

    def get(self, reference):
        worker, job = reference
        self.jobs.append(job)
        return worker.run(self.before(job))

    def kill(self, worker):
        pass


class Reference(tuple):
    """A call that can be waited for."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.fixture
def cluster(monkeypatch):
    """Workers in this process in place of those of Ray."""
    fake = FakeRay()

    @contextmanager
    def started(address, workers, **_):
        yield ray_cluster.Cluster(fake, workers or 2, 1.0, 0.0)

    monkeypatch.setattr(ray_engine, "started", started)
    return fake


def dies(job):
    raise ActorDied("the worker was killed")


def test_blocks_joined_by_a_worker_are_the_image(cluster, predictor, images, tmp_path):
    notes, shares = [], []
    labeller = labeller_of(
        predictor, images, tmp_path / "out", note=notes.append, progress=lambda done, total: shares.append(done / total)
    )
    assert statuses(ray_engine.run_on_ray(labeller, **BLOCKS)) == DONE
    assert statuses(run_batch(predictor, plan_batch([images], tmp_path / "local"))) == DONE
    assert same_labels(tmp_path / "out", tmp_path / "local")
    assert notes[0] == "4 images and 6 blocks of 1 large image for 2 workers of Ray"
    assert len(notes) == 2  # the way is told once
    assert shares == sorted(shares) and shares[-1] == 1
    assert {
        path.name for path in (tmp_path / "out").rglob("*") if "store" in path.name or "shared" in path.name
    } == set()
    assert statuses(ray_engine.run_on_ray(labeller, **BLOCKS)) == SKIPPED


def test_blocks_come_back_where_the_outputs_go_to_an_object_store(cluster, predictor, images, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    labeller = labeller_of(predictor, images, "memory://out")
    assert statuses(ray_engine.run_on_ray(labeller, **BLOCKS)) == DONE
    list(run_batch(predictor, plan_batch([images], tmp_path / "local")))
    store.get("/out/", str(tmp_path / "out"), recursive=True)
    assert same_labels(tmp_path / "out", tmp_path / "local")
    assert not [name for name in store.find("/out") if "store" in name]
    assert statuses(ray_engine.run_on_ray(labeller, **BLOCKS)) == SKIPPED
    store.store.clear()


def test_a_worker_that_dies_is_replaced_and_its_job_given_to_another(cluster, predictor, images, tmp_path):
    dead = []

    def before(job):
        if len(dead) < 2:
            dead.append(job)
            dies(job)
        return job

    cluster.before = before
    assert statuses(ray_engine.run_on_ray(labeller_of(predictor, images, tmp_path / "out"), **BLOCKS)) == DONE
    assert cluster.workers == 4
    list(run_batch(predictor, plan_batch([images], tmp_path / "local")))
    assert same_labels(tmp_path / "out", tmp_path / "local")


def test_what_kills_every_worker_is_one_failed_image(cluster, predictor, images, tmp_path):
    def before(job):
        return dies(job) if any(task.path.name == "1.png" for task in job.tasks) else job

    cluster.before = before
    outcomes = list(ray_engine.run_on_ray(labeller_of(predictor, images, tmp_path / "out"), workers=1, **BLOCKS))
    assert statuses(outcomes) == DONE | {"1.png": "failed"}
    (message,) = [outcome.message for outcome in outcomes if outcome.path.name == "1.png"]
    assert "1.png: each worker that tried it died (the worker was killed)" in message


def test_an_image_that_changes_is_labelled_as_it_is_in_the_end(cluster, predictor, images, tmp_path):
    changed = []

    def before(job):
        if job.block is not None and not changed:
            changed.append(True)
            pixels = np.random.default_rng(5).integers(0, 256, (640, 450, 3), dtype=np.uint8)
            tifffile.imwrite(images / "scene.tif", pixels, tile=(128, 128))
        return job

    cluster.before = before
    assert statuses(ray_engine.run_on_ray(labeller_of(predictor, images, tmp_path / "out"), **BLOCKS)) == DONE
    list(run_batch(predictor, plan_batch([images], tmp_path / "local")))
    assert same_labels(tmp_path / "out", tmp_path / "local")
    assert not list((tmp_path / "out").rglob(".*store*"))


def test_workers_that_do_not_see_the_folders_stop_the_batch(cluster, predictor, images, tmp_path, monkeypatch):
    def stops(match, **changes):
        setting = replace(driver.setting, **changes)
        return match in worker.Worker(setting).run(worker.Job(tasks=[])).stopped

    labeller = labeller_of(predictor, images, tmp_path / "out")
    driver = ray_engine._Driver(labeller, ray_cluster.Cluster(cluster, 1, 1.0, 0.0), "none")
    assert stops(f"--out {tmp_path / 'out'}: is not seen by the worker on ")
    assert stops("cannot load the network", folder=str(tmp_path / "elsewhere"))
    assert stops("finds another network in", weights_sha256="0" * 64)
    assert not (tmp_path / "out").exists()
    seen = worker.Worker.run

    def blind(self, job):
        found = seen(self, job)
        found.unseen += [outcome.path for outcome in found.outcomes if outcome.status == "failed"]
        return found

    monkeypatch.setattr(worker.Worker, "run", blind)
    with pytest.raises(PixelwiseError, match=r"broken.png: is not seen by a worker"):
        list(ray_engine.run_on_ray(labeller, **BLOCKS))


@pytest.mark.parametrize(
    ("address", "error", "match"),
    [
        ("head", PixelwiseError, "it must be HOST:PORT"),
        ("head:0", PixelwiseError, "it must be HOST:PORT"),
        ("ray://head:10001", UsageError, "ray job submit"),
        ("closed", PixelwiseError, "no Ray cluster answers there .*refused"),
    ],
)
def test_a_wrong_address_is_an_error_at_once(predictor, images, tmp_path, address, error, match):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}" if address == "closed" else address
        with pytest.raises(error, match=match):
            list(run_batch(predictor, plan_batch([images], tmp_path / "out"), engine="ray", address=address))
        assert not [name for name in os.environ if name.startswith("RAY_")]


def test_a_damaged_block_is_one_failed_image_without_litter(cluster, predictor, images, tmp_path):
    scene = images / "scene.tif"
    with tifffile.TiffFile(scene) as file:
        offset = file.pages[0].dataoffsets[-1]
    with scene.open("r+b") as file:
        file.truncate(offset + 5000)
    assert statuses(ray_engine.run_on_ray(labeller_of(predictor, images, tmp_path / "out"), **BLOCKS)) == DONE | {
        "scene.tif": "failed"
    }
    assert not list((tmp_path / "out").rglob(".*store*"))


def test_without_a_run_folder_there_is_nothing_to_load(predictor, images, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor, "folder", None)
    with pytest.raises(UsageError, match="load it from a run folder"):
        list(run_batch(predictor, plan_batch([images], tmp_path / "out"), engine="ray"))


# Ray itself


def test_without_the_extra_the_command_is_named(predictor, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UsageError, match=r'--engine ray needs the package ray. Install it: pip install "ray\[data\]>=2\.40"'
    ):
        list(run_batch(predictor, plan_batch([images], tmp_path / "out"), engine="ray"))


def processes_with(text):
    """The processes other than this one that were started with `text` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(path.parent.name)
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """Ray on this machine, with the log of the bands; when it ends nothing is left of it."""
    log = tmp_path_factory.mktemp("ray") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LOG, str(log))
        with ray_cluster.started(None, 2) as cluster:
            assert cluster.workers == 2
            assert cluster.ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"
            cluster.ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
            yield cluster.ray
            cluster.ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert not cluster.ray.is_initialized()
    deadline = time.monotonic() + 120  # of a busy machine; they end by themselves
    while (left := processes_with(str(log))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def kill_one(log, stop):
    """Kill the first process that has computed two bands, with a signal that it cannot handle."""
    while not stop.is_set():
        counts = Counter(line.split()[0] for line in log.read_text().splitlines()) if log.exists() else Counter()
        for pid, count in counts.items():
            if count >= 2:
                os.kill(int(pid), signal.SIGKILL)
                return
        time.sleep(0.005)


def test_a_worker_of_ray_that_is_killed_loses_nothing(ray, predictor, images, tmp_path, monkeypatch):
    log, stop = Path(os.environ[LOG]), threading.Event()
    labeller = labeller_of(predictor, images, tmp_path / "out")
    monkeypatch.setattr(ray_engine, "Worker", SlowWorker)
    killer = threading.Thread(target=kill_one, args=(log, stop))
    killer.start()
    try:
        outcomes = list(ray_engine.run_on_ray(labeller, workers=2, **BLOCKS))
    finally:
        stop.set()
        killer.join()
    lines = log.read_text().splitlines()
    assert statuses(outcomes) == DONE
    bands = Counter(line.split(" ", 1)[1] for line in lines)
    assert len(bands) == 20
    assert bands.total() > 20  # what the dead worker had not stored was computed again
    assert max(bands.values()) <= 2
    assert sum(count - 1 for count in bands.values()) <= 4  # of one piece
    assert len({line.split()[0] for line in lines}) >= 2
    assert not list((tmp_path / "out").rglob(".*store*"))
    list(run_batch(predictor, plan_batch([images], tmp_path / "local")))
    assert same_labels(tmp_path / "out", tmp_path / "local")
    log.unlink()
    assert statuses(run_batch(predictor, labeller.batch)) == SKIPPED
    assert not log.exists()
