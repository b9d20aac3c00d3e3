import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pixelwise.data.labels import LabelSpec
from pixelwise.data.readers import read_mask
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.infer.batch import plan_batch, prefetch, run_batch
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.predictor import Predictor

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
    return [job.outputs["labels"].relative_to(out).as_posix() for job in batch.jobs]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for index, name in enumerate(("b.png", "a.jpg", "deep/er/c.TIF", ".hidden.png", ".cache/d.png")):
        write_image(folder / name, index)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_folders_are_read_recursively_and_keep_their_sub_folders(images, tmp_path):
    batch = plan_batch([images], tmp_path / "out")
    assert label_names(batch, tmp_path / "out") == ["a.png", "b.png", "deep/er/c.png"]


def test_files_and_globs(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    batch = plan_batch([images / "notes.txt", images / "deep" / "er" / "c.TIF"], out)
    assert label_names(batch, out) == ["notes.png", "c.png"]
    assert label_names(plan_batch([f"{images}/*.*g"], out), out) == ["a.png", "b.png"]
    assert label_names(plan_batch([f"{images}/**/*.TIF"], out), out) == ["deep/er/c.png"]
    assert label_names(plan_batch([f"{images}/de*"], out), out) == ["deep/er/c.png"]
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
    assert label_names(batch, tmp_path / "out") == ["a.png", "b.png", "deep/er/c.png"]


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
        plan_batch([images], tmp_path / "out", overlay=True)


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
    batch = plan_batch([tmp_path / "a.png"], out, overlay=True, probabilities=True)
    assert statuses(run_batch(make_predictor(), batch)) == ["done"]
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "a_overlay.png", "a_probabilities.npy"]
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
    plain, rich = (plan_batch([tmp_path / "a.png"], tmp_path / "out", overlay=extra) for extra in (False, True))
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
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


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
