"""TIFF in windows: every layout gives the slices of what the whole-image reader gives; damage is one DataError."""

import io
import random
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import open_source
from pixelwise.formats.local import Identity
from pixelwise.formats.registry import format_of
from pixelwise.formats.tiff import windows
from pixelwise.formats.tiff.read import open_tiff

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 255, (70, 90, 5), dtype=np.uint8)
CHW = np.ascontiguousarray(BANDS.transpose(2, 0, 1))
RGB, GREY = np.ascontiguousarray(BANDS[..., :3]), np.ascontiguousarray(BANDS[..., 0])
DEEP = RNG.integers(0, 65535, (70, 90), dtype=np.uint16)
FLOATS = RNG.normal(size=(70, 90, 3)).astype(np.float32)
COLORMAP = RNG.integers(0, 65535, (3, 256), dtype=np.uint16)
TILED = {"tile": (16, 32)}
ORIENTED = [{"extratags": [(274, 3, 1, turn, True)], "tile": (16, 32)} for turn in range(2, 9)]

LAYOUTS = {
    "one strip": (RGB, {"photometric": "rgb"}),
    "strips": (RGB, {"photometric": "rgb", "rowsperstrip": 7}),
    "tiles": (RGB, {"photometric": "rgb", **TILED}),
    "deflate tiles": (RGB, {"photometric": "rgb", **TILED, "compression": "zlib", "predictor": True}),
    "lzw strips": (RGB, {"photometric": "rgb", "compression": "lzw", "rowsperstrip": 9}),
    "one lzw strip": (RGB, {"photometric": "rgb", "compression": "lzw", "rowsperstrip": 70}),
    "zstd bigtiff": (RGB, {"photometric": "rgb", "compression": "zstd", "bigtiff": True, **TILED}),
    "jpeg": (RGB, {"photometric": "rgb", "compression": "jpeg", **TILED}),
    "jpeg ycbcr": (RGB, {"photometric": "ycbcr", "compression": "jpeg", "subsampling": (2, 2), "tile": (32, 32)}),
    "planar": (CHW, {"photometric": "minisblack", "planarconfig": "separate", "rowsperstrip": 8}),
    "planar deflate": (CHW, {"photometric": "minisblack", "planarconfig": "separate", **TILED, "compression": "zlib"}),
    "big-endian": (DEEP, {"byteorder": ">", "rowsperstrip": 6}),
    "big-endian deflate": (DEEP, {"byteorder": ">", "compression": "zlib", "predictor": True, **TILED}),
    "16 bit": (DEEP, {}),
    "float": (FLOATS, {"photometric": "rgb", **TILED, "compression": "zlib", "predictor": 3}),
    "float big-endian": (FLOATS, {"photometric": "rgb", "byteorder": ">"}),
    "1 bit": (GREY > 99, {}),
    "1 bit strips": (GREY > 99, {"rowsperstrip": 5}),
    "1 bit tiles": (GREY > 99, {**TILED, "compression": "zlib"}),
    "palette": (GREY, {"photometric": "palette", "colormap": COLORMAP, **TILED, "compression": "zlib"}),
    "white is zero": (GREY, {"photometric": "miniswhite", "rowsperstrip": 8}),
    "alpha": (np.dstack([RGB, (GREY > 60) * np.uint8(255)]), {"photometric": "rgb", **TILED}),
    "infrared": (BANDS[..., :4], {"photometric": "rgb", **TILED}),  # tifffile marks it as opacity
    "four channels": (BANDS[..., :4], {"photometric": "rgb", "extrasamples": ["unspecified"], **TILED}),
    "5 channels last": (BANDS, {"photometric": "minisblack", "planarconfig": "contig", **TILED}),
    "5 channels last in pages": (BANDS, {}),
    "5 channels last in pages, deflate": (BANDS, {"compression": "zlib"}),
    "5 channels first": (CHW, {}),
    "5 channels first deflate": (CHW, {"compression": "zlib", **TILED}),
    "imagej": (CHW, {"imagej": True, "metadata": {"axes": "CYX"}}),
    "ome": (CHW, {"ome": True, "metadata": {"axes": "CYX"}, **TILED, "compression": "zlib"}),
    **{f"turned {number + 2}": (RGB, {"photometric": "rgb", **options}) for number, options in enumerate(ORIENTED)},
}


def as_meant(path):
    """What tifffile reads, and what its pixels mean, by hand."""
    with tifffile.TiffFile(path) as tiff:
        stored, page = tiff.series[0].asarray(), tiff.pages.first
        colors = None if page.colormap is None else (page.colormap >> 8).astype(np.uint8).T
    array = np.moveaxis(stored, 0, 2) if stored.ndim == 3 and stored.shape[0] == 5 else np.atleast_3d(stored)
    is_opacity = page.extrasamples == (2,) and set(np.unique(array[..., -1])) == {0, 255}
    array = array[..., :3] if is_opacity else array
    array = array * np.uint8(255) if array.dtype == bool else array
    array = 255 - array if page.photometric == 0 else array
    array = array if colors is None else colors[array[..., 0]]
    if turn := page.tags.valueof(274, 1) - 1:
        picture = Image.fromarray(array)
        picture.getexif()[274] = turn + 1
        array = np.asarray(ImageOps.exif_transpose(picture))
    return stored, array


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiff") / "a.tif"
    stored, options = LAYOUTS[request.param]
    tifffile.imwrite(path, np.ascontiguousarray(stored), **options)
    with open_tiff(str(path)) as source:
        yield source, as_meant(path)[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_masks_are_the_numbers_as_stored(tmp_path, name):
    stored, options = LAYOUTS[name]
    tifffile.imwrite(tmp_path / "a.tif", np.ascontiguousarray(stored), **options)
    stored, meant = as_meant(tmp_path / "a.tif")
    meant = meant[..., :3] if name == "infrared" else meant  # of masks it is the opacity that it is marked as
    if stored.ndim == 3 and (meant.shape[2] != 3 or meant.dtype != np.uint8):
        with pytest.raises(DataError, match=r"a\.tif: it has \d channels of \w+; a mask has one channel"):
            open_tiff(str(tmp_path / "a.tif"), labels=True)
        return
    with open_tiff(str(tmp_path / "a.tif"), labels=True) as source:
        expected = meant if stored.ndim == 3 or stored.dtype == bool else stored[..., None]  # 1 bit is black and white
        np.testing.assert_array_equal(source.read(0, 0, source.info.height, source.info.width), expected)
        assert source.info.dtype == expected.dtype.name
        colors = source.metadata.get("palette")
        assert (colors is not None) == (name == "palette")
        assert colors is None or colors[7] == tuple(COLORMAP[:, 7] >> 8)


def test_masks_of_whole_floats(tmp_path):
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, GREY.astype(np.float32))
    with open_tiff(path, labels=True) as source:
        assert source.info.dtype == "int64"
        np.testing.assert_array_equal(source.read(3, 4, 9, 9)[..., 0], GREY[3:12, 4:13])
    for value in (0.5, 1e12):
        tifffile.imwrite(path, np.full((3, 3), value))
        with open_tiff(path, labels=True) as source, pytest.raises(DataError, match="not whole; a mask has"):
            source.read(0, 0, 3, 3)


@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None, derandomize=True)
@given(data=st.data())
def test_windows_are_slices_of_the_whole_image(written, data):
    source, whole = written
    info = source.info
    assert (info.height, info.width, info.channels, info.dtype, info.planes) == (*whole.shape, whole.dtype.name, 1)
    top = data.draw(st.integers(0, info.height - 1))
    left = data.draw(st.integers(0, info.width - 1))
    height, width = data.draw(st.integers(1, info.height - top)), data.draw(st.integers(1, info.width - left))
    window = source.read(top, left, height, width)
    assert window.dtype.name == info.dtype
    np.testing.assert_array_equal(window, whole[top : top + height, left : left + width])
    assert source.valid(top, left, height, width) is None


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "I;16", "F"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "group4", "packbits"])
def test_pillows_files(tmp_path, mode, compression):
    if compression == "group4" and mode != "1":
        pytest.skip("group 4 is for 1 bit")
    image = Image.fromarray(RGB).convert("L" if mode in ("I;16", "F") else "RGB")
    image = Image.fromarray(DEEP) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "a.tif", compression=compression)
    with open_tiff(str(tmp_path / "a.tif")) as source:
        expected = (
            image.convert("RGB") if mode == "P" else image.convert(mode[:-1]) if mode in ("LA", "RGBA") else image
        )
        expected = np.atleast_3d(np.asarray(expected)) * (255 if mode == "1" else 1)
        np.testing.assert_array_equal(source.read(11, 13, 40, 50), expected[11:51, 13:63])


STACK = RNG.integers(0, 255, (4, 3, 40, 50), dtype=np.uint8)


@pytest.mark.parametrize(
    ("options", "axes", "planes", "channels"),
    [
        ({"ome": True, "metadata": {"axes": "ZCYX"}}, "Z", 4, 3),
        ({"ome": True, "metadata": {"axes": "TCYX"}, "compression": "zlib", "tile": (16, 16)}, "T", 4, 3),
        ({"ome": True, "metadata": {"axes": "TZYX"}, "compression": "zlib"}, "TZ", 12, 1),
        ({"imagej": True, "metadata": {"axes": "ZCYX"}}, "Z", 4, 3),
        ({"imagej": True, "metadata": {"axes": "TZYX"}}, "TZ", 12, 1),
        ({"metadata": {"axes": "ZCYX"}}, "Z", 4, 3),
        ({"metadata": {"axes": "ZCYX"}, "photometric": "rgb", "planarconfig": "separate", "tile": (16, 16)}, "Z", 4, 3),
        ({"photometric": "minisblack", "compression": "lzw"}, "QQ", 12, 1),
    ],
)
def test_stacks_have_planes(tmp_path, options, axes, planes, channels):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK, **{"photometric": "minisblack", **options})
    with open_tiff(str(path)) as source:
        assert (source.info.planes, source.info.channels) == (planes, channels)
        assert source.metadata["plane_axes"] == axes
        expected = STACK.transpose(0, 2, 3, 1) if channels == 3 else STACK.reshape(12, 40, 50, 1)
        for plane in range(planes):
            np.testing.assert_array_equal(source.read(5, 7, 20, 30, plane), expected[plane, 5:25, 7:37])


def test_volumetric_tiles_and_stacks_of_colour(tmp_path):
    volume = STACK.reshape(12, 40, 50)
    tifffile.imwrite(tmp_path / "v.tif", volume, tile=(4, 16, 16), volumetric=True, compression="zlib")
    with open_tiff(str(tmp_path / "v.tif")) as source:
        assert source.info.planes == 12
        for plane in (0, 5, 11):
            np.testing.assert_array_equal(source.read(5, 7, 20, 30, plane)[..., 0], volume[plane, 5:25, 7:37])
    colour = np.ascontiguousarray(STACK.transpose(0, 2, 3, 1))
    tifffile.imwrite(tmp_path / "c.tif", colour, photometric="rgb", compression="zlib")
    with open_tiff(str(tmp_path / "c.tif")) as source:
        assert (source.info.planes, source.info.channels) == (4, 3)
        np.testing.assert_array_equal(source.read(0, 0, 40, 50, 3), colour[3])


def test_the_wanted_channels_decide_where_a_file_leaves_it_open(tmp_path):
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, STACK[:, 0], photometric="minisblack", compression="zlib")
    for wanted, found in ((None, (1, 4)), (4, (1, 4)), (1, (4, 1)), (3, (4, 1))):
        with open_tiff(path, channels=wanted) as source:
            assert (source.info.planes, source.info.channels) == found
    pages = [Image.fromarray(page) for page in STACK[:, 0]]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    for wanted, found in ((None, (4, 1)), (1, (4, 1)), (4, (1, 4))):
        with open_tiff(path, channels=wanted) as source:
            assert (source.info.planes, source.info.channels) == found
            assert source.read(3, 4, 5, 6)[0, 0, 0] == STACK[0, 0, 3, 4]


def test_pyramids_are_read_at_full_resolution(tmp_path):
    for ome in (False, True):
        path = tmp_path / "p.tif"
        with tifffile.TiffWriter(path, ome=ome) as writer:
            writer.write(RGB, photometric="rgb", tile=(16, 16), subifds=1, compression="zlib")
            writer.write(RGB[::2, ::2], photometric="rgb", tile=(16, 16), subfiletype=1, compression="zlib")
        with open_tiff(str(path)) as source:
            assert source.info.format == ("ome-tiff" if ome else "tiff")
            np.testing.assert_array_equal(source.read(0, 0, 70, 90), RGB)


def test_metadata_of_ome_and_of_tags(tmp_path):
    metadata = {
        "axes": "ZCYX", "Name": "cells", "Channel": {"Name": ["DAPI", "GFP", "RFP"]}, "PhysicalSizeX": 250.0,
        "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0, "TimeIncrement": 3.0,
    }  # fmt: skip
    tifffile.imwrite(tmp_path / "a.ome.tif", STACK, ome=True, photometric="minisblack", metadata=metadata)
    with open_tiff(str(tmp_path / "a.ome.tif")) as source:
        assert dict(source.metadata) == {
            "image_name": "cells", "pixel_size_um": {"x": 0.25, "y": 0.25, "z": 2.0}, "time_increment_s": 3.0,
            "channel_names": ("DAPI", "GFP", "RFP"), "plane_axes": "Z", "plane_shape": (4,), "resolution": (1.0, 1.0),
            "resolution_unit": "none",
        }  # fmt: skip
    tifffile.imwrite(tmp_path / "b.tif", RGB, photometric="rgb", resolution=(20_000, 10_000), resolutionunit=3)
    with open_tiff(str(tmp_path / "b.tif")) as source:
        assert source.metadata["resolution"] == (20_000, 10_000)
        assert source.metadata["pixel_size_um"] == {"x": 0.5, "y": 1.0}


def test_nodata_and_nan(tmp_path):
    values = FLOATS.copy()
    values[3, 4] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", **TILED)
    with open_tiff(str(tmp_path / "a.tif")) as source:
        np.testing.assert_array_equal(source.read(4, 0, 9, 9), values[4:13, :9])
        with pytest.raises(DataError, match=r"a\.tif: 3 of its numbers in rows 0\.\.9, columns 0\.\.9 are NaN"):
            source.read(0, 0, 9, 9)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=[(42113, "s", 0, "nan", True)], **TILED)
    with open_tiff(str(tmp_path / "a.tif")) as source:
        assert source.read(0, 0, 9, 9)[3, 4].tolist() == [0, 0, 0]
        assert np.argwhere(~source.valid(0, 0, 9, 9)).tolist() == [[3, 4]]
    tifffile.imwrite(tmp_path / "a.tif", GREY, extratags=[(42113, "s", 0, "7", True)])
    with open_tiff(str(tmp_path / "a.tif")) as source:
        np.testing.assert_array_equal(source.valid(0, 0, 70, 90), GREY != 7)


def _handles(content):
    """An opener that counts, as URLs have one."""
    opened = []

    def opener():
        opened.append(io.BytesIO(content))
        return opened[-1]

    return opener, opened


def test_any_seekable_file_will_do(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", **TILED)
    opener, opened = _handles((tmp_path / "a.tif").read_bytes())
    identity = Identity(fingerprint=lambda: "abc", check=lambda: None)
    with open_tiff("s3://bucket/a.tif", opener, identity=identity) as source:
        np.testing.assert_array_equal(source.read(9, 9, 30, 30), RGB[9:39, 9:39])
        assert source.fingerprint() == "abc"
        source.check_unchanged()
    assert opened and all(file.closed for file in opened)
    with pytest.raises(UsageError, match="identity"):
        open_tiff("s3://bucket/a.tif", opener)


def test_threads_read_in_parallel(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", **TILED, compression="zlib")
    with open_tiff(str(path)) as source, ThreadPoolExecutor(8) as pool:
        places = [(top, left) for top in range(0, 50, 3) for left in range(0, 60, 5)]
        for (top, left), window in zip(places, pool.map(lambda at: source.read(*at, 20, 30), places), strict=True):
            np.testing.assert_array_equal(window, RGB[top : top + 20, left : left + 30])


def test_blocks_under_a_band_are_decoded_once(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", **TILED, compression="zlib")
    decoded, lock = [], threading.Lock()
    decode = windows.Stack._decode

    def counting(self, page, index):
        with lock:
            decoded.append(index)
        return decode(self, page, index)

    monkeypatch.setattr(windows.Stack, "_decode", counting)
    with open_tiff(str(path)) as source:
        source.read(20, 40, 5, 5)
        assert decoded == [4]
        for top in range(0, 70, 7):
            source.read(top, 0, 7, 90)
    assert sorted(decoded) == list(range(15))


def test_files_that_change_are_noticed(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY)
    with open_tiff(str(path)) as source:
        before = source.fingerprint()
        source.check_unchanged()
        tifffile.imwrite(path, GREY[:50])
        with pytest.raises(DataError, match=r"a\.tif: the file changed"):
            source.check_unchanged()
        assert source.fingerprint() != before


def _sparse(path: Path, size=100_000, tile=512):
    """A BigTIFF of which one tile is there."""
    blank = np.zeros((tile, tile), np.uint8)
    across = -(-size // tile)
    filled = (across // 2) * across + across // 2

    def tiles():
        for index in range(across * across):
            yield blank + 7 if index in (0, filled) else None

    tifffile.imwrite(
        path,
        tiles(),
        shape=(size, size),
        dtype=np.uint8,
        tile=(tile, tile),
        bigtiff=True,
        metadata=None,
        compression="zlib",
    )
    return across // 2 * tile


def test_a_window_of_a_huge_sparse_file_is_quick_and_small(tmp_path):
    place = _sparse(tmp_path / "huge.tif")
    tracemalloc.start()
    started = time.perf_counter()
    with open_tiff(str(tmp_path / "huge.tif")) as source:
        assert (source.info.height, source.info.width) == (100_000, 100_000)
        window = source.read(place - 10, place - 10, 100, 100)
        assert source.read(99_900, 99_900, 100, 100).max() == 0
    took, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert window[:10].max() == 0 and (window[10:, 10:] == 7).all()
    assert took < 5, took
    assert peak < 40 * 2**20, peak


def test_one_giant_compressed_strip_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "MAX_BLOCK_BYTES", 10_000)
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", compression="zlib", rowsperstrip=70)
    with pytest.raises(DataError, match=r"a\.tif: it is stored in strips of .*tiffcp"):
        open_tiff(str(tmp_path / "a.tif"))
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb")
    with open_tiff(str(tmp_path / "a.tif")) as source:
        np.testing.assert_array_equal(source.read(5, 5, 9, 9), RGB[5:14, 5:14])


@pytest.mark.parametrize(
    "text",
    [
        "<!DOCTYPE x [<!ENTITY a 'aaaa'>]><OME>&a;</OME>",
        "<OME><Image><Pixels SizeX='-1'/></Image></OME>",
        "<OME><Image><Pixels SizeZ='99999999' SizeT='99999999'/></Image></OME>",
        "<OME><Image><Pixels DimensionOrder='XYCZT' SizeX='90' SizeY='70' SizeC='1' SizeT='1' SizeZ='99999999999'>"
        "<TiffData PlaneCount='99999999999'/></Pixels></Image></OME>",
        "<OME><Image",
    ],
)
def test_hostile_xml(tmp_path, text):
    closing = "" if text.endswith("OME>") else "</OME>"
    tifffile.imwrite(tmp_path / "a.tif", GREY, description=text + closing, metadata=None)
    try:
        with open_source(tmp_path / "a.tif") as source:
            np.testing.assert_array_equal(source.read(0, 0, 70, 90)[..., 0], GREY)
    except DataError as error:
        assert str(error).startswith(f"{tmp_path / 'a.tif'}: ")


def test_pages_of_ome_that_are_not_there_are_an_error(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK[:, 0], ome=True, photometric="minisblack", compression="zlib")
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content.replace(b'SizeC="4"', b'SizeC="9"').replace(b'SizeZ="4"', b'SizeZ="9"'))
    with open_tiff(str(tmp_path / "a.tif")) as source, pytest.raises(DataError, match=r"page \d is missing"):
        for plane in range(source.info.planes):
            source.read(0, 0, 9, 9, plane)


def test_a_stack_that_is_cut_off_is_an_error_and_no_smaller_stack(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for page in STACK[:, 0]:
            writer.write(page, photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        end = tiff.pages[2].offset + 5
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(DataError, match=r"a\.tif: .*truncated"):
        open_tiff(str(path))


def test_ome_that_names_other_files_does_not_open_them(tmp_path):
    other = "<UUID FileName='/etc/passwd'>urn:uuid:1</UUID>"
    text = (
        f"<OME><Image><Pixels DimensionOrder='XYCZT' SizeX='90' SizeY='70' SizeC='1' SizeZ='2' SizeT='1' Type='uint8'>"
        f"<TiffData IFD='0' FirstZ='1'>{other}</TiffData></Pixels></Image></OME>"
    )
    tifffile.imwrite(tmp_path / "a.tif", GREY, description=text, metadata=None)
    with open_tiff(str(tmp_path / "a.tif")) as source:
        assert source.info.planes == 1
        np.testing.assert_array_equal(source.read(0, 0, 70, 90)[..., 0], GREY)


def test_a_later_tile_that_is_damaged_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", **TILED, compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.dataoffsets[-1]
    content = bytearray(path.read_bytes())
    content[offset + 2 : offset + 40] = b"\xff" * 38
    path.write_bytes(content)
    with open_tiff(str(path)) as source:
        np.testing.assert_array_equal(source.read(0, 0, 64, 90), RGB[:64])
        with pytest.raises(DataError, match=r"a\.tif: the file is damaged or truncated \(rows 60\.\.70"):
            source.read(60, 0, 10, 90)


def test_a_tile_that_is_a_giant_jpeg_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", tile=(32, 32), compression="jpeg")
    content = path.read_bytes()
    size = b"\x08\x00\x20\x00\x20\x03"
    assert size in content
    path.write_bytes(content.replace(size, b"\x08\xff\xff\xff\xff\x03"))
    with open_source(path) as source, pytest.raises(DataError, match=r"a\.tif: "):
        source.read(0, 0, 9, 9)


CODECS = ("png", "jpeg2000", "webp", "jpegxl", "jpegxr")


@pytest.mark.parametrize("codec", CODECS)
def test_tiles_that_are_images_of_their_own(tmp_path, codec):
    path, options = tmp_path / "a.tif", {"compression": codec, "photometric": "rgb"}
    stored = [RGB, BANDS[..., :4]] if codec in ("png", "webp") else [RGB]
    for pixels in (*stored, *([] if codec == "webp" else [np.dstack([DEEP] * 3), GREY])):
        options["photometric"] = "rgb" if pixels.ndim == 3 else "minisblack"
        for blocks in (TILED, {"rowsperstrip": 16}):
            tifffile.imwrite(path, pixels, **options, **blocks)
            with open_tiff(str(path)) as source:
                np.testing.assert_array_equal(source.read(11, 13, 50, 60), as_meant(path)[1][11:61, 13:73])


@pytest.mark.parametrize("codec", CODECS)
def test_tiles_that_are_giant_images_are_refused(tmp_path, codec):
    small, large = tmp_path / "a.tif", tmp_path / "b.tif"
    tifffile.imwrite(small, RGB, photometric="rgb", tile=(32, 32), compression=codec)
    tifffile.imwrite(large, np.zeros((256, 256, 3), np.uint8), photometric="rgb", tile=(256, 256), compression=codec)
    with tifffile.TiffFile(large) as tiff:
        offset, count = tiff.pages.first.dataoffsets[0], tiff.pages.first.databytecounts[0]
    block = large.read_bytes()[offset : offset + count]
    content = bytearray(small.read_bytes())
    with tifffile.TiffFile(small) as tiff:
        offsets, counts = (tiff.pages.first.tags[code] for code in (324, 325))
        tags = [(offsets.valueoffset, offsets.dtype, len(content)), (counts.valueoffset, counts.dtype, len(block))]
    for place, dtype, value in tags:
        width = 4 if dtype == 4 else 2
        content[place : place + width] = value.to_bytes(width, "little")
    small.write_bytes(bytes(content) + block)
    with open_source(small) as source, pytest.raises(DataError, match=r"a\.tif: "):
        source.read(0, 0, 9, 9)


def _corpus(tmp_path):
    for name in (
        "strips",
        "deflate tiles",
        "jpeg",
        "planar deflate",
        "1 bit",
        "5 channels first",
        "imagej",
        "ome",
        "palette",
    ):
        stored, options = LAYOUTS[name]
        tifffile.imwrite(tmp_path / "c.tif", np.ascontiguousarray(stored), **options)
        yield (tmp_path / "c.tif").read_bytes()
    for codec in ("png", "jpeg2000", "webp"):
        tifffile.imwrite(tmp_path / "c.tif", RGB, photometric="rgb", **TILED, compression=codec)
        yield (tmp_path / "c.tif").read_bytes()
    tifffile.imwrite(tmp_path / "c.tif", STACK, ome=True, metadata={"axes": "ZCYX"}, photometric="minisblack")
    yield (tmp_path / "c.tif").read_bytes()


def _read_all(path, opens=open_tiff):
    with opens(str(path)) as source:
        info = source.info
        for plane in range(min(info.planes, 20)):
            source.read(0, 0, min(info.height, 200), min(info.width, 200), plane)


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "t.tif"
    for content in list(_corpus(tmp_path))[:4]:
        for end in range(0, len(content), max(1, len(content) // 40)):
            path.write_bytes(content[:end])
            with pytest.raises(DataError, match=r"t\.tif"):
                _read_all(path)


def _damage(content, rng):
    content = bytearray(content)
    kind = rng.randrange(3)
    if kind == 0:
        for _ in range(rng.choice((1, 4, 30))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(3):
            content[rng.choice((rng.randrange(200), -rng.randrange(1, 400)))] = rng.choice((0, 1, 127, 255))
    else:
        start = rng.randrange(len(content))
        del content[start : start + rng.randrange(1, 100)]
    return bytes(content)


def test_damaged_files_give_pixels_or_a_data_error(tmp_path):
    rng, path, refused = random.Random(2), tmp_path / "d.tif", 0
    corpus = list(_corpus(tmp_path))
    for number in range(300):
        path.write_bytes(_damage(corpus[number % len(corpus)], rng))
        try:
            _read_all(path, open_source)
        except DataError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ")
    assert refused > 100


def test_what_is_a_tiff():
    heads = {b"II+\0": "tiff", b"MM\0*": "tiff", b"\x89PNG\r\n\x1a\n": "png"}
    assert {head: format_of(head.ljust(16, b"\0"), "a.png") for head in heads} == heads
