"""Reading, wording, plots, pictures and the geometry of the confusion matrix, each on its own."""

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from pixelwise.errors import DataError
from pixelwise.report import pictures, wording
from pixelwise.report.figures import Line, plot_histogram, plot_lines
from pixelwise.report.matrix import draw_matrix, largest_confusions
from pixelwise.report.reading import EvaluationFile, read_classes, read_metrics
from pixelwise.report.sections import best_validation, training_curves


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
    curves = training_curves(
        write_metrics(tmp_path, "step,train_loss\n" + "".join(f"{k},{9 / k}\n" for k in range(1, 9)))
    )
    assert [curve.title for curve in curves.curves] == ["Loss"]
    assert curves.curves[0].keys == (("--series-1", "training"),)
    assert curves.summary == "8 steps."


def test_the_best_validation_is_the_first_of_equals():
    assert best_validation([(1, 0.2), (5, 0.7), (9, 0.7)]) == (5, 0.7)
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


def test_the_matrix_is_normalised_by_row_and_small_shares_are_blank():
    drawing = draw_matrix([[996, 4, 0], [500, 0, 500], [0, 0, 0]], ["sky", "tree", "x" * 90])
    assert {(cell.row, cell.column): round(cell.percent) for cell in drawing.cells} == {
        (0, 0): 100,
        (1, 0): 50,
        (1, 2): 50,
    }
    assert drawing.empty_rows == (2,)
    assert [cell.is_right for cell in drawing.cells] == [True, False, False]
    assert len(drawing.labels[2]) == 24 and drawing.labels[2].endswith("…")
    assert len(draw_matrix([[1]], ["道路" * 20]).labels[0]) == 12


@pytest.mark.parametrize("num_classes", [1, 2, 11, 40, 120])
def test_the_cells_of_the_matrix_lie_inside_the_drawing(num_classes):
    drawing = draw_matrix(np.ones((num_classes, num_classes), int).tolist(), [f"class {k}" for k in range(num_classes)])
    assert all(0 <= cell.x <= drawing.width - drawing.cell + 1e-6 for cell in drawing.cells)
    assert all(0 <= cell.y <= drawing.height - drawing.cell + 1e-6 for cell in drawing.cells)
    assert drawing.is_numbered == (num_classes <= 40)
    assert drawing.font >= 8 or not drawing.is_numbered


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


def test_numbers_are_worded_for_people():
    assert wording.percent(1.0) == "100.0" and wording.percent(float("inf")) == wording.DASH
    assert [wording.share(value) for value in (None, 0.0, 0.002, 0.5)] == ["–", "0", "0.20", "50.0"]
    assert [wording.count(value) for value in (None, 0, 999_999, 10**6)] == ["–", "0", "999,999", "1.0 million"]
    assert [wording.duration(value) for value in (None, 0.0, 59.99, 60, 3600, 90061)] == [
        "–", "0.0 s", "60.0 s", "1 min", "1 h", "25 h 1 min",
    ]  # fmt: skip
    assert wording.setting("x" * 5000).endswith("…") and len(wording.setting(list(range(5000)))) <= 600
    assert wording.command_line("pixelwise train x") == "pixelwise train x"
