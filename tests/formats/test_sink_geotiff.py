"""Labels and maps as GeoTIFF: rasterio finds the pixels, the place of the image, the colours, names and mark in them."""

import errno
import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError
from pixelwise.formats import Result, SourceInfo
from pixelwise.formats.geotiff import open_geotiff, write_cog, write_geotiff

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore:Use `@`:PendingDeprecationWarning"),  # rasterio, of affine
]

SPEC = LabelSpec(
    names=("Wasser", "forêt", "city, dense"), colors=((0, 0, 200), (0, 90, 0), (200, 0, 9)), values=((0,), (1,), (2,))
)
UTM = {"crs": "EPSG:32633", "transform": Affine(10, 0, 5e5, 0, -10, 5e6)}
TURNED = Affine(10, 0, 5e5, 0, -10, 5e6) @ Affine.rotation(30)
MARK = {"model": "abc", "input": "12", "options": {"tile": 512, "name": "größer"}}


def image_file(path, **profile):
    kind = {"driver": "GTiff", "width": 301, "height": 270, "count": 3, "dtype": "uint8"} | UTM | profile
    with rasterio.open(path, "w", **kind) as file:
        file.write(np.ones((3, 270, 301), dtype=np.uint8))
        file.update_tags(AREA_OR_POINT="Point", ACQUIRED="2026-01-02", STATISTICS_MEAN="3")
    return str(path)


def result_of(array, source=None, *, kind="labels", nodata=None, mark=MARK, asked=None):
    array = array if array.ndim == 3 else array[None]
    planes, height, width = array.shape
    given = {"height": height, "width": width, "planes": planes}
    if source is None:
        info, metadata = SourceInfo(location="a.png", format="png", channels=3, dtype="uint8", **given), {}
    else:
        info, metadata = replace(source.info, **given), source.metadata

    def rows(plane, top, bottom):
        if asked is not None:
            asked.append((plane, top, bottom))
        return array[plane, top:bottom]

    return Result(
        kind=kind, spec=SPEC, source=info, dtype=array.dtype, rows=rows, nodata=nodata, metadata=metadata, mark=mark
    )


def random_labels(*shape, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(0, 3, shape).astype(dtype)


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3035", "EPSG:2056"])
@pytest.mark.parametrize("transform", [UTM["transform"], TURNED], ids=["north up", "turned"])
@pytest.mark.parametrize("write", [write_geotiff, write_cog])
def test_labels_lie_where_their_image_lies(tmp_path, crs, transform, write):
    labels = random_labels(270, 301)
    path = image_file(tmp_path / "image.tif", crs=crs, transform=transform)
    with open_geotiff(path) as source:
        write(tmp_path / "out" / "labels.tif", result_of(labels, source, nodata=255))
    with rasterio.open(path) as image, rasterio.open(tmp_path / "out" / "labels.tif") as file:
        assert file.crs == image.crs and file.bounds == image.bounds and file.shape == image.shape
        assert file.transform.almost_equals(image.transform, 1e-9)
        assert (file.nodata, file.dtypes, file.count) == (255, ("uint8",), 1)
        assert file.compression.name == "deflate" and file.profile["tiled"] and file.descriptions == ("labels",)
        assert np.array_equal(file.read(1), labels)
        assert [file.colormap(1)[index][:3] for index in range(3)] == list(SPEC.colors)
        tags = file.tags()
        assert (tags["AREA_OR_POINT"], tags["ACQUIRED"]) == ("Point", "2026-01-02")
        assert tags["TIFFTAG_SOFTWARE"] == "pixelwise" and "STATISTICS_MEAN" not in tags
        assert [entry["name"] for entry in json.loads(tags["CLASSES"])] == list(SPEC.names)
        assert json.loads(tags["PIXELWISE"]) == MARK
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["labels.tif"]


def test_a_cog_holds_smaller_copies_with_the_most_frequent_label(tmp_path):
    labels = np.zeros((1200, 1300), dtype=np.uint8)
    labels[:600] = np.kron(random_labels(150, 325), np.ones((4, 4), dtype=np.uint8))
    write_cog(tmp_path / "cog.tif", result_of(labels, nodata=255))
    with rasterio.open(tmp_path / "cog.tif") as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.overviews(1) == [2, 4]
        assert file.block_shapes == [(512, 512)] and np.array_equal(file.read(1), labels)
    with rasterio.open(tmp_path / "cog.tif", overview_level=0) as file:
        assert np.array_equal(file.read(1), labels[::2, ::2])


@pytest.mark.parametrize("write", [write_geotiff, write_cog])
def test_maps_are_float32_with_nan_as_nodata(tmp_path, write):
    values = np.random.default_rng(0).random((300, 280)).astype(np.float32)
    values[:9] = np.nan
    write(tmp_path / "entropy.tif", result_of(values, kind="entropy"))
    with rasterio.open(tmp_path / "entropy.tif") as file:
        assert file.dtypes == ("float32",) and np.isnan(file.nodata) and file.descriptions == ("entropy",)
        assert np.array_equal(file.read(1), values, equal_nan=True)
        assert not file.dataset_mask()[:9].any() and file.dataset_mask()[9:].all()
        assert "CLASSES" not in file.tags()


def test_planes_are_bands_written_along_the_blocks(tmp_path):
    labels, asked = random_labels(4, 600, 70, dtype="uint16"), []
    write_geotiff(tmp_path / "stack.tif", result_of(labels, asked=asked))
    with rasterio.open(tmp_path / "stack.tif") as file:
        assert np.array_equal(file.read(), labels) and file.dtypes == ("uint16",) * 4
        assert file.block_shapes[0] == (256, 80)
    assert asked == [(plane, top, min(top + 256, 600)) for plane in range(4) for top in (0, 256, 512)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    labels = random_labels(530, 310)
    path = tmp_path_factory.mktemp("written") / "a.tif"
    write_geotiff(path, result_of(labels))
    with rasterio.open(path) as file:
        yield file, labels


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_window_of_the_file_is_that_part(written, data):
    file, labels = written
    top, left = data.draw(st.integers(0, 529)), data.draw(st.integers(0, 309))
    bottom, right = data.draw(st.integers(top + 1, 530)), data.draw(st.integers(left + 1, 310))
    assert np.array_equal(file.read(1, window=((top, bottom), (left, right))), labels[top:bottom, left:right])


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(height=st.integers(1, 40), width=st.integers(1, 40), planes=st.integers(1, 2))
def test_all_sizes_down_to_one_pixel(tmp_path, height, width, planes):
    labels = random_labels(planes, height, width)
    for write in (write_geotiff, write_cog):
        write(tmp_path / "a.tif", result_of(labels))
        with rasterio.open(tmp_path / "a.tif") as file:
            assert np.array_equal(file.read(), labels)


def test_control_points_and_rpcs_are_kept(tmp_path):
    points = [GroundControlPoint(row, col, 10 + col / 99, 50 - row / 99, 5) for row, col in ((0, 0), (0, 9), (9, 0))]
    with open_geotiff(image_file(tmp_path / "g.tif", crs="EPSG:4326", gcps=points, transform=None)) as source:
        write_geotiff(tmp_path / "labels.tif", result_of(random_labels(270, 301), source))
    with rasterio.open(tmp_path / "g.tif") as image, rasterio.open(tmp_path / "labels.tif") as file:
        (found, crs), (wanted, _) = file.gcps, image.gcps
        assert [(p.row, p.col, p.x, p.y, p.z) for p in found] == [(p.row, p.col, p.x, p.y, p.z) for p in wanted]
        assert crs == rasterio.crs.CRS.from_epsg(4326) and len(found) == 3
    numbers = " ".join(map(str, range(20)))
    rpcs = dict.fromkeys(("LINE_NUM_COEFF", "LINE_DEN_COEFF", "SAMP_NUM_COEFF", "SAMP_DEN_COEFF"), numbers)
    for name in ("LINE", "SAMP", "LAT", "LONG", "HEIGHT"):
        rpcs |= {f"{name}_OFF": "7", f"{name}_SCALE": "3"}
    with rasterio.Env(GDAL_PAM_ENABLED="NO"):
        path = image_file(tmp_path / "r.tif", rpcs=rasterio.rpc.RPC.from_gdal(rpcs), crs=None, transform=None)
    with open_geotiff(path) as source, rasterio.open(path) as image:
        write_geotiff(tmp_path / "rpc.tif", result_of(random_labels(270, 301), source))
        with rasterio.open(tmp_path / "rpc.tif") as file:
            assert image.rpcs is not None and file.rpcs == image.rpcs


@pytest.mark.filterwarnings("error")
def test_images_of_other_formats_have_no_place(tmp_path):
    write_geotiff(tmp_path / "a.tif", result_of(random_labels(20, 30)))
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning), rasterio.open(tmp_path / "a.tif") as file:
        assert file.crs is None


@pytest.mark.parametrize("write", [write_geotiff, write_cog])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, write):
    path = tmp_path / "a.tif"
    path.write_text("old")

    def rows(plane, top, bottom):
        if top:
            raise PixelwiseError("the network overflows")
        return np.zeros((bottom - top, 50), dtype=np.uint8)

    with pytest.raises(PixelwiseError, match="overflows"):
        write(path, replace(result_of(random_labels(600, 50)), rows=rows))
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.999])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, capfd, share):
    result = result_of(random_labels(400, 400))
    write_geotiff(tmp_path / "whole.tif", result)
    size = (tmp_path / "whole.tif").stat().st_size
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), before[1]))
        with pytest.raises(PixelwiseError, match=r"full\.tif: cannot be written \(File too large\)"):
            write_geotiff(tmp_path / "full.tif", result)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [item.name for item in tmp_path.iterdir()] == ["whole.tif"]
    assert capfd.readouterr() == ("", "")


def test_a_cog_is_not_begun_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: os.terminal_size((1, 1)) and type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(PixelwiseError, match=r"a\.tif: a COG of about .*Free some space"):
        write_cog(tmp_path / "a.tif", result_of(random_labels(50, 50)))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (write_geotiff, write_cog):
        with pytest.raises(PixelwiseError, match="cannot be written"):
            write(tmp_path / "file" / "a.tif", result_of(random_labels(5, 5)))
    assert errno.ENOTDIR and Path(tmp_path / "file").read_text() == ""
