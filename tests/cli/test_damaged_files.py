"""200 damaged files among good ones: no traceback, no hang, the damaged are named and the good are labelled.

The damage is seeded. Some of it must make a file unreadable (`lethal`); of the rest only the decoder can say, so there
it is asked that each file is either used or named.
"""

import io
import struct
import sys
import time
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pixelwise.cli import main
from pixelwise.data.check import inspect_data
from pixelwise.data.classes import save_labels
from pixelwise.data.labels import LabelSpec
from pixelwise.data.layouts import open_data
from pixelwise.errors import DataError
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.models import create_model

SPEC = LabelSpec(names=("no", "yes"), colors=((0, 0, 0), (250, 0, 0)), values=((0,), (1,)))
CONFIG = {"tiny": True, "num_classes": 2, "in_channels": 3}
SIZE = (24, 31)
SECONDS = 60  # far more than needed, far less than a hang


def encoded(values, suffix, rng):
    """The bytes of an image file; TIFFs of several kinds."""
    buffer = io.BytesIO()
    if suffix == ".tif":
        options = [{}, {"compression": "zlib"}, {"compression": "lzw", "predictor": True}, {"tile": (16, 16)}]
        tifffile.imwrite(buffer, values, **options[int(rng.integers(0, len(options)))])
    else:
        formats = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
        Image.fromarray(values).save(buffer, formats[suffix])
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(header, data=b""):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def empty(content, rng):
    return b""


def cut_early(content, rng):
    return content[: int(rng.integers(1, 20))]


def text(content, rng):
    return b"<html>404: no such picture, but the download went on</html>"


def wrong_magic(content, rng):
    return rng.bytes(16) + content[16:]


def huge_png(content, rng):
    side = int(rng.choice([60_000, 2**31 - 1]))
    return png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"\0" * 100)


def impossible_png(content, rng):
    width, height, depth, colour = [(0, 0, 8, 2), (9, 9, 77, 2), (9, 9, 8, 99), (9, 9, 16, 3)][int(rng.integers(0, 4))]
    return png(struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0), b"\0" * 400)


def tiff_garbage(content, rng):
    start = [b"II*\0", b"MM\0*", b"II+\0"][int(rng.integers(0, 3))]
    return start + rng.bytes(int(rng.integers(0, 400)))


def tiff_that_points_at_itself(content, rng):
    """A directory whose next directory is itself, with one tag and no pixels."""
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 4, 1, 7, 8)


def zip_bomb_header(content, rng):
    return b"PK\x03\x04" + rng.bytes(200)


def cut_anywhere(content, rng):
    return content[: int(rng.integers(20, len(content)))]


def flip_bits(content, rng):
    damaged = bytearray(content)
    for place in rng.integers(0, len(damaged), int(rng.integers(1, 20))):
        damaged[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(damaged)


def overwrite_a_run(content, rng):
    start = int(rng.integers(0, len(content)))
    return content[:start] + rng.bytes(int(rng.integers(1, 60))) + content[start + 30 :]


def shuffle_blocks(content, rng):
    blocks = [content[at : at + 16] for at in range(0, len(content), 16)]
    return b"".join(blocks[index] for index in rng.permutation(len(blocks)))


LETHAL = (empty, cut_early, text, wrong_magic, huge_png, impossible_png, tiff_garbage, tiff_that_points_at_itself)
LETHAL += (zip_bomb_header,)
DAMAGES = (*LETHAL, cut_anywhere, flip_bits, overwrite_a_run, shuffle_blocks)
SUFFIXES = (".png", ".jpg", ".webp", ".bmp", ".gif", ".tif")


def damaged_files(count, rng, suffixes, make):
    """`count` times (name, content, whether it must be unreadable), all kinds of damage in turn."""
    for index in range(count):
        damage, suffix = DAMAGES[index % len(DAMAGES)], suffixes[index % len(suffixes)]
        content = damage(encoded(make(rng), suffix, rng), rng)
        yield f"{damage.__name__}_{index:03d}{suffix}", content, damage in LETHAL


def some_image(rng):
    return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def some_mask(rng):
    return rng.integers(0, 2, SIZE, dtype=np.uint8)


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    card = ModelCard(model="unet", config=CONFIG, labels=SPEC, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_bundle(tmp_path / "run", create_model("unet", **CONFIG), card)
    return tmp_path / "run"


def test_predict_labels_the_good_and_names_the_damaged(run, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(11)
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    must_fail, may_fail, good = set(), set(), set()
    for name, content, is_lethal in damaged_files(200, rng, SUFFIXES, some_image):
        (folder / name).write_bytes(content)
        (must_fail if is_lethal else may_fail).add(name)
    for index in range(30):
        name = f"good_{index:03d}{SUFFIXES[index % len(SUFFIXES)]}"
        (folder / name).write_bytes(encoded(some_image(rng), SUFFIXES[index % len(SUFFIXES)], rng))
        good.add(name)
    monkeypatch.setattr(sys, "argv", ["pixelwise", "predict", str(run), str(folder), "--out", str(out)])
    started = time.monotonic()
    with pytest.raises(SystemExit) as exited:
        main()
    assert time.monotonic() - started < SECONDS
    assert exited.value.code == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    reports = [line for line in printed.err.splitlines() if line.startswith("failed: ")]
    failed = {name for name in must_fail | may_fail for line in reports if f"/{name}" in line}
    assert len(reports) == len(failed)  # one line each
    labelled = {path.stem for path in out.iterdir() if path.name != ".pixelwise"}
    assert must_fail <= failed
    assert labelled == {name.rpartition(".")[0] for name in (good | may_fail) - failed}
    assert f"{len(labelled)} labelled, {len(failed)} failed" in printed.out
    assert len(failed) > 150


def test_inspecting_damaged_masks_and_images_gives_problems(tmp_path):
    rng = np.random.default_rng(12)
    root = tmp_path / "data"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    must_fail = set()
    for index, (name, content, is_lethal) in enumerate(damaged_files(200, rng, (".png", ".tif", ".bmp"), some_mask)):
        where, other = ("masks", "images") if index % 2 else ("images", "masks")
        (root / where / name).write_bytes(content)
        make = some_image if other == "images" else some_mask
        (root / other / name).with_suffix(".png").write_bytes(encoded(make(rng), ".png", rng))
        if is_lethal:
            must_fail.add(f"{where}/{name}")
    for index in range(10):
        (root / "images" / f"good{index}.png").write_bytes(encoded(some_image(rng), ".png", rng))
        (root / "masks" / f"good{index}.png").write_bytes(encoded(some_mask(rng), ".png", rng))
    save_labels(root / "classes.yaml", SPEC)
    started = time.monotonic()
    inspection = inspect_data(open_data(root))
    (root / "classes.yaml").unlink()
    try:
        inspect_data(open_data(root))  # classes are proposed from what can be read
    except DataError as error:
        assert str(root) in str(error)
    assert time.monotonic() - started < SECONDS
    fatal = " ".join(f"{problem.message} {' '.join(problem.files)}" for problem in inspection.problems)
    assert [name for name in must_fail if name not in fatal] == []
    assert "good" not in " ".join(problem.message for problem in inspection.problems if "read" in problem.message)
    with pytest.raises(DataError):
        inspection.raise_if_fatal()
