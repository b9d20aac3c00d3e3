"""Reading, formatting, plots, pictures and the largest confusions, each on its own."""

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from pixelwise.errors import DataError
from pixelwise.metrics import ConfusionMatrix
from pixelwise.report import formatting, pictures
from pixelwise.report.figures import Line, plot_histogram, plot_lines
from pixelwise.report.page import best_validation, image_scores, largest_confusions, training_curves
from pixelwise.report.run_folder import EvaluationFile, read_classes, read_metrics


def write_metrics(folder, text):
    (folder / "metrics.csv").write_text(text)
    return folder


def test_metrics_are_read_by_column_and_a_resumed_step_counts_once(tmp_path):
    text = (
        "step,train_loss,val_miou,other\n1,2.0,,x\n2,1.5,0.3,x\n3,nan,inf,x\n2,1.4,,x\nrubbish,1,1,1\n1e99,5,,\n4,1.0\n"
    )
    columns = read_metrics(write_metrics(tmp_path, text))
    assert columns["train_loss"] == [(1, 2.0), (2, 1.4), (4, 1.0)]
    assert columns["val_miou"] == [(2, 0.3)]
    assert columns["lr"] == []


@pytest.mark.parametrize("text", ["", "step\n1\n", "a,b\n1,2\n", "step,train_loss\nx,1\n"])
def test_metrics_without_a_measurement_are_refused(tmp_path, text):
    with pytest.raises(DataError, match="holds no measurement"):
        read_metrics(write_metrics(tmp_path, text))


def test_only_measured_quantities_are_plotted(tmp_path):
    summary, curves = training_curves(
        write_metrics(tmp_path, "step,train_loss\n" + "".join(f"{k},{9 / k}\n" for k in range(1, 9)))
    )
    assert [curve.title for curve in curves] == ["Loss"]
    assert curves[0].legend == (("--series-1", "training"),)
    assert summary == "8 steps."
    assert training_curves(write_metrics(tmp_path, "step,epoch,lr\n1,1,0.1\n"))[0] == "1 step, 1 epoch."


def test_the_best_validation_is_that_of_the_weights_that_are_kept_else_the_last_of_equals():
    points = [(1, 0.2), (5, 0.7), (9, 0.7), (12, 0.3)]
    assert best_validation(points) == (9, 0.7)
    assert best_validation(points, 12) == (12, 0.3) and best_validation(points, 13) == (9, 0.7)
    assert best_validation([]) is None


@pytest.mark.parametrize(
    "points", [[(1, 0.0)], [(1, 5.0), (2, 5.0)], [(k, -k) for k in range(9)], [(k, 1e29 * k) for k in range(2000)]]
)
def test_a_plot_is_an_svg_in_the_colours_of_the_page(points):
    svg = plot_lines([Line(label="a", points=points, smooth=True), Line(label="b", points=[])], percent=True)
    ElementTree.fromstring(svg)
    assert "var(--series-1)" in svg and "var(--sans)" in svg and "metadata" not in svg
    assert not any(stand_in in svg for stand_in in ("#010101", "#020202", "#030303", "DejaVu"))
    assert len(svg) < 40_000


def test_a_histogram_counts_every_image():
    ElementTree.fromstring(plot_histogram([0.0, 1.0, 0.5]))


def test_the_lowest_images_come_first_and_equal_ones_by_name():
    per_image = [{"name": name, "miou": miou} for name, miou in (("c", 0.2), ("b", 0.2), ("a", 0.9), ("d", None))]
    scores = ConfusionMatrix(1).scores().to_dict()
    _, lowest = image_scores(EvaluationFile(split="test", scores=scores, matrix=[[0]], per_image=per_image))
    assert [image.name for image in lowest] == ["b", "c", "a"]


def test_the_largest_confusions_are_counted_in_pixels():
    pairs = largest_confusions([[50, 30, 20], [0, 10, 0], [5, 0, 5]], count=2)
    assert [(pair.truth, pair.prediction, pair.pixels) for pair in pairs] == [(0, 1, 30), (0, 2, 20)]
    assert (pairs[0].share_of_class, pairs[0].share_of_errors) == (0.3, 30 / 55)
    assert largest_confusions([[3, 0], [0, 0]]) == []


def test_the_error_map_shows_right_wrong_and_void():
    image = np.full((8, 8, 3), 255, np.uint8)
    truth, prediction = np.zeros((8, 8), np.int64), np.zeros((8, 8), np.int64)
    prediction[0], truth[1] = 1, 255
    drawn = pictures.error_map(image, truth, prediction)
    assert (drawn[0] == pictures.ERROR_RGB).all()
    assert {tuple(pixel) for pixel in drawn[1].tolist()} == set(pictures.VOID_RGB)
    assert (drawn[2:] == 255).all()


def test_the_pictures_keep_the_colours_of_the_classes(make_run):
    run = make_run()
    classes = read_classes(run)
    file = EvaluationFile.model_validate_json((run / "evaluation-test.json").read_text())
    examples = pictures.read_examples(run, file, classes)
    assert [example.kind for example in examples] == ["best", "best", "median", "median", "worst", "worst"]
    assert all(example.score and example.score.name == example.name for example in examples)
    by_caption = {panel.caption: panel.uri for panel in examples[0].panels}
    assert list(by_caption) == ["image", "truth", "prediction", "errors"]
    shown = Image.open(io.BytesIO(base64.b64decode(by_caption["truth"].partition(",")[2]))).convert("RGB")
    kept = Image.open(run / "evaluation-test" / "best-1" / "truth.png").convert("RGB")
    assert np.array_equal(np.asarray(shown), np.asarray(kept))


def test_large_pictures_are_reduced_without_new_labels(make_run, make_spec, make_scenes):
    run = make_run(labels=make_spec(["a", "b", "c"]), scenes=make_scenes(3, 6, (300, 1000)))
    file = EvaluationFile.model_validate_json((run / "evaluation-test.json").read_text())
    classes = read_classes(run)
    for panel in pictures.read_examples(run, file, classes)[0].panels:
        picture = Image.open(io.BytesIO(base64.b64decode(panel.uri.partition(",")[2])))
        assert picture.size == (720, 216) and not panel.is_small
        if panel.caption in ("truth", "prediction"):
            found = {color for _, color in picture.convert("RGB").getcolors()}
            assert found <= {*classes.colors, (0, 0, 0)}


def test_numbers_are_formatted_for_people():
    assert formatting.percent(0.6543) == "65.4" and formatting.percent(1.0) == "100.0"
    assert formatting.percent(None) == formatting.percent(float("inf")) == formatting.DASH
    assert [formatting.share(value) for value in (None, 0.0, 0.00001, 0.002, 0.0123, 0.5)] == [
        "–", "0", "<0.01", "0.20", "1.2", "50.0",
    ]  # fmt: skip
    assert [formatting.count(value) for value in (None, 0, 999_999, 10**6, 4_100_000_000)] == [
        "–", "0", "999,999", "1.0 million", "4.1 billion",
    ]  # fmt: skip
    assert [formatting.plural(value, "image") for value in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [formatting.duration(value) for value in (None, 0.0, 59.99, 60, 1745, 3600, 90061)] == [
        "–", "0.0 s", "60.0 s", "1 min", "29 min 5 s", "1 h", "25 h 1 min",
    ]  # fmt: skip


def test_settings_are_formatted_as_text_of_bounded_length():
    values = (True, None, 0.00050, [1, 2.5], 31_032_395)
    assert [formatting.setting(value) for value in values] == ["yes", "–", "0.0005", "1, 2.5", "31,032,395"]
    assert formatting.setting("x" * 5000).endswith("…") and len(formatting.setting(list(range(5000)))) <= 600
    nested = {"optimiser": {"lr": 0.001, "clip": None}, "seed": 0}
    assert formatting.flatten(nested) == [("optimiser.lr", "0.001"), ("optimiser.clip", "–"), ("seed", "0")]
    united = {"crop_px": 320, "data": {"read_s": 75.0}, "memory_bytes": 3 << 29, "expected_seconds": 9, "steps": 9}
    assert formatting.describe(united) == [
        ("crop", "320 px"), ("data read", "1 min 15 s"), ("memory", "1.5 GiB"), ("expected", "9.0 s"), ("steps", "9"),
    ]  # fmt: skip
    assert formatting.command_line(["pixelwise", "train", "my data"]) == "pixelwise train 'my data'"
    assert formatting.command_line("pixelwise train x") == "pixelwise train x"


def test_of_very_many_rows_some_are_shown_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("pixelwise.report.run_folder.MAX_ROWS", 10)
    rows = [f"{step},{step / 10},{0.5 if step == 37 else ''}\n" for step in range(1, 101)]
    write_metrics(tmp_path, "step,train_loss,val_miou\n" + "".join(rows))
    columns = read_metrics(tmp_path)
    assert 10 <= len(columns["train_loss"]) <= 12 and columns["train_loss"][-1] == (100, 10.0)
    assert columns["val_miou"] == [(37, 0.5)]
    assert "one in 11 is shown" in training_curves(tmp_path)[0]
    monkeypatch.setattr("pixelwise.report.run_folder.MAX_METRICS_BYTES", 100)
    with pytest.raises(DataError, match=r"metrics\.csv cannot be shown: it has more than"):
        read_metrics(tmp_path)
