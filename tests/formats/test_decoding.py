"""Files are decoded in a child process: whatever happens to it, the parent lives, and no other file is lost."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tifffile
from PIL import Image

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import decoding, open_source
from pixelwise.formats.worker import packed, unpacked

KILLS = int(os.environ.get("PIXELWISE_TEST_KILLS", "25"))


@pytest.fixture(autouse=True)
def fresh_child():
    """No test inherits the settings that another one gave its child."""
    decoding.stop()
    yield
    decoding.stop()


@pytest.fixture
def scene(tmp_path):
    """Pixels, and a compressed TIFF of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "scene.tif", pixels, photometric="rgb", tile=(64, 64), compression="zlib")
    return pixels, tmp_path / "scene.tif"


def child_pid():
    return decoding.start()._process.pid


def test_messages_keep_their_types():
    value = {
        "tuple": (1, 2.5, None, True), "list": [b"\0\xff", "text"], "empty": (), "inner": {"array": [1], "dict": (2,)},
        "affine": np.eye(4), "flags": np.array([[True], [False]]), "nan": (float("inf"),),
    }  # fmt: skip
    back = unpacked(packed(value))
    assert {key: back[key] for key in ("tuple", "list", "empty", "inner", "nan")} == {
        key: value[key] for key in ("tuple", "list", "empty", "inner", "nan")
    }
    assert type(back["tuple"]) is tuple and type(back["list"]) is list
    for key in ("affine", "flags"):
        assert np.array_equal(back[key], value[key]) and back[key].dtype == value[key].dtype


def test_the_child_never_imports_torch():
    code = (
        "import sys, pkgutil, importlib, pixelwise.formats as formats\n"
        "for found in pkgutil.walk_packages(formats.__path__, 'pixelwise.formats.'): importlib.import_module(found.name)\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_plain_pictures_need_no_child(tmp_path):
    Image.new("L", (4, 3), 7).save(tmp_path / "a.png")
    with open_source(tmp_path / "a.png") as source:
        assert source.read(0, 0, 3, 4).max() == 7
    assert decoding._shared is None


def test_windows_are_those_of_the_file_and_outlive_the_source(scene):
    pixels, path = scene
    with open_source(path) as source:
        windows = [source.read(top, 10, 50, 120) for top in range(0, 250, 10)]
        assert source.valid(0, 0, 5, 5) is None
        source.check_unchanged()
    for index, window in enumerate(windows):
        assert np.array_equal(window, pixels[10 * index : 10 * index + 50, 10:130])


def test_more_windows_than_there_are_file_handles(scene):
    pixels, path = scene
    with open_source(path) as source:
        windows = [source.read(index % 290, 0, 10, 200) for index in range(1500)]
    assert all(np.array_equal(window, pixels[index % 290 : index % 290 + 10]) for index, window in enumerate(windows))


def test_a_child_killed_at_random_moments_loses_no_file(tmp_path):
    rng = np.random.default_rng(1)
    files = {}
    for index in range(4):
        files[index] = rng.integers(0, 256, (200, 160, 3), dtype=np.uint8)
        tifffile.imwrite(tmp_path / f"{index}.tif", files[index], photometric="rgb", tile=(32, 32), compression="zlib")
    wrong, ready, kills = [], threading.Event(), 0

    def read(index):
        draws = random.Random(index)
        while not ready.is_set():
            with open_source(tmp_path / f"{index}.tif") as source:
                for _ in range(20):
                    top, left = draws.randrange(150), draws.randrange(100)
                    found = source.read(top, left, 50, 60)
                    if not np.array_equal(found, files[index][top : top + 50, left : left + 60]):
                        wrong.append(index)

    def guarded(index):
        try:
            read(index)
        except DataError as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=guarded, args=(index,)) for index in files]
    for thread in threads:
        thread.start()
    draws = random.Random(0)
    while kills < KILLS and not wrong:
        time.sleep(draws.random() * 0.02)
        child = decoding._shared
        if child is not None and child.is_alive:
            child._process.kill()
            kills += 1
    ready.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and kills == KILLS


def test_a_child_that_hangs_costs_one_file(scene, tmp_path, monkeypatch):
    pixels, path = scene
    monkeypatch.setenv("PIXELWISE_DECODER_SECONDS", "4")
    with open_source(path) as source:
        os.kill(child_pid(), signal.SIGSTOP)
        with pytest.raises(
            DataError, match=r"scene\.tif: decoding takes too long.*PIXELWISE_DECODER_SECONDS \(now 4\)"
        ):
            source.read(0, 0, 10, 10)
        assert np.array_equal(source.read(0, 0, 10, 10), pixels[:10, :10])


def test_a_file_that_ends_the_child_each_time_is_blamed(scene, monkeypatch):
    pixels, path = scene
    source = open_source(path)
    asked = decoding._Child.request

    def crash(self, message, **options):
        if message["do"] == "read":
            os.kill(self._process.pid, signal.SIGSEGV)
        return asked(self, message, **options)

    with monkeypatch.context() as patch:
        patch.setattr(decoding._Child, "request", crash)
        with pytest.raises(
            DataError, match=r"scene\.tif: the file is damaged or too large: decoding it fails: .*SIGSEGV"
        ):
            source.read(0, 0, 10, 10)
    assert np.array_equal(source.read(0, 0, 300, 200), pixels)


def test_too_much_memory_is_one_error_and_others_go_on(scene, tmp_path, monkeypatch):
    pixels, path = scene
    bomb = np.zeros((12_000, 12_000, 3), np.uint8)
    tifffile.imwrite(tmp_path / "bomb.tif", bomb, compression="zlib", tile=(12_000, 12_000))
    monkeypatch.setenv("PIXELWISE_DECODER_MEMORY", str(200 << 20))
    with open_source(path) as sound:
        with open_source(tmp_path / "bomb.tif") as bomb, pytest.raises(DataError, match=r"bomb\.tif: .*memory"):
            bomb.read(0, 0, 5, 5)
        assert np.array_equal(sound.read(0, 0, 300, 200), pixels)


def test_a_file_that_changed_under_a_new_child_is_noticed(scene):
    _, path = scene
    with open_source(path) as source:
        source.fingerprint()
        decoding.stop()
        tifffile.imwrite(path, np.zeros((300, 200, 3), np.uint8), photometric="rgb", tile=(64, 64))
        with pytest.raises(DataError, match=r"scene\.tif: the file changed while it was read"):
            source.read(0, 0, 10, 10)


def test_a_forked_process_has_a_child_of_its_own(scene):
    pixels, path = scene
    with open_source(path) as source:
        pid = child_pid()
        if (forked := os.fork()) == 0:
            found = source.read(0, 0, 300, 200)
            os._exit(0 if np.array_equal(found, pixels) and child_pid() != pid else 1)
        assert os.waitpid(forked, 0)[1] == 0
        assert child_pid() == pid and np.array_equal(source.read(0, 0, 300, 200), pixels)


def test_the_child_ends_with_its_parent(scene):
    code = (
        "import os, sys, pixelwise.formats as formats, pixelwise.formats.decoding as decoding\n"
        "formats.open_source(sys.argv[1]); print(decoding._shared._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(scene[1])], capture_output=True, text=True, timeout=120)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the decoding process outlives its parent")


def test_nothing_is_left_in_the_temporary_folder(scene, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with open_source(scene[1]):
        assert len(list((tmp_path / "tmp").iterdir())) == 1
    decoding.stop()
    assert not list((tmp_path / "tmp").iterdir())


def test_settings_that_are_no_numbers(scene, monkeypatch):
    monkeypatch.setenv("PIXELWISE_DECODER_MEMORY", "much")
    with pytest.raises(UsageError, match="PIXELWISE_DECODER_MEMORY must be a number above 0, not 'much'"):
        open_source(scene[1])
