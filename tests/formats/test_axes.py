"""Arrays whose axes come in another order, packed numbers and missing data: read as meant, or asked about."""

import nibabel as nib
import numpy as np
import pytest
import zarr

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import open_source
from pixelwise.formats.axes import axes_of_numpy

IMAGE = np.random.default_rng(0).integers(0, 255, (15, 18, 3), dtype=np.uint8)


def planes(source):
    whole = (0, 0, source.info.height, source.info.width)
    return np.stack([source.read(*whole, plane) for plane in range(source.info.planes)])


@pytest.mark.parametrize(
    "shape, channels, axes",
    [
        ((15, 18), 3, "yx"),
        ((15, 18, 3), 3, "yxc"),
        ((3, 15, 18), 3, "cyx"),
        ((3, 15, 3), 3, "yxc"),  # both fit
        ((8, 15, 18), 8, "cyx"),
        ((15, 18, 8), 3, "yxc"),  # neither fits: an error, not 15 planes
        ((5, 15, 18), 3, "zyx"),
        ((5, 15, 18), 1, "zyx"),
        ((3, 15, 18), 1, "yxc"),  # colours or slices? An error
        ((3, 15, 18), None, "yxc"),  # nobody says what is wanted
        ((15, 18, 30), None, "yxc"),
        ((7, 15, 18, 3), 3, "zyxc"),
        ((7, 3, 15, 18), 3, "zcyx"),
        ((15, 18, 1), 3, "yxc"),
    ],
)
def test_axes_of_numpy(shape, channels, axes):
    assert axes_of_numpy(shape, channels) == axes


@pytest.mark.parametrize("order", ["C", "F"])
def test_channels_first_and_stacks_of_numpy(tmp_path, order):
    np.save(tmp_path / "chw.npy", np.array(IMAGE.transpose(2, 0, 1), order=order))
    np.save(tmp_path / "zyx.npy", np.array(np.stack([IMAGE[..., 0]] * 5), order=order))
    np.save(tmp_path / "xyc.npy", np.array(IMAGE.transpose(1, 0, 2), order=order))
    with open_source(tmp_path / "chw.npy", channels=3) as source:
        np.testing.assert_array_equal(planes(source)[0], IMAGE)
        np.testing.assert_array_equal(source.read(2, 3, 4, 5), IMAGE[2:6, 3:8])
    with open_source(tmp_path / "zyx.npy", channels=3) as source:
        np.testing.assert_array_equal(planes(source), np.stack([IMAGE[..., :1]] * 5))
    with open_source(tmp_path / "xyc.npy", channels=3, axes="xyc") as source:
        np.testing.assert_array_equal(planes(source)[0], IMAGE)
    with pytest.raises(UsageError, match="axes 'yx' do not fit an array of 18 x 15 x 3"):
        open_source(tmp_path / "xyc.npy", axes="yx")


def test_five_axes_without_names(tmp_path):
    five = np.stack([IMAGE.transpose(2, 0, 1)] * 2, 1)[None]
    made = zarr.create_array(str(tmp_path / "a.zarr"), shape=five.shape, chunks=(1, 1, 1, 8, 8), dtype="u1")
    made[:] = five
    with open_source(tmp_path / "a.zarr", channels=3) as source:
        np.testing.assert_array_equal(planes(source), np.stack([IMAGE] * 2))
    with pytest.raises(DataError, match="--axes tczyx"):
        open_source(tmp_path / "a.zarr", channels=1)


@pytest.mark.parametrize("version", [2, 3])
def test_packed_numbers_of_zarr_mean_what_cf_says(tmp_path, version):
    meant = np.random.default_rng(0).uniform(200, 300, (9, 11))
    stored = np.round((meant - 250) / 0.01).astype("i2")
    stored[0, 0] = -32768
    given = {"shape": (9, 11), "chunks": (4, 4), "dtype": "i2"}
    given["fill_value"] = -32768 if version == 2 else 0
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=version)
    made = group.create_array("t", **given)  # one image, beside its coordinates, as xarray writes it
    group.create_array("x", shape=(11,), dtype="f8", chunks=(11,))
    made[:] = stored
    made.attrs.update({"scale_factor": 0.01, "add_offset": 250.0} | ({"_FillValue": -32768} if version == 3 else {}))
    with open_source(tmp_path / "a.zarr") as source:
        assert source.info.dtype == "float32"
        meant[0, 0] = 0
        np.testing.assert_allclose(planes(source)[0, ..., 0], meant, atol=0.006)
        there = source.valid(0, 0, 9, 11)
        assert not there[0, 0] and there.sum() == 98
    with open_source(tmp_path / "a.zarr", labels=True) as source:
        np.testing.assert_array_equal(planes(source)[0, ..., 0], stored)


def test_nan_of_nifti_is_missing_data_where_it_is_asked_for(tmp_path):
    volume = np.random.default_rng(0).uniform(0, 100, (7, 6, 3)).astype(np.float32)
    volume[:2] = np.nan
    nib.save(nib.Nifti1Image(volume, np.diag([2, 2, 3, 1.0])), tmp_path / "a.nii.gz")
    with (
        open_source(tmp_path / "a.nii.gz", intensity="type") as source,
        pytest.raises(DataError, match="--nan-is-nodata"),
    ):
        source.read(0, 0, 6, 7)
    with open_source(tmp_path / "a.nii.gz", intensity="type", nan_is_nodata=True) as source:
        found = planes(source)[..., 0]
        np.testing.assert_array_equal(found, np.nan_to_num(volume).transpose(2, 1, 0))
        np.testing.assert_array_equal(source.valid(0, 0, 6, 7), np.isfinite(volume[:, :, 0]).T)
    with open_source(tmp_path / "a.nii.gz", nan_is_nodata=True) as source:
        assert (planes(source)[..., 0][:, :, :2] == 0).all()


def test_the_fourth_axis_of_nifti_is_the_channels_that_the_network_takes(tmp_path):
    volume = np.random.default_rng(0).integers(0, 100, (7, 6, 5, 4)).astype(np.int16)
    volume[..., 1] *= 50  # modalities have ranges of their own
    nib.save(nib.Nifti1Image(volume, np.diag([2, 2, 3, 1.0])), tmp_path / "a.nii")
    with open_source(tmp_path / "a.nii", channels=4) as source:
        info, known = source.info, source.metadata
        assert (info.planes, info.channels, known["shape"]) == (5, 4, (7, 6, 5))
        found = planes(source)
        each = [np.percentile(volume[..., k], (0.5, 99.5)) for k in range(4)]
        right = [np.clip((volume[..., k] - low) / (high - low), 0, 1) for k, (low, high) in enumerate(each)]
        np.testing.assert_allclose(found, np.stack(right, 3).transpose(2, 1, 0, 3), atol=1e-6)
        assert len(known["intensity"]["channels"]) == 4
    with open_source(tmp_path / "a.nii", channels=1) as source:
        assert (source.info.planes, source.info.channels) == (20, 1)


def ome(path, *images):
    """An OME-Zarr as bioformats2raw writes it: images 0, 1, ... of two levels."""
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    for number, image in enumerate(images):
        group = root.create_group(str(number))
        axes = [{"name": name, "type": kind} for name, kind in (("c", "channel"), ("y", "space"), ("x", "space"))]
        levels = []
        for level, scale in enumerate((1.0, 2.0)):
            pixels = image[:, :: 2**level, :: 2**level]
            group.create_array(str(level), shape=pixels.shape, chunks=(1, 8, 8), dtype="u1")[:] = pixels
            transform = [{"type": "scale", "scale": [1.0, scale, scale]}]
            levels.append({"path": str(level), "coordinateTransformations": transform})
        group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": levels}]
    return path


def test_further_images_of_ome_zarr_are_named(tmp_path):
    image = IMAGE.transpose(2, 0, 1)
    with open_source(ome(tmp_path / "two.zarr", image, image + 1)) as source:
        assert "only the first is read" in source.metadata["warnings"][0]
    with open_source(tmp_path / "two.zarr", series=1, level=1) as source:
        assert "warnings" not in source.metadata
        assert source.metadata["level_shapes"] == ((15, 18), (8, 9))
        np.testing.assert_array_equal(planes(source)[0], IMAGE[::2, ::2] + 1)
    with open_source(ome(tmp_path / "one.zarr", image)) as source:
        assert "warnings" not in source.metadata


@pytest.mark.parametrize("command", ["inspect", "predict"])
def test_axes_is_an_option_of_the_commands(command):
    from typer.testing import CliRunner

    from pixelwise.cli import app

    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert "--axes" in shown and "--nan-is-nodata" in shown
