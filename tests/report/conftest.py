"""A made-up run folder: every file in the form that training and evaluation write, and consistent with the others."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pixelwise.data.labels import CAMVID_COLORS, CAMVID_NAMES, LabelSpec, distinct_colors
from pixelwise.files import write_json, write_text
from pixelwise.metrics import ConfusionMatrix

VOID = 255
Scene = tuple[str, np.ndarray, np.ndarray]  # name, image (H, W, 3), truth (H, W)


def draw_scenes(num_classes: int, count: int, size: tuple[int, int] = (48, 64), seed: int = 0) -> list[Scene]:
    """Blobs of every class, in the colours of nothing in particular, with a border of void."""
    rng = np.random.default_rng(seed)
    scenes = []
    for index in range(count):
        coarse = rng.integers(0, num_classes, size=(6, 8)).astype(np.uint8)
        truth = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.NEAREST)).copy()
        shades = rng.integers(0, 256, size=(num_classes, 3))
        image = np.clip(shades[truth] + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
        truth[:2] = VOID
        scenes.append((f"drive/{index:03d}", image, truth))
    return scenes


def guess(truth: np.ndarray, quality: float, seed: int) -> np.ndarray:
    """A prediction with errors at the borders, and more of them the lower the quality (0..1)."""
    rng = np.random.default_rng(seed)
    reach = round(1 + 6 * (1 - quality))
    shifted = np.roll(truth, (rng.integers(-reach, reach + 1), rng.integers(-reach, reach + 1)), axis=(0, 1))
    height, width = truth.shape
    coarse = Image.fromarray(rng.random((9, 12)).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    lost = np.asarray(coarse) > 0.25 + 0.7 * quality
    shifted[lost] = rng.choice(truth[truth != VOID])
    shifted[shifted == VOID] = truth[truth != VOID][0]
    return shifted


def write_run(
    run: Path,
    *,
    labels: LabelSpec | None = None,
    scenes: Sequence[Scene] = (),
    splits: Sequence[str] = ("test",),
    curves: bool = True,
) -> Path:
    """Write a complete run folder (but the weights) and return it."""
    labels = labels or LabelSpec(
        names=CAMVID_NAMES, colors=CAMVID_COLORS, values=tuple((k,) for k in range(11)), ignore_values=(11,)
    )
    scenes = scenes or draw_scenes(labels.num_classes, 9)
    for split in splits:
        _write_evaluation(run, split, labels, scenes)
    if curves:  # drawing them takes most of the time of a report
        _write_metrics(run)
    _write_settings(run, labels)
    _write_data(run, labels, scenes)
    return run


def spec(names: Sequence[str]) -> LabelSpec:
    """Classes of these names in any colours."""
    return LabelSpec(
        names=tuple(names), colors=distinct_colors(len(names)), values=tuple((k,) for k in range(len(names)))
    )


def _write_evaluation(run: Path, split: str, labels: LabelSpec, scenes: Sequence[Scene]) -> None:
    whole, per_image, predictions = ConfusionMatrix(labels.num_classes), [], []
    for index, (name, _, truth) in enumerate(scenes):
        prediction = guess(truth, 1 - index / len(scenes), index)
        one = ConfusionMatrix(labels.num_classes)
        one.update(prediction, truth)
        whole += one
        scores = one.scores()
        entry = {"name": name, "miou": scores.miou, "global_accuracy": scores.global_accuracy, "pixels": scores.pixels}
        per_image.append(entry)
        predictions.append(prediction)
    ranked = sorted(range(len(scenes)), key=lambda index: (-per_image[index]["miou"], per_image[index]["name"]))
    middle = len(ranked) // 2
    chosen = {"best": ranked[:2], "median": ranked[middle - 1 : middle + 1], "worst": ranked[:-3:-1]}
    examples = {f"{kind}-{rank}": index for kind, group in chosen.items() for rank, index in enumerate(group, 1)}
    for folder, index in examples.items():
        _write_pictures(run / f"evaluation-{split}" / folder, labels, scenes[index], predictions[index])
    content = {"split": split, "scores": whole.scores().to_dict(), "matrix": whole.matrix.tolist()}
    content |= {"per_image": per_image, "images": len(scenes), "seconds": 12.5, "names": list(labels.names)}
    content |= {"examples": {folder: scenes[index][0] for folder, index in examples.items()}}
    write_json(run / f"evaluation-{split}.json", content)


def _write_pictures(folder: Path, labels: LabelSpec, scene: Scene, prediction: np.ndarray) -> None:
    folder.mkdir(parents=True)
    Image.fromarray(scene[1]).save(folder / "image.png")
    for name, values in (("truth", scene[2]), ("prediction", prediction)):
        picture = Image.fromarray(values)
        picture.putpalette(labels.palette_bytes())
        picture.save(folder / f"{name}.png")


def _write_metrics(run: Path, steps: int = 1200, epochs: int = 24) -> None:
    rng = np.random.default_rng(0)
    lines = ["step,epoch,elapsed_s,lr,train_loss,images_per_s,val_miou,val_global_accuracy"]
    for step in range(1, steps + 1):
        done = step / steps
        loss = 0.25 + 2.2 * np.exp(-6 * done) + 0.12 * rng.normal() * np.exp(-2 * done)
        lr, speed = 0.001 * min(1, done * 20) * (1 - done) ** 0.9, 5.6 + 0.3 * rng.normal()
        validation = ","
        if step % (steps // epochs) == 0:
            miou = 0.7 * (1 - np.exp(-5 * done)) + 0.01 * rng.normal()
            validation = f"{miou:.5f},{0.6 + miou * 0.45:.5f}"
        epoch, elapsed = step * epochs // steps, step * 1.45
        lines.append(f"{step},{epoch},{elapsed:.2f},{lr:.8f},{loss:.5f},{speed:.3f},{validation}")
    write_text(run / "metrics.csv", "\n".join(lines) + "\n")


def _write_settings(run: Path, labels: LabelSpec) -> None:
    network = {"num_classes": labels.num_classes, "in_channels": 3, "backbone": "tf_efficientnet_lite0"}
    card = {"format": 1, "model": "encoder_decoder", "config": network, "labels": labels.to_dict()}
    card |= {"mean": [0.41, 0.42, 0.43], "std": [0.3, 0.31, 0.3], "weights_sha256": "0" * 64}
    write_json(run / "model.json", card)
    config = {"model": "encoder_decoder", "minutes": 30.0, "steps": None, "lr": 0.001, "seed": 0, "ema": 0.999}
    config |= {"augment": {"flip": True, "scale": [0.5, 2.0]}, "crop_px": [320, 320], "class_weights": "none"}
    write_text(run / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    plan = {"data": {"root": "data/camvid"}, "classes": list(labels.names), "model": "encoder_decoder"}
    plan |= {"parameters": 4_652_331, "crop_px": 320, "batch_size": 8, "precision": "bf16", "device": "cpu"}
    write_json(run / "plan.json", plan | {"steps": 1200, "expected_seconds": 1800})
    command = ["pixelwise", "train", "data/camvid", "--model", "encoder_decoder", "--out", "runs/my run"]
    environment = {"command": command, "pixelwise": "0.1.0", "python": "3.11.9", "torch": "2.14.1"}
    environment |= {"platform": "Linux-6.1-x86_64", "cpu": "AMD EPYC 9R14", "cores": 2, "device": "cpu"}
    write_json(run / "environment.json", environment | {"started": "2026-11-23T04:00:00+00:00", "seconds": 1745.3})


def _write_data(run: Path, labels: LabelSpec, scenes: Sequence[Scene]) -> None:
    k = labels.num_classes
    pixels = sum(np.bincount(truth.ravel(), minlength=256) for _, _, truth in scenes)
    seen = sum((np.bincount(truth.ravel(), minlength=256) > 0).astype(int) for _, _, truth in scenes)
    splits = {
        name: {
            "images": len(scenes) * factor,
            "pixels": (pixels[:k] * factor).tolist(),
            "void": int(pixels[VOID]) * factor,
            "images_with": (seen[:k] * factor).tolist(),
            "image_pixels": (seen[:k] * factor * 48 * 64).tolist(),
        }
        for name, factor in (("train", 4), ("val", 1), ("test", 2))
    }
    height, width = scenes[0][2].shape
    content = {
        "root": "data/camvid",
        "layout": "segnet",
        "labels": labels.to_dict(),
        "channels": 3,
        "dtypes": {"uint8": 7 * len(scenes)},
    }
    content |= {"sizes": {f"{width}x{height}": 7 * len(scenes)}, "splits": splits, "fingerprint": "5f" * 32}
    content |= {"mean": [0.41103, 0.42512, 0.43171], "std": [0.3001, 0.3112, 0.3054]}
    problem = {"severity": "warning", "message": "test/0001.png: the same image is in val.", "files": ["test/0001.png"]}
    write_json(run / "data.json", content | {"problems": [problem]})


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a made-up run folder; takes what `write_run` takes."""
    return lambda **options: write_run(tmp_path / "my run", **options)


@pytest.fixture
def make_spec() -> Callable[[Sequence[str]], LabelSpec]:
    """Classes of given names."""
    return spec


@pytest.fixture
def make_scenes() -> Callable[..., list[Scene]]:
    """Images and truths to put into a run folder."""
    return draw_scenes
