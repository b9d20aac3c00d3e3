import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from pixelwise.data.classes import save_labels
from pixelwise.data.labels import LabelSpec
from pixelwise.data.layouts import open_data
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats.opening import read_mask
from pixelwise.infer import scoring
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.evaluate import choose_examples, evaluate, open_for
from pixelwise.infer.pipeline import ArraySource
from pixelwise.infer.predictor import Predictor, load
from pixelwise.infer.tiling.blend import BlendedTiles
from pixelwise.metrics.confusion import ConfusionMatrix, Scores
from pixelwise.models import create_model
from pixelwise.ops.cost import PassMemory

# Mask values differ from class ids, one is merged, one is void: what is scored must be class ids.
SPEC = LabelSpec(
    names=("red", "green", "blue"),
    colors=((250, 0, 0), (0, 250, 0), (0, 0, 250)),
    values=((10,), (20, 21), (30,)),
    ignore_values=(99,),
)
CARD = ModelCard(model="m", config={}, labels=SPEC, mean=(0.0,) * 3, std=(1.0,) * 3)
FILE_VALUES = np.array([10, 21, 30], dtype=np.uint8)


class Strongest(nn.Module):
    """The class of a pixel is its strongest colour."""

    def forward(self, image):
        return image


def strongest(card=CARD, **options):
    return Predictor(Strongest(), card, device="cpu", precision="float32", **options)


def write_pair(root, split, name, rng, *, void=0.1, size=None):
    """An image and a mask that is right for about 70 % of the pixels; returns truth and prediction as class ids."""
    height, width = size or rng.integers(5, 30, 2)
    image = rng.permuted(np.arange(height * width * 3, dtype=np.uint32) * 2654435761 % 251).astype(np.uint8)
    image = image.reshape(height, width, 3)
    truth = np.where(rng.random((height, width)) < 0.7, image.argmax(axis=2), rng.integers(0, 2, (height, width)))
    values = FILE_VALUES[truth]
    hidden = rng.random((height, width)) < void
    values[hidden] = 99
    for kind, content in (("images", image), ("masks", values)):
        path = root / split / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(path)
    return np.where(hidden, 255, truth).astype(np.uint8), image.argmax(axis=2)


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1), ("test", 9)):
        for index in range(count):
            write_pair(tmp_path / "data", split, f"{split}{index}", rng)
    save_labels(tmp_path / "data" / "classes.yaml", SPEC)
    return tmp_path / "data"


def test_one_matrix_over_all_pixels_with_void_dropped(tmp_path):
    rng = np.random.default_rng(1)
    root, wanted = tmp_path / "data", np.zeros((3, 3), dtype=np.int64)
    per_image = {}
    for index in range(6):
        truth, prediction = write_pair(root, "test", f"t{index}", rng, void=0.2)
        keep = truth != 255
        np.add.at(wanted, (truth[keep], prediction[keep]), 1)
        per_image[f"t{index}"] = (truth[keep] == prediction[keep]).mean(), int(keep.sum())
    save_labels(root / "classes.yaml", SPEC)
    evaluation = evaluate(strongest(), root)
    assert evaluation.matrix == wanted.tolist()
    iou = np.diag(wanted) / (wanted.sum(0) + wanted.sum(1) - np.diag(wanted))
    assert evaluation.scores.iou == tuple(iou.tolist())
    assert evaluation.scores.miou == iou.mean()
    assert (evaluation.images, evaluation.names, evaluation.split) == (6, SPEC.names, "test")
    assert {entry["name"]: (entry["global_accuracy"], entry["pixels"]) for entry in evaluation.per_image} == per_image


def test_the_parts_of_a_split_add_up(root):
    evaluation = evaluate(strongest(), root)
    assert sum(map(sum, evaluation.matrix)) == sum(entry["pixels"] for entry in evaluation.per_image)
    accuracies = sum(entry["global_accuracy"] * entry["pixels"] for entry in evaluation.per_image)
    assert math.isclose(accuracies, sum(evaluation.matrix[index][index] for index in range(3)))


def test_results_are_written_and_read_back(root, tmp_path):
    evaluation = evaluate(strongest(), root, out=tmp_path / "out")
    content = json.loads((tmp_path / "out" / "evaluation-test.json").read_text())
    assert content == json.loads(json.dumps(evaluation.to_dict()))
    assert Scores.from_dict(content["scores"]).iou == evaluation.scores.iou
    assert content["images"] == len(content["per_image"]) == 9
    folders = sorted(path.name for path in (tmp_path / "out" / "evaluation-test").iterdir())
    assert (
        folders
        == sorted(content["examples"])
        == sorted(f"{k}-{i}" for k in ("best", "median", "worst") for i in (1, 2))
    )


def test_examples_show_what_was_scored(root, tmp_path):
    evaluation = evaluate(strongest(), root, out=tmp_path / "out")
    scores = {entry["name"]: entry["miou"] for entry in evaluation.per_image}
    assert scores[evaluation.examples["best-1"]] == max(scores.values())
    assert scores[evaluation.examples["worst-1"]] == min(scores.values())
    for key, name in evaluation.examples.items():
        folder = tmp_path / "out" / "evaluation-test" / key
        confusion = ConfusionMatrix(3)
        confusion.update(read_mask(folder / "prediction.png"), read_mask(folder / "truth.png"))
        assert confusion.scores().miou == scores[name]
        with Image.open(folder / "image.png") as shown:
            assert np.array_equal(np.asarray(shown).argmax(axis=2), read_mask(folder / "prediction.png"))


def test_a_second_evaluation_replaces_the_examples(root, tmp_path):
    evaluate(strongest(), root, out=tmp_path / "out")
    for path in list((root / "test" / "images").iterdir())[3:]:
        path.unlink()
        (root / "test" / "masks" / path.name).unlink()
    evaluation = evaluate(strongest(), root, out=tmp_path / "out")
    folders = {path.name for path in (tmp_path / "out" / "evaluation-test").iterdir()}
    assert folders == set(evaluation.examples) == {"best-1", "best-2", "worst-1"}


def test_large_examples_are_shown_small_but_scored_whole(tmp_path):
    rng = np.random.default_rng(2)
    write_pair(tmp_path / "data", "test", "wide", rng, size=(3, 2100))
    save_labels(tmp_path / "data" / "classes.yaml", SPEC)
    evaluation = evaluate(strongest(), tmp_path / "data", out=tmp_path / "out")
    for name in ("image", "truth", "prediction"):
        with Image.open(tmp_path / "out" / "evaluation-test" / "best-1" / f"{name}.png") as picture:
            assert picture.size == (1024, 1)
    assert set(np.unique(read_mask(tmp_path / "out" / "evaluation-test" / "best-1" / "truth.png"))) <= {0, 1, 2, 255}
    assert evaluation.scores.pixels > 5000


def test_the_run_folder_is_where_results_go_by_default(root, tmp_path):
    torch.manual_seed(0)
    config = {"tiny": True, "num_classes": 3, "in_channels": 3}
    card = ModelCard(model="unet", config=config, labels=SPEC, mean=(0.5,) * 3, std=(0.2,) * 3)
    save_bundle(tmp_path / "run", create_model("unet", **config), card)
    first = evaluate(tmp_path / "run", root, split="val")
    assert (tmp_path / "run" / "evaluation-val.json").is_file()
    again = evaluate(load(tmp_path / "run"), open_data(root), split="val")
    assert first.matrix == again.matrix
    assert not (tmp_path / "data" / "evaluation-val.json").exists()
    assert evaluate(strongest(), root, split="val").examples == {}


def test_masks_without_classes_mean_what_they_meant_in_training(root):
    wanted = evaluate(strongest(), root).matrix
    (root / "classes.yaml").unlink()
    assert evaluate(strongest(), root).matrix == wanted


def test_ignored_values_count_as_void(root):
    (root / "classes.yaml").unlink()
    wanted = evaluate(strongest(), root)
    card = ModelCard(model="m", config={}, labels=LabelSpec(names=SPEC.names, colors=SPEC.colors, values=SPEC.values),
                     mean=CARD.mean, std=CARD.std)  # fmt: skip
    predictor = strongest(card)
    with pytest.raises(DataError, match="99"):
        evaluate(predictor, root)
    assert evaluate(predictor, open_for(predictor, root, ignore=[99])).matrix == wanted.matrix


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("red", "blue", "green"), "class 1 is 'blue', but the network's is 'green'"),
        (("red", "green"), "2 classes, but the network knows 3"),
    ],
)
def test_other_classes_than_the_networks_are_refused(root, tmp_path, names, message):
    other = LabelSpec(names=names, colors=SPEC.colors[: len(names)], values=SPEC.values[: len(names)])
    save_labels(root / "classes.yaml", other)
    with pytest.raises(DataError, match=message):
        evaluate(strongest(), root)
    save_labels(tmp_path / "good.yaml", SPEC)
    predictor = strongest()
    assert evaluate(predictor, open_for(predictor, root, classes=tmp_path / "good.yaml")).images == 9


def test_a_split_that_must_be_made_is_the_one_of_the_training(tmp_path):
    rng = np.random.default_rng(3)
    for index in range(60):
        write_pair(tmp_path / "data", "x", f"p{index // 3}_{index % 3}", rng, size=(4, 4))
    shutil.move(tmp_path / "data" / "x" / "images", tmp_path / "data" / "images")
    shutil.move(tmp_path / "data" / "x" / "masks", tmp_path / "data" / "masks")
    card = ModelCard(model="m", config={}, labels=SPEC, mean=CARD.mean, std=CARD.std, data={"group_by": r"^p\d+"})
    trained = open_data(tmp_path / "data", group_by=r"^p\d+", labels=SPEC)
    wanted = [pair.name for pair in trained.split("test")]
    assert [entry["name"] for entry in evaluate(strongest(card), tmp_path / "data").per_image] == wanted
    assert len(wanted) % 3 == 0


def test_an_empty_split_names_the_others(root):
    with pytest.raises(
        DataError, match=r"'holdout' holds no images; the splits are train \(2\), val \(1\), test \(9\)"
    ):
        evaluate(strongest(), root, split="holdout")


def test_images_without_masks_cannot_be_scored(root):
    (root / "test" / "masks" / "test4.png").unlink()
    with pytest.raises(DataError, match=r"1 of 9 images of split 'test' have no mask \(.*test4"):
        evaluate(strongest(), root)


def test_a_broken_mask_stops_the_evaluation(root):
    (root / "test" / "masks" / "test4.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"test4\.png"):
        evaluate(strongest(), root)


def test_images_without_labelled_pixels_have_no_score(tmp_path):
    rng = np.random.default_rng(4)
    write_pair(tmp_path / "data", "test", "void", rng, void=1.1)
    write_pair(tmp_path / "data", "test", "seen", rng)
    save_labels(tmp_path / "data" / "classes.yaml", SPEC)
    with pytest.warns(UserWarning, match="test: 1 mask holds no labelled pixel"):
        evaluation = evaluate(strongest(), tmp_path / "data", out=tmp_path / "out")
    entry = next(entry for entry in evaluation.per_image if entry["name"] == "void")
    assert entry["pixels"] == 0
    assert math.isnan(entry["miou"])
    assert evaluation.examples == {"best-1": "seen"}
    assert json.loads((tmp_path / "out" / "evaluation-test.json").read_text())["per_image"][1]["miou"] is None


TWO = LabelSpec(names=("background", "cell"), colors=((0, 0, 0), (250, 0, 0)), values=((0,), (255,)))


def binary(root, change=lambda mask: mask, count=4):
    """Images of a bright square each, and masks of 0 and 255 that were changed."""
    for index in range(count):
        mask = np.zeros((40, 48), np.uint8)
        mask[6 + index : 26, 8:30] = 255
        image = np.repeat((mask // 2 + 20)[..., None] + np.random.default_rng(index).integers(0, 9, (40, 48, 3)), 1, 2)
        for kind, content in (("images", image.astype(np.uint8)), ("masks", change(mask))):
            path = root / "test" / kind / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)


class Bright(nn.Module):
    """Class 1 is bright."""

    def forward(self, image):
        return torch.cat([0.3 - image[:, :1], image[:, :1] - 0.3], 1)


def soft(mask):
    return np.array(Image.fromarray(mask).resize((24, 20), Image.Resampling.BILINEAR).resize((48, 40)))


def stray(mask):
    return np.where((np.indices(mask.shape) == 3).all(axis=0), np.uint8(7), mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (soft, "only 0 and 255 fill areas; .* between, as antialiasing, resizing or JPEG leaves them"),
        (stray, "Values in so few pixels may be strays: 7 in 0.png at row 3, column 3"),
        (lambda mask: mask // 255, "No mask holds 'cell': if one of these values means it"),
        (lambda mask: mask[:20], "is 48 x 20 px, but its image"),
        (lambda mask: mask[..., None] // 9 * np.array([3, 5, 7]) % 251 + soft(mask)[..., None], "masks"),
    ],
)
@pytest.mark.parametrize("reads", ["path", "folder"])
def test_masks_that_cannot_be_meant_give_no_score(tmp_path, change, message, reads):
    binary(tmp_path, lambda mask: change(mask).astype(np.uint8))
    predictor = strongest(replace(CARD, labels=TWO))
    data = tmp_path if reads == "path" else open_for(predictor, tmp_path)
    with pytest.raises(DataError, match=message):
        evaluate(predictor, data)


def test_what_may_make_scores_mean_something_else_is_told(tmp_path):
    binary(tmp_path, lambda mask: 255 - mask)
    predictor = Predictor(Bright(), replace(CARD, labels=TWO), device="cpu", precision="float32")
    folder = open_for(predictor, tmp_path)
    with pytest.warns(UserWarning, match="4 masks look inverted"):
        evaluate(predictor, folder)
    told = []
    binary(tmp_path, lambda mask: mask * 0)
    evaluate(predictor, tmp_path, note=told.append)
    assert told == [
        "test: 4 masks hold nothing but background: test/masks/0.png, test/masks/1.png, test/masks/2.png and 1 more.",
        "test: no mask contains 'cell'. It cannot be scored there.",
    ]
    binary(tmp_path)
    for path in (tmp_path / "test" / "images").iterdir():
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 3
            image.save(path, exif=exif)
    evaluate(predictor, tmp_path, note=told.append)
    assert "4 photos carry an EXIF orientation that their masks do not" in told[2]


def test_images_and_masks_that_are_swapped_give_no_score(tmp_path):
    binary(tmp_path)
    (tmp_path / "test/images").rename(tmp_path / "test/x")
    (tmp_path / "test/masks").rename(tmp_path / "test/images")
    (tmp_path / "test/x").rename(tmp_path / "test/masks")
    with pytest.raises(DataError, match="images and masks seem to be swapped"):
        evaluate(strongest(replace(CARD, labels=TWO)), tmp_path)


def test_an_unwritable_place_is_an_error_of_one_sentence(root, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PixelwiseError, match="file"):
        evaluate(strongest(), root, out=tmp_path / "file")


def test_progress_counts_every_image(root):
    seen = []
    evaluate(strongest(), root, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(index, 9) for index in range(1, 10)]


@pytest.mark.parametrize("count", range(10))
def test_examples_are_never_the_same_image_twice(count):
    scores = [{"name": str(i), "miou": (i * 7 % 10) / 10, "global_accuracy": 0.5, "pixels": 1} for i in range(count)]
    chosen = choose_examples(scores)
    assert len(chosen) == len(set(chosen.values())) == min(count, 6)
    if count > 3:
        mious = {
            kind: [scores[i]["miou"] for key, i in chosen.items() if key.startswith(kind)] for kind in ("best", "worst")
        }
        assert min(mious["best"]) > max(mious["worst"])


# -- several at a time, and the statistics of the batch --


@pytest.fixture
def alike(tmp_path):
    """11 test images: 6 of one size, 1 of another, 4 of the first again."""
    rng = np.random.default_rng(7)
    for index in range(11):
        write_pair(tmp_path / "alike", "test", f"t{index:02}", rng, size=(12, 17) if index != 6 else (9, 17))
    save_labels(tmp_path / "alike" / "classes.yaml", SPEC)
    return tmp_path / "alike"


class Counting(Strongest):
    """As its base; notes how many images came together, and has batch norm to be asked for."""

    def __init__(self):
        super().__init__()
        self.norm, self.seen = nn.BatchNorm2d(3, affine=False), []

    def forward(self, image):
        self.seen.append(len(image))
        return self.norm(image)


@pytest.mark.parametrize(
    ("batch", "seen"), [(None, [1] * 11), (1, [1] * 11), (4, [4, 2, 1, 4]), (10, [6, 1, 4])], ids=str
)
def test_neighbours_of_equal_size_share_a_pass_and_change_nothing(alike, batch, seen):
    model = Counting()
    evaluation = evaluate(Predictor(model, CARD, device="cpu", precision="float32"), alike, batch=batch)
    assert model.seen == seen
    wanted = evaluate(strongest(), alike)
    assert (evaluation.matrix, evaluation.per_image) == (wanted.matrix, wanted.per_image)
    assert (evaluation.statistics, evaluation.batch) == ("running", batch or 1)


def test_statistics_of_the_batch_are_used_and_said(alike, tmp_path):
    model = Counting()
    predictor = Predictor(model, CARD, device="cpu", precision="float32", batch_statistics=True)
    evaluation = evaluate(predictor, alike, out=tmp_path / "out")
    assert model.seen[:3] == [6, 1, 4]  # up to ten, as the authors of FC-DenseNet tested
    content = json.loads((tmp_path / "out" / "evaluation-test.json").read_text())
    assert (content["statistics"], content["batch"]) == ("batch", 10) == (evaluation.statistics, evaluation.batch)
    folder = open_data(alike)
    images = [np.asarray(Image.open(pair.image)) for pair in folder.split("test")]
    group = torch.from_numpy(np.stack(images[:6])).movedim(-1, 1).float() / 255
    centred = (group - group.mean((0, 2, 3), keepdim=True)) / group.std((0, 2, 3), keepdim=True)
    truth = [read_mask(pair.mask) for pair in folder.split("test")[:6]]
    right = [
        (FILE_VALUES[labels][values != 99] == values[values != 99]).mean()
        for labels, values in zip(centred.argmax(1).numpy(), [np.where(t == 20, 21, t) for t in truth], strict=True)
    ]
    assert [entry["global_accuracy"] for entry in evaluation.per_image[:6]] == pytest.approx(right, abs=0.01)


def test_examples_of_a_batch_are_what_was_scored(alike, tmp_path):
    predictor = Predictor(Counting(), CARD, device="cpu", precision="float32", batch_statistics=True)
    evaluation = evaluate(predictor, alike, out=tmp_path / "out", batch=4)
    scores = {entry["name"]: entry["miou"] for entry in evaluation.per_image}
    assert len(evaluation.examples) == 6
    for key, name in evaluation.examples.items():
        confusion = ConfusionMatrix(3)
        example = tmp_path / "out" / "evaluation-test" / key
        confusion.update(read_mask(example / "prediction.png"), read_mask(example / "truth.png"))
        assert confusion.scores().miou == scores[name]


def test_an_image_of_any_size_is_scored_window_by_window(tmp_path, monkeypatch):
    """The labels and the mask of a large image are never in memory as a whole."""
    write_pair(tmp_path / "data", "test", "a", np.random.default_rng(6), size=(90, 70))
    save_labels(tmp_path / "data" / "classes.yaml", SPEC)
    wanted = evaluate(strongest(), tmp_path / "data")
    monkeypatch.setattr("pixelwise.infer.pipeline.ONE_PASS_PX", 100)
    monkeypatch.setattr("pixelwise.infer.scoring.THINNED_PX", 100)
    monkeypatch.setattr("pixelwise.infer.scoring.EXAMPLE_PX", 30)
    monkeypatch.setattr(
        "pixelwise.infer.pipeline.choose_scorer", lambda network, height, width, tiling, note: BlendedTiles(
            network.scores, PassMemory(8.0), in_channels=3, num_classes=3, height=height, width=width, window_px=16,
            overlap=0.0,
        )
    )  # fmt: skip
    windows, add = [], scoring._Counting.add
    monkeypatch.setattr(scoring._Counting, "add", lambda self, plane, region, arrays: (
        windows.append(region), add(self, plane, region, arrays)
    ))  # fmt: skip
    found = evaluate(strongest(), tmp_path / "data", out=tmp_path / "out")
    assert (found.matrix, found.per_image) == (wanted.matrix, wanted.per_image)
    assert len(windows) > 4
    with Image.open(tmp_path / "out" / "evaluation-test" / "best-1" / "image.png") as picture:
        assert picture.size == (24, 30)


@pytest.mark.parametrize("plane", [None, 1])
def test_a_volume_is_scored_plane_by_plane(tmp_path, plane):
    rng = np.random.default_rng(7)
    pixels, truth = rng.integers(0, 256, (3, 20, 12, 3), dtype=np.uint8), rng.integers(0, 3, (3, 20, 12))
    tifffile.imwrite(tmp_path / "image.tif", pixels, photometric="rgb")
    mask = ArraySource(FILE_VALUES[truth[0]][:, :, None])
    mask.info = replace(mask.info, planes=3)
    mask.read = lambda top, left, height, width, plane=0: FILE_VALUES[truth[plane]][
        top : top + height, left : left + width, None
    ]
    pair = SimpleNamespace(name="a", mask="mask", plane=plane)
    with strongest().open(tmp_path / "image.tif") as image:
        labelled = scoring._Labelled.of(SimpleNamespace(image=image, mask=mask, region=None, labels=SPEC), pair)
        store = scoring._Counting(labelled, 3)
        scoring._label(strongest(), [labelled], [store])
    wanted, planes = ConfusionMatrix(3), slice(None) if plane is None else slice(plane, plane + 1)
    wanted.update(pixels.argmax(-1)[planes], truth[planes])
    assert np.array_equal(store.confusion.matrix, wanted.matrix)


def test_a_batch_has_at_least_one_image(alike):
    with pytest.raises(UsageError, match="batch must be at least 1, not 0"):
        evaluate(strongest(), alike, batch=0)
