"""GeoTIFFs that rasterio wrote are read as it reads them, window by window; damaged ones end in one `DataError`."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import open_source
from pixelwise.formats.geotiff import is_geotiff, open_geotiff
from pixelwise.formats.local import Identity
from pixelwise.formats.opening import read_image
from pixelwise.formats.tiff.read import open_tiff

UTM = {"crs": "EPSG:32633", "transform": Affine(10, 0, 5e5, 0, -10, 5e6)}
TURNED = Affine(10, 0, 5e5, 0, -10, 5e6) @ Affine.rotation(30)


def random_image(bands=3, height=70, width=90, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(0, 120, (bands, height, width)).astype(dtype)


def write(path, array, *, colormap=None, mask=None, tags=None, **profile):
    """As rasterio writes it: bands first."""
    bands, height, width = array.shape
    kind = {"driver": "GTiff", "width": width, "height": height, "count": bands, "dtype": array.dtype} | UTM | profile
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **kind) as file:
        if colormap:
            file.write_colormap(1, colormap)
        file.update_tags(**(tags or {}))
        file.write(array)
        if mask is not None:
            file.write_mask(mask)
    return str(path)


def last(array):
    return array.transpose(1, 2, 0)


def whole(source):
    return source.read(0, 0, source.info.height, source.info.width)


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3035", "EPSG:2056", "EPSG:2263"])
@pytest.mark.parametrize("transform", [Affine(10, 0, 5e5, 0, -10, 5e6), TURNED], ids=["north up", "turned"])
def test_place_and_pixels_are_those_that_rasterio_reads(tmp_path, crs, transform):
    pixels = random_image()
    tags = {"AREA_OR_POINT": "Point"}
    path = write(tmp_path / "a.tif", pixels, crs=crs, transform=transform, tags=tags, compress="lzw")
    with open_geotiff(path) as source, rasterio.open(path) as file:
        assert rasterio.crs.CRS.from_wkt(source.metadata["crs"]) == file.crs
        assert source.metadata["transform"] == tuple(file.transform)[:6]
        assert source.metadata["tags"]["AREA_OR_POINT"] == "Point"
        assert source.info.format == "geotiff" and source.info.block_px == file.block_shapes[0]
        assert np.array_equal(whole(source), last(pixels)) and source.valid(0, 0, 5, 5) is None


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize(
    "layout",
    [
        {"interleave": "band", "compress": "lzw"},
        {"interleave": "pixel", "tiled": True, "blockxsize": 32, "blockysize": 16, "compress": "deflate"},
        {"bigtiff": "YES", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "zstd"},
    ],
    ids=["strips", "tiles", "one big tile"],
)
def test_types_and_layouts(tmp_path, dtype, layout):
    pixels = random_image(bands=5, dtype=dtype)
    path = write(tmp_path / "a.tif", pixels, **layout)
    with open_geotiff(path) as source:
        assert (source.info.channels, source.info.dtype) == (5, dtype)
        assert source.read(11, 20, 40, 50).dtype == dtype
        assert np.array_equal(source.read(11, 20, 40, 50), last(pixels)[11:51, 20:70])


@pytest.mark.parametrize(
    "compress", ["lzw", "deflate", "zstd", "packbits", "lzma", "webp", "lerc", "lerc_deflate", "lerc_zstd"]
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_every_compression_is_that_of_gdal(tmp_path, compress, dtype, interleave):
    if compress == "webp" and dtype != "uint8":
        pytest.skip("WebP holds bytes")
    pixels = random_image(dtype=dtype)
    layout = {"tiled": True, "blockxsize": 32, "blockysize": 32, "webp_lossless": True}
    layout |= {"sparse_ok": True, "interleave": "pixel" if compress == "webp" else interleave}
    layout |= {"predictor": 3 if dtype == "float32" else 2} if compress in ("lzw", "deflate", "zstd") else {}
    if dtype == "float32":
        pixels[:, 40:45], pixels[1, 5, 6] = np.nan, np.nan
        layout["nodata"] = float("nan")
    path = write(tmp_path / "a.tif", pixels, compress=compress, **layout)
    with open_geotiff(path) as source, rasterio.open(path) as file:
        assert np.array_equal(file.read(), pixels, equal_nan=True)
        empty = np.isnan(pixels).any(axis=0)
        assert np.array_equal(whole(source), last(np.where(empty, 0, pixels)))
        assert dtype != "float32" or np.array_equal(source.valid(0, 0, 70, 90), ~empty)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    pixels = random_image(height=130, width=101)
    folder = tmp_path_factory.mktemp("tiled")
    path = write(folder / "a.tif", pixels, tiled=True, blockxsize=32, blockysize=48, compress="deflate", nodata=7)
    with open_geotiff(path) as source:
        yield source, pixels


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_window_is_that_part_of_the_whole(tiled, data):
    source, pixels = tiled
    top, left = data.draw(st.integers(0, 129)), data.draw(st.integers(0, 100))
    height, width = data.draw(st.integers(1, 130 - top)), data.draw(st.integers(1, 101 - left))
    part = last(pixels)[top : top + height, left : left + width]
    empty = (part == 7).all(axis=2)
    assert np.array_equal(source.read(top, left, height, width), np.where(empty[..., None], 0, part))
    assert np.array_equal(source.valid(top, left, height, width), ~empty)


def test_pixels_are_those_that_the_reader_of_tiff_gives(tmp_path):
    one, colors = random_image(1), {index: (index, 255 - index, 7, 255) for index in range(256)}
    bits = {"nbits": 1}
    files = {
        "palette": write(tmp_path / "p.tif", one, colormap=colors),
        "white is zero": write(tmp_path / "w.tif", one, photometric="miniswhite"),
        "white is zero, 16 bit": write(tmp_path / "w16.tif", one.astype("uint16") * 300, photometric="miniswhite"),
        "bits": write(tmp_path / "b.tif", one % 2, **bits),
        "bits, white is zero": write(tmp_path / "bw.tif", one % 2, photometric="miniswhite", **bits),
        "four bits": write(tmp_path / "n4.tif", one % 16, nbits=4),
        "four bits, white is zero": write(tmp_path / "w4.tif", one % 16, nbits=4, photometric="miniswhite"),
        "palette of two colours": write(tmp_path / "p1.tif", one % 2, colormap={0: colors[3], 1: colors[9]}, **bits),
        "grey and opacity": write(tmp_path / "la.tif", random_image(2), alpha="yes"),
        "colour and opacity": write(tmp_path / "rgba.tif", random_image(4), photometric="rgb", alpha="yes"),
        "half floats": write(tmp_path / "h.tif", random_image(2, dtype="float32"), nbits=16),
    }
    for name, path in files.items():
        with open_geotiff(path) as source, open_tiff(path) as other:
            assert np.array_equal(whole(source), whole(other)), name
            assert source.info.channels == other.info.channels, name
        assert np.array_equal(read_image(path), whole(open_geotiff(path))), name


def test_jpeg_colours_are_rgb(tmp_path):
    rows, columns = np.mgrid[:64, :96]
    smooth = np.stack([rows * 3, columns * 2, 255 - rows - columns]).astype(np.uint8)
    path = write(
        tmp_path / "j.tif", smooth, compress="jpeg", photometric="ycbcr", tiled=True, blockxsize=32, blockysize=32
    )
    with open_geotiff(path) as source:
        assert np.abs(whole(source).astype(int) - last(smooth)).mean() < 3


def test_opacity_and_masks_say_where_data_is(tmp_path):
    pixels = random_image(4)
    pixels[3] = np.where(random_image(1)[0] > 60, 255, 0)
    with open_geotiff(write(tmp_path / "a.tif", pixels, photometric="rgb", alpha="yes")) as source:
        assert np.array_equal(source.valid(0, 0, 70, 90), pixels[3] != 0)
    mask = random_image(1)[0] > 60
    jpeg = {"compress": "jpeg", "photometric": "ycbcr"}
    with open_geotiff(write(tmp_path / "m.tif", pixels[:3], mask=mask, **jpeg)) as source:
        assert source.info.channels == 3
        assert np.array_equal(source.valid(5, 6, 30, 40), mask[5:35, 6:46])


def test_nodata_of_zero_or_unsigned_numbers_is_where_all_bands_have_it(tmp_path):
    pixels = random_image(2, dtype="uint16")
    pixels[0, 0], pixels[:, 1] = 65535, 65535
    with open_geotiff(write(tmp_path / "u.tif", pixels, nodata=65535)) as source:
        valid = source.valid(0, 0, 3, 90)
        assert valid[0].all() and not valid[1].any() and valid[2].all()
        assert (source.read(0, 0, 1, 90)[..., 0] == 65535).all() and (source.read(1, 0, 1, 90) == 0).all()


def test_nodata_of_signed_numbers_is_where_any_band_has_it(tmp_path):
    pixels = random_image(2, dtype="int16")
    pixels[0, 0] = -9999
    with open_geotiff(write(tmp_path / "i.tif", pixels, nodata=-9999)) as source:
        assert not source.valid(0, 0, 1, 90).any() and source.valid(1, 0, 1, 90).all()
        assert (source.read(0, 0, 1, 90) == 0).all()


def test_a_nodata_value_that_no_pixel_can_hold_changes_nothing(tmp_path):
    path = write(tmp_path / "a.tif", random_image(1), nodata=255)
    content = Path(path).read_bytes()
    assert content.count(b"255\0") == 1
    Path(path).write_bytes(content.replace(b"255\0", b"-99\0"))
    with open_geotiff(path) as source:
        assert source.valid(0, 0, 70, 90) is None


def test_nan_is_nodata_where_the_file_says_so_and_an_error_elsewhere(tmp_path):
    pixels = random_image(2, dtype="float32")
    pixels[0, 3, 4] = np.nan
    with open_geotiff(write(tmp_path / "declared.tif", pixels, nodata=np.nan)) as source:
        assert not source.valid(3, 4, 1, 1).any() and (source.read(3, 4, 1, 1) == 0).all()
        assert source.valid(0, 0, 70, 90).sum() == 70 * 90 - 1
    with open_geotiff(write(tmp_path / "not.tif", pixels)) as source:
        assert np.isfinite(source.read(10, 0, 60, 90)).all()
        with pytest.raises(DataError, match=r"not\.tif: 1 of its numbers in rows 0\.\.9, columns 0\.\.8 are NaN"):
            source.read(0, 0, 9, 8)
    mask = np.ones((70, 90), dtype=bool)
    mask[3, 4] = False
    with open_geotiff(write(tmp_path / "masked.tif", pixels, mask=mask)) as source:
        assert source.read(3, 4, 1, 1)[0, 0, 0] == 0


def test_a_coordinate_system_without_a_transform_is_an_error(tmp_path, recwarn):
    path = tmp_path / "lost.tif"
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        write(path, random_image(), transform=None)
    with pytest.raises(
        DataError, match=r"lost\.tif: it has a coordinate system \(EPSG:32633\) but no transform.*-a_ullr"
    ):
        open_geotiff(str(path))


def test_text_that_is_not_utf8_costs_no_more_than_the_tags(tmp_path):
    path = write(tmp_path / "a.tif", random_image(1), tags={"TIFFTAG_IMAGEDESCRIPTION": "Hoehe", "WHERE": "Wuerzburg"})
    content = Path(path).read_bytes()
    for old, new in ((b"Hoehe", b"H\xf6he\0"), (b"Wuerzburg", b"W\xfcrzburg ")):
        changed = content.replace(old, new)
        assert changed != content
        Path(path).write_bytes(changed)
        with open_geotiff(path) as source:
            assert np.array_equal(whole(source), last(random_image(1)))
            assert source.metadata["crs"]


def test_a_transform_without_a_coordinate_system_is_kept(tmp_path):
    with open_geotiff(write(tmp_path / "a.tif", random_image(), crs=None)) as source:
        assert source.metadata["crs"] is None and source.metadata["transform"] == (10, 0, 5e5, 0, -10, 5e6)


def test_control_points_are_a_place(tmp_path):
    points = [GroundControlPoint(row, col, 10 + col / 100, 50 - row / 100, 0) for row, col in ((0, 0), (0, 9), (9, 0))]
    path = write(tmp_path / "g.tif", random_image(), crs="EPSG:4326", gcps=points, transform=None)
    with open_geotiff(path) as source:
        assert source.metadata["gcps"][1] == (0, 9, 10.09, 50, 0) and "WGS 84" in source.metadata["gcps_crs"]


@pytest.mark.parametrize(
    ("profile", "bands", "words"),
    [
        ({"photometric": "cmyk"}, 4, "stored as CMYK"),
        ({"photometric": "cielab"}, 3, "stored as CIELAB"),
        ({"dtype": "complex64"}, 1, "numbers are of type complex64"),
        ({"transform": Affine(0, 0, 5, 0, 0, 6)}, 1, "no place or no area"),
    ],
)
def test_what_no_network_takes_is_refused(tmp_path, profile, bands, words):
    path = write(tmp_path / "bad.tif", random_image(bands).astype(profile.get("dtype", "uint8")), **profile)
    with pytest.raises(DataError, match=rf"bad\.tif: .*{words}"):
        open_geotiff(path)


def test_what_it_is_its_tags_say(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", random_image())
    content = Path(path).read_bytes()
    assert is_geotiff(content[:4096], path) and is_geotiff(content[:16], path)
    assert not is_geotiff(content[:16], str(tmp_path / "none.tif"))
    assert is_geotiff(content[:16], "s3://bucket/a.tif", opener=lambda: io.BytesIO(content))
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        plain = write(tmp_path / "plain.tif", random_image(), crs=None, transform=None)
    assert not is_geotiff(Path(plain).read_bytes()[:4096], plain)
    assert not is_geotiff(b"\x89PNG", "a.tif") and not is_geotiff(b"", "a.tif")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert is_geotiff(content[:4096], path)
    with pytest.raises(UsageError, match=r'GeoTIFF needs .*pip install "rasterio>=1\.4"'):
        open_geotiff(path)


def test_windows_are_read_from_many_threads(tmp_path):
    pixels = random_image(height=256, width=256)
    path = write(tmp_path / "a.tif", pixels, tiled=True, blockxsize=32, blockysize=32, compress="deflate")
    places = [tuple(place) for place in np.random.default_rng(1).integers(0, 200, (200, 2)).tolist()]
    for opener in (None, lambda: io.FileIO(path)):
        with open_geotiff(path, opener, identity=Identity.local(path)) as source, ThreadPoolExecutor(6) as pool:
            for (top, left), part in zip(places, pool.map(lambda p: source.read(*p, 50, 50), places), strict=True):
                assert np.array_equal(part, last(pixels)[top : top + 50, left : left + 50])
            assert len(source._file._idle) <= 6


def test_a_file_object_that_fails_ends_in_an_error_that_says_why(tmp_path, capfd):
    path = write(tmp_path / "a.tif", random_image(height=300, width=300), tiled=True, blockxsize=16, blockysize=16)
    wire = {"cut": False}

    class Remote(io.FileIO):
        def readinto(self, buffer):
            if wire["cut"]:
                raise ConnectionResetError("the line is dead")
            return super().readinto(buffer)

    with pytest.raises(UsageError, match="identity"):
        open_geotiff(path, lambda: Remote(path))
    with open_geotiff("s3://bucket/a.tif", lambda: Remote(path), identity=Identity.local(path)) as source:
        assert source.read(200, 200, 100, 100).shape == (100, 100, 3)
        wire["cut"] = True
        with pytest.raises(DataError, match=r"s3://bucket/a\.tif: .*the line is dead"):
            source.read(0, 0, 100, 100)
        wire["cut"] = False
        assert source.read(0, 0, 100, 100).shape == (100, 100, 3)
    assert capfd.readouterr() == ("", "")


def test_names_that_gdal_takes_for_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = random_image()
    for name in ("GTIFF_DIR:1:a.tif", "s3:x.tif", "a\udcff.tif", "zip+file.vrt", "ä ö.tif", "tif"):
        write(tmp_path / "plain.tif", pixels)
        Path("plain.tif").rename(name)
        with open_geotiff(name) as source:
            assert np.array_equal(whole(source), last(pixels))


def test_references_to_other_files_are_not_followed(tmp_path):
    other = write(tmp_path / "other.tif", random_image(1))
    vrt = tmp_path / "b.tif"
    vrt.write_text(
        f"<VRTDataset rasterXSize='9' rasterYSize='9'><VRTRasterBand dataType='Byte' band='1'><SimpleSource>"
        f"<SourceFilename>{other}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    assert not is_geotiff(vrt.read_bytes(), str(vrt))
    with pytest.raises(DataError, match=r"b\.tif: .*not a TIFF"):
        open_geotiff(str(vrt))


def test_files_beside_it_neither_matter_nor_appear(tmp_path):
    path = write(tmp_path / "a.tif", random_image(1))
    (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset><SRS>EPSG:4326</SRS></PAMDataset>")
    (tmp_path / "a.tfw").write_text("1\n0\n0\n-1\n7\n7\n")
    write(tmp_path / "a.tif.msk", random_image(1) * 0)
    with open_geotiff(path) as source:
        assert "32633" in source.metadata["crs"] and source.metadata["transform"][2] == 5e5
        assert source.valid(0, 0, 5, 5) is None
        source.read(0, 0, 5, 5)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_change_while_it_is_read_is_noticed(tmp_path):
    path = write(tmp_path / "a.tif", random_image(1))
    with open_geotiff(path) as source:
        before = source.fingerprint()
        source.check_unchanged()
        Path(path).write_bytes(Path(path).read_bytes() + b"more")
        with pytest.raises(DataError, match=r"a\.tif: the file changed"):
            source.check_unchanged()
        assert source.fingerprint() != before


def test_a_block_larger_than_memory_costs_one_error(tmp_path):
    path = tmp_path / "block.tif"
    kind = {"driver": "GTiff", "width": 80_000, "height": 80_000, "count": 1, "dtype": "uint32", "sparse_ok": True}
    with rasterio.open(path, "w", **kind, **UTM, tiled=True, blockxsize=40_000, blockysize=40_000, compress="lzw"):
        pass
    with pytest.raises(DataError, match=r"block\.tif: "), open_source(path) as source:
        source.read(0, 0, 9, 9)
    with open_source(write(tmp_path / "a.tif", random_image())) as source:
        assert source.info.format == "geotiff" and np.array_equal(whole(source), last(random_image()))


def test_masks_are_read_as_stored(tmp_path):
    one, colors = random_image(1), {index: (index, 255 - index, 7, 255) for index in range(256)}
    bits, palette = one % 2, {"colormap": colors, "nodata": 5}
    for name, wanted, array, profile in (
        ("palette", one, one, palette),
        ("white is zero", one, one, {"photometric": "miniswhite"}),
        ("16 bit", one.astype("uint16") * 300, one.astype("uint16") * 300, {"nodata": 300}),
        ("bits", 255 - bits * 255, bits, {"nbits": 1, "photometric": "miniswhite"}),
        ("whole floats", one, one.astype("float32"), {}),
        ("colours", random_image(3), random_image(3), {}),
        ("colours and opacity", random_image(4)[:3], random_image(4), {"photometric": "rgb", "alpha": "yes"}),
    ):
        with open_geotiff(write(tmp_path / "m.tif", array, **profile), labels=True) as source:
            found = whole(source)
            assert np.array_equal(found, last(wanted)), name
            assert (found.shape[2], found.dtype.name) == (source.info.channels, source.info.dtype), name
            assert found.dtype.kind in "ui", name
            assert ("palette" in source.metadata) == (name == "palette"), name
    with open_geotiff(write(tmp_path / "m.tif", one, **palette), labels=True) as source:
        assert source.metadata["palette"][3] == (3, 252, 7)
        assert np.array_equal(source.valid(0, 0, 70, 90), one[0] != 5)


def test_what_is_no_mask_is_refused(tmp_path):
    for array in (random_image(2), random_image(3, dtype="uint16")):
        with pytest.raises(DataError, match=r"m\.tif: it has . channels of .*a mask has"):
            open_geotiff(write(tmp_path / "m.tif", array), labels=True)
    path = write(tmp_path / "m.tif", random_image(1, dtype="float32") / 7)
    with pytest.raises(DataError, match=r"m\.tif: .*not whole"), open_geotiff(path, labels=True) as source:
        whole(source)


def try_all(path):
    """What reading a file gives: pixels, or None after a `DataError` that names it."""
    try:
        with open_geotiff(str(path)) as source:
            source.valid(0, 0, source.info.height, source.info.width)
            return whole(source)
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


@pytest.mark.parametrize("layout", ["strips", "tiles", "jpeg"])
def test_truncated_files_end_in_one_error(tmp_path, capfd, layout):
    options = {
        "strips": {"compress": "lzw"},
        "tiles": {"compress": "deflate", "tiled": True, "blockxsize": 32, "blockysize": 32, "bigtiff": "YES"},
        "jpeg": {"compress": "jpeg", "photometric": "ycbcr", "tiled": True, "blockxsize": 32, "blockysize": 32},
    }[layout]
    path = write(tmp_path / "a.tif", random_image(), **options)
    content, pixels = Path(path).read_bytes(), try_all(path)
    cuts = np.random.default_rng(2).integers(0, len(content) - 1, 20).tolist()
    for cut in [0, 1, 4, 8, 16, *cuts]:
        Path(path).write_bytes(content[:cut])
        found = try_all(path)
        assert found is None or np.array_equal(found, pixels)
    assert capfd.readouterr() == ("", "")


def test_damaged_files_end_in_one_error(tmp_path, capfd):
    rng = np.random.default_rng(3)
    layouts = [
        {"compress": "deflate", "nodata": 0},
        {"compress": "jpeg", "photometric": "ycbcr", "tiled": True, "blockxsize": 32, "blockysize": 32},
        {"compress": "zstd", "bigtiff": "YES", "mask": random_image(1)[0] > 60},
    ]
    originals = [
        Path(write(tmp_path / f"{index}.tif", random_image(), **options)).read_bytes()
        for index, options in enumerate(layouts)
    ]
    errors, path = 0, tmp_path / "damaged.tif"
    for turn in range(60):
        content = bytearray(originals[turn % 3])
        until = 600 if turn % 2 else len(content)
        for place in rng.integers(4, until, 1 + turn % 7).tolist():
            content[place] = int(rng.integers(0, 256))
        path.write_bytes(content)
        errors += try_all(path) is None
    assert errors > 20
    assert capfd.readouterr() == ("", "")


def test_nothing_appears_on_the_terminal_of_a_program_without_logging(tmp_path):
    path = write(tmp_path / "a.tif", random_image(), compress="deflate")
    Path(path).write_bytes(Path(path).read_bytes()[:6000])
    code = (
        "from pixelwise.formats.geotiff import open_geotiff\nimport sys\n"
        "try:\n    open_geotiff(sys.argv[1]).read(0, 0, 70, 90)\nexcept ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith(path) and done.stdout.count("\n") == 1


def test_closing_while_others_read(tmp_path):
    source = open_geotiff(write(tmp_path / "a.tif", random_image()))
    source.close()
    source.close()
    with pytest.raises(DataError, match=r"a\.tif: the image is closed"):
        source.read(0, 0, 1, 1)
