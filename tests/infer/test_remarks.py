"""What is said of an image before its labels are believed: numbers unlike those of the training, files that are not read."""

import re
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image
from torch import nn

from pixelwise.data.labels import LabelSpec
from pixelwise.data.numbers import Numbers
from pixelwise.infer import evaluate, plan_batch, run_batch
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.predictor import Predictor

SPEC = LabelSpec(names=("a", "b", "c"), colors=((250, 0, 0), (0, 250, 0), (0, 0, 250)), values=((0,), (1,), (2,)))
BYTES = np.random.default_rng(0).integers(30, 140, (40, 50, 3)).astype(np.uint8)


def predictor(mean=0.31, std=0.12):
    card = ModelCard(model="m", config={}, labels=SPEC, mean=(mean,) * 3, std=(std,) * 3, weights_sha256="1" * 64)
    return Predictor(nn.Identity(), card, device="cpu", precision="float32")


@pytest.mark.parametrize(
    "image",
    [
        BYTES.astype(np.float32),
        BYTES.astype(np.int64),
        BYTES.astype(np.int32),
        np.round(BYTES / 255 * 10000).astype(np.uint16),
        np.round(BYTES / 255 * 10000 + 1000).astype(np.uint16),
    ],
    ids=["floats of bytes", "int64", "int32", "reflectance", "reflectance with offset"],
)
def test_numbers_unlike_those_of_the_training_are_warned_of(image):
    with pytest.warns(
        UserWarning, match=r"far from those that the network was trained on \(mean 0.31, deviation 0.12\)"
    ):
        predictor().predict(image)


@pytest.mark.parametrize(
    "image",
    [
        BYTES,
        BYTES / 255,
        (BYTES * 257.0).astype(np.uint16),
        BYTES // 4,  # a dark photo
        np.clip(BYTES + 110.0, 0, 255).astype(np.uint8),
        np.zeros((40, 50, 3), np.float32),
    ],
    ids=["bytes", "unit", "16 bit", "dark", "bright", "empty"],
)
def test_like_numbers_are_not(image):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor().predict(image)


def test_bytes_are_warned_of_where_others_were_learnt():
    with pytest.warns(UserWarning, match=r"mean 0.33.*trained on \(mean 0.0475, deviation 0.01\)"):
        predictor(0.0475, 0.01).predict(BYTES)


def notes_of(folder, out):
    notes = []
    outcomes = list(run_batch(predictor(), plan_batch([folder], out), note=notes.append))
    assert {outcome.status for outcome in outcomes} == {"done"}
    return notes


def test_what_is_large_though_its_file_is_small_is_told_first(tmp_path, monkeypatch):
    monkeypatch.setattr("pixelwise.infer.remarks.MANY_PX", 2000)
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    Image.fromarray(BYTES[:30]).save(tmp_path / "b.png")
    notes = notes_of(tmp_path, tmp_path / "out")
    assert [note for note in notes if "million pixels" in note] == [
        f"{tmp_path / 'a.png'}: 50 x 40 px: 0 million pixels, 0.0 GiB when decoded. This takes a while."
    ]


def test_files_beside_an_image_are_named_once_for_each_kind(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(BYTES).save(folder / name)
        (folder / name).with_suffix(".pgw").write_text("10\n0\n0\n-10\n500005\n4999995\n")
    (folder / "a.prj").write_text("PROJCS[]")
    tifffile.imwrite(folder / "c.tif", BYTES, photometric="rgb")
    (folder / "c.tif.msk").write_bytes(b"II*\0")
    (folder / "c.TFW").write_text("10\n0\n0\n-10\n500005\n4999995\n")
    (folder / "a.png.aux.xml").write_text("<PAMDataset><SRS>x</SRS></PAMDataset>")
    (folder / "b.png.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><Metadata/></PAMRasterBand></PAMDataset>'
    )
    notes = notes_of(folder, tmp_path / "out")
    found = sorted(note.split(": ", 1)[1].split(" beside")[0] for note in notes)
    assert sorted(name.partition(".")[2] for name in found) == ["TFW", "pgw", "png.aux.xml", "prj", "tif.msk"]
    assert any("which pixels hold data" in note for note in notes) and any("place on Earth" in note for note in notes)


def test_images_that_are_left_out_of_a_file_are_named_in_every_file(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        for number in range(2):
            tifffile.imwrite(tmp_path / "in" / f"{name}.tif", BYTES[number * 9 :], photometric="rgb", append=number > 0)
        frames = [Image.fromarray(BYTES), Image.fromarray(255 - BYTES), Image.fromarray(BYTES)]
        frames[0].save(tmp_path / "in" / f"{name}2.png", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / "in" / f"{name}3.webp", save_all=True, append_images=frames[1:], lossless=True)
        frames[0].save(tmp_path / "in" / f"{name}4.gif", save_all=True, append_images=frames[1:])
    notes = notes_of(tmp_path / "in", tmp_path / "out")
    assert sum("2 images that differ" in note for note in notes) == 2
    assert sum("3 frames, of which only the first is read" in note for note in notes) == 6


def test_suffixes_that_are_passed_over_are_counted_and_named(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(BYTES).save(folder / "a.png")
    Image.fromarray(BYTES).save(folder / "b.jfif", format="JPEG")
    for name in ("c.jp2", "d.jp2", "e.heic", "notes.txt", "a.pgw", "scene.RAW"):
        (folder / name).write_bytes(b"x")
    batch = plan_batch([folder], tmp_path / "out")
    assert sorted(task.path.name for task in batch.tasks) == ["a.png", "b.jfif"]
    assert batch.passed_over.startswith(
        "passed over in folders: 2 .jp2, 1 .heic, 1 .raw; images are looked for by .bif"
    )
    assert plan_batch([folder / "a.png"], tmp_path / "out").passed_over == ""


GREY = Numbers(mean=(0.1,), std=(0.2,), low=(0.0,), high=(1.0,), dtypes=("uint8",))
MIXED = Numbers(mean=(0.2, 300.0), std=(0.1, 5.0), low=(0.0, 280.0), high=(0.6, 320.0), dtypes=("float32",))


@pytest.mark.parametrize(
    ("trained", "pixels", "said"),
    [
        (GREY, BYTES[:, :, :1].astype(np.int32), r"numbers \(int32, 1.4e-08..6.47e-08.*on \(uint8, 0..1, mean 0.1, "),
        (GREY, np.random.default_rng(1).normal(0, 1, (40, 50, 1)), r"numbers \(float64, -[23].*, mean .*on \(uint8, 0..1"),
        (GREY, BYTES[:, :, :1] // 8, ""),  # dark, but bytes as they were learnt
        (GREY, BYTES[:, :, :1] / 255, ""),
        (MIXED, np.dstack([BYTES[:, :, 0] / 255, BYTES[:, :, 1] / 30 + 300]), ""),
        (MIXED, np.dstack([BYTES[:, :, 0] / 255, BYTES[:, :, 1] / 9 + 27]), r"of band 2 \(float64, 30.*\(float32, 280..320"),
    ],
    ids=["int32 where dark bytes were learnt", "standardised", "dark", "unit", "two units", "Celsius for Kelvin"],
)  # fmt: skip
def test_the_range_and_type_of_the_training_count_too(trained, pixels, said):
    found = trained.difference(pixels.reshape(-1, pixels.shape[2]))
    assert re.search(said, found) if said else found == ""


def test_evaluation_and_python_tell_what_the_command_tells(tmp_path):
    """Numbers unlike those of the training, and opacity that is left out, each in one line."""
    for kind in ("images", "masks"):
        (tmp_path / "data" / "test" / kind).mkdir(parents=True)
    for name in ("a", "b"):
        rgba = np.dstack([np.round(BYTES / 255 * 10000), np.full((40, 50), 65535)]).astype(np.uint16)
        rgba[:9, :, 3] = 0
        tifffile.imwrite(
            tmp_path / "data/test/images" / f"{name}.tif", rgba, photometric="rgb", extrasamples=["unassalpha"]
        )
        Image.fromarray(BYTES[:, :, 0] % 3).save(tmp_path / "data/test/masks" / f"{name}.png")
    notes, images = [], tmp_path / "data/test/images"
    evaluate(predictor(), tmp_path / "data", note=notes.append)
    assert len(notes) == 2 and "band 4 is left out" in notes[0] and "far from those" in notes[1]
    assert {note.replace("b.tif", "a.tif") for note in notes_of(images, tmp_path / "out")} == set(notes)
    for call in (predictor().predict, lambda path: evaluate(predictor(), tmp_path / "data")):
        with pytest.warns(UserWarning, match=r"a\.tif: ") as caught:
            call(images / "a.tif")
        assert [str(warning.message) for warning in caught] == notes
        assert {warning.filename for warning in caught} == {__file__}
    evaluate(predictor(), tmp_path / "data", note=None)  # in silence, as during a training
