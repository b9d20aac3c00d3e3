"""What the data, the disk or the machine do in the middle of a training is one paragraph, and the checkpoint is kept."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.train import make_config, stream, train
from pixelwise.train.folder import LAST_NAME, checkpoint_step

TINY = {
    "model": "unet", "options": {"widths": [2, 3]}, "crop_px": 16, "batch_size": 6, "precision": "float32",
    "checkpoint_minutes": 0, "steps": 20, "validate_every": 1000,
}  # fmt: skip


def delete(data: Path, run: Path) -> None:
    (data / "train" / "images" / "train_1.png").unlink()


def replace(data: Path, run: Path) -> None:
    Image.new("RGB", (9, 9)).save(data / "train" / "images" / "train_1.png")


def exchange(data: Path, run: Path) -> None:
    images = data / "train" / "images"
    Image.open(images / "train_1.png").transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(run / "turned.png")
    (run / "turned.png").replace(images / "train_1.png")  # in one step, for a worker may be reading it


def shorten(data: Path, run: Path) -> None:
    path = data / "train" / "images" / "train_1.png"
    path.write_bytes(path.read_bytes()[:500])


def remove_run(data: Path, run: Path) -> None:
    shutil.rmtree(run)


def too_many(data: Path, run: Path) -> None:
    raise OSError(errno.EMFILE, "Too many open files", "a.png")


def no_processes(data: Path, run: Path) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


GOES_ON = "put them back. The checkpoint {run}/checkpoints/last.safetensors is kept. Then go on with --resume."


@pytest.mark.parametrize(
    ("fault", "workers", "told"),
    [
        (delete, 1, ("train_1.png: there is no such file.", GOES_ON)),
        (replace, 0, ("the mask is", "is 9 x 9 px", GOES_ON)),
        (exchange, 1, ("train_1.png: was replaced or changed since the training began (its", GOES_ON)),
        (shorten, 0, ("the file is damaged or truncated", GOES_ON)),
        (remove_run, 0, ("{run}: the run folder was removed or renamed", "go on with --resume and its new name.")),
        (too_many, 0, ("a.png: too many files are open at once (ulimit -n)", "is kept. Then go on with --resume.")),
        (no_processes, 0, ("no further process or thread may be started (ulimit -u", "is kept. Then go on with")),
    ],
)
def test_a_fault_in_the_middle_is_one_paragraph(
    fault: Callable[[Path, Path], None],
    workers: int,
    told: tuple[str, ...],
    toy_data: Path,
    tmp_path: Path,
    monkeypatch,
) -> None:
    monkeypatch.setattr(stream, "CACHE_SHARE", 0)  # every image is read when it is drawn
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(toy_data, data)

    def at_step_3(event: dict[str, object]) -> None:
        if event.get("step") == 3:
            fault(data, run)

    with pytest.raises(PixelwiseError) as caught:
        train(data, make_config({**TINY, "workers": workers}), out=run, report=at_step_3)
    message = str(caught.value)
    assert all(text.format(run=run) in message for text in told), message
    assert "Traceback" not in message and "\n" not in message
    if fault is remove_run:
        assert not run.exists()
    else:
        assert checkpoint_step(run / "checkpoints" / LAST_NAME) >= 2
    if fault is delete:  # as it says
        assert isinstance(caught.value, DataError)
        shutil.copy(toy_data / "train" / "images" / "train_1.png", data / "train" / "images")
        assert train(data, make_config({"workers": 0}), out=run, resume=True).steps == 20
