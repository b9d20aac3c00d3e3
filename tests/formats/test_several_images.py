"""Files of several images: planes where their sizes agree, else what is left out is said; levels keep their place."""

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import tifffile
from rasterio.transform import Affine

from pixelwise.errors import UsageError
from pixelwise.formats import open_source
from pixelwise.formats.in_process import open_in_process
from pixelwise.formats.opening import read_image

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore:Use `@`:PendingDeprecationWarning"),  # rasterio, of affine
]

PLACE = [
    (33550, "d", 3, (10.0, 10.0, 0.0), True),
    (33922, "d", 6, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0), True),
    (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True),
]


def pictures(count, height=20, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def planes(source):
    whole = (0, 0, source.info.height, source.info.width)
    return np.stack([source.read(*whole, plane) for plane in range(source.info.planes)])


def append(path, images, **options):
    for number, image in enumerate(images):
        tifffile.imwrite(path, image, photometric="rgb", append=number > 0, **options)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}, {"metadata": None}])
def test_appended_images_are_planes(tmp_path, options):
    images = pictures(4)
    append(tmp_path / "a.tif", images, **options)
    with open_in_process(tmp_path / "a.tif") as source:
        np.testing.assert_array_equal(planes(source), images)
        assert source.info.channels == 3 and "warnings" not in source.metadata
    if "metadata" not in options:  # else tifffile takes the pages for one stack
        with open_in_process(tmp_path / "a.tif", series=2) as source:
            np.testing.assert_array_equal(planes(source), images[2:3])


def test_scenes_of_ome_tiff_are_planes(tmp_path):
    images = pictures(3)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        for number, image in enumerate(images):
            writer.write(image, photometric="rgb", metadata={"axes": "YXS", "Name": f"position {number}"})
    with open_in_process(tmp_path / "a.ome.tif") as source:
        assert source.info.format == "ome-tiff"
        np.testing.assert_array_equal(planes(source), images)
    with open_in_process(tmp_path / "a.ome.tif", series=1) as source:
        assert source.metadata["image_name"] == "position 1"


def test_stacks_that_were_appended_keep_their_planes(tmp_path):
    stacks = pictures(6).reshape(2, 3, 20, 24, 3)
    append(tmp_path / "a.tif", stacks)
    with open_in_process(tmp_path / "a.tif", channels=3) as source:
        assert source.metadata["plane_shape"] in ((2, 3), (6,))
        np.testing.assert_array_equal(planes(source), stacks.reshape(6, 20, 24, 3))


@pytest.mark.parametrize("options", [{}, {"metadata": None}], ids=["described", "plain"])
def test_grey_pages_are_channels_where_the_network_takes_as_many(tmp_path, options):
    bands = np.ascontiguousarray(pictures(1)[0].transpose(2, 0, 1))
    for number, band in enumerate(bands):
        tifffile.imwrite(tmp_path / "a.tif", band, append=number > 0, tile=(16, 16), **options)
    with open_in_process(tmp_path / "a.tif", channels=3) as source:
        assert (source.info.planes, source.info.channels) == (1, 3)
        np.testing.assert_array_equal(planes(source)[0], pictures(1)[0])
    with open_in_process(tmp_path / "a.tif", channels=1) as source:
        np.testing.assert_array_equal(planes(source)[..., 0], bands)
    with open_in_process(tmp_path / "a.tif", labels=True) as source:
        assert source.info.planes == 3


def test_images_that_differ_are_named_and_can_be_chosen(tmp_path):
    one, other = pictures(1)[0], pictures(1, 30, 10)[0]
    append(tmp_path / "a.tif", [one, other])
    with open_source(tmp_path / "a.tif") as source:
        np.testing.assert_array_equal(planes(source)[0], one)
        (told,) = source.metadata["warnings"]
        assert "2 images that differ" in told and "30 x 10 x 3" in told and "--series 1" in told
    with open_source(tmp_path / "a.tif", series=1) as source:
        np.testing.assert_array_equal(planes(source)[0], other)
        assert "warnings" not in source.metadata
    with pytest.raises(UsageError, match=r"series 2: the file holds 2, counted from 0"):
        open_source(tmp_path / "a.tif", series=2)


@pytest.mark.parametrize("tags", [(), PLACE], ids=["tiff", "geotiff"])
def test_a_thumbnail_is_not_the_image(tmp_path, tags):
    image = pictures(1)[0]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        small = np.ascontiguousarray(image[::4, ::4])
        writer.write(small, photometric="rgb", subfiletype=1, metadata=None)
        writer.write(image, photometric="rgb", metadata=None, extratags=tags)
    with open_in_process(tmp_path / "a.tif") as source:
        assert source.info.format == ("geotiff" if tags else "tiff")
        assert source.metadata.get("transform") == ((10, 0, 5e5, 0, -10, 5e6) if tags else None)
        np.testing.assert_array_equal(planes(source), image[None])
        assert "warnings" not in source.metadata


def test_pages_of_a_geotiff_are_planes_where_they_share_the_place(tmp_path):
    images = pictures(3)
    elsewhere = [(33550, "d", 3, (20.0, 20.0, 0.0), True), *PLACE[1:]]
    for name, tags in (("one", PLACE), ("two", elsewhere)):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as writer:
            for number, image in enumerate(images):
                extratags = tags if number == 2 else PLACE
                writer.write(image, photometric="rgb", extratags=extratags, metadata=None)
    with open_in_process(tmp_path / "one.tif") as source:
        np.testing.assert_array_equal(planes(source), images)
    with open_in_process(tmp_path / "two.tif") as source:
        assert source.info.planes == 1 and "3 images that differ" in source.metadata["warnings"][0]
    with open_in_process(tmp_path / "two.tif", series=2) as source:
        np.testing.assert_array_equal(planes(source), images[2:])
        assert source.metadata["transform"][0] == 20


@pytest.fixture
def cog(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (3, 130, 150), dtype=np.uint8)
    profile = {"driver": "GTiff", "height": 130, "width": 150, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(tmp_path / "a.tif", "w", transform=Affine(10, 0, 5e5, 0, -10, 5e6), **profile) as file:
        file.write(image)
    rasterio.shutil.copy(tmp_path / "a.tif", tmp_path / "cog.tif", driver="COG", BLOCKSIZE=128, OVERVIEW_COUNT=2)
    return tmp_path / "cog.tif"


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_of_a_cog_keeps_its_place(cog, level):
    given = {} if level == 0 else {"overview_level": level - 1}
    with rasterio.open(cog, **given) as right, open_source(cog, level=level) as source:
        info, known = source.info, source.metadata
        assert (info.format, info.height, info.width) == ("geotiff", *right.shape)
        np.testing.assert_allclose(known["transform"], tuple(right.transform)[:6])
        assert rasterio.crs.CRS.from_wkt(known["crs"]) == right.crs
        np.testing.assert_array_equal(planes(source)[0], right.read().transpose(1, 2, 0))


def test_a_level_that_is_not_there_is_named(cog):
    with pytest.raises(UsageError, match=r"no level 7. Its levels are 0 \(150 x 130\), 1 \(75 x 65\)"):
        open_source(cog, level=7)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_scale_and_offset_of_a_geotiff_are_followed(tmp_path, dtype):
    reflectance = np.random.default_rng(0).uniform(0, 0.6, (2, 9, 11))
    scales, offsets = (1e-4, 2e-4), (-0.1, 0.0)
    shape = (2, 1, 1)
    stored = np.round((reflectance - np.reshape(offsets, shape)) / np.reshape(scales, shape)).astype(dtype)
    profile = {"driver": "GTiff", "height": 9, "width": 11, "count": 2, "dtype": dtype, "nodata": 0}
    stored[:, 0, 0] = 0
    with rasterio.open(
        tmp_path / "a.tif", "w", crs="EPSG:4326", transform=Affine(1, 0, 0, 0, -1, 0), **profile
    ) as file:
        file.write(stored)
        file.scales, file.offsets = scales, offsets
    found = read_image(tmp_path / "a.tif")
    assert found.dtype == np.float32
    reflectance[:, 0, 0] = 0  # no data
    np.testing.assert_allclose(found, reflectance.transpose(1, 2, 0), atol=2e-4)
    with open_source(tmp_path / "a.tif") as source:
        assert not source.valid(0, 0, 1, 1)[0, 0] and source.valid(0, 1, 1, 1)[0, 0]


def test_masks_ignore_the_scale(tmp_path):
    stored = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    profile = {"driver": "GTiff", "height": 2, "width": 3, "count": 1, "dtype": "uint8"}
    with rasterio.open(
        tmp_path / "a.tif", "w", crs="EPSG:4326", transform=Affine(1, 0, 0, 0, -1, 0), **profile
    ) as file:
        file.write(stored)
        file.scales = (0.5,)
    with open_source(tmp_path / "a.tif", labels=True) as source:
        np.testing.assert_array_equal(planes(source)[0, ..., 0], stored[0])


def test_a_compression_that_gdal_does_not_know_is_read(tmp_path):
    image = pictures(1)[0]
    options = {"photometric": "rgb", "compression": "jpegxl", "metadata": None, "tile": (16, 16)}
    tifffile.imwrite(tmp_path / "a.tif", image, extratags=PLACE, **options)
    with open_source(tmp_path / "a.tif") as source:
        assert source.metadata["transform"] == (10, 0, 5e5, 0, -10, 5e6)
        np.testing.assert_array_equal(planes(source)[0], tifffile.imread(tmp_path / "a.tif"))
