import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.formats.opening import read_mask
from pixelwise.infer import plan_batch, run_batch
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.options import JobOptions, Tiling
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.prefetch import prefetch
from pixelwise.infer.tiling import Region, Scorer, Scores

SPEC = LabelSpec(names=("a", "b", "c"), colors=((250, 0, 0), (0, 250, 0), (0, 0, 250)), values=((0,), (1,), (2,)))


class Strongest(nn.Module):
    """The class is the strongest colour; `calls` counts how often the network was asked."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, image):
        self.calls += 1
        return image


def make_predictor(sha256="1" * 64):
    card = ModelCard(model="m", config={}, labels=SPEC, mean=(0.5,) * 3, std=(1.0,) * 3, weights_sha256=sha256)
    return Predictor(Strongest(), card, device="cpu", precision="float32")


def write_image(path, seed=0, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return values


def statuses(outcomes):
    return [outcome.status for outcome in outcomes]


def label_names(batch, out):
    return [task.outputs["labels"].relative_to(out).as_posix() for task in batch.tasks]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for index, name in enumerate(("b.png", "a.jpg", "deep/er/c.TIF", ".hidden.png", ".cache/d.png")):
        write_image(folder / name, index)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_folders_are_read_recursively_and_keep_their_sub_folders(images, tmp_path):
    batch = plan_batch([images], tmp_path / "out")
    assert label_names(batch, tmp_path / "out") == ["a.png", "b.png", "deep/er/c.tif"]


def test_files_and_globs(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    batch = plan_batch([images / "notes.txt", images / "deep" / "er" / "c.TIF"], out)
    assert label_names(batch, out) == ["notes.png", "c.tif"]
    assert label_names(plan_batch([f"{images}/*.*g"], out), out) == ["a.png", "b.png"]
    assert label_names(plan_batch([f"{images}/**/*.TIF"], out), out) == ["deep/er/c.tif"]
    assert label_names(plan_batch([f"{images}/de*"], out), out) == ["deep/er/c.tif"]
    monkeypatch.chdir(images)
    assert label_names(plan_batch(["[ab].*"], out), out) == ["a.png", "b.png"]


def test_a_name_with_wildcards_that_exists_is_a_file(tmp_path):
    write_image(tmp_path / "a[1].png")
    write_image(tmp_path / "a1.png")
    batch = plan_batch([tmp_path / "a[1].png"], tmp_path / "out")
    assert label_names(batch, tmp_path / "out") == ["a[1].png"]


def test_an_image_given_twice_is_labelled_once(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    batch = plan_batch([images, images / "b.png", "b.png", "./b.png", "*.png"], tmp_path / "out")
    assert label_names(batch, tmp_path / "out") == ["a.png", "b.png", "deep/er/c.tif"]


def test_results_inside_the_input_folder_are_not_labelled_again(images):
    out = images / "labels"
    assert statuses(run_batch(make_predictor(), plan_batch([images], out))) == ["done"] * 3
    assert statuses(run_batch(make_predictor(), plan_batch([images], out))) == ["skipped"] * 3


@pytest.mark.parametrize("first", ["a.jpg", "x/a.png"])
def test_two_inputs_with_one_result_are_refused_before_anything_starts(images, tmp_path, first):
    write_image(images / first)
    write_image(images / "a.png")
    with pytest.raises(UsageError, match=r"would both become .*out.a\.png.*Rename one"):
        plan_batch([images / first, images / "a.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_overlay_may_clash_too(images, tmp_path):
    write_image(images / "a_overlay.png")
    plan_batch([images], tmp_path / "out")
    with pytest.raises(UsageError, match=r"a_overlay\.png"):
        plan_batch([images], tmp_path / "out", options=JobOptions(overlay=True))


def test_many_clashes_are_summed_up(images, tmp_path):
    for index in range(9):
        write_image(images / f"{index}.png")
        write_image(images / f"{index}.bmp")
    with pytest.raises(UsageError, match="and 4 more"):
        plan_batch([images], tmp_path / "out")


def test_inputs_are_never_overwritten(images):
    with pytest.raises(UsageError, match="is also an input"):
        plan_batch([images], images)
    with pytest.raises(UsageError, match=r"would replace the input .*b\.png"):
        plan_batch([images / "b.png"], images)
    with pytest.raises(UsageError, match="is a file"):
        plan_batch([images], images / "b.png")


def test_missing_inputs_are_reported_and_the_rest_goes_on(images, tmp_path):
    (tmp_path / "empty").mkdir()
    given = [tmp_path / "no.png", images / "b.png", f"{images}/*.gif", tmp_path / "empty", "x" * 5000]
    outcomes = list(run_batch(make_predictor(), plan_batch(given, tmp_path / "out")))
    assert statuses(outcomes) == ["failed"] * 4 + ["done"]
    for outcome, reason in zip(
        outcomes, ("no such file", "no file matches", "holds no images", "too long"), strict=False
    ):
        assert reason in outcome.message
    with pytest.raises(UsageError, match=r"no images to label.*no\.png: there is no such file"):
        plan_batch([tmp_path / "no.png"], tmp_path / "out")
    with pytest.raises(UsageError, match="no images to label"):
        plan_batch([], tmp_path / "out")


def test_all_outputs_are_written(tmp_path):
    values = write_image(tmp_path / "a.png")
    out = tmp_path / "out"
    batch = plan_batch([tmp_path / "a.png"], out, options=JobOptions(overlay=True, probabilities=True))
    assert statuses(run_batch(make_predictor(), batch)) == ["done"]
    assert sorted(path.name for path in out.glob("[!.]*")) == ["a.png", "a_overlay.png", "a_probabilities.npy"]
    prediction = make_predictor().predict(values)
    assert np.array_equal(read_mask(out / "a.png"), values.argmax(axis=2))
    assert np.array_equal(np.load(out / "a_probabilities.npy", allow_pickle=False), prediction.probabilities)
    with Image.open(out / "a_overlay.png") as overlay:
        assert overlay.mode == "RGB"
        assert np.array_equal(np.asarray(overlay), np.asarray(prediction.overlay()))


def test_finished_files_are_skipped_without_asking_the_network(images, tmp_path):
    batch = plan_batch([images], tmp_path / "out")
    list(run_batch(make_predictor(), batch))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    again = make_predictor()
    assert statuses(run_batch(again, batch)) == ["skipped"] * 3
    assert again.model.calls == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert statuses(run_batch(again, batch, overwrite=True)) == ["done"] * 3


def test_another_network_or_another_image_is_done_again(images, tmp_path):
    batch = plan_batch([images], tmp_path / "out")
    list(run_batch(make_predictor(), batch))
    values = write_image(images / "b.png", seed=99)
    assert statuses(run_batch(make_predictor(), batch)) == ["skipped", "done", "skipped"]
    assert np.array_equal(read_mask(tmp_path / "out" / "b.png"), values.argmax(axis=2))
    assert statuses(run_batch(make_predictor("2" * 64), batch)) == ["done"] * 3


def test_an_output_asked_for_later_or_lost_is_made(tmp_path):
    write_image(tmp_path / "a.png")
    plain, rich = (
        plan_batch([tmp_path / "a.png"], tmp_path / "out", options=JobOptions(overlay=extra)) for extra in (False, True)
    )
    steps = [(plain, "1", "done"), (rich, "1", "done"), (plain, "1", "skipped"), (rich, "1", "skipped")]
    # A label file from another network does not vouch for the overlay that lies beside it.
    steps += [(plain, "2", "done"), (rich, "2", "done"), (rich, "2", "skipped")]
    for batch, network, wanted in steps:
        assert statuses(run_batch(make_predictor(network * 64), batch)) == [wanted]
    (tmp_path / "out" / "a_overlay.png").unlink()
    assert statuses(run_batch(make_predictor("2" * 64), rich)) == ["done"]


def test_files_of_somebody_else_are_kept(tmp_path):
    write_image(tmp_path / "a.png")
    mine = write_image(tmp_path / "out" / "a.png", seed=5)
    batch = plan_batch([tmp_path / "a.png"], tmp_path / "out")
    (outcome,) = run_batch(make_predictor(), batch)
    assert outcome.status == "failed"
    assert "was not written by pixelwise" in outcome.message
    with Image.open(tmp_path / "out" / "a.png") as kept:
        assert np.array_equal(np.asarray(kept), mine)
    assert statuses(run_batch(make_predictor(), batch, overwrite=True)) == ["done"]


def test_broken_files_are_named_and_the_rest_goes_on(images, tmp_path):
    (images / "aa.png").write_bytes((images / "b.png").read_bytes()[:50])
    (images / "ab.png").write_bytes(b"")
    outcomes = list(run_batch(make_predictor(), plan_batch([images], tmp_path / "out")))
    assert statuses(outcomes) == ["done", "failed", "failed", "done", "done"]
    assert [outcome.message.startswith(f"{outcome.path}: ") for outcome in outcomes[1:3]] == [True, True]
    assert not (tmp_path / "out" / "aa.png").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_loops_of_links_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    write_image(tmp_path / "z.png")
    outcomes = list(run_batch(make_predictor(), plan_batch([tmp_path], tmp_path / "out")))
    assert {outcome.path.name: outcome.status for outcome in outcomes} == {
        "loop.png": "failed",
        "pipe.png": "failed",
        "z.png": "done",
    }


def test_an_image_too_large_for_memory_fails_alone(tmp_path):
    class Small(Strongest):
        def forward(self, image):
            if image.shape[-1] > 20:
                raise MemoryError
            return super().forward(image)

    write_image(tmp_path / "a.png", size=(5, 30))
    write_image(tmp_path / "b.png")
    predictor = make_predictor()
    predictor.model = Small()
    outcomes = list(run_batch(predictor, plan_batch([tmp_path], tmp_path / "out")))
    assert statuses(outcomes) == ["failed", "done"]
    assert "30 x 5 px" in outcomes[0].message


def test_a_full_disk_stops_the_batch_and_leaves_no_half_file(images, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    batch = plan_batch([images], tmp_path / "out")
    monkeypatch.setattr("pixelwise.files.os.fsync", full)
    with pytest.raises(PixelwiseError, match="No space left on device"):
        list(run_batch(make_predictor(), batch))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and ".pixelwise" not in path.parts]


def test_the_next_item_is_read_while_the_present_one_is_used():
    second_started = threading.Event()

    def read(item):
        if item == 2:
            second_started.set()
        return item * 10

    results = []
    for item, future in prefetch(read, [1, 2, 3]):
        assert item != 1 or second_started.wait(timeout=10)
        results.append((item, future.result()))
    assert results == [(1, 10), (2, 20), (3, 30)]


def test_prefetch_stops_when_its_user_does():
    seen = []
    for item, _ in prefetch(seen.append, range(1000)):
        if item == 3:
            break
    assert len(seen) <= 6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pixelwise-read")]


def test_labels_do_not_depend_on_what_else_is_in_the_batch(images, tmp_path):
    torch.manual_seed(0)
    for given, out in (([images], "all"), ([images / "b.png"], "one")):
        list(run_batch(make_predictor(), plan_batch(given, tmp_path / out)))
    assert Path(tmp_path / "all" / "b.png").read_bytes() == Path(tmp_path / "one" / "b.png").read_bytes()


def write_tiff(path, seed=0, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    tifffile.imwrite(path, values)
    return values


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_format_of_the_image_is_that_of_the_labels(tmp_path):
    values = write_tiff(tmp_path / "in" / "deep" / "a.tif")
    np.save(tmp_path / "in" / "b.npy", values)
    write_tiff(tmp_path / "in" / "really.tif").tofile(tmp_path / "none")
    Image.fromarray(values).save(tmp_path / "in" / "really.tif", format="PNG")  # the content decides
    out = tmp_path / "out"
    assert statuses(run_batch(make_predictor(), plan_batch([tmp_path / "in"], out))) == ["done"] * 3
    made = ["b.npy", "deep/a.tif", "really.png"]
    records = [f".pixelwise/{name}.json" for name in made]
    assert names_in(out) == sorted([*records, *made])
    assert np.array_equal(tifffile.imread(out / "deep" / "a.tif"), values.argmax(axis=2))
    assert np.array_equal(np.load(out / "b.npy"), values.argmax(axis=2))
    assert statuses(run_batch(make_predictor(), plan_batch([tmp_path / "in"], out))) == ["skipped"] * 3


def test_another_format_can_be_wanted(tmp_path):
    write_image(tmp_path / "a.png")
    for name, ending in (("tiff", ".tif"), ("npy", ".npy"), ("ome-tiff", ".ome.tif")):
        batch = plan_batch([tmp_path / "a.png"], tmp_path / name, options=JobOptions(format=name))
        assert label_names(batch, tmp_path / name) == [f"a{ending}"]
        assert statuses(run_batch(make_predictor(), batch)) == ["done"]
        assert (tmp_path / name / f"a{ending}").is_file()
    with pytest.raises(UsageError, match="there is no format 'jpeg' for labels; there are png, "):
        plan_batch([tmp_path / "a.png"], tmp_path / "out", options=JobOptions(format="jpeg"))
    batch = plan_batch([tmp_path / "a.png"], tmp_path / "out", options=JobOptions(format="nifti"))
    (outcome,) = run_batch(make_predictor(), batch)
    assert "a.png: labels cannot be written as nifti" in outcome.message


def test_records_know_what_is_ours(tmp_path):
    image = tmp_path / "a.tif"
    values = write_tiff(image)
    out, batch = tmp_path / "out", plan_batch([image], tmp_path / "out")
    assert statuses(run_batch(make_predictor(), batch)) == ["done"]
    assert statuses(run_batch(make_predictor("2" * 64), batch)) == ["done"]  # ours, by another network: made again
    write_tiff(out / "a.tif", seed=9)  # somebody edits it
    (outcome,) = run_batch(make_predictor(), batch)
    assert "was changed since, so it is kept" in outcome.message
    assert statuses(run_batch(make_predictor(), batch, overwrite=True)) == ["done"]
    assert np.array_equal(tifffile.imread(out / "a.tif"), values.argmax(axis=2))
    record = out / ".pixelwise" / "a.tif.json"
    sound = record.read_bytes()
    for damaged in (b"", b"[]", b"{", b'{"a.tif": 3}', b'{"a.tif": {"stamp": 3, "provenance": {}}}', b'{"a.tif": {}}'):
        record.write_bytes(damaged)
        (outcome,) = run_batch(make_predictor(), batch)
        assert "was not written by pixelwise" in outcome.message
    record.write_bytes(sound)
    assert statuses(run_batch(make_predictor(), batch)) == ["skipped"]
    os.utime(out / "a.tif")  # as of a copy
    assert statuses(run_batch(make_predictor(), batch)) == ["skipped"]
    record.unlink()
    (out / "a.tif").unlink()
    assert statuses(run_batch(make_predictor(), batch)) == ["done"]


def test_a_kill_before_the_record_is_finished_leaves_our_own_files_ours(tmp_path, monkeypatch):
    write_tiff(tmp_path / "a.tif")
    batch = plan_batch([tmp_path / "a.tif"], tmp_path / "out")

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pixelwise.infer.outputs.OutFolder._stamp", killed)
        with pytest.raises(Killed):
            list(run_batch(make_predictor(), batch))
    assert (tmp_path / "out" / "a.tif").is_file()
    assert statuses(run_batch(make_predictor(), batch)) == ["done"]
    assert statuses(run_batch(make_predictor(), batch)) == ["skipped"]
    assert statuses(run_batch(make_predictor("2" * 64), batch)) == ["done"]


class Bands(Scorer):
    """Bands of four rows, for networks that look at single pixels."""

    way, cost, memory_bytes = "stripes", 1.0, 1 << 20

    def __init__(self, predictor):
        self.predictor = predictor

    def score(self, read, region):
        for top in range(region.top, region.bottom, 4):
            height = min(4, region.bottom - top)
            scores = self.predictor.scores(read(top, region.left, height, region.width)[None])[0]
            yield Scores(Region(top, region.left, height, region.width), scores)


@pytest.fixture
def bands(monkeypatch):
    """All images count as large and are computed in bands."""
    monkeypatch.setattr("pixelwise.infer.pipeline.ONE_PASS_PX", 20)
    monkeypatch.setattr("pixelwise.infer.pipeline.choose_scorer", lambda predictor, *_: Bands(predictor))


def test_large_images_and_all_extra_outputs(tmp_path, bands):
    values = write_image(tmp_path / "a.png", size=(23, 17))
    options = JobOptions(maps=("entropy",), overlay=True, probabilities=True, geojson=True, coco=True)
    out, notes, seen = tmp_path / "out", [], []
    batch = plan_batch([tmp_path / "a.png"], out, options=options)
    hooks = {"note": notes.append, "progress": lambda *at: seen.append(at)}
    assert [outcome.message for outcome in run_batch(make_predictor(), batch, **hooks)] == [""]
    endings = (".geojson", ".png", "_coco.json", "_entropy.tif", "_overlay.png", "_probabilities.npy")
    assert names_in(out) == [".pixelwise/a.png.json", *(f"a{ending}" for ending in endings)]
    prediction = make_predictor().predict(values)
    assert np.array_equal(read_mask(out / "a.png"), prediction.labels)
    assert np.allclose(np.load(out / "a_probabilities.npy"), prediction.probabilities, atol=1e-6)
    entropy = -(prediction.probabilities * np.log(prediction.probabilities)).sum(axis=0)
    assert np.allclose(tifffile.imread(out / "a_entropy.tif"), entropy, atol=1e-5)
    with Image.open(out / "a_overlay.png") as overlay:
        assert np.array_equal(np.asarray(overlay), np.asarray(prediction.overlay()))
    assert len(json.loads((out / "a.geojson").read_text())["features"]) > 3
    assert len(notes) == 1
    assert seen[-1] == (23 * 17, 23 * 17)
    assert statuses(run_batch(make_predictor(), batch)) == ["skipped"]
    (out / "a.geojson").write_text("{}")
    (outcome,) = run_batch(make_predictor(), batch)
    assert "a.geojson: exists and" in outcome.message


def test_other_options_make_other_labels(tmp_path, bands):
    values = write_image(tmp_path / "a.png", size=(40, 30))
    for options, wanted in (
        (JobOptions(), "done"),
        (JobOptions(min_area_px=9), "done"),
        (JobOptions(min_area_px=9), "skipped"),
        (JobOptions(min_area_px=9, tiling=Tiling(tile_px=64, memory_bytes=1 << 30)), "skipped"),
        (JobOptions(thresholds=(("a", 0.3),)), "done"),
        (JobOptions(), "done"),
    ):
        batch = plan_batch([tmp_path / "a.png"], tmp_path / "out", options=options)
        assert statuses(run_batch(make_predictor(), batch)) == [wanted]
        labels = read_mask(tmp_path / "out" / "a.png")
        assert np.array_equal(labels, values.argmax(axis=2)) == (options == JobOptions())
    with pytest.raises(UsageError, match="no class 'z'"):
        list(run_batch(make_predictor(), plan_batch([tmp_path / "a.png"], tmp_path / "out", options=JobOptions(
            thresholds=(("z", 0.5),)
        ))))  # fmt: skip


def test_folders_that_are_one_image(tmp_path):
    for name in (
        "in/cells.zarr/zarr.json",
        "in/old/.zgroup",
        "in/ct/1.dcm",
        "in/ct/2.dcm",
        "in/xray/1.dcm",
        "in/m/x.DCM",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"-")
    write_image(tmp_path / "in" / "m" / "a.png")
    for name in ("brain.nii.gz", "slide.svs", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"-")
    out = tmp_path / "out"
    wanted = {
        "brain.nii.gz", "slide.ome.tif", "cells.zarr", "ct.png", "old.png", "m/a.png", "m/x.nii.gz", "xray/1.nii.gz",
    }  # fmt: skip
    assert set(label_names(plan_batch([tmp_path / "in"], out), out)) == wanted
    assert label_names(plan_batch([tmp_path / "in" / "ct"], out), out) == ["ct.png"]
    assert label_names(plan_batch([tmp_path / "in" / "cells.zarr"], out), out) == ["cells.zarr"]
    assert set(label_names(plan_batch([f"{tmp_path}/in/*"], out), out)) == wanted | {"notes.png"}


def test_images_and_labels_behind_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    values = write_tiff(tmp_path / "a.tif")
    write_image(tmp_path / "b.png")
    for name in ("a.tif", "b.png"):
        memory.pipe(f"/scans/day/{name}", (tmp_path / name).read_bytes())
    for given, wanted in (("memory://scans/", ["day/a.tif", "day/b.png"]), ("memory://scans/day/*.tif", ["a.tif"])):
        batch = plan_batch([given], "memory://labels")
        assert [task.outputs["labels"].removeprefix("memory://labels/") for task in batch.tasks] == wanted
    batch = plan_batch(["memory://scans/day/"], "memory://labels/")
    assert [outcome.message for outcome in run_batch(make_predictor(), batch)] == ["", ""]
    memory.get_file("/labels/a.tif", str(tmp_path / "got.tif"))
    assert np.array_equal(tifffile.imread(tmp_path / "got.tif"), values.argmax(axis=2))
    assert names_in(tmp_path / "cache") == []
    assert statuses(run_batch(make_predictor(), batch)) == ["skipped", "skipped"]
    memory.pipe("/labels/a.tif", b"mine")
    outcomes = list(run_batch(make_predictor(), batch))
    assert statuses(outcomes) == ["failed", "skipped"]
    assert "memory://labels/a.tif: exists and" in outcomes[0].message
    outcomes = list(
        run_batch(make_predictor(), plan_batch(["memory://scans/none.tif", tmp_path / "b.png"], tmp_path / "o"))
    )
    assert statuses(outcomes) == ["failed", "done"]
    with pytest.raises(UsageError, match="results cannot be written there"):
        plan_batch([tmp_path / "a.tif"], "https://host/labels")
    with pytest.raises(UsageError, match="would replace the input"):
        plan_batch(["memory://scans/day/a.tif"], "memory://scans/day")
