"""The engines: one Ray for all tests that need one; what workers and driver do is tested without it as well."""

import http.server
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

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pixelwise.infer.engines.base import Job, Labeller, Outcome, OutputError
from pixelwise.infer.engines.ledger import Ledger
from pixelwise.infer.engines.pieces import pieces
from pixelwise.infer.engines.ray_worker import Worker, network_of
from pixelwise.infer.engines.shared import SharedParts
from pixelwise.infer.engines.work import jobs_of, rows_of_images, unpacked
from pixelwise.infer.parts import Parts
from pixelwise.infer.tools import Tools

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.formats.readers import read_mask
from pixelwise.infer.batch import plan_batch, run_batch
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.engines import ray as ray_engine
from pixelwise.infer.engines import ray_cluster, ray_worker
from pixelwise.infer.engines.local import run as run_local
from pixelwise.infer.options import JobOptions, Tiling
from pixelwise.infer.predictor import load
from pixelwise.infer.tiling import Region, Scores
from pixelwise.models import create_model

SPEC = LabelSpec(names=("a", "b", "c"), colors=((250, 0, 0), (0, 250, 0), (0, 0, 250)), values=((0,), (1,), (2,)))
CONFIG = {"tiny": True, "num_classes": 3, "in_channels": 3}
HALO = 64
LOG = "PIXELWISE_TEST_LOG"
SMALL_MEMORY = JobOptions(tiling=Tiling(memory_bytes=8 << 20))  # for which the scene is too large in one pass
PIECES = {"piece_px": 128 * 450, "spread_bytes": 1 << 18}


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
            scores = self.predictor.scores(read(y, 0, end - y, self.width)[None])[0]
            if self.height > 100 and os.environ.get(LOG):
                with Path(os.environ[LOG]).open("a") as file:
                    file.write(f"{os.getpid()} {region.top} {region.left} {top}\n")
                time.sleep(0.04)
            found = Region(top, region.left, bottom - top, region.width)
            yield Scores(found, scores[:, top - y : bottom - y, region.left : region.right])


def choose(predictor, height, width, tiling, note):
    return SlowRows(predictor, height, width)


TOOLS = replace(Tools.standard(), choose_scorer=choose)


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


def labeller_of(predictor, images, out, **changes):
    return Labeller(predictor=predictor, batch=plan_batch([images], out, options=SMALL_MEMORY), tools=TOOLS, **changes)


def statuses(outcomes):
    return {Path(outcome.path).name: outcome.status for outcome in outcomes}


DONE = {"scene.tif": "done", "0.png": "done", "1.png": "done", "2.png": "done", "broken.png": "failed"}
SKIPPED = {name: "skipped" if status == "done" else status for name, status in DONE.items()}


def same_labels(first, second):
    names = [name for name, status in DONE.items() if status == "done"]
    return all(np.array_equal(read_mask(first / name), read_mask(second / name)) for name in names)


# Pieces and rows


@given(
    st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 40), st.integers(1, 20), st.integers(1, 10**6),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_pieces_cover_every_pixel_once(height, width, planes, workers, piece_px, strips):
    found = pieces(height, width, planes, workers, piece_px, (16, width if strips else 64))
    assert sum(piece.px for piece in found) == height * width * planes
    assert len({(piece.plane, piece.region) for piece in found}) == len(found)
    assert all(piece.plane >= 0 and piece.plane + piece.planes <= planes for piece in found)
    assert all(piece.region.bottom <= height and piece.region.right <= width for piece in found)


@pytest.mark.parametrize("size", [(70_000, 300_000), (30_000, 30_000), (100_000, 4000)])
def test_pieces_of_huge_images_are_nearly_square(size):
    found = pieces(*size, 1, 100)
    sides = [side for piece in found[: len(found) // 2] for side in (piece.region.height, piece.region.width)]
    assert max(sides) < 2 * min(sides)
    assert max(piece.px for piece in found) < 80 << 20


def test_rows_hold_all_images_once_and_full_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs = [(index, Job(Path(f"in/{index}.png"), {"labels": Path(f"out/{index}.png")})) for index in range(1000)]
    rows = list(rows_of_images(jobs, workers=2))
    assert max(len(unpacked(row["work"])["jobs"]) for row in rows) <= 64
    found = [item for row in rows for item in jobs_of(unpacked(row["work"]))]
    assert [index for index, _ in found] == list(range(1000))
    assert found[7][1].path == tmp_path / "in" / "7.png"
    url = Job("s3://a/b.tif", {"labels": "s3://c/b.tif"})
    assert jobs_of(unpacked(next(rows_of_images([(3, url)], workers=5))["work"])) == [(3, url)]


def test_who_brings_the_last_piece_joins_and_nobody_else():
    ledger = Ledger({0: 3})
    assert [ledger.add(0, piece) for piece in (2, 0, 0, 1, 2, 1)] == [False, False, False, True, False, True]
    assert not ledger.is_closed(0)
    assert not ledger.add(9, 0)  # of a ledger that was lost and began again


# The local engine


def test_local_outcomes_come_in_order_and_broken_images_do_not_stop_the_others(predictor, images, tmp_path):
    outcomes = list(run_batch(predictor, plan_batch([images], tmp_path / "out"), tools=TOOLS))
    assert statuses(outcomes) == DONE
    assert [outcome.path.name for outcome in outcomes] == sorted(DONE)
    assert statuses(run_batch(predictor, plan_batch([images], tmp_path / "out"), tools=TOOLS)) == SKIPPED


def test_results_are_written_while_the_next_image_is_computed(predictor, images, tmp_path, monkeypatch):
    started, wrote = threading.Event(), []
    label, write = type(predictor).label, Labeller._write_small

    def second(self, image, **options):
        if image.shape[-1] == 21:
            started.set()
        return label(self, image, **options)

    def slow(self, task, prediction, stack):
        if prediction.labels.shape[-1] == 20:
            assert started.wait(20)  # the image after this one is being computed
        wrote.append(threading.current_thread().name)
        write(self, task, prediction, stack)

    monkeypatch.setattr(type(predictor), "label", second)
    monkeypatch.setattr(Labeller, "_write_small", slow)
    (images / "scene.tif").unlink()
    found = statuses(run_batch(predictor, plan_batch([images], tmp_path / "out")))
    assert Counter(found.values()) == {"done": 3, "failed": 1}
    assert all(name.startswith("pixelwise-results") for name in wrote)


def test_a_full_disk_ends_the_local_engine(predictor, images, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    labeller = Labeller(predictor=predictor, batch=plan_batch([images], tmp_path / "out"), tools=TOOLS)
    monkeypatch.setattr("pixelwise.files.os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        list(run_local(labeller))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_who_stops_early_leaves_no_image_open(predictor, images, tmp_path, monkeypatch):
    labeller = Labeller(predictor=predictor, batch=plan_batch([images], tmp_path / "out"), tools=TOOLS)
    sources = []
    prepare = Labeller.prepare

    def watched(self, job, **options):
        task = prepare(self, job, **options)
        closed = task.image.source.close
        sources.append(task.image.source)
        monkeypatch.setattr(task.image.source, "close", lambda: (sources.remove(task.image.source), closed()))
        return task

    monkeypatch.setattr(Labeller, "prepare", watched)
    running = run_local(labeller, threads=3)
    next(running)
    running.close()
    assert sources == []


def test_an_unknown_engine_is_refused(predictor, images, tmp_path):
    with pytest.raises(UsageError, match="there is no engine 'cloud'"):
        list(run_batch(predictor, plan_batch([images], tmp_path / "out"), engine="cloud"))


# What the driver and its workers do, in this process


@pytest.fixture
def cluster(monkeypatch):
    """Two workers one after the other in place of Ray; `before` may change or drop a row."""
    monkeypatch.setattr(Worker, "_ask", lambda self, method, *arguments: method(*arguments))

    @contextmanager
    def started(address, workers, **_):
        yield ray_cluster.Cluster(None, workers or 2, 1.0, 0.0)

    class Fake:
        before = staticmethod(lambda row, attempt: row)
        attempts = 0

        @classmethod
        def results(cls, cluster, labeller, rows, work, token, reasons):
            cls.attempts += 1
            network = network_of(labeller, device="cpu", token=token, threads=1)
            ledger = Ledger(work.pieces)
            workers = [Worker(network, ledger), Worker(network, ledger)]
            for number, row in enumerate(rows):
                if (row := cls.before(row, cls.attempts)) is not None:
                    yield unpacked(workers[number % 2](row)["result"])

    monkeypatch.setattr(ray_engine, "started", started)
    monkeypatch.setattr(ray_engine, "_results", Fake.results)
    return Fake


def test_pieces_joined_by_a_worker_are_the_image(cluster, predictor, images, tmp_path):
    notes, shares = [], []
    labeller = labeller_of(
        predictor, images, tmp_path / "out", note=notes.append, progress=lambda done, total: shares.append(done / total)
    )
    assert statuses(ray_engine.run(labeller, **PIECES)) == DONE
    assert statuses(run_batch(predictor, plan_batch([images], tmp_path / "local"), tools=TOOLS)) == DONE
    assert same_labels(tmp_path / "out", tmp_path / "local")
    assert notes[0] == "4 images and 6 pieces of 1 large image for 2 workers of Ray"
    assert len(notes) == 2  # the way is told once
    assert shares == sorted(shares[:5]) + [0.0] * (len(shares) - 5)
    assert {
        path.name for path in (tmp_path / "out").rglob("*") if "parts" in path.name or "shared" in path.name
    } == set()
    assert statuses(ray_engine.run(labeller, **PIECES)) == SKIPPED


def test_results_and_pieces_meet_in_an_object_store(cluster, predictor, images, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    labeller = labeller_of(predictor, images, "memory://out")
    assert statuses(ray_engine.run(labeller, **PIECES)) == DONE
    list(run_batch(predictor, plan_batch([images], tmp_path / "local"), tools=TOOLS))
    store.get("/out/", str(tmp_path / "out"), recursive=True)
    assert same_labels(tmp_path / "out", tmp_path / "local")
    assert not [name for name in store.find("/out") if "parts" in name]
    assert statuses(ray_engine.run(labeller, **PIECES)) == SKIPPED
    store.store.clear()


def test_rows_that_no_worker_brings_back_come_again_one_by_one(cluster, predictor, images, tmp_path):
    cluster.before = staticmethod(lambda row, attempt: row if attempt == 2 else None)
    assert statuses(ray_engine.run(labeller_of(predictor, images, tmp_path / "out"), **PIECES)) == DONE
    assert cluster.attempts == 2


def test_what_kills_every_worker_is_one_failed_image(cluster, predictor, images, tmp_path):
    def fatal(row, attempt):
        return None if any(job.path.name == "1.png" for _, job in jobs_of(unpacked(row["work"]))) else row

    cluster.before = staticmethod(fatal)
    outcomes = list(ray_engine.run(labeller_of(predictor, images, tmp_path / "out"), workers=1, **PIECES))
    assert statuses(outcomes) == DONE | {"1.png": "failed"}
    (message,) = [outcome.message for outcome in outcomes if outcome.path.name == "1.png"]
    assert "1.png: each worker that tried it died or failed" in message


def test_a_damaged_piece_is_one_failed_image_without_litter(cluster, predictor, images, tmp_path):
    scene = images / "scene.tif"
    with tifffile.TiffFile(scene) as file:
        offset = file.pages[0].dataoffsets[-1]
    with scene.open("r+b") as file:
        file.truncate(offset + 5000)
    assert statuses(ray_engine.run(labeller_of(predictor, images, tmp_path / "out"), **PIECES)) == DONE | {
        "scene.tif": "failed"
    }
    assert not list((tmp_path / "out").rglob(".*parts*"))


def test_an_image_that_changes_is_failed_without_litter(cluster, predictor, images, tmp_path):
    def change(row, attempt):
        work = unpacked(row["work"])
        if work.get("piece") == 3:
            pixels = np.zeros((640, 450, 3), dtype=np.uint8)
            tifffile.imwrite(images / "scene.tif", pixels, tile=(128, 128))
        return row

    cluster.before = staticmethod(change)
    outcomes = list(ray_engine.run(labeller_of(predictor, images, tmp_path / "out"), **PIECES))
    assert statuses(outcomes) == DONE | {"scene.tif": "failed"}
    assert "the file changed while it was read" in next(o.message for o in outcomes if o.path.name == "scene.tif")
    assert not list((tmp_path / "out").rglob(".*parts*"))


def test_workers_that_do_not_see_the_folders_stop_the_job(cluster, run, predictor, images, tmp_path, monkeypatch):
    def stops(match, **changes):
        network = replace(network_of(labeller, device="cpu", token="none", threads=1), **changes)
        (row,) = rows_of_images([(0, labeller.batch.jobs[0])], 1, most=1)
        return match in unpacked(Worker(network)(row)["result"])["stopped"]

    labeller = labeller_of(predictor, images, tmp_path / "out")
    assert stops(f"--out {tmp_path / 'out'}: is not seen by the worker on ")
    assert stops("cannot load the network", folder=str(tmp_path / "elsewhere"))
    assert stops("finds another network in", weights_sha256="0" * 64)
    assert not (tmp_path / "out").exists()
    lexists = os.path.lexists
    monkeypatch.setattr(ray_worker.os.path, "lexists", lambda path: "broken" not in str(path) and lexists(path))
    with pytest.raises(PixelwiseError, match=r"broken.png: is not seen by a worker"):
        list(ray_engine.run(labeller, **PIECES))


def test_without_a_run_folder_there_is_nothing_to_load(predictor, images, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor, "folder", None)
    with pytest.raises(UsageError, match="load it from a run folder"):
        list(run_batch(predictor, plan_batch([images], tmp_path / "out"), engine="ray"))


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


# Ray itself


class Other(http.server.BaseHTTPRequestHandler):
    """Answers every request with an error, and tells nobody."""

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("address", "error", "match"),
    [
        ("head", PixelwiseError, "it must be HOST:PORT"),
        ("head:0", PixelwiseError, "it must be HOST:PORT"),
        ("ray://head:10001", UsageError, "ray job submit"),
        ("closed", PixelwiseError, "no Ray cluster answers there .*refused"),
        ("web", PixelwiseError, "what listens there is something else"),
    ],
)
def test_a_wrong_address_is_an_error_at_once(predictor, images, tmp_path, address, error, match):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as web, socket.socket() as closed:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        closed.bind(("127.0.0.1", 0))
        ports = {"web": web.server_port, "closed": closed.getsockname()[1]}
        address = f"127.0.0.1:{ports[address]}" if address in ports else address
        start = time.monotonic()
        with pytest.raises(error, match=match):
            list(run_batch(predictor, plan_batch([images], tmp_path / "out"), engine="ray", address=address))
        assert time.monotonic() - start < 20
        assert not [name for name in os.environ if name.startswith("RAY_")]
        web.shutdown()


def test_without_the_extra_the_command_is_named(predictor, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UsageError, match=r'--engine ray needs the package ray. Install it: pip install "pixelwise\[cluster\]"'
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
    deadline = time.monotonic() + 60  # of a busy machine; they end by themselves
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


def test_a_worker_of_ray_that_is_killed_loses_nothing(ray, predictor, images, tmp_path, capfd):
    log, stop = Path(os.environ[LOG]), threading.Event()
    labeller = labeller_of(predictor, images, tmp_path / "out")
    killer = threading.Thread(target=kill_one, args=(log, stop))
    killer.start()
    try:
        outcomes = list(ray_engine.run(labeller, workers=2, **PIECES))
    finally:
        stop.set()
        killer.join()
    lines = log.read_text().splitlines()
    assert statuses(outcomes) == DONE
    assert capfd.readouterr() == ("", "")  # Ray is not heard of
    bands = Counter(line.split(" ", 1)[1] for line in lines)
    assert len(bands) == 20
    assert bands.total() > 20  # what the dead worker had not stored was computed again
    assert max(bands.values()) <= 2
    assert sum(count - 1 for count in bands.values()) <= 4  # of one piece
    assert len({line.split()[0] for line in lines}) >= 2
    assert not list((tmp_path / "out").rglob(".*parts*"))
    list(run_batch(predictor, plan_batch([images], tmp_path / "local"), tools=TOOLS))
    assert same_labels(tmp_path / "out", tmp_path / "local")
    log.unlink()
    assert statuses(run_batch(predictor, labeller.batch, tools=TOOLS)) == SKIPPED
    assert not log.exists()


def test_outcomes_tell_what_they_are_of():
    outcome = ray_engine._seen(Job("s3://a/b.png", {}), {"status": "unseen", "message": "gone"})
    assert outcome == Outcome("s3://a/b.png", "failed", "gone")
