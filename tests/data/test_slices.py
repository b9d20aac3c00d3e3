"""Volumes as images: neighbouring planes as channels."""

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from pixelwise.data.check import inspect_data
from pixelwise.data.labels import LabelSpec
from pixelwise.data.layouts import open_data
from pixelwise.data.pairs import Pair
from pixelwise.data.samples import OpenPair, SliceStack, open_image
from pixelwise.errors import UsageError
from pixelwise.formats import open_source
from pixelwise.formats.axes import axes_of_mask
from pixelwise.infer import evaluate, plan_batch, run_batch
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.predictor import Predictor


@pytest.fixture
def volume(tmp_path):
    """(5, 6, 4, 3): 4 slices at 3 points in time; every slice of every volume has its own number."""
    numbers = np.arange(12, dtype=np.uint8).reshape(4, 3) * np.ones((5, 6, 1, 1), dtype=np.uint8)
    nibabel.Nifti1Image(numbers, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    return tmp_path / "a.nii.gz", numbers


def test_neighbours_become_channels_and_the_last_plane_is_repeated(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5 * 4 * 6 * 2, dtype=np.uint16).reshape(5, 4, 6, 2))
    with open_source(tmp_path / "a.npy") as source, SliceStack(open_source(tmp_path / "a.npy"), 3) as stack:
        assert (stack.info.channels, stack.info.planes, stack.info.dtype) == (6, 5, "uint16")
        for plane, around in ((0, (0, 0, 1)), (2, (1, 2, 3)), (4, (3, 4, 4))):
            wanted = np.concatenate([source.read(1, 2, 3, 4, number) for number in around], axis=2)
            assert np.array_equal(stack.read(1, 2, 3, 4, plane), wanted)
        assert stack.valid(0, 0, 2, 2) is None and stack.fingerprint() == source.fingerprint()


def test_neighbours_belong_to_one_point_in_time(volume):
    path, numbers = volume
    with open_image(path, {"slices": 3}) as stack:
        assert stack.info.planes == 12
        first = [stack.read(0, 0, 1, 1, plane)[0, 0].tolist() for plane in (3, 4, 5)]
    # plane = t * 4 + slice: plane 3 is the last slice at t = 0, plane 4 the first at t = 1
    wanted = [(0, 2), (0, 3), (0, 3)], [(1, 0), (1, 0), (1, 1)], [(1, 0), (1, 1), (1, 2)]
    assert first == [[numbers[0, 0, number, time] for time, number in around] for around in wanted]


def test_one_slice_is_the_source_itself_and_the_axis_is_that_of_the_format(volume):
    with open_image(volume[0], {"axis": 0}) as source:
        assert not isinstance(source, SliceStack)
        assert source.info.planes == 5 * 3 and source.info.channels == 1


@pytest.mark.parametrize("slices", [2, 0, -1])
def test_slices_are_an_odd_number(volume, slices):
    with open_source(volume[0]) as source, pytest.raises(UsageError, match="odd number"):
        SliceStack(source, slices)


SPEC = LabelSpec(names=("dark", "bright"), colors=((0, 0, 0), (255, 0, 0)), values=((0,), (1,)))
SIDE = 8


class Bright(nn.Module):
    """The class of a pixel is whether it is bright."""

    def forward(self, image):
        return torch.cat([torch.full_like(image, 0.4), image], dim=1)


def save(path, volume):
    if path.suffix == ".npy":
        np.save(path, volume)
    else:
        nibabel.Nifti1Image(volume, np.eye(4)).to_filename(path)


@pytest.mark.parametrize(
    ("suffix", "reading", "place"),
    [
        (".nii.gz", {"axis": 0}, "plane 2 along axis 0, row 7, column 5"),
        (".nii.gz", {"axis": 1}, "plane 5 along axis 1, row 7, column 2"),
        (".nii.gz", {"axis": 2}, "plane 7 along axis 2, row 5, column 2"),
        (".npy", {"axes": "zyx"}, "plane 2, row 5, column 7"),
        (".npy", {"axes": "yxz"}, "plane 7, row 2, column 5"),
        (".npy", {"axes": "xzy"}, "plane 5, row 7, column 2"),
    ],
)
def test_images_and_masks_are_cut_alike_by_every_command(tmp_path, suffix, reading, place):
    """Of cubes, whose sides do not tell which axis is which."""
    for split in ("train", "val", "test"):
        truth = (np.random.default_rng(len(split)).random((SIDE,) * 3) < 0.5).astype(np.uint8)
        for kind, volume in (("images", truth * 200), ("masks", truth)):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            if (kind, split) == ("masks", "train"):
                volume = volume.copy()
                volume[2, 5, 7] = 7
            save(tmp_path / "data" / split / kind / f"{split}{suffix}", volume)
    folder = open_data(tmp_path / "data", labels=SPEC)
    (stray,) = [problem for problem in inspect_data(folder, reading=reading).problems if problem.severity == "fatal"]
    assert f"7 in train{suffix} at {place}" in stray.message
    image, mask = (tmp_path / "data/test" / kind / f"test{suffix}" for kind in ("images", "masks"))
    with OpenPair(Pair(image=image, mask=mask, split="test", name="a"), SPEC, 1, reading) as pair:
        for plane in range(SIDE):
            sample = pair.read(plane)
            assert torch.equal(sample.image[0] // 200, sample.mask)
    config = {"num_classes": 2, "in_channels": 1}
    card = ModelCard(
        model="m", config=config, labels=SPEC, mean=(0.0,), std=(1.0,), reading=reading, weights_sha256="1" * 64
    )
    predictor = Predictor(Bright(), card, device="cpu", precision="float32")
    assert evaluate(predictor, folder).scores.miou == 1
    (outcome,) = run_batch(predictor, plan_batch([image], tmp_path / "out"))
    assert outcome.status == "done"
    with OpenPair(Pair(image=image, mask=mask, split="test", name="a"), SPEC, 1, reading) as pair:
        planes = [pair.read(plane).mask.numpy() for plane in range(SIDE)]
    if suffix == ".npy":  # planes first, as NumPy's programs write stacks
        assert np.array_equal(np.load(tmp_path / "out/test.npy"), planes)
    else:
        found, wanted = (np.asarray(nibabel.load(path).dataobj) for path in (tmp_path / "out/test.nii.gz", mask))
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("shape", "axes", "found"),
    [
        ((4, 5), "cyx", "yx"),
        ((1, 4, 5), "cyx", "cyx"),
        ((4, 5, 3), "cyx", None),
        ((9, 4, 5), "tcyx", "tyx"),
        ((4, 5), None, None),
    ],
)
def test_axes_of_a_mask_are_those_of_its_image_without_channels(shape, axes, found):
    assert axes_of_mask(shape, axes) == found
