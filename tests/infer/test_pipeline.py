import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import pixelwise.infer.pipeline as module
from pixelwise.data.labels import LabelSpec
from pixelwise.data.samples import to_tensor
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import Source, SourceInfo
from pixelwise.infer import store as stores
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.options import JobOptions, Tiling
from pixelwise.infer.outputs import write_outputs
from pixelwise.infer.pipeline import ArraySource as InMemory
from pixelwise.infer.pipeline import Pipeline, compute_together
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.tiling import Region, Scorer, Scores, choose_scorer
from pixelwise.ops.receptive_field import ReceptiveField

SPEC = LabelSpec(names=("a", "b", "c"), colors=((250, 0, 0), (0, 250, 0), (0, 0, 250)), values=((0,), (1,), (2,)))
OURS = ("pixelwise-window", "pixelwise-write", "pixelwise-read")
MARK = {"model": "1" * 64, "input": "abc"}


class Blurred(nn.Module):
    """The class is the strongest colour of the neighbourhood."""

    def forward(self, image):
        return nn.functional.avg_pool2d(image, 3, 1, 1, count_include_pad=False)


class ArraySource(Source):
    """An image in memory that can be damaged, change, or have pixels without data."""

    def __init__(self, pixels, *, nodata=None, bad_row=None, location="scene.tif"):
        planes, height, width, channels = pixels.shape
        self.pixels, self.nodata, self.bad_row, self.changed, self.threads = pixels, nodata, bad_row, False, set()
        self.info = SourceInfo(
            location=location, format="tiff", height=height, width=width, channels=channels,
            dtype=pixels.dtype.name, planes=planes, block_px=(4, 4),
        )  # fmt: skip

    def read(self, top, left, height, width, plane=0):
        self.threads.add(threading.current_thread().name)
        if self.bad_row is not None and top <= self.bad_row < top + height:
            raise DataError(f"{self.info.location}: the file is damaged or truncated (row {self.bad_row}).")
        assert top >= 0 and left >= 0 and top + height <= self.info.height and left + width <= self.info.width
        return self.pixels[plane, top : top + height, left : left + width]

    def valid(self, top, left, height, width, plane=0):
        if self.nodata is None:
            return None
        return (self.pixels[plane, top : top + height, left : left + width] != self.nodata).any(axis=2)

    def fingerprint(self):
        return "abc"

    def check_unchanged(self):
        if self.changed:
            raise DataError(f"{self.info.location}: the file changed while it was read.")


class RowScorer(Scorer):
    """Bands of rows with a halo of one row, so the result is that of one pass."""

    way, cost, memory_bytes = "stripes of 3 rows", 1.0, 1 << 30

    def __init__(self, predictor, height, width, rows=3, columns=None):
        self.predictor, self.height, self.width = predictor, height, width
        self.rows, self.columns, self.count = rows, columns or width, 0

    def score(self, read, region):
        for top in range(region.top, region.bottom, self.rows):
            for left in range(region.left, region.right, self.columns):
                bottom, right = min(top + self.rows, region.bottom), min(left + self.columns, region.right)
                y, x = max(0, top - 1), max(0, left - 1)
                window = read(y, x, min(bottom + 1, self.height) - y, min(right + 1, self.width) - x)
                scores = self.predictor.scores(window[None])[0]
                self.count += (bottom - top) * (right - left)
                found = Region(top, left, bottom - top, right - left)
                yield Scores(found, scores[:, top - y : bottom - y, left - x : right - x])


def make_predictor(model=None):
    card = ModelCard(model="m", config={}, labels=SPEC, mean=(0.5,) * 3, std=(1.0,) * 3, weights_sha256="1" * 64)
    return Predictor(model or Blurred(), card, device="cpu", precision="float32")


def random_pixels(planes=1, height=41, width=23, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 256, (planes, height, width, 3)).astype(dtype)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """All images count as large; what `make_job` chooses is forgotten afterwards."""
    monkeypatch.setattr(module, "ONE_PASS_PX", 0)
    monkeypatch.setattr(module, "choose_scorer", None)


def make_job(source, options=None, scorers=None, predictor=None, rows=3, columns=None, choose=None, **hooks):
    def rows_of(predictor, height, width, tiling, note):
        scorer = RowScorer(predictor, height, width, rows, columns)
        if scorers is not None:
            scorers.append(scorer)
        return scorer

    module.choose_scorer = choose or rows_of
    return Pipeline(network=predictor or make_predictor(), source=source, options=options or JobOptions(), **hooks)


def label_source(job, outputs, provenance):
    path = outputs["labels"][0]
    store = job.store_for(path, provenance)
    job.label(store)
    write_outputs(job, store, outputs, provenance)
    store.remove()


def save(path, result):
    info = result.source
    planes = [[result.rows(plane, y, y + 1)[0] for y in range(info.height)] for plane in range(info.planes)]
    np.save(path, np.array(planes, dtype=result.dtype))


def outputs_in(folder, *kinds):
    return {kind: (folder / f"scene_{kind}.npy", save) for kind in ("labels", *kinds)}


def expected(pixels):
    predictor = make_predictor()
    return np.stack([predictor.logits(to_tensor(plane)[None])[0].argmax(0).numpy() for plane in pixels])


@pytest.mark.parametrize(("rows", "columns"), [(3, None), (64, None), (1, 1), (7, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_are_those_of_one_pass(tmp_path, rows, columns, dtype):
    pixels = random_pixels(planes=3, dtype=dtype)
    seen = []
    job = make_job(
        ArraySource(pixels), JobOptions(maps=("entropy",)), rows=rows, columns=columns,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    label_source(job, outputs_in(tmp_path, "entropy"), MARK)
    assert np.array_equal(np.load(tmp_path / "scene_labels.npy"), expected(pixels))
    assert np.load(tmp_path / "scene_entropy.npy").dtype == np.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene_entropy.npy", "scene_labels.npy"]
    assert seen == sorted(seen)
    assert seen[-1] == (pixels[..., 0].size,) * 2


def test_reading_and_writing_have_their_own_threads(tmp_path):
    source = ArraySource(random_pixels())
    label_source(make_job(source), outputs_in(tmp_path), MARK)
    assert all(name.startswith("pixelwise-window") for name in source.threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(OURS)]


def test_the_user_is_told_before_it_starts(tmp_path):
    notes = []
    job = make_job(ArraySource(random_pixels()), state=notes.append, progress=lambda *_: notes.append("progress"))
    label_source(job, outputs_in(tmp_path), MARK)
    assert notes[0].startswith("scene.tif: stripes of 3 rows, 1.00x the multiply-adds of one pass, at most ")
    assert notes[0].endswith(" GiB of memory")
    assert notes[1] == "progress"


def test_pixels_without_data_get_the_number_for_it(tmp_path):
    pixels = random_pixels()
    pixels[0, 5:9, 4:8] = 0
    results = []
    outputs = {"labels": (tmp_path / "a.npy", lambda path, result: (results.append(result), save(path, result)))}
    label_source(make_job(ArraySource(pixels, nodata=0)), outputs, MARK)
    labels = np.load(tmp_path / "a.npy")[0]
    assert (labels[5:9, 4:8] == 255).all()
    assert (labels != 255).sum() == labels.size - 16
    assert results[0].nodata == 255
    assert results[0].mark == MARK


def test_wrong_channels_are_refused_before_anything_is_computed():
    with pytest.raises(DataError, match=r"scene\.tif: it has 4 channels, but 3 are wanted"):
        make_job(ArraySource(np.zeros((1, 2, 2, 4), dtype=np.uint8)))


def test_a_damaged_row_leaves_no_output_and_no_parts(tmp_path):
    job = make_job(ArraySource(random_pixels(), bad_row=38))
    with pytest.raises(DataError, match=r"scene\.tif: .*row 38"):
        label_source(job, outputs_in(tmp_path), MARK)
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(OURS)]


def test_a_file_that_changes_leaves_no_output_and_no_parts(tmp_path):
    source = ArraySource(random_pixels())
    job = make_job(source, progress=lambda done, total: setattr(source, "changed", done == total))
    with pytest.raises(DataError, match="changed while it was read"):
        label_source(job, outputs_in(tmp_path), MARK)
    assert list(tmp_path.iterdir()) == []


def test_a_change_is_blamed_for_the_damage_it_did(tmp_path):
    source = ArraySource(random_pixels(), bad_row=5)
    source.changed = True
    with pytest.raises(DataError, match="changed while it was read"):
        label_source(make_job(source), outputs_in(tmp_path), MARK)


def test_scores_that_overflow_name_the_file(tmp_path):
    pixels = random_pixels(dtype=np.float32)
    pixels[0, 30, 2:5] = 3e38
    job = make_job(ArraySource(pixels))
    with pytest.raises(PixelwiseError, match=r"scene\.tif: the network's scores overflow"):
        label_source(job, outputs_in(tmp_path), MARK)


def test_no_room_on_the_disk_is_said_before_the_start(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("pixelwise.infer.estimates.shutil.disk_usage", lambda _: usage._replace(free=100))
    scorers = []
    with pytest.raises(
        PixelwiseError, match=r"scene\.tif: needs up to 2 KiB on the disk of .*, but 100 bytes are free"
    ):
        label_source(make_job(ArraySource(random_pixels()), scorers=scorers), outputs_in(tmp_path / "new"), MARK)
    assert not scorers
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_keeps_what_is_finished(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    job = make_job(ArraySource(random_pixels()))
    with monkeypatch.context() as patch:
        patch.setattr("pixelwise.files.os.fsync", full)
        with pytest.raises(PixelwiseError, match="No space left"):
            label_source(job, outputs_in(tmp_path), MARK)
    assert not (tmp_path / "scene_labels.npy").exists()
    label_source(job, outputs_in(tmp_path), MARK)
    assert (tmp_path / "scene_labels.npy").exists()


def test_only_what_is_missing_is_computed(tmp_path):
    pixels = random_pixels(planes=2)
    scorers = []
    job = make_job(ArraySource(pixels), scorers=scorers)
    outputs = outputs_in(tmp_path)
    store = job.store_for(outputs["labels"][0], MARK)
    job.compute(store, plane=0, region=Region(4, 0, 11, 23))
    job.compute(store, plane=1, region=Region(0, 0, 41, 7))
    assert [scorer.count for scorer in scorers] == [11 * 23, 41 * 7]
    label_source(job, outputs, MARK)
    assert scorers[2].count == 2 * 41 * 23 - 11 * 23 - 41 * 7
    assert np.array_equal(np.load(outputs["labels"][0]), expected(pixels))


def test_parts_of_other_settings_are_never_mixed_and_go_in_the_end(tmp_path):
    job = make_job(ArraySource(random_pixels()))
    outputs = outputs_in(tmp_path)
    path = outputs["labels"][0]
    keys = {
        make_job(job.source, options).key(mark)
        for mark, options in (
            (MARK, JobOptions()),
            (MARK | {"with": ["labels"]}, JobOptions(format="png", min_area_px=3)),  # the same parts serve these
            (MARK | {"model": "2" * 64}, JobOptions()),
            (MARK | {"input": "def"}, JobOptions()),
            (MARK, JobOptions(maps=("entropy",))),
            (MARK, JobOptions(thresholds=(("a", 0.5),))),
            (MARK, JobOptions(tiling=Tiling(blend="gaussian"))),
        )
    }
    assert len(keys) == 6
    job.compute(job.store_on_disk(path, MARK | {"model": "2" * 64}))
    label_source(job, outputs, MARK)
    assert [item.name for item in tmp_path.iterdir()] == ["scene_labels.npy"]


class Greedy(Blurred):
    """Runs out of memory where windows have more than `rows` rows."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, image):
        if image.shape[2] > self.rows:
            raise MemoryError
        return super().forward(image)


def test_out_of_memory_halves_and_goes_on_from_where_it_was(tmp_path):
    pixels, scorers, notes = random_pixels(), [], []

    def choose(predictor, height, width, tiling, note):
        scorers.append(RowScorer(predictor, height, width, 8 if scorers else 16))  # whatever this machine has free
        return scorers[-1]

    job = make_job(ArraySource(pixels), predictor=make_predictor(Greedy(17)), choose=choose, note=notes.append)
    label_source(job, outputs_in(tmp_path), MARK)  # the first band has a halo on one side only, 17 rows
    assert [scorer.count for scorer in scorers] == [16 * 23, 25 * 23]
    assert notes[0] == "scene.tif: out of memory; going on with half of it (stripes of 3 rows)."
    assert np.array_equal(np.load(tmp_path / "scene_labels.npy"), expected(pixels))


def test_each_retry_has_half_of_the_memory_and_of_the_tile(tmp_path):
    chosen = []

    def choose(predictor, height, width, tiling, note):
        chosen.append((tiling.memory_bytes, tiling.tile_px))
        return RowScorer(predictor, height, width, 3 if len(chosen) == 3 else 20)

    wish = JobOptions(tiling=Tiling(tile_px=50, memory_bytes=4 << 30))
    job = make_job(ArraySource(random_pixels()), wish, predictor=make_predictor(Greedy(5)), choose=choose)
    label_source(job, outputs_in(tmp_path), MARK)
    assert chosen == [(4 << 30, 50), (2 << 30, 25), (1 << 30, 12)]


class Scarce(Blurred):
    """Runs out of memory where windows have more than `px` pixels; shapes alone may be asked for."""

    def __init__(self, px, error=torch.OutOfMemoryError):
        super().__init__()
        self.px, self.error = px, error

    def forward(self, image):
        if not isinstance(image, FakeTensor) and image[0, 0].numel() > self.px:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(image)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
@pytest.mark.parametrize("options", [{"tolerance": 1e-3}, {"blend": "uniform"}, {"blend": "uniform", "tta": "flips"}])
def test_every_strategy_goes_on_with_less_and_says_so(options, error):
    pixels, notes, tiling = random_pixels(height=100, width=170), [], Tiling(tile_px=64, **options)
    predictor = make_predictor(Scarce(40 * 40, error))
    radius = (1, 1, 1, 1)
    field = ReceptiveField(bounded=True, stride=1, radius_px=radius, size_px=(3, 3))
    predictor.receptive_field, predictor.cut_radii[1e-3] = field, radius
    job = make_job(
        InMemory(pixels[0]), JobOptions(tiling=tiling), predictor=predictor,
        choose=choose_scorer, note=notes.append,
    )  # fmt: skip
    store = job.store()
    job.compute(store)
    assert notes and all("out of memory; going on with half of it" in note for note in notes)
    assert all("labels may differ" in note for note in notes) == bool(tiling.blend)
    if not tiling.blend:
        assert (store.rows("labels", 0, 0, 100) == expected(pixels)[0]).mean() > 0.999


def test_a_small_image_that_does_not_fit_in_one_pass_is_computed_in_windows(monkeypatch):
    monkeypatch.setattr(module, "ONE_PASS_PX", 1 << 20)
    pixels, notes = random_pixels(height=600, width=700), []
    job = make_job(
        InMemory(pixels[0]), predictor=make_predictor(Scarce(500_000 // 2)), choose=lambda network, height, width, tiling,
        note: choose_scorer(network, height, width, replace(tiling, tile_px=128), note), note=notes.append,
    )  # fmt: skip
    store = job.store()
    job.compute(store)
    assert len(notes) == 1
    assert np.array_equal(store.rows("labels", 0, 0, 600), expected(pixels)[0])


def test_images_of_one_size_are_labelled_together_as_alone():
    pixels = random_pixels(planes=3)
    jobs = [make_job(InMemory(plane)) for plane in pixels]
    stores = [job.store() for job in jobs]
    compute_together(jobs, stores)
    assert np.array_equal(np.stack([store.rows("labels", 0, 0, 41) for store in stores]), expected(pixels))


def test_what_is_wrong_in_a_batch_is_named():
    good, bad = np.zeros((4, 4, 3), np.float32), np.full((4, 4, 3), np.inf, np.float32)
    jobs = [make_job(InMemory(image, name=name)) for image, name in ((good, "a.png"), (bad, "b.png"))]
    with pytest.raises(PixelwiseError, match=r"^b\.png: the network's scores overflow"):
        compute_together(jobs, [job.store() for job in jobs])
    jobs = [make_job(InMemory(good, name=name), predictor=make_predictor(Greedy(0))) for name in "ab"]
    with pytest.raises(
        PixelwiseError, match=r"^a and 1 more: 4 x 4 px .* does not fit into memory.* or a smaller batch"
    ):
        compute_together(jobs, [job.store() for job in jobs])


def test_rows_may_wait_on_the_disk_of_the_outputs(tmp_path):
    chosen, told = [], []

    def choose(predictor, height, width, tiling, note):
        scorer = RowScorer(predictor, height, width)
        scorer.disk_bytes, scorer.scratch = 3 << 30, tiling.scratch
        chosen.append(tiling.scratch)
        return scorer

    job = make_job(ArraySource(random_pixels()), choose=choose, state=told.append)
    label_source(job, outputs_in(tmp_path / "new"), MARK)
    assert chosen == [str(tmp_path)]  # the folder of the outputs was not there yet
    assert told[0].endswith(f"GiB of memory and 3.0 GiB on the disk of {tmp_path}")


def test_a_network_that_never_fits_is_an_error(tmp_path):
    job = make_job(ArraySource(random_pixels()), predictor=make_predictor(Greedy(0)))
    with pytest.raises(PixelwiseError, match=r"scene\.tif: 23 x 41 px with 3 channels does not fit into memory"):
        label_source(job, outputs_in(tmp_path), MARK)


def test_statistics_of_the_whole_image_need_the_whole_image(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(3))
    job = make_job(ArraySource(random_pixels()), predictor=Predictor(
        model, make_predictor().card, device="cpu", precision="float32", batch_statistics=True
    ))  # fmt: skip
    with pytest.raises(UsageError, match=r"batch statistics .* stripes"):
        label_source(job, outputs_in(tmp_path), MARK)


def test_a_tile_that_takes_more_than_is_allowed_is_refused(tmp_path):
    wish = JobOptions(tiling=Tiling(tile_px=3, memory_bytes=(1 << 30) - 1))  # the rows of these jobs take 1 GiB
    with pytest.raises(UsageError, match=r"stripes of 3 rows of --tile 3 take 1\.0 GiB, but --memory allows 1\.0"):
        label_source(make_job(ArraySource(random_pixels()), wish), outputs_in(tmp_path), MARK)
    label_source(
        make_job(ArraySource(random_pixels()), JobOptions(tiling=Tiling(tile_px=3))), outputs_in(tmp_path), MARK
    )


def test_that_nothing_is_small_enough_is_told(tmp_path):
    notes, wish = [], JobOptions(tiling=Tiling(memory_bytes=500 << 20))
    label_source(make_job(ArraySource(random_pixels()), wish, note=notes.append), outputs_in(tmp_path), MARK)
    assert notes == [
        "scene.tif: stripes of 3 rows are the least that the network can do with, and take 1.0 GiB rather than the 0.5 GiB "
        "of --memory."
    ]


def run_slowly(folder):
    """The run of a process that is killed: each window waits, and is written at once."""
    stores.FLUSH_S = 0.0
    module.ONE_PASS_PX = 0
    folder = Path(folder)

    def slow(done, total):
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(0.05)

    label_source(make_job(ArraySource(random_pixels()), progress=slow), outputs_in(folder), MARK)


def test_a_job_that_was_killed_goes_on_where_it_was(tmp_path):
    code = (
        "import importlib.util as u; "
        f"s = u.spec_from_file_location('killed', {str(Path(__file__))!r}); "
        f"m = u.module_from_spec(s); s.loader.exec_module(m); m.run_slowly({str(tmp_path)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        deadline = time.monotonic() + 300  # a busy machine may take a minute to import torch
        while len(list(tmp_path.glob(".*/labels-*"))) < 4:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "scene_labels.npy").exists()
    pixels, scorers = random_pixels(), []
    job = make_job(ArraySource(pixels), scorers=scorers)
    before = job.store_for(outputs_in(tmp_path)["labels"][0], MARK)
    assert 0 < before.done_px < job.total_px
    label_source(job, outputs_in(tmp_path), MARK)
    assert scorers[0].count == job.total_px - before.done_px
    label_source(make_job(ArraySource(pixels)), outputs_in(tmp_path / "undisturbed"), MARK)
    names = ("scene_labels.npy", "undisturbed/scene_labels.npy")
    first, second = ((tmp_path / name).read_bytes() for name in names)
    assert first == second
    assert not list(tmp_path.glob(".*"))
