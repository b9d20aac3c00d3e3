"""Trains a tiny network, killed before every single file operation in its run folder, and goes on; prints JSON.

Usage: python tests/train/kills.py DATA SCRATCH [STEPS [STRIDE]]

A fresh process with everything imported forks for each call. The child counts what it opens for writing, renames, removes
and makes in the run folder, and is gone (`os._exit`) before number n; there is one run for each n, or for
every STRIDE-th. A second call finishes it.
"""

import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from pixelwise.infer.bundle import load_bundle, load_card
from pixelwise.infer.evaluate import evaluate
from pixelwise.report import write_report
from pixelwise.train import make_config, train
from pixelwise.train.folder import read_history

KILLED = 9
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
CONFIG = {
    "model": "unet", "options": {"widths": [2, 3], "dropout": 0.3}, "crop_px": 16, "batch_size": 12, "workers": 0,
    "lr": 0.01, "precision": "float32", "checkpoint_minutes": 0, "validate_every": 2, "max_val_images": 2,
}  # fmt: skip


def watch(folder: Path, kill_at: int) -> list[int]:
    """Count the operations below `folder`, and end before number `kill_at`; 0 only counts."""
    count = [0]

    def hook(event: str, given: tuple) -> None:
        if event not in OPERATIONS or not str(given[0]).startswith(str(folder)):
            return
        if event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count[0] += 1
        if count[0] == kill_at:
            os._exit(KILLED)

    sys.addaudithook(hook)
    return count


def call(data: Path, out: Path, steps: int, kill_at: int = 0) -> tuple[int, int]:
    """Train or go on, evaluate and report, in a child of its own: its exit code and how many operations it counted."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            count = watch(out, kill_at)
            is_begun = (out / "config.yaml").exists()
            train(data, None if is_begun else make_config({**CONFIG, "steps": steps}), out=out, resume=is_begun)
            evaluate(out, data, split="val")
            write_report(out)
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


def facts(out: Path) -> dict[str, object]:
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
        "left over": sorted(str(path.relative_to(out)) for path in out.rglob(".*")),
    }


def main() -> None:
    torch.set_num_threads(1)
    data, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    given = [int(text) for text in sys.argv[3:]]
    steps, stride = given + [4, 1][len(given) :]
    os.fsync = lambda _file: None  # which no kill needs, only a power cut
    started = time.monotonic()
    run = train(data, make_config({**CONFIG, "steps": 1}), out=scratch / "warm")  # so that all is imported already
    evaluate(run.folder, data, split="val")
    write_report(run.folder)
    code, operations = call(data, scratch / "whole" / "run", steps)
    assert code == 0, "the run without a kill failed"
    wanted, kills, unusable, different = facts(scratch / "whole" / "run"), 0, [], []
    for number in range(1, operations + 1, stride):
        out = scratch / str(number) / "run"  # the folder's name is in the card
        code, _ = call(data, out, steps, kill_at=number)
        kills += code == KILLED
        try:
            if (out / "model.safetensors").exists():
                load_bundle(out)
        except ValueError as error:
            unusable.append(f"{number}: {error}")
        code, _ = call(data, out, steps)
        if code or facts(out) != wanted:
            found = facts(out) if code == 0 else {"code": code}
            different.append({"kill": number} | {key: found[key] for key in found if found[key] != wanted.get(key)})
    seconds = round(time.monotonic() - started, 1)
    result = {
        "operations": operations,
        "kills": kills,
        "unusable": unusable,
        "different": different,
        "seconds": seconds,
    }
    print(json.dumps(result))  # noqa: T201  (what the test reads)


if __name__ == "__main__":
    main()
