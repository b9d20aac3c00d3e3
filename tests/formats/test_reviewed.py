"""Rare files and moments in which pixels were once wrong, or a process waited for itself."""

import base64
import gc
import os
import struct
import threading

import numpy as np
import pytest
import rasterio
import tifffile
import zarr

from pixelwise.formats import decoding, open_source
from pixelwise.formats.base import whole_numbers
from pixelwise.formats.beside import not_read
from pixelwise.formats.nifti import open_nifti
from pixelwise.formats.tiff.read import open_tiff
from pixelwise.formats.tiff.windows import CACHE_BYTES


@pytest.mark.parametrize("nodata", [2, 255])
def test_a_nodata_value_that_one_bit_cannot_hold_hides_nothing(tmp_path, nodata):
    bits = np.random.default_rng(0).integers(0, 2, (1, 40, 48), dtype=np.uint8)
    profile = {"driver": "GTiff", "width": 48, "height": 40, "count": 1, "dtype": "uint8", "nbits": 1, "nodata": nodata}
    with rasterio.open(
        tmp_path / "a.tif", "w", **profile, crs="EPSG:32633", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)
    ) as file:
        file.write(bits)
    with open_source(tmp_path / "a.tif") as source:
        assert np.array_equal(source.read(0, 0, 40, 48)[..., 0], bits[0] * 255)
        valid = source.valid(0, 0, 40, 48)
        assert valid is None or valid.all()


@pytest.mark.parametrize("version", [2, 3])
def test_missing_floats_as_xarray_writes_them_are_no_data(tmp_path, version):
    values = np.random.default_rng(0).random((20, 30)).astype("f4")
    values[:4] = -9999
    names = {"dimension_names": ("y", "x")} if version == 3 else {}
    fill = -9999.0 if version == 2 else 0.0
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(20, 30), chunks=(10, 10), dtype="f4", zarr_format=version, fill_value=fill, **names
    )
    array[:] = values
    if version == 2:
        array.attrs["_ARRAY_DIMENSIONS"] = ["y", "x"]
    else:
        array.attrs["_FillValue"] = base64.b64encode(struct.pack("<d", -9999.0)).decode()
    with open_source(tmp_path / "a.zarr") as source:
        assert np.array_equal(source.valid(0, 0, 20, 30), values != -9999)
        assert np.array_equal(source.read(0, 0, 20, 30)[..., 0], np.where(values == -9999, 0, values))


def test_a_default_fill_value_of_zero_is_data(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(4, 4), chunks=(4, 4), dtype="f4", zarr_format=2, fill_value=0)
    array[:] = np.eye(4)
    array.attrs["_ARRAY_DIMENSIONS"] = ["y", "x"]
    with open_source(tmp_path / "a.zarr") as source:
        assert source.valid(0, 0, 4, 4) is None


def test_what_the_garbage_collector_closes_does_not_lock_the_process(tmp_path, monkeypatch):
    """It runs in any allocation, below the locks of the messages and of the shared memory too."""
    path, sizes = tmp_path / "a.tif", [3, 700]  # of windows, so that shared memory must grow for the last
    tifffile.imwrite(path, np.zeros((700, 700), np.uint8), tile=(256, 256))
    knot = {"source": open_source(path)}
    knot["me"], knot["pixels"] = knot, knot["source"].read(0, 0, 3, 3)
    del knot
    decoding.stop()  # with new memory, which has no room yet

    def with_collection(function):
        return lambda *given: (gc.collect(), function(*given))[1]

    found = []
    with open_source(path) as source, monkeypatch.context() as patch:
        knots = [{"source": open_source(path)} for _ in range(2)]
        for knot in knots:
            knot["me"], knot["pixels"] = knot, knot["source"].read(0, 0, 3, 3)
        del knot, knots
        patch.setattr(decoding, "send", with_collection(decoding.send))
        patch.setattr("pixelwise.formats.worker.os.truncate", with_collection(os.truncate))
        reading = threading.Thread(
            target=lambda: found.extend(source.read(0, 0, n, n).shape for n in sizes), daemon=True
        )
        reading.start()
        reading.join(30)
        assert not reading.is_alive()
    assert found == [(3, 3, 1), (700, 700, 1)]


def test_names_beside_which_nothing_can_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for location in (".", "/", "a" * 250 + ".tif"):
        assert not_read(location, {}) == ()


def test_pages_as_channels_share_the_cache_of_decoded_blocks(tmp_path):
    path = str(tmp_path / "a.tif")
    for number in range(4):
        pixels = np.full((512, 512), number, np.uint8)
        tifffile.imwrite(path, pixels, tile=(256, 256), compression="zlib", append=number > 0)
    with open_tiff(path, channels=4) as source:
        assert source.read(0, 0, 300, 300)[0, 0].tolist() == [0, 1, 2, 3]
        stacks = [item for item in gc.get_objects() if type(item).__name__ == "Stack" and item._handles is source._file]
        assert len(stacks) == 4
        assert sum(item._block.cache_info().maxsize * 256 * 256 for item in stacks) <= CACHE_BYTES


def test_modalities_along_the_first_axis_are_read_once(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    voxels = np.random.default_rng(0).integers(0, 255, (12, 20, 16, 4), dtype=np.uint8)
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "a.nii")
    with open_nifti(str(tmp_path / "a.nii"), axis=0, intensity="type", channels=4) as source:
        for plane in range(12):
            found = source.read(0, 0, source.info.height, source.info.width, plane)
            assert np.array_equal(found, voxels[plane].transpose(1, 0, 2))
        assert source._slab.cache_info().misses <= 4


def test_halves_of_masks_are_whole_numbers_without_a_warning():
    assert whole_numbers(np.array([0, 1, 3], np.float16)).tolist() == [0, 1, 3]
