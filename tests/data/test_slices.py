"""Volumes as images: neighbouring planes as channels."""

import nibabel
import numpy as np
import pytest

from pixelwise.data.samples import SliceStack, open_image
from pixelwise.errors import UsageError
from pixelwise.formats import open_source


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
