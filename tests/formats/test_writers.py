import json

import numpy as np
import pytest
import torch
from PIL import Image

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.formats.image import label_image, write_png
from pixelwise.formats.opening import read_mask
from pixelwise.infer.overlay import blend, displayable

SPEC = LabelSpec(names=("sky", "road"), colors=((10, 20, 250), (90, 80, 70)), values=((3,), (4,)))


def test_label_files_hold_class_ids_and_class_colours(tmp_path):
    labels = np.array([[0, 1, 255]], dtype=np.uint8)
    write_png(tmp_path / "a.png", label_image(labels, SPEC))
    assert np.array_equal(read_mask(tmp_path / "a.png"), labels)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture.convert("RGB"))[0], [(10, 20, 250), (90, 80, 70), (0, 0, 0)])


def test_the_record_is_a_text_chunk(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, Image.new("L", (3, 2)), {"model": "é" * 40, "with": ["labels"]})
    with Image.open(path) as picture:
        assert json.loads(picture.text["pixelwise"]) == {"model": "é" * 40, "with": ["labels"]}


def test_eight_bit_pictures_are_shown_as_they_are():
    image = torch.arange(5 * 2 * 3, dtype=torch.uint8).reshape(5, 2, 3)
    assert np.array_equal(displayable(image), image[:3].permute(1, 2, 0).numpy())
    assert np.array_equal(displayable(image[:2])[..., 2], image[0].numpy())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 4000.0])
def test_other_images_are_stretched_to_the_whole_range(scale):
    image = torch.linspace(0, scale, 101).reshape(1, 1, 101)
    shown = displayable(image)[0, :, 0].astype(int)
    assert (shown.min(), shown.max()) == (0, 255)
    assert (np.diff(shown) >= 0).all()


def test_constant_float_image_is_shown_without_warning():
    assert displayable(torch.full((1, 2, 2), 0.3)).max() == 0


def test_blend_mixes_in_proportion():
    image = np.full((1, 1, 3), 200, dtype=np.uint8)
    labels = np.zeros((1, 1), dtype=np.uint8)
    assert blend(image, labels, SPEC, 0).getpixel((0, 0)) == (200, 200, 200)
    assert blend(image, labels, SPEC, 0.5).getpixel((0, 0)) == (105, 110, 225)
    assert blend(image, labels, SPEC, 1).getpixel((0, 0)) == (10, 20, 250)
    with pytest.raises(UsageError, match="between 0"):
        blend(image, labels, SPEC, 1.5)


def test_unwritable_targets_are_named_and_leave_nothing(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PixelwiseError, match=r"file/a\.png: cannot be written"):
        write_png(tmp_path / "file" / "a.png", Image.new("L", (1, 1)))
    with pytest.raises(UsageError, match=r"ends in \.png"):
        write_png(tmp_path / "a.jpg", Image.new("L", (1, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
