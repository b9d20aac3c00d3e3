"""Masks as users have them: what their values mean is recognised, told or asked, and never guessed in silence."""

import functools
import operator

import numpy as np
import pytest
import rasterio
import tifffile
import torch
from PIL import Image

from pixelwise.data.check import inspect_data
from pixelwise.data.classes import load_labels, save_labels
from pixelwise.data.labels import CAMVID_COLORS, CAMVID_NAMES, distinct_colors
from pixelwise.data.layouts import open_data
from pixelwise.data.proposals import with_unknown_ignored
from pixelwise.data.samples import load_sample
from pixelwise.errors import DataError, UsageError
from pixelwise.formats.base import NAN_VALUE, orient

SIDE = 48


class Masks:
    """A folder of grey photos with a brighter rectangle; `add` saves the mask of the next one."""

    def __init__(self, root):
        self.root, self.truth, self.draws = root, [], np.random.default_rng(1)
        for kind in ("images", "masks"):
            (root / kind).mkdir()

    def next(self):
        """The next truth, (48, 48): a rectangle of ones; its photo is saved."""
        truth = np.zeros((SIDE, SIDE), np.uint8)
        y, x = self.draws.integers(6, 20, 2)
        truth[y : y + 16, x : x + 20] = 1
        photo = self.draws.integers(0, 40, (SIDE, SIDE, 3)) + 150 * truth[:, :, None]
        Image.fromarray(photo.astype(np.uint8)).save(self.root / f"images/{len(self.truth):02}.png")
        self.truth.append(truth)
        return truth

    def path(self, suffix=".png"):
        return self.root / f"masks/{len(self.truth) - 1:02}{suffix}"

    def write(self, make, count=10, suffix=".png"):
        """Save what `make(truth, number)` gives as the masks."""
        for number in range(count):
            made, path = make(self.next(), number), self.path(suffix)
            options = {".jpg": {"quality": 80}, ".webp": {"lossless": True}}.get(suffix, {})
            if isinstance(made, np.ndarray) and suffix == ".tif":
                tifffile.imwrite(path, made, photometric="minisblack")
            elif isinstance(made, np.ndarray) and suffix == ".npy":
                np.save(path, made)
            else:
                made = Image.fromarray(made) if isinstance(made, np.ndarray) else made
                made.save(path, **options)
        return self

    def problems(self, severity="fatal", **options):
        found = inspect_data(open_data(self.root, **options)).problems
        return [problem.message for problem in found if problem.severity == severity]

    def answer(self):
        """Write the proposed classes as `inspect --write-classes` does; nothing may be asked any more."""
        folder = open_data(self.root)
        save_labels(self.root / "classes.yaml", with_unknown_ignored(folder.labels, folder.pairs))
        assert self.problems() == []
        return open_data(self.root)

    def labels(self, folder):
        """Class ids of all masks, as training gets them."""
        samples = [load_sample(pair, folder.labels) for pair in sorted(folder.pairs, key=lambda pair: pair.name)]
        return torch.stack([sample.mask for sample in samples]).numpy()


@pytest.fixture
def masks(tmp_path):
    return Masks(tmp_path)


def soft(truth, levels=(0, 255), scale=4, mode="L"):
    """Drawn large and made smaller with interpolation, which leaves a rim of greys."""
    values = np.take(np.array(levels, np.uint8), truth)
    large = Image.fromarray(values).resize((SIDE * scale, SIDE * scale), Image.Resampling.NEAREST)
    moved = Image.new("L", large.size, int(levels[0]))
    moved.paste(large, (1, 1))  # or the rectangle's edges would fall between pixels
    return moved.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("scale", [2, 4])
def test_soft_rims_are_no_classes(masks, mode, suffix, scale):
    masks.write(lambda truth, _: soft(truth, mode=mode, scale=scale), suffix=suffix)
    questions = masks.problems()
    assert len(questions) == 1
    for part in ("only 0 and 255 fill areas", "0-127; 128-255", "--write-classes", "interpolation"):
        assert part in questions[0]
    folder = masks.answer()
    assert "128-255" in (masks.root / "classes.yaml").read_text()
    assert folder.labels.names == ("background", "foreground")
    assert (masks.labels(folder) != masks.truth).mean() < 0.02


def test_soft_rims_of_16_bits_may_hold_thousands_of_values(masks):
    draws = np.random.default_rng(3)

    def make(truth, number):
        mask = np.kron(truth, np.ones((4, 4), np.uint16)) * np.uint16(65_535)
        mask[:36] = draws.integers(2_000, 63_000, (36, 192))  # a rim of 6,912 pixels
        image = masks.root / f"images/{masks.path().name}"
        Image.open(image).resize((192, 192)).save(image)
        return mask

    masks.write(make, count=4)
    assert "only 0 and 65535 fill areas" in masks.problems()[0]
    labels = open_data(masks.root).labels
    assert (labels.values[0][-1], labels.values[1][0]) == (32_767, 32_768)
    save_labels(masks.root / "classes.yaml", labels)
    assert masks.problems() == []


def test_soft_rims_of_three_classes_are_void_between_them(masks):
    def mask(truth, _):
        truth[:8] = 2
        return soft(truth, (0, 128, 255))

    masks.write(mask)
    assert "0, 128, 255" in masks.problems()[0]
    folder = masks.answer()
    labels = masks.labels(folder)
    assert folder.labels.num_classes == 3
    assert set(np.unique(labels)) == {0, 1, 2, 255}
    wrong = (labels != masks.truth) & (labels != 255)
    assert wrong.mean() < 0.005  # a rim from 0 to 255 passes through 128


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_soft_rims_of_colours(masks, suffix):
    """Red and blue areas on black, drawn with antialiasing or saved as JPEG."""
    colors = np.array([(0, 0, 0), (220, 20, 20), (20, 40, 230)], np.uint8)
    truths = []
    for number in range(6):
        truth = np.zeros((160, 160), np.uint8)
        truth[20 + number : 90, 30:101] = 1
        truth[111 + number :, 10:] = 2
        truths.append(truth)
        picture = Image.fromarray(colors[truth])
        if suffix == ".png":
            picture = picture.resize((641, 641)).resize((160, 160), Image.Resampling.BILINEAR)
        picture.save(masks.root / f"masks/{number:02}{suffix}", quality=85)
        Image.fromarray(truth * 90).save(masks.root / f"images/{number:02}.png")
    questions = masks.problems()
    assert len(questions) == 1, questions
    assert "the colours that are nearest" in questions[0]
    folder = masks.answer()
    assert folder.labels.num_classes == 3
    ids = np.array([0, 2, 1])  # black, red, blue among the colours in ascending order
    labels = masks.labels(folder)
    wrong = (labels != ids[np.stack(truths)]) & (labels != 255)
    assert wrong.mean() < 0.005
    assert (labels == 255).mean() < 0.1


def test_jpeg_noise_beside_the_peaks(masks):
    masks.write(lambda truth, _: truth * 255, suffix=".jpg")
    assert "0-127; 128-255" in masks.problems()[0]
    assert (masks.labels(masks.answer()) != masks.truth).mean() < 0.005


@pytest.mark.parametrize(
    "values",
    [[0, 1, 255], [0, 100, 200], list(range(21)), [0, 40, 80, 120, 160, 200, 240], [0, 15, 255], [0, 128, 255]],
)
def test_real_classes_are_not_taken_for_rims(masks, values):
    def mask(_, number):
        return np.kron(np.resize(np.roll(values, number), (4, 6)), np.ones((12, 8))).astype(np.uint8)

    masks.write(mask)
    has_void = values in ([0, 1, 255], [0, 15, 255])
    found = open_data(masks.root, ignore=(255,) * has_void)
    assert found.labels.values == tuple((value,) for value in values[: len(values) - has_void])
    assert found.problems == ()


def test_photographs_are_no_masks(masks):
    masks.write(lambda _, number: np.random.default_rng(number).integers(0, 200, (SIDE, SIDE)).astype(np.uint8))
    with pytest.raises(DataError, match="photographs"):
        open_data(masks.root)


def test_a_value_in_a_few_pixels_of_one_mask_is_asked_about(masks):
    def mask(truth, number):
        if number == 3:
            truth[40:43, 5:8] = 7
        return truth

    masks.write(mask)
    (question,) = masks.problems()
    assert question.partition(": ")[2] == (
        "mask 03.png holds value 7 (9 px), but there are 2 classes (0..1). Pass --ignore 7, or map it in classes.yaml. "
        "Values in so few pixels may be strays: 7 in 03.png at row 40, column 5."
    )
    assert masks.problems(ignore=(7,)) == []
    (masks.root / "classes.yaml").write_text("classes: [ground, thing, {name: seven, values: 7}]")
    assert masks.problems() == []


def test_a_stray_is_one_among_few_and_small_masks_too(masks):
    def mask(truth, number):
        truth = truth[:24, :28].copy()
        Image.open(masks.root / f"images/{number:02}.png").crop((0, 0, 28, 24)).save(
            masks.root / f"images/{number:02}.png"
        )
        if number == 1:
            truth[2:5, 3:6] = 7
        return truth

    masks.write(mask, 4)
    assert "7 in 01.png at row 2, column 3" in masks.problems()[0]


def test_a_rare_class_of_many_masks_is_no_stray(masks):
    def mask(truth, _):
        truth[40, 5] = 7
        return truth

    assert masks.write(mask).problems() == []
    assert open_data(masks.root).labels.values == ((0,), (1,), (7,))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(-1, "int16"), (-9999, "int32"), (65_535, "uint16"), (2**32 - 1, "uint32"), (np.nan, "float32")],
)
def test_numbers_that_mean_no_class_by_custom(masks, value, dtype):
    def mask(truth, _):
        made = truth.astype(dtype)
        made[40:] = value
        return made

    masks.write(mask, suffix=".tif")
    name = "nan" if value != value else str(value)
    question = masks.problems()[0]
    assert f"holds value {name} (" in question
    assert f"Pass --ignore {name}" in question
    number = NAN_VALUE if value != value else value
    labels = masks.labels(open_data(masks.root, ignore=(number,)))
    assert (labels[:, 40:] == 255).all()
    np.testing.assert_array_equal(labels[:, :40], np.stack(masks.truth)[:, :40])
    np.testing.assert_array_equal(masks.labels(masks.answer()), labels)
    assert load_labels(masks.root / "classes.yaml").ignore_values == (number,)


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_fill_values_of_floats_are_nan(masks, suffix):
    def mask(truth, _):
        made = truth.astype(np.float32)
        made[40:] = np.finfo(np.float32).min
        return made

    masks.write(mask, suffix=suffix)
    assert "Pass --ignore nan" in masks.problems()[0]


def save_geotiff(path, made, nodata):
    shape = {"width": SIDE, "height": SIDE, "count": 1, "dtype": made.dtype.name}
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}
    with rasterio.open(path, "w", driver="GTiff", nodata=nodata, **shape, **place) as file:
        file.write(made, 1)


@pytest.mark.parametrize(("nodata", "dtype"), [(-9999, "float32"), (255, "uint8"), (float("nan"), "float32")])
def test_declared_nodata_is_void_and_told(masks, nodata, dtype):
    for _ in range(10):
        made = (masks.next() + 1).astype(dtype)
        made[40:] = nodata
        save_geotiff(masks.path(".tif"), made, nodata)
    assert masks.problems() == []
    assert any("10 masks declare" in message and "void" in message for message in masks.problems("warning"))
    labels = masks.labels(open_data(masks.root))
    assert (labels[:, 40:] == 255).all()
    np.testing.assert_array_equal(labels[:, :40], np.stack(masks.truth)[:, :40])


def test_declared_nodata_0_may_be_background(masks):
    for _ in range(10):
        made = masks.next()
        made[40:] = 2
        save_geotiff(masks.path(".tif"), made, 0)
    assert "Pass --ignore 0 if it is void" in masks.problems()[0]
    assert masks.problems(ignore=(0,)) == []
    assert masks.answer().labels.num_classes == 3


def test_one_class_written_in_two_ways(masks):
    masks.write(lambda truth, number: truth * np.uint8(255 if number % 2 else 1))
    questions = masks.problems()
    assert len(questions) == 1
    assert "one class in two ways" in questions[0]
    assert "If 255 is void, pass --ignore 255" in questions[0]
    np.testing.assert_array_equal(masks.labels(masks.answer()), masks.truth)


def test_masks_of_void_alone_are_not_another_way_of_writing(masks):
    masks.write(lambda truth, number: truth if number % 3 else np.full_like(truth, 255))
    assert "Pass --ignore 255" in masks.problems()[0]


def test_palettes_that_differ_are_read_by_colour(masks):
    colors = [(0, 0, 0), (200, 30, 30), (30, 200, 30)]

    def mask(truth, number):
        truth[40:] = 2
        order = np.random.default_rng(number).permutation(3)
        image = Image.fromarray(np.argsort(order)[truth].astype(np.uint8))
        image.putpalette(functools.reduce(operator.iadd, (list(colors[index]) for index in order), []))
        return image

    masks.write(mask)
    assert masks.problems() == []
    assert any("palettes" in message and "colours" in message for message in masks.problems("warning"))
    folder = open_data(masks.root)
    assert {color for there in folder.labels.values for color in there} == set(colors)
    ids = np.array([folder.labels.class_of(color) for color in colors])
    np.testing.assert_array_equal(masks.labels(folder), ids[np.stack(masks.truth)])


def test_palettes_that_only_show_the_numbers_or_are_rounded_do_not_differ(masks):
    def mask(truth, number):
        image = Image.fromarray(truth)
        grey, coloured = [0, 0, 0, 1, 1, 1], [0, 0, 0, 200 + number, 30, 30]
        image.putpalette(grey if number % 2 else coloured)
        return image

    masks.write(mask)
    folder = open_data(masks.root)
    assert (folder.labels.kind, folder.problems) == ("index", ())
    np.testing.assert_array_equal(masks.labels(folder), masks.truth)


def test_palette_masks_beside_pictures_are_read_by_colour(masks):
    colors = np.array([(0, 0, 0), (200, 30, 30)], np.uint8)

    def mask(truth, number):
        image = Image.fromarray(truth)
        image.putpalette(colors.tobytes())
        return image if number % 3 else image.convert("RGB")

    masks.write(mask)
    assert masks.problems() == []
    np.testing.assert_array_equal(masks.labels(open_data(masks.root)), masks.truth)


def test_pictures_in_the_own_colours_of_pixelwise(masks):
    own = np.array([*distinct_colors(4), (0, 0, 0)], np.uint8)

    def mask(truth, _):
        truth[40:] = 3
        truth[46:] = 4
        return own[truth]

    masks.write(mask)
    folder = open_data(masks.root)
    assert folder.labels.names == ("class 0", "class 1", "class 2", "class 3")
    assert any("pixelwise itself paints" in message for message in masks.problems("warning"))
    truth = np.stack(masks.truth)
    np.testing.assert_array_equal(masks.labels(folder), np.where(truth == 4, 255, truth))


def test_pictures_in_camvids_colours_have_its_names(masks):
    masks.write(
        lambda _, __: np.kron(np.array(CAMVID_COLORS, np.uint8)[None], np.ones((SIDE, 5, 1), np.uint8))[:, :SIDE]
    )
    assert open_data(masks.root).labels.names == CAMVID_NAMES


def test_pictures_in_the_colours_of_the_classes_are_read_with_any_classes(masks):
    (masks.root / "classes.yaml").write_text(
        "classes: [{name: ground, color: '#0a0b0c', values: 0}, {name: thing, color: '#c81e1e', values: 255}]"
    )
    colors = np.array([(10, 11, 12), (200, 30, 30)], np.uint8)
    masks.write(lambda truth, number: colors[truth] if number % 2 else truth * np.uint8(255))
    assert masks.problems() == []
    assert any("RGB colours of the classes" in message for message in masks.problems("warning"))
    np.testing.assert_array_equal(masks.labels(open_data(masks.root)), masks.truth)


def test_numbers_in_three_equal_channels(masks):
    masks.write(lambda truth, _: np.dstack([truth * np.uint8(1)] * 3))
    folder = open_data(masks.root)
    assert folder.labels.names == ("background", "foreground")
    np.testing.assert_array_equal(masks.labels(folder), masks.truth)
    (masks.root / "classes.yaml").write_text(
        "masks: rgb\nclasses: [{name: a, color: [0, 0, 0]}, {name: b, color: [1, 1, 1]}]\n"
    )
    with pytest.raises(UsageError, match="--ignore 1: this RGB colour means class 'b'"):
        open_data(masks.root, ignore=(1,))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_masks_in_the_alpha_channel_are_named(masks, mode, suffix):
    channels = len(mode) - 1
    masks.write(
        lambda truth, _: Image.fromarray(np.dstack([truth * 0] * channels + [truth * 255]), mode), suffix=suffix
    )
    with pytest.raises(DataError, match="alpha channel"):
        open_data(masks.root)


def test_one_bit_of_a_tiff_is_as_that_of_a_png(masks):
    for _ in range(10):
        truth = masks.next()
        tifffile.imwrite(masks.path(".tif"), truth == 0, photometric="miniswhite")  # 0 is white
    folder = open_data(masks.root)
    assert folder.labels.values == ((0,), (255,))
    np.testing.assert_array_equal(masks.labels(folder), masks.truth)


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_one_hot_stacks_are_named(masks, suffix):
    masks.write(lambda truth, _: np.stack([truth == i for i in range(4)]).astype(np.uint8), suffix=suffix)
    try:
        question = masks.problems()[0]
    except DataError as error:  # read as a stack of channels
        question = str(error)
    assert "one-hot" in question


def test_one_hot_channels_are_named(masks):
    masks.write(lambda truth, _: np.stack([truth == i for i in range(5)], axis=-1).astype(np.float32), 4, suffix=".npy")
    masks.path(".npy").unlink()
    masks.next()
    tifffile.imwrite(
        masks.path(".tif"),
        np.zeros((SIDE, SIDE, 5), np.uint8),
        photometric="minisblack",
        planarconfig="contig",
    )
    assert any("one-hot" in message for message in masks.problems())


def test_inverted_masks_are_warned_about(masks):
    masks.write(lambda truth, _: (1 - truth) * np.uint8(255))
    assert any("10 masks look inverted" in message for message in masks.problems("warning"))


def test_a_few_inverted_masks_are_named(masks):
    masks.write(lambda truth, number: (1 - truth if number == 4 else truth) * np.uint8(255))
    warning = next(message for message in masks.problems("warning") if "inverted" in message)
    assert "1 mask looks inverted (of 10 with both classes)" in warning
    assert "masks/04.png" in warning


def test_swapped_folders_are_named(masks):
    masks.write(lambda truth, _: truth * np.uint8(255))
    (masks.root / "images").rename(masks.root / "other")
    (masks.root / "masks").rename(masks.root / "images")
    (masks.root / "other").rename(masks.root / "masks")
    with pytest.raises(DataError, match="seem to be swapped"):
        open_data(masks.root)
    (masks.root / "classes.yaml").write_text("classes: [a, {name: b, values: 255}]")
    assert any("seem to be swapped" in message for message in masks.problems())


def test_labels_of_another_data_set_are_named(masks):
    masks.write(lambda truth, _: truth + np.uint8(20))
    (masks.root / "classes.yaml").write_text("classes: [a, b, c]")
    assert "masks of another data set" in masks.problems()[0]


def test_masks_of_turned_photos_whose_sizes_tell(masks):
    exif = Image.Exif()
    exif[0x0112] = 6
    for _ in range(4):
        truth = masks.next()[:30]
        image = masks.root / f"images/{masks.path().name}"
        Image.open(image).crop((0, 0, SIDE, 30)).save(image, exif=exif)
        Image.fromarray(truth).save(masks.path())
    assert "the image has 6, the mask 1" in masks.problems()[0]
    assert any("sizes agree only if the masks are turned too" in message for message in masks.problems("warning"))


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_masks_drawn_on_the_pixels_of_a_turned_photo(masks, orientation, turned, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for _ in range(10):
        truth = masks.next()
        image = masks.root / f"images/{masks.path().name}"
        photo = Image.open(image).convert("RGB")
        if suffix == ".jpg":
            photo.save(image.with_suffix(".jpg"), exif=exif, quality=95)
        else:
            tag = (0x0112, "H", 1, orientation, True)
            tifffile.imwrite(image.with_suffix(".tif"), np.asarray(photo), photometric="rgb", extratags=[tag])
        image.unlink()
        Image.fromarray(np.ascontiguousarray(orient(truth, orientation)) if turned else truth).save(masks.path())
    found = [message for message in masks.problems("warning") if "EXIF" in message]
    if turned:
        assert found == []
    else:
        assert "10 photos carry an EXIF orientation that their masks do not" in found[0]
        assert "times stronger edges" in found[0]


# -- numbered objects --


def discs(count, first=1, size=96, seed=0):
    """So many discs of different numbers that do not touch, (size, size)."""
    mask = np.zeros((size, size), np.uint16)
    places = np.random.default_rng(seed).permutation((size // 12) ** 2)[:count]
    rows, columns = np.mgrid[:size, :size]
    for number, place in enumerate(places):
        y, x = divmod(int(place), size // 12)
        mask[(rows - 12 * y - 6) ** 2 + (columns - 12 * x - 6) ** 2 < 20] = first + number
    return mask


def folder_of(root, masks):
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for number, mask in enumerate(masks):
        photo = np.random.default_rng(number).integers(0, 255, (*mask.shape[:2], 3), dtype=np.uint8)
        Image.fromarray(photo).save(root / f"images/{number:02}.png")
        Image.fromarray(mask).save(root / f"masks/{number:02}.png")
    return open_data(root)


@pytest.mark.parametrize("goes_on", [False, True])
def test_masks_that_number_objects_are_one_class(tmp_path, goes_on):
    counts = [5, 17, 30, 9, 22, 12]
    firsts = np.cumsum([1, *counts]) if goes_on else [1] * len(counts)
    masks = [discs(count, int(first), seed=count) for count, first in zip(counts, firsts, strict=False)]
    folder = folder_of(tmp_path, masks)
    (problem,) = [problem for problem in folder.problems if problem.severity == "fatal"]
    largest = max(map(np.max, masks))
    assert f"number objects, it seems, and no classes: each number (1 to {largest})" in problem.message
    assert [values[:3] for values in folder.labels.values] == [(0,), (1, 2, 3)]
    save_labels(tmp_path / "classes.yaml", folder.labels)
    again = open_data(tmp_path)
    assert not again.problems
    sample = load_sample(again.pairs[0], again.labels)
    assert int(sample.mask.sum()) == int((masks[int(again.pairs[0].image.stem)] > 0).sum())


def test_numbered_objects_in_three_equal_channels(tmp_path):
    folder = folder_of(tmp_path, [np.dstack([discs(count).astype(np.uint8)] * 3) for count in (5, 17, 30, 9)])
    assert "number objects" in folder.problems[0].message
    assert folder.labels.values[1][-1] == (255, 255, 255)


def test_a_few_numbered_objects_are_a_warning(tmp_path):
    folder = folder_of(tmp_path, [discs(1 + number % 4, seed=number) for number in range(8)])
    assert folder.labels.values == ((0,), (1,), (2,), (3,), (4,))
    assert [problem.severity for problem in folder.problems if "number objects" in problem.message] == ["warning"]


def test_many_classes_are_no_numbered_objects(tmp_path):
    rng = np.random.default_rng(0)
    scenes = [np.kron(rng.choice(np.arange(1, 30), 6, replace=False)[rng.integers(0, 6, (8, 8))], np.ones((12, 12), int))
              for _ in range(6)]  # fmt: skip
    for scene in scenes:
        scene[:12] = 0
    organs = []  # one region for each class, but the same classes in every mask, some missing
    for number in range(6):
        organ = discs(9, seed=7)
        organ[organ == 1 + number] = 0
        organs.append(organ)
    for name, masks in (("scenes", [scene.astype(np.uint8) for scene in scenes]), ("organs", organs)):
        (tmp_path / name).mkdir()
        folder = folder_of(tmp_path / name, masks)
        assert not any("number objects" in problem.message for problem in folder.problems)
        assert folder.labels.num_classes > 8
