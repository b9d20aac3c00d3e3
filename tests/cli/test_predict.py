import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pixelwise.cli import main
from pixelwise.data.labels import LabelSpec
from pixelwise.files import hidden_name
from pixelwise.formats.opening import read_mask
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.predictor import load
from pixelwise.models import create_model

SPEC = LabelSpec(
    names=("sky", "road", "car"), colors=((9, 9, 250), (90, 80, 70), (250, 0, 0)), values=((0,), (1,), (2,))
)
CONFIG = {"tiny": True, "num_classes": 3, "in_channels": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    card = ModelCard(model="unet", config=CONFIG, labels=SPEC, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_bundle(folder, create_model("unet", **CONFIG), card)
    return folder


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (20, 31)), ("b.jpg", (17, 16)), ("night/c.webp", (40, 9)), ("night/d.tif", (1, 1))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def pixelwise(monkeypatch, capsys):
    """Run the command line as a user does; gives the exit code, what was printed and what was complained about."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pixelwise", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "1000")
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        return code, printed.out, printed.err

    return call


def test_a_folder_is_labelled_at_the_size_of_each_image(run, images, tmp_path, pixelwise):
    code, out, _ = pixelwise("predict", run, images, "--out", tmp_path / "out")
    assert (code, out) == (0, f"4 labelled: {tmp_path / 'out'}\n")
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    made = ["a.png", "b.png", "night/c.png", "night/d.tif"]
    assert names == [".pixelwise", *(f".pixelwise/{name}.json" for name in made), *made]
    predictor = load(run)
    for source in images.rglob("*.*"):
        is_tiff = source.suffix == ".tif"
        path = (tmp_path / "out" / source.relative_to(images)).with_suffix(".tif" if is_tiff else ".png")
        assert np.array_equal(read_mask(path), predictor.predict(source).labels)
        with Image.open(path) as picture:
            assert picture.mode == "P"
            assert tuple(picture.getpalette()[:9]) == (9, 9, 250, 90, 80, 70, 250, 0, 0)


def test_a_second_call_skips_what_is_finished(run, images, tmp_path, pixelwise):
    arguments = ("predict", run, images, "--out", tmp_path / "out")
    pixelwise(*arguments)
    (tmp_path / "out" / "a.png").unlink()
    assert pixelwise(*arguments)[:2] == (0, f"1 labelled, 3 finished before: {tmp_path / 'out'}\n")
    assert pixelwise(*arguments, "--overwrite")[:2] == (0, f"4 labelled: {tmp_path / 'out'}\n")


def test_labels_by_batch_statistics_are_not_taken_for_others(run, images, tmp_path, pixelwise):
    config = CONFIG | {"batch_norm": True}
    card = ModelCard(model="unet", config=config, labels=SPEC, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.manual_seed(0)
    save_bundle(tmp_path / "normed", create_model("unet", **config), card)
    (images / "night" / "d.tif").unlink()  # of one pixel there are no statistics
    arguments = ("predict", tmp_path / "normed", images, "--out", tmp_path / "out")
    assert pixelwise(*arguments)[1].startswith("3 labelled:")
    running = read_mask(tmp_path / "out" / "a.png")
    assert pixelwise(*arguments, "--batch-statistics")[1].startswith("3 labelled:")
    by_image = read_mask(tmp_path / "out" / "a.png")
    assert not np.array_equal(by_image, running)
    assert pixelwise(*arguments, "--batch-statistics")[1].startswith("0 labelled, 3 finished before:")
    assert pixelwise(*arguments)[1].startswith("3 labelled:")
    assert pixelwise("predict", run, images, "--out", tmp_path / "other", "--batch-statistics")[0] == 2


def test_overlays_and_probabilities(run, images, tmp_path, pixelwise):
    out = tmp_path / "out"
    code, _, _ = pixelwise(
        "predict", run, f"{images}/*.*g", "--out", out, "--overlay", "--probabilities", "--device", "cpu"
    )
    assert code == 0
    assert len(list(out.glob("[!.]*"))) == 6
    probabilities = np.load(out / "a_probabilities.npy", allow_pickle=False)
    assert (probabilities.shape, probabilities.dtype) == ((3, 20, 31), np.float32)
    assert np.array_equal(probabilities.argmax(axis=0), read_mask(out / "a.png"))
    with Image.open(out / "a_overlay.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (31, 20))


def test_a_broken_image_is_reported_and_the_others_are_labelled(run, images, tmp_path, pixelwise):
    (images / "aa.png").write_bytes((images / "a.png").read_bytes()[:60])
    code, out, err = pixelwise("predict", run, images, tmp_path / "no.png", "--out", tmp_path / "out")
    assert (code, out) == (1, f"4 labelled, 2 failed: {tmp_path / 'out'}\n")
    reports = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(reports) == 2
    assert str(tmp_path / "no.png") in reports[0]
    assert str(images / "aa.png") in reports[1]


def test_names_that_are_no_text_are_printed_and_used(run, tmp_path, pixelwise):
    name = b"caf\xe9\n[red]".decode("utf-8", "surrogateescape")
    (tmp_path / "in").mkdir()
    try:
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / f"{name}.png")
    except (OSError, ValueError):
        pytest.skip("this file system holds no such names")
    (tmp_path / "in" / f"{name}2.png").write_bytes(b"")
    code, _, err = pixelwise("predict", run, tmp_path / "in", "--out", tmp_path / "out")
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert "[red]2.png" in err
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == [f"{name}.png"]


@pytest.mark.parametrize("kind", ["auto", "none", "fold"])
def test_how_the_network_computes_is_told_for_many_images_or_if_it_was_asked_for(run, tmp_path, pixelwise, kind):
    for number in range(10):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (9, 7), number).save(tmp_path / "in" / f"{number}.png")
    given = ("--precision", "bf16", "--device", "cpu", "--accelerate", kind)
    said = "the network as it is" if kind == "none" else "batch norm folded into the convolutions"
    _, _, err = pixelwise("predict", run, tmp_path / "in", "--out", tmp_path / "out", *given)
    assert f"bf16 on cpu, {said}" in err
    _, _, err = pixelwise("predict", run, tmp_path / "in" / "1.png", "--out", tmp_path / "one", *given)
    assert (f"bf16 on cpu, {said}" in err) == (kind == "fold")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{images}/none.png", "--out", "{out}"], "there is no such file"),
        (["{run}", "{images}", "--out", "{images}"], "is also an input"),
        (["{out}/run", "{images}", "--out", "{out}"], "is not a folder"),
        (["{images}", "{images}", "--out", "{out}"], "holds no model.json"),
        (["{run}", "{images}", "--out", "{out}", "--device", "abacus"], "device 'abacus'"),
        (["{run}", "{images}", "--out", "{out}", "--precision", "int8"], "precision 'int8'"),
        (["{run}", "{images}"], "--out"),
        (["{run}"], "INPUTS"),
    ],
)
def test_wrong_usage_says_what_is_wrong_and_writes_nothing(run, images, tmp_path, pixelwise, arguments, message):
    out = tmp_path / "out"
    code, _, err = pixelwise("predict", *(text.format(run=run, images=images, out=out) for text in arguments))
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())
    assert not out.exists()


def test_two_images_of_one_name_are_refused_before_the_start(run, images, tmp_path, pixelwise):
    Image.new("RGB", (4, 4)).save(images / "a.bmp")
    code, _, err = pixelwise("predict", run, images, "--out", tmp_path / "out")
    assert code == 2
    assert "would both become" in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_hostile_card_is_an_error_of_one_paragraph(run, images, tmp_path, pixelwise):
    card = json.loads((run / "model.json").read_text())
    card["mean"] = ["0.5"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.json").write_text(json.dumps(card))
    shutil.copy(run / "model.safetensors", tmp_path / "run")
    code, _, err = pixelwise("predict", tmp_path / "run", images, "--out", tmp_path / "out")
    assert code == 2
    assert "'mean'" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "lots"], "--memory lots: write a size such as 2GiB"),
        (["--memory", "2"], "--memory 2 is 2 bytes, too little for any network; write 2GiB or 500MB"),
        (["--tile", "0"], "tile must be at least 1 px"),
        (["--blend", "linear"], "blend is one of gaussian, cosine, uniform"),
        (["--overlap", "0.5"], "add --blend gaussian"),
        (["--blend", "gaussian", "--overlap", "0.95"], "overlap must be a share from 0 to 0.9"),
        (["--blend", "gaussian", "--tolerance", "0.1"], "choose one"),
        (["--tta", "d8"], "tta is one of flips, d4, scales"),
        (["--tta", "d4", "--samples", "3"], "tta and samples cannot be combined"),
        (["--seed", "3"], "add --samples 20"),
        (["--maps", "entropy,surprise"], "there is no map 'surprise'; there are entropy, mutual_information"),
        (["--maps", "mutual-information"], "compares several passes"),
        (["--threshold", "sky"], "write CLASS=P"),
        (["--threshold", "sky=1.5"], "write CLASS=P"),
        (["--threshold", "sea=0.5"], "there is no class 'sea'"),
        (["--threshold", "sky=0.5", "--threshold", "sky=0.6"], "two thresholds"),
        (["--min-area", "-1"], "the smallest area must be 0 px or more"),
        (["--format", "bmp"], "there is no format 'bmp' for labels"),
        (["--intensity", "bright"], "write auto, type, or LOW,HIGH"),
        (["--engine", "cloud"], "there are local (this process) and ray"),
        (["--address", "host:6379"], "add --engine ray"),
        (["--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(
    run, images, tmp_path, pixelwise, options, message
):
    code, _, err = pixelwise("predict", run, images, "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_options_of_another_format_are_named(run, images, tmp_path, pixelwise):
    code, out, err = pixelwise("predict", run, images / "a.png", "--out", tmp_path / "out", "--axis", 1)
    assert (code, out) == (1, f"1 failed: {tmp_path / 'out'}\n".replace("1 failed", "0 labelled, 1 failed"))
    assert "has no option axis" in err


def test_a_large_image_with_everything(run, tmp_path, pixelwise, monkeypatch):
    monkeypatch.setattr(sys.modules["pixelwise.cli.predict"], "LOG_S", -1)
    rng = np.random.default_rng(0)
    tifffile.imwrite(tmp_path / "scene.tif", rng.integers(0, 256, (1100, 1000, 3), dtype=np.uint8), tile=(256, 256))
    arguments = (
        "predict", run, tmp_path / "scene.tif", "--out", tmp_path / "out", "--tile", 512, "--memory", "2GiB",
        "--maps", "entropy", "--threshold", "car=0.4", "--min-area", 4, "--coco", "--precision", "float32",
    )  # fmt: skip
    code, out, err = pixelwise(*arguments)
    assert (code, out) == (0, f"1 labelled: {tmp_path / 'out'}\n"), err
    assert "x the multiply-adds of one pass, at most" in err
    assert re.search(r"0 of 1 images done, and \d+% of the next", err)  # in a log, which has no bar
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".pixelwise", "scene.tif", "scene_coco.json", "scene_entropy.tif"]
    assert tifffile.imread(tmp_path / "out" / "scene.tif").shape == (1100, 1000)
    assert pixelwise(*arguments)[1].startswith("0 labelled, 1 finished before")


def test_a_large_image_has_the_labels_of_one_pass(run, tmp_path, pixelwise):
    rng = np.random.default_rng(1)
    tifffile.imwrite(tmp_path / "scene.tif", rng.integers(0, 256, (1040, 1030, 3), dtype=np.uint8))
    for memory in ("1GiB", "64MiB"):
        code, _, err = pixelwise(
            "predict",
            run,
            tmp_path / "scene.tif",
            "--out",
            tmp_path / memory,
            "--memory",
            memory,
            "--precision",
            "float32",
        )
        assert code == 0, err
    whole = load(run, precision="float32").predict(tmp_path / "scene.tif")
    best, second = np.sort(whole.logits.numpy(), axis=0)[[-1, -2]]
    clear = best - second > 1e-5
    for memory in ("1GiB", "64MiB"):
        labels = tifffile.imread(tmp_path / memory / "scene.tif")
        assert np.array_equal(labels[clear], whole.labels[clear])
    assert clear.mean() > 0.5  # the rest are ties of a hardly trained network


def test_help_shows_an_example(pixelwise):
    code, out, _ = pixelwise("predict", "--help")
    assert code == 0
    assert "Example: pixelwise predict" in " ".join(out.split())


def test_the_decoder_starts_before_torch_is_imported(tmp_path):
    """So that a single image that is no plain picture waits for no more than torch."""
    code = (
        "import sys; from pixelwise.formats import decoding; from pixelwise.cli import main\n"
        "def start(): print('torch' in sys.modules); raise SystemExit(0)\n"
        "decoding.start = start; main(['predict', 'run', 'a.tif', '--out', 'labels'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_what_killed_calls_left_is_removed_and_what_a_neighbour_writes_is_not(run, images, tmp_path, pixelwise):
    out = tmp_path / "out"
    assert pixelwise("predict", run, images, "--out", out)[0] == 0
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def hidden(path, pid):
        part = hidden_name(path, "part")
        return part.with_name(part.name.replace(f"-{os.getpid():x}-", f"-{pid:x}-"))

    left = [hidden(out / name, ended.pid) for name in ("a.png", "night/d.tif", ".pixelwise/night/d.tif.json")]
    written = [hidden(path.with_name("x"), os.getppid()) for path in left]
    for path in (*left, *written):
        path.write_bytes(b"half")
    stores = [out / "night" / f".{name}.store-{'0' * 16}" for name in ("d.tif", "e.tif")]  # the other is not finished
    for folder in stores:
        folder.mkdir()
    code, text, _ = pixelwise("predict", run, images, "--out", out)
    assert code == 0 and "4 finished before" in text
    assert not any(path.exists() for path in left) and all(path.exists() for path in written)
    assert [folder.exists() for folder in stores] == [False, True]


def test_names_may_be_as_long_as_the_disk_takes_them(run, images, tmp_path, pixelwise):
    out, name = tmp_path / "out", "ä" * 125 + ".png"  # 254 bytes
    shutil.copy(images / "a.png", images / name)
    shutil.copy(images / "a.png", images / f"{name[:-5]}ö.png")  # which differs at its end
    for told in ("6 labelled", "6 finished before"):
        code, text, err = pixelwise("predict", run, images, "--out", out)
        assert code == 0 and told in text and (out / name).exists(), err
    code, text, err = pixelwise("predict", run, images, "--out", tmp_path / "more", "--overlay")
    assert code == 1 and "4 labelled, 2 failed" in text
    assert err.count("its name is too long for this disk") == 2


def test_names_need_not_be_text(run, tmp_path, pixelwise):
    folder = tmp_path / os.fsdecode(b"\xff\nin")
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / os.fsdecode(b"caf\xe9.png"))
    out = tmp_path / os.fsdecode(b"out\xfe")
    code, text, err = pixelwise("predict", run, folder, "--out", out, "--geojson", "--coco", "--overlay", "--tile", "8")
    assert code == 0 and text.endswith("out\\udcfe\n"), err
    assert len([path for path in out.iterdir() if path.name.startswith("caf")]) == 4
    found = json.loads((out / os.fsdecode(b"caf\xe9.geojson")).read_text(encoding="utf-8"))
    assert found["name"] == "caf\\udce9"
