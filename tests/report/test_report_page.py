"""The report is one self-contained, well-formed, escaped page, whatever the run folder holds or lacks."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from pixelwise.cli.report import report
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.metrics import ConfusionMatrix
from pixelwise.report import write_report

VOID_TAGS = {"meta", "img", "br", "link", "input", "hr"}
FILES = ["model.json", "config.yaml", "plan.json", "data.json", "environment.json", "metrics.csv"]
EVIL = "</td></svg><script>alert(1)</script><img src=x onerror='alert(2)'>\"'{{ 7 * 7 }}$x^2$"


class Page(HTMLParser):
    """Collects what a browser would see, and fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [attrs[name] or "" for found, attrs in self.tags if found == tag and name in attrs]


def read(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_a_whole_run_is_shown_whole(make_run):
    run = make_run(splits=("test", "val"))
    page = read(run)
    evaluation = json.loads((run / "evaluation-test.json").read_text())
    scores = evaluation["scores"]
    for expected in (
        f"{100 * scores['miou']:.1f}",
        f"{100 * scores['iou'][3]:.1f}",
        "scored on the test split: 9 images",
        "pedestrian",
        "1,200 steps, 24 epochs, 29 min",
        "warning : test/0001.png",
        "4,652,331",
        "augment.flip",
        "pixelwise train data/camvid --model encoder_decoder --out 'runs/my run'",
        "29 min 5 s",
        f"Best · {evaluation['examples']['best-1']} · mIoU",
        "data/camvid",
    ):
        assert expected in page.text, expected
    assert page.text.count("errors") >= 6
    assert len(page.values("img", "src")) == 6 * 4
    assert len([tag for tag, attrs in page.tags if tag == "svg"]) == 4 + 1
    assert 'class="note"' not in (run / "report.html").read_text()


def test_the_page_needs_nothing_from_outside(make_run):
    run = make_run()
    page, text = read(run), (run / "report.html").read_text()
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert all(uri.startswith("data:image/") for uri in page.values("img", "src"))
    targets = [href for tag, attrs in page.tags for key, href in attrs.items() if key in ("href", "xlink:href")]
    assert targets and all(href.startswith("#") for href in targets)
    assert {href[1:] for href in page.values("a", "href")} <= {attrs.get("id") for _, attrs in page.tags}
    assert not re.search(r"url\((?!#)|@import", text)
    assert set(re.findall(r"https?://[\w./-]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_same_run_gives_the_same_bytes(make_run, tmp_path):
    run = make_run()
    assert write_report(run).read_bytes() == write_report(run, tmp_path / "again.html").read_bytes()


@pytest.mark.parametrize("missing", [*FILES, "evaluation-test.json", "evaluation-test"])
def test_a_missing_file_costs_one_section_and_is_said(make_run, missing):
    run = make_run()
    whole = read(run)
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = read(run)
    if missing == "model.json":  # what it tells is in data.json and plan.json as well
        assert page.text == whole.text
        return
    said = "has not been evaluated yet" if missing == "evaluation-test.json" else f"{missing} "
    assert said in page.text and said not in whole.text
    assert len(page.text) > 1000


@pytest.mark.parametrize("damaged", [*FILES, "evaluation-test.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00{", b"[1, 2]", b"{}", b'{"splits": 3, "matrix": [[1, 2]]}'])
def test_a_damaged_file_costs_one_section_and_is_said(make_run, damaged, content):
    run = make_run(curves=False)
    (run / damaged).write_bytes(content)
    page = read(run)
    if damaged not in ("model.json", "plan.json", "config.yaml", "environment.json"):
        assert f"{damaged} " in page.text  # the others may hold any mapping
    assert "bicyclist" in page.text


def test_only_what_is_left_is_shown(make_run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(make_run() / "metrics.csv", bare)
    page = read(bare)
    assert "Best validation mIoU in training" in page.text and page.text.count("is not in the run folder") == 4
    shutil.copy(tmp_path / "my run" / "evaluation-test.json", bare)
    (bare / "metrics.csv").unlink()
    page = read(bare)
    assert "class 3" not in page.text and "bicyclist" in page.text  # the evaluation names its classes too


def test_nothing_a_user_named_can_become_markup(make_run, make_spec, make_scenes, tmp_path):
    names = (EVIL, "naïve $\\frac{", "道路" * 20, "&lt;", "<b>bold</b>")
    scenes = [(f"{EVIL}/{index}", image, truth) for index, (_, image, truth) in enumerate(make_scenes(5, 6))]
    run = make_run(labels=make_spec(names), scenes=scenes).rename(tmp_path / "<script>run")
    (run / "plan.json").write_text(json.dumps({EVIL: EVIL, "list": [EVIL]}))
    (run / "config.yaml").write_text(json.dumps({EVIL: {EVIL: EVIL}}))
    (run / "environment.json").write_text(json.dumps({"command": ["pixelwise", EVIL, "\udcff"], EVIL: EVIL}))
    data = json.loads((run / "data.json").read_text())
    data |= {"root": EVIL, "layout": EVIL, "sizes": {EVIL: 3}, "dtypes": {EVIL: 1}, "fingerprint": EVIL}
    data["problems"] = [{"severity": EVIL, "message": EVIL}]
    data["splits"] = {EVIL: data["splits"]["train"]}
    (run / "data.json").write_text(json.dumps(data))
    page = read(run)
    assert {"script", "b"} & {tag for tag, _ in page.tags} == {"b"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(uri.startswith("data:") for uri in page.values("img", "src"))
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text and "<b>bold</b>" in page.text
    assert "alert(1)</script>" not in (run / "report.html").read_text()


def test_random_values_in_the_files_never_raise(make_run):
    run, rng = make_run(curves=False), np.random.default_rng(0)
    strange = [None, -1, 10**30, 1e308, "x" * 9999, [], {}, [[]], [None], {"a": {}}, True, "\udcff", "../../etc"]
    for _ in range(30):
        name = ["data.json", "evaluation-test.json", "environment.json", "model.json", "plan.json"][rng.integers(5)]
        original = (run / name).read_text()
        content = json.loads(original)
        inner = content
        while True:
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            key = keys[int(rng.integers(len(keys)))]
            if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.3:
                break
            inner = inner[key]
        inner[key] = strange[int(rng.integers(len(strange)))]
        (run / name).write_text(json.dumps(content))
        read(run)
        (run / name).write_text(original)


def test_a_yaml_that_repeats_itself_without_end_is_cut_short(make_run):
    run = make_run(curves=False)
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{k}: &{k} [{', '.join(['*' + p] * 9)}]\n" for p, k in zip("abcdefgh", "bcdefghi", strict=True))
    maps = "ma: &ma {x: 1, y: 2, z: 3, u: 4, v: 5, w: 6}\n"
    for before, key in zip("abcdefg", "bcdefgh", strict=True):
        maps += f"m{key}: &m{key} {{{', '.join(f'k{n}: *m{before}' for n in range(9))}}}\n"
    (run / "config.yaml").write_text(bomb + maps + "loop: &loop [*loop]\nme: &me {me: *me}\n")
    assert len(write_report(run).read_bytes()) < 2_000_000


def test_an_absent_class_is_named_and_undefined_scores_are_dashes(make_run, make_spec, make_scenes):
    run = make_run(curves=False, labels=make_spec(["road", "car", "unicorn"]), scenes=make_scenes(2, 6))
    page = read(run)
    assert "Classes in neither truth nor prediction are left out of the means: unicorn." in page.text
    assert "unicorn – – – – 0" in page.text and "A dash means that the score is undefined" in page.text
    assert "not in the truth" in page.text


def test_an_evaluation_without_pixels_is_shown_as_undefined(make_run):
    run = make_run(curves=False)
    path = run / "evaluation-test.json"
    content = json.loads(path.read_text())
    content["matrix"] = [[0] * 11 for _ in range(11)]
    content["scores"] = ConfusionMatrix(11).scores().to_dict()
    content["per_image"] = [{"name": "a", "miou": None, "global_accuracy": None, "pixels": 0}]
    path.write_text(json.dumps(content))
    page = read(run)
    assert "mIoU, test – %" in page.text and "holds no scores of single images" not in page.text


def cells(page: Page) -> dict[tuple[int, ...], tuple[str | None, float]]:
    """Class and fill of each cell of the confusion matrix, by row and column."""
    found = {}
    for _, attrs in page.tags:
        if match := re.match(r"grid-area:(\d+)/(\d+);--fill:([\d.]+)", attrs.get("style") or ""):
            found[int(match[1]) - 3, int(match[2]) - 3] = ((attrs.get("class") or "").split()[0], float(match[3]))
    return found


def test_the_matrix_is_normalised_by_row_and_small_shares_are_blank(make_run, make_spec, make_scenes):
    run = make_run(curves=False, labels=make_spec(["sky", "tree", "x" * 90]), scenes=make_scenes(3, 6))
    path = run / "evaluation-test.json"
    content = json.loads(path.read_text())
    confusion = ConfusionMatrix(3)
    confusion.matrix += torch.tensor([[996, 4, 0], [500, 0, 500], [0, 0, 0]])
    path.write_text(json.dumps(content | {"matrix": confusion.matrix.tolist(), "scores": confusion.scores().to_dict()}))
    page = read(run)
    assert cells(page) == {
        (0, 0): ("right", 1.0),
        (1, 0): ("wrong", 0.63),
        (1, 1): ("right", 0.0),
        (1, 2): ("wrong", 0.63),
        (2, 2): ("right", 0.0),
    }
    assert "100 50 50 not in the truth" in page.text
    assert "tree predicted as sky: 50.0 %" in page.values("i", "title")


@pytest.mark.parametrize("num_classes", [1, 2, 19, 40, 254])
def test_any_number_of_classes_fits(make_run, make_spec, make_scenes, num_classes):
    labels = make_spec([f"class number {index}" for index in range(num_classes)])
    run = make_run(curves=False, labels=labels, scenes=make_scenes(num_classes, 6))
    assert f"class number {num_classes - 1}" in read(run).text
    assert (run / "report.html").stat().st_size < 2_000_000


def test_the_page_stays_under_five_megabytes(make_run, make_scenes):
    rng = np.random.default_rng(0)
    scenes = [
        (
            name,
            rng.integers(0, 256, (1024, 1024, 3)).astype(np.uint8),
            rng.integers(0, 11, (1024, 1024)).astype(np.uint8),
        )
        for name, _, _ in make_scenes(11, 2, (8, 8))
    ]
    assert write_report(make_run(curves=False, scenes=scenes)).stat().st_size < 5_000_000


def test_damaged_pictures_cost_one_example(make_run):
    run = make_run(curves=False)
    folder = run / "evaluation-test"
    (folder / "best-1" / "truth.png").write_bytes(b"nothing")
    (folder / "best-2" / "image.png").unlink()
    Image.new("L", (5, 5)).save(folder / "worst-1" / "prediction.png")
    page = read(run)
    assert page.text.count("missing or unreadable") == 2 and "different sizes" in page.text
    assert len(page.values("img", "src")) == 3 * 4


def test_the_split_inside_a_file_leads_nowhere_else(make_run):
    run = make_run(curves=False)
    path = run / "evaluation-test.json"
    path.write_text(path.read_text().replace('"split": "test"', '"split": "../../elsewhere"'))
    page = read(run)
    assert "elsewhere" not in page.text and len(page.values("img", "src")) == 24


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder", "foreign folder"])
def test_what_is_no_run_is_refused(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("x")
    elif kind != "missing":
        path.mkdir()
    if kind == "foreign folder":
        (path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="run folder that `pixelwise train` wrote"):
        write_report(path)


def test_the_file_may_go_elsewhere_but_not_onto_a_folder(make_run, tmp_path):
    run = make_run(curves=False)
    assert write_report(run, tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    assert not (run / "report.html").exists()
    with pytest.raises(UsageError, match="is a folder"):
        write_report(run, tmp_path)
    (tmp_path / "taken").write_text("x")
    with pytest.raises(PixelwiseError, match="cannot be written"):
        write_report(run, tmp_path / "taken" / "page.html")


def test_no_state_of_pyplot_is_touched(make_run):
    code = (
        "import sys; from pixelwise.report import write_report; write_report(sys.argv[1]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(make_run())], check=True, timeout=120)


def test_the_command_writes_the_page_and_says_where(make_run, tmp_path):
    app = typer.Typer()
    app.command()(report)
    run = make_run()
    result = CliRunner().invoke(app, [str(run)])
    assert result.exit_code == 0 and (run / "report.html").is_file()
    assert str(run / "report.html") in result.output
    result = CliRunner().invoke(app, [str(run), "--out", str(tmp_path / "[b]page.html")])
    assert result.exit_code == 0 and "[b]page.html" in result.output
    assert "Example" in CliRunner().invoke(app, ["--help"]).output
