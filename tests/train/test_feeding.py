"""How crops reach the network: smaller ones first, pasted objects, and how long it waits for them."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pixelwise
from pixelwise.cli import main
from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.errors import UsageError
from pixelwise.train import make_config
from pixelwise.train.folder import read_history
from pixelwise.train.network import start_network, warm_side
from pixelwise.train.order import BatchStream
from pixelwise.train.plan import make_plan
from pixelwise.train.stream import CropSet, make_dataset, make_stream

TINY = {
    "model": "unet", "options": {"widths": [4, 6]}, "crop_px": 64, "batch_size": 2, "workers": 0, "ema": 0,
    "precision": "float32", "device": "cpu",
}  # fmt: skip


def made(root: Path, first_step: int = 0, spent: float = 0.0, **options: object) -> tuple[object, ...]:
    """The plan, and the first six batches."""
    config, inspection = make_config(TINY | options), inspect_data(open_data(root, ignore=(255,)))
    start = start_network(config, inspection, is_resumed=False)
    plan = make_plan(config, inspection, start)
    dataset = make_dataset(config, plan, inspection, start.model)
    loader = make_stream(config, plan, dataset, first_step, lambda: spent)
    return plan, list(itertools.islice(iter(loader), 6)), loader


# -- smaller crops first --


@pytest.mark.parametrize(("crop_px", "share", "side"), [(352, 0.5, 192), (256, 0.5, 128), (64, 0.1, 32), (352, 1.0, 0)])
def test_warm_sides_are_multiples_of_32_px(crop_px: int, share: float, side: int) -> None:
    assert warm_side(make_config({"warm_size": share}), crop_px) == side


@pytest.mark.parametrize(("crop_px", "share"), [(32, 0.5), (64, 0.9), (16, 0.5)])
def test_a_warm_side_that_is_not_smaller_is_refused(crop_px: int, share: float) -> None:
    with pytest.raises(UsageError, match=r"warm_size=.* Choose a smaller warm_size"):
        warm_side(make_config({"warm_size": share}), crop_px)


def test_the_first_half_of_the_steps_has_smaller_crops_wherever_it_is_entered(toy_data: Path) -> None:
    plan, batches, _ = made(toy_data, steps=5, warm_size=0.5)
    assert plan.warm_px == 32
    assert [batch[0].shape[1] for batch in batches] == [32, 32, 32, 64, 64, 64]  # steps 0, 1, 2 lie before 2.5
    assert [batch[2].shape for batch in batches[2:4]] == [(2, 32, 32), (2, 64, 64)]
    _, later, _ = made(toy_data, first_step=2, steps=5, warm_size=0.5)
    for one, other in zip(batches[2:], later, strict=False):
        assert all(map(torch.equal, one, other))
    _, plain, _ = made(toy_data, steps=5)
    assert all(map(torch.equal, plain[4], batches[4]))  # what comes later is what would have come


@pytest.mark.parametrize(("spent", "side"), [(0.49, 32), (0.5, 64)])
def test_of_a_time_the_first_half_has_smaller_crops(toy_data: Path, spent: float, side: int) -> None:
    _, batches, _ = made(toy_data, first_step=900, spent=spent, minutes=1, warm_size=0.5)
    assert {batch[0].shape[1] for batch in batches} == {side}


def test_a_stream_asks_before_each_batch_since_time_passes_while_it_is_used() -> None:
    asked: list[int] = []
    stream = BatchStream(
        4, batch_size=2, seed=0, first_step=3, is_warm=lambda step: asked.append(step) or len(asked) < 3
    )
    keys = [batch[0][2:] for batch in itertools.islice(iter(stream), 4)]
    assert keys == [(True,), (True,), (), ()] and asked == [3, 4, 5, 6]


def test_a_plan_counts_on_the_faster_steps(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # other tests' times are not of these steps

    def timed(_config: Any, _model: Any, shape: tuple[int, int, int], _device: Any, precisions: Any, _most: Any) -> Any:
        return {name: [0.1 * shape[2] / 64] for name in precisions}

    for module in ("plan", "timing"):
        monkeypatch.setattr(f"pixelwise.train.{module}.time_steps", timed)
    monkeypatch.setattr("pixelwise.train.plan._image_s", lambda *_: 0.0)
    plain, warm = (made(toy_data, steps=100, warm_size=share)[0] for share in (1.0, 0.5))
    assert (plain.expected_s, warm.expected_s) == pytest.approx((10, 7.5))
    plain, warm = (made(toy_data, minutes=1, warm_size=share)[0] for share in (1.0, 0.5))
    assert (plain.steps, warm.steps) == (552, 828)  # 92 % of a minute; half of it twice as fast


def test_networks_of_windows_refuse_crops_of_two_sizes(toy_data: Path, tmp_path: Path) -> None:
    for option in ({"warm_size": 0.5}, {"copy_paste": 0.5}):
        config = make_config({"model": "patch_classifier", "steps": 1, **option})
        with pytest.raises(UsageError, match=f"not on crops, so {next(iter(option))} means nothing"):
            pixelwise.train(toy_data, config, out=tmp_path / "run")


def test_a_resumed_run_is_the_same_with_small_crops_and_pasted_objects(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        TINY | {"steps": 6, "warm_size": 0.5, "copy_paste": 0.7, "validate_every": 1.0, "batch_size": 6}
    )
    whole = pixelwise.train(toy_data, config, out=tmp_path / "whole")
    real = CropSet.__getitem__
    for stop_at in (2, 4):  # before the middle, and behind it

        def dying(self: CropSet, key: tuple[int, ...], stop_at: int = stop_at) -> tuple[torch.Tensor, ...]:
            if key[1] >= 6 * (stop_at + 2):
                raise OSError("the machine stops")
            return real(self, key)

        monkeypatch.setattr(CropSet, "__getitem__", dying)
        with pytest.raises(Exception, match="the machine stops"):
            pixelwise.train(toy_data, config, out=tmp_path / f"cut{stop_at}")
        monkeypatch.setattr(CropSet, "__getitem__", real)
        resumed = pixelwise.train(toy_data, out=tmp_path / f"cut{stop_at}", resume=True)
        ours, theirs = (load_file(run.folder / "model.safetensors") for run in (whole, resumed))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# -- pasted objects --


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight dark scenes, of which one holds a bright square of class 1, and one for validation."""
    root = tmp_path_factory.mktemp("rare")
    for index in range(9):
        mask = np.zeros((64, 64), np.uint8)
        mask[20:30, 20:30] = index == 5
        mask[60:] = 255
        for kind, array in (("images", 40 + 150 * (mask == 1)), ("masks", mask)):
            path = root / ("train" if index < 8 else "val") / kind / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)
    return root


def test_crops_of_other_images_show_the_rare_object(rare: Path) -> None:
    options = {"scale": (1.0, 1.0), "flips": "none", "photometric": 0.0, "batch_size": 8}
    _, plain, _ = made(rare, steps=6, **options)
    _, batches, _ = made(rare, steps=6, copy_paste=0.5, **options)
    shows = [sum(int((mask == 1).any()) for batch in found for mask in batch[2]) for found in (plain, batches)]
    assert shows[0] == 6 and 24 < shows[1] < 40  # of 48: one in eight, and half of the others
    for images, _, masks in batches:
        assert torch.equal(images[..., 0] > 100, masks == 1)  # 190 where the square is, 40 elsewhere
    _, again, _ = made(rare, steps=6, copy_paste=0.5, **options)
    assert all(
        torch.equal(a, b) for one, other in zip(batches, again, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_weights_of_gaps_and_pasted_objects_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="copy_paste and separation exclude each other"):
        make_config({"copy_paste": 0.5, "separation": 10})


# -- waiting --


def test_the_time_waited_for_crops_is_recorded_and_told(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = CropSet.__getitem__
    monkeypatch.setattr(CropSet, "__getitem__", lambda self, key: time.sleep(0.03) or real(self, key))
    monkeypatch.setattr("pixelwise.cli.progress.LINE_EVERY_S", 0.5)
    settings = [f"--set={key}={value}" for key, value in TINY.items() if key not in ("model", "options")]
    arguments = ["train", str(toy_data), "--out", str(tmp_path / "run"), "--model=unet", "--steps=20", *settings]
    monkeypatch.setattr("sys.argv", ["pixelwise", *arguments, "--set=options.widths=[4, 6]"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = [row for row in read_history(tmp_path / "run/metrics.csv") if row["wait"]]
    assert [int(row["step"]) for row in rows] == [10, 20]
    assert all(0.3 < float(row["wait"]) <= 1 for row in rows)
    assert "% of the time for its crops: with --set workers=" in capsys.readouterr().out


def test_a_loader_counts_the_seconds_until_a_batch_is_there(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = CropSet.__getitem__
    monkeypatch.setattr(CropSet, "__getitem__", lambda self, key: time.sleep(0.01) or real(self, key))
    _, _, loader = made(toy_data, steps=5)
    assert 6 * 2 * 0.01 <= loader.waited_s < 10
