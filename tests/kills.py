"""Kills a training, a prediction or an inspection before every single file operation, and calls it again; prints JSON.

Usage: python tests/kills.py train DATA SCRATCH [STRIDE [STEPS]]
       python tests/kills.py predict DATA SCRATCH [STRIDE]

A fresh process with everything imported forks for each call. The child counts what it opens for writing, renames, removes
and makes in its output folder and in the folder of temporary files, and is gone (`os._exit`) before number n; there is one
run for each n, or for every STRIDE-th. A second call finishes it. All must then be as if nothing had been killed, and
nothing half written may ever have a final name.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file

from pixelwise.cli import main as pixelwise
from pixelwise.data.labels import LabelSpec
from pixelwise.formats import decoding
from pixelwise.infer import pipeline, store
from pixelwise.infer.bundle import ModelCard, load_bundle, load_card, save_bundle
from pixelwise.infer.evaluate import evaluate
from pixelwise.infer.outputs import RECORDS
from pixelwise.models import create_model
from pixelwise.report import write_report
from pixelwise.train import make_config, train
from pixelwise.train.folder import read_history

KILLED = 9
FOLDERS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.link": 2, "os.symlink": 2}
"""What is counted besides opening and cutting, and which of its arguments is the folder that the path is relative to."""

Facts = dict[str, Any]
Job = Callable[[Path], None]
CONFIG = {
    "model": "unet", "options": {"widths": [2, 3], "dropout": 0.3}, "crop_px": 16, "batch_size": 12, "workers": 0,
    "lr": 0.01, "precision": "float32", "checkpoint_minutes": 0, "validate_every": 2, "max_val_images": 2,
}  # fmt: skip
OPTIONS = [
    "--tile", "32", "--maps", "entropy", "--probabilities", "--geojson", "--coco", "--overlay", "--min-area", "3",
    "--device", "cpu",
]  # fmt: skip


def watch(folder: Path, kill_at: int) -> list[int]:
    """Count the operations below `folder`, and end before number `kill_at`; 0 only counts."""
    count = [0]

    def hook(event: str, given: tuple[Any, ...]) -> None:
        is_opened = event == "open" and bool(given[2] & (os.O_WRONLY | os.O_RDWR))
        if not is_opened and event not in FOLDERS and event != "os.truncate":
            return
        parent = given[FOLDERS[event]] if event in FOLDERS else None
        above = Path(f"/proc/self/fd/{parent}").readlink() if parent not in (None, -1) else Path()
        if str(above / str(given[0])).startswith(str(folder)):
            count[0] += 1
            if count[0] == kill_at:
                os._exit(KILLED)

    sys.addaudithook(hook)
    return count


def call(job: Job, place: Path, kill_at: int = 0) -> tuple[int, int]:
    """Do a job in `place`, in a child of its own: its exit code and how many operations it counted."""
    (place / "tmp").mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            tempfile.tempdir = str(place / "tmp")
            count = watch(place, kill_at)
            job(place / "out")
            decoding.stop()  # which the end of a process does; its folder must be gone before it is looked for
            os.write(writer, str(count[0]).encode())
            code = 0
        except BaseException:  # noqa: BLE001  (whatever it is belongs into the output)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    told = os.read(reader, 20)
    os.close(reader)
    return os.waitstatus_to_exitcode(status), int(told or 0)


def sweep(
    job: Job, facts: Callable[[Path], Facts], check: Callable[[Path, Facts], str], scratch: Path, stride: int
) -> Facts:
    """Do a job once without a kill and then once for every `stride`-th operation; what was counted and what was wrong.

    Args:
        job: does all the work in an output folder; called again, it goes on.
        facts: what must not depend on kills, of a folder that is done.
        check: what must not be in a folder after a kill, in words; it is given the facts of the whole one.
    """
    started = time.monotonic()
    code, operations = call(job, scratch / "whole")
    assert code == 0, "the call without a kill failed"
    wanted, kills, unusable, different = facts(scratch / "whole" / "out"), 0, [], []
    for number in range(1, operations + 1, stride):
        place = scratch / str(number)
        code, _ = call(job, place, kill_at=number)
        kills += code == KILLED
        if wrong := check(place / "out", wanted):
            unusable.append(f"{number}: {wrong}")
        code, _ = call(job, place)
        found = facts(place / "out") if code == 0 else {"code": code}
        if code or found != wanted:
            changed = {key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)}
            different.append({"kill": number} | {key: found.get(key) for key in sorted(changed)})
    seconds = round(time.monotonic() - started, 1)
    return {
        "operations": operations, "kills": kills, "unusable": unusable, "different": different, "seconds": seconds,
    }  # fmt: skip


# -- training, evaluation and report ----------------------------------------------------------------------------------


def train_all(data: Path, steps: int, out: Path) -> None:
    """Train or go on, evaluate and report."""
    is_begun = (out / "config.yaml").exists()
    train(data, None if is_begun else make_config({**CONFIG, "steps": steps}), out=out, resume=is_begun)
    evaluate(out, data, split="val")
    write_report(out)


def trained(out: Path) -> Facts:
    """What must not depend on kills: weights, card, log, score."""
    state, card = load_file(out / "model.safetensors"), load_card(out)
    digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
    rows = read_history(out / "metrics.csv")
    environment = json.loads((out / "environment.json").read_text())
    return {
        "weights": digest,
        "card": {"scores": card.scores, "mean": card.mean},
        "beside": json.loads((out / "model.json").read_text())["scores"],
        "validations": [(row["step"], row["val_miou"]) for row in rows if row["val_miou"]],
        "losses": [(row["step"], row["train_loss"]) for row in rows if row["train_loss"]],
        "best_miou": environment["best_miou"],
        "finished": environment["finished"],
        "report": (out / "report.html").is_file(),
        "left over": sorted(str(path.relative_to(out.parent)) for path in out.parent.rglob(".*")),
    }


def unusable(out: Path, _wanted: Facts) -> str:
    """Whether weights that are there cannot be loaded."""
    try:
        if (out / "model.safetensors").exists():
            load_bundle(out)
    except ValueError as error:
        return str(error)
    return ""


# -- prediction -------------------------------------------------------------------------------------------------------


def make_images(folder: Path) -> None:
    """Two photos, a tiled TIFF with a name that is long, and a Zarr; in two folders."""
    import zarr

    draws = np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    pixels = draws.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels[:20, :30]).save(folder / "a.png")
    Image.fromarray(pixels[:25, :20]).save(folder / "more" / "b.png")
    name = "scan of the second of march, left side, after " * 5 + ".tif"
    tifffile.imwrite(folder / "more" / name, pixels, tile=(32, 32), photometric="rgb")
    array = zarr.open_group(folder / "c.zarr", mode="w").create_array(
        "0", shape=(70, 40, 3), chunks=(35, 40, 3), dtype="uint8"
    )
    array[:] = pixels[:, :40]


def make_run(folder: Path) -> None:
    """A network that has learnt nothing."""
    torch.manual_seed(0)
    config = {"tiny": True, "num_classes": 2, "in_channels": 3}
    spec = LabelSpec(names=("ground", "disc"), colors=((0, 0, 0), (250, 0, 0)), values=((0,), (1,)))
    card = ModelCard(model="unet", config=config, labels=spec, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_bundle(folder, create_model("unet", **config), card)


def predict_all(run: Path, images: Path, data: Path, out: Path) -> None:
    """Label the images, and write proposed classes, as a user does."""
    for arguments in (
        ["predict", run, images, "--out", out, *OPTIONS],
        ["predict", run, images / "a.png", "--out", out / "cog", "--format", "cog"],
        *([["inspect", data, "--write-classes", out / "classes.yaml"]] if not (out / "classes.yaml").exists() else []),
    ):
        try:
            pixelwise([str(item) for item in arguments])
        except SystemExit as error:
            if error.code:
                raise


def predicted(out: Path) -> Facts:
    """The content of every file, of temporary ones too; of the records without the times of files."""
    found: Facts = {}
    for path in sorted(item for item in out.parent.rglob("*") if item.is_file() or item.parent.name == "tmp"):
        content = path.read_bytes() if path.is_file() else b""
        if path.parent.name == RECORDS or RECORDS in path.parts:
            content = json.dumps(
                {name: [known["provenance"], known["stamp"][2:]] for name, known in json.loads(content).items()}
            ).encode()
        found[str(path.relative_to(out.parent))] = hashlib.sha256(content).hexdigest()
    return found


def half_written(out: Path, wanted: Facts) -> str:
    """The files under final names that are not those of the whole call."""
    names = (path.relative_to(out.parent) for path in sorted(out.rglob("*")) if path.is_file())
    final = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    digests = {str(name): hashlib.sha256((out.parent / name).read_bytes()).hexdigest() for name in final}
    wrong = [name for name, digest in digests.items() if wanted.get(name) != digest]
    for zarr in {name.parents[-3] for name in final if len(name.parents) > 2 and name.parents[-3].suffix == ".zarr"}:
        inner = {name for name in wanted if Path(name).is_relative_to(zarr)}
        wrong += sorted(inner.difference(digests))
    return ", ".join(wrong)


def main() -> None:
    torch.set_num_threads(1)
    what, data, scratch = sys.argv[1], Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve()
    stride, steps = [int(text) for text in sys.argv[4:]] + [1, 4][len(sys.argv[4:]) :]
    os.fsync = lambda _file: None  # which no kill needs, only a power cut
    if what == "train":
        train_all(data, 1, scratch / "warm")  # so that all is imported already
        result = sweep(partial(train_all, data, steps), trained, unusable, scratch, stride)
    else:
        pipeline.ONE_PASS_PX, store.FLUSH_BYTES = 1_000, 1_000  # so that small images take the way of large ones
        make_images(scratch / "images")
        make_run(scratch / "network")
        job = partial(predict_all, scratch / "network", scratch / "images", data)
        job(scratch / "warm")
        result = sweep(job, predicted, half_written, scratch, stride)
    print(json.dumps(result))  # noqa: T201  (what the test reads)


if __name__ == "__main__":
    main()
