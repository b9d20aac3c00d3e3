"""Zarr arrays and OME-Zarr images, written by zarr-python and by hand."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import open_source
from pixelwise.formats.zarr.source import open_zarr

DRAWS = np.random.default_rng(0)
IMAGE = DRAWS.integers(0, 255, (70, 90, 3), dtype=np.uint8)

STORED = {
    "v3": {},
    "v2": {"zarr_format": 2},
    "v2 gzip": {"zarr_format": 2, "compressors": numcodecs.GZip(1)},
    "v2 zlib": {"zarr_format": 2, "compressors": numcodecs.Zlib(1)},
    "v2 lz4": {"zarr_format": 2, "compressors": numcodecs.LZ4()},
    "v2 bz2": {"zarr_format": 2, "compressors": numcodecs.BZ2()},
    "v2 lzma": {"zarr_format": 2, "compressors": numcodecs.LZMA()},
    "v2 delta, blosc": {"zarr_format": 2, "compressors": numcodecs.Blosc(), "filters": [numcodecs.Delta("|u1")]},
    "v2 columns first": {"zarr_format": 2, "order": "F"},
    "v3 blosc": {"compressors": BloscCodec()},
    "v3 checksum": {"compressors": [GzipCodec(), Crc32cCodec()]},
    "v3 raw": {"compressors": None},
    "v3 transposed": {"filters": [TransposeCodec(order=(1, 0, 2))]},
    "v3 shards": {"shards": (32, 32, 3)},
}


def save(path, array, chunks=(16, 16, 3), **options):
    """An array written by zarr-python."""
    made = zarr.create_array(path, shape=array.shape, dtype=array.dtype, chunks=chunks, **options)
    made[:] = array
    return str(path)


@pytest.mark.parametrize("name", STORED)
def test_windows_are_those_of_the_array(tmp_path, name):
    path = save(tmp_path / "a.zarr", IMAGE, **STORED[name])
    with open_source(path) as source:
        info = source.info
        assert (info.format, info.height, info.width, info.channels, info.dtype) == ("zarr", 70, 90, 3, "uint8")
        assert (info.planes, info.block_px) == (1, (16, 16))
        for top, left, height, width in ((0, 0, 70, 90), (3, 5, 40, 50), (69, 89, 1, 1), (0, 0, 32, 32)):
            window = source.read(top, left, height, width)
            assert window.flags.writeable
            assert np.array_equal(window, IMAGE[top : top + height, left : left + width])
        assert source.valid(0, 0, 5, 5) is None
        source.check_unchanged()


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((20, 30), {}, (20, 30, 1, 1)),
        ((20, 30, 4), {}, (20, 30, 4, 1)),
        ((3, 20, 30), {}, (20, 30, 3, 1)),
        ((7, 20, 30), {}, (20, 30, 1, 7)),
        ((7, 20, 30), {"channels": 7}, (20, 30, 7, 1)),
        ((3, 20, 30), {"axes": "zyx"}, (20, 30, 1, 3)),
        ((5, 20, 30, 3), {}, (20, 30, 3, 5)),
        ((5, 2, 20, 30), {}, (20, 30, 2, 5)),
        ((2, 3, 4, 20, 30), {"axes": "tczyx"}, (20, 30, 3, 8)),
        ((30, 20), {"axes": "xy"}, (20, 30, 1, 1)),
    ],
)
def test_axes_without_names(tmp_path, shape, options, expected):
    array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    path = save(tmp_path / "a.zarr", array, chunks=tuple(min(side, 8) for side in shape))
    with open_zarr(path, **options) as source:
        info = source.info
        assert (info.height, info.width, info.channels, info.planes) == expected
        axes = options.get("axes") or "".join(source.metadata["axes"])
        order = [axes.index(name) for name in (*(set(axes) & set("tz")), "y", "x", *(set(axes) & set("c")))]
        if "t" in axes:
            order = [axes.index(name) for name in "tzyxc"]
        planes = array.transpose(order).reshape(info.planes, info.height, info.width, info.channels)
        for plane in range(info.planes):
            assert np.array_equal(source.read(1, 2, 10, 11, plane), planes[plane, 1:11, 2:13])


def test_axes_by_name(tmp_path):
    array = DRAWS.random((6, 9, 4), dtype=np.float32)
    path = save(tmp_path / "a.zarr", array, chunks=(4, 4, 4), dimension_names=["lon", "lat", "band"])
    with open_zarr(path) as source:
        assert (source.info.height, source.info.width, source.info.channels) == (9, 6, 4)
        assert np.array_equal(source.read(0, 0, 9, 6), array.transpose(1, 0, 2))
    old = zarr.create_array(tmp_path / "b.zarr", shape=(5, 6, 9), dtype=">i2", chunks=(2, 2, 2), zarr_format=2)
    old[:] = np.arange(270).reshape(5, 6, 9)
    old.attrs["_ARRAY_DIMENSIONS"] = ["time", "y", "x"]
    with open_zarr(str(tmp_path / "b.zarr")) as source:
        assert (source.info.planes, source.info.dtype) == (5, "int16")
        assert source.read(1, 1, 1, 2, 3).ravel().tolist() == [172, 173]


def test_open_questions_and_wrong_options_are_refused(tmp_path):
    path = save(tmp_path / "a.zarr", np.zeros((5, 6, 7, 8), dtype=np.uint8), chunks=(5, 6, 7, 8))
    with pytest.raises(DataError, match=r"a.zarr: nothing says which of its axes \(5 x 6 x 7 x 8\)"):
        open_zarr(path)
    for options, message in (
        ({"axes": "yx"}, "do not fit"),
        ({"axes": "yyxx"}, "do not fit"),
        ({"axes": "zcyx", "level": 1}, "plain array"),
        ({"level": -1}, "counted from 0"),
    ):
        with pytest.raises(UsageError, match=message):
            open_zarr(path, **options)
    with pytest.raises(UsageError, match=r"\(zarr\) has no option intensity; it has level, series, axes"):
        open_source(path, intensity="auto")


def test_bool_is_black_and_white(tmp_path):
    path = save(tmp_path / "a.zarr", np.eye(9, dtype=bool), chunks=(4, 4))
    with open_zarr(path) as source:
        assert source.info.dtype == "uint8"
        assert np.array_equal(source.read(0, 0, 9, 9)[..., 0], np.eye(9) * 255)


def test_nan_is_refused_unless_it_is_the_fill_value(tmp_path):
    array = DRAWS.random((20, 20), dtype=np.float32)
    array[3, 4] = np.nan
    path = save(tmp_path / "a.zarr", array, chunks=(8, 8), fill_value=0.0)
    with open_zarr(path) as source:
        assert np.array_equal(source.read(8, 0, 5, 5)[..., 0], array[8:13, :5])
        with pytest.raises(DataError, match=r"a\.zarr: 1 of its numbers in rows 0\.\.5"):
            source.read(0, 0, 5, 5)
    path = save(tmp_path / "b.zarr", array, chunks=(8, 8), fill_value=np.nan)
    shutil.rmtree(tmp_path / "b.zarr" / "c" / "1")
    with open_zarr(path) as source:
        wanted = ~np.isnan(array)
        wanted[8:16] = False
        for _ in range(2):  # asked before and after reading
            assert np.array_equal(source.valid(0, 0, 20, 20), wanted)
            assert np.array_equal(source.read(0, 0, 20, 20)[..., 0], np.where(wanted, array, 0))
    array[0, 0] = np.inf
    path = save(tmp_path / "c.zarr", array, chunks=(8, 8), fill_value=np.nan)
    with open_zarr(path) as source, pytest.raises(DataError, match="1 of its numbers"):
        source.read(0, 0, 5, 5)


def ngff(path, version, array, axes, levels=2, chunk=16):
    """An OME-Zarr image whose metadata are written by hand."""
    zarr_format = 2 if version == "0.4" else 3
    datasets = []
    for level in range(levels):
        part = array[..., :: 2**level, :: 2**level]
        chunks = tuple(min(side, chunk) for side in part.shape)
        save(path / f"s{level}", part, chunks, zarr_format=zarr_format)
        scale = [2.0, 1.0, 0.5, 0.25 * 2**level, 0.25 * 2**level][-len(axes) :]
        shift = [0.0, 0.0, 0.0, 7.0, 8.0][-len(axes) :]
        transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
        datasets.append({"path": f"s{level}", "coordinateTransformations": transforms})
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes]
    for axis in named:
        if axis["name"] in "yx":
            axis["unit"] = "micrometer"
    image = {"axes": named, "datasets": datasets, "name": "cells"}
    omero = {"channels": [{"label": "DAPI", "color": "0000FF"}]}
    if version == "0.4":
        attributes = {"multiscales": [image | {"version": "0.4"}], "omero": omero}
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps(attributes))
    else:
        attributes = {"ome": {"version": "0.5", "multiscales": [image], "omero": omero}}
        document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        (path / "zarr.json").write_text(json.dumps(document))
    return str(path)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(tmp_path, version):
    array = DRAWS.integers(0, 4000, (2, 3, 4, 40, 50), dtype=np.uint16)
    path = ngff(tmp_path / "a.ome.zarr", version, array, "tczyx")
    for level, factor in ((0, 1), (1, 2)):
        with open_source(path, level=level) as source:
            info = source.info
            assert (info.format, info.channels, info.planes) == ("ome-zarr", 3, 8)
            assert (info.height, info.width) == (40 // factor, 50 // factor)
            window = source.read(2, 3, 10, 12, plane=6)  # t = 1, z = 2
            part = array[1, :, 2, ::factor, ::factor][:, 2:12, 3:15]
            assert np.array_equal(window, np.moveaxis(part, 0, 2))
            known = source.metadata
            assert (known["ngff_version"], known["name"], known["level"], known["levels"]) == (
                version,
                "cells",
                level,
                2,
            )
            assert known["axes"] == tuple("tczyx")
            assert known["sizes"] == {"t": 2, "z": 4}
            assert known["scale"] == {"t": 2, "c": 1, "z": 0.5, "y": 0.25 * factor, "x": 0.25 * factor}
            assert known["translation"]["y"] == 7
            assert known["units"] == {"y": "micrometer", "x": "micrometer"}
            assert known["omero"]["channels"][0]["label"] == "DAPI"
    with pytest.raises(UsageError, match=r"level 2: the image has 2 \(0\.\.1\)"):
        open_source(path, level=2)
    with pytest.raises(UsageError, match="series 1"):
        open_source(path, series=1)


def test_labels_are_read_as_stored(tmp_path):
    whole = DRAWS.integers(0, 300, (20, 30)).astype(np.float32)
    with open_zarr(save(tmp_path / "a.zarr", whole, (8, 8)), labels=True) as source:
        assert (source.info.channels, source.info.dtype) == (1, "int64")
        assert np.array_equal(source.read(2, 3, 9, 9)[..., 0], whole[2:11, 3:12])
    with open_zarr(save(tmp_path / "b.zarr", IMAGE), labels=True) as source:
        assert np.array_equal(source.read(0, 0, 70, 90), IMAGE)  # colours
    with open_zarr(save(tmp_path / "c.zarr", np.eye(9, dtype=bool), (4, 4)), labels=True) as source:
        assert np.array_equal(source.read(0, 0, 9, 9)[..., 0], np.eye(9) * 255)
    with pytest.raises(DataError, match=r"d\.zarr: it has 2 channels of uint8; a mask has one channel"):
        open_zarr(save(tmp_path / "d.zarr", IMAGE[..., :2], (16, 16, 2)), labels=True)
    not_whole = pytest.raises(DataError, match=r"e\.zarr: it holds numbers of type float32 that are not whole")
    with open_zarr(save(tmp_path / "e.zarr", whole + 0.5, (8, 8)), labels=True) as source, not_whole:
        source.read(0, 0, 5, 5)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_of_an_ome_zarr_image(tmp_path, version):
    path = ngff(tmp_path / "a.zarr", version, DRAWS.integers(0, 4000, (3, 40, 50), dtype=np.uint16), "cyx")
    marked = DRAWS.integers(0, 5, (40, 50), dtype=np.int32)
    with pytest.raises(DataError, match="it has 3 channels of uint16"):
        open_zarr(path, labels=True)
    group = zarr.open_group(path, path="labels", mode="a", zarr_format=2 if version == "0.4" else 3)

    def named(*names):
        group.attrs.put({"labels": names} if version == "0.4" else {"ome": {"version": "0.5", "labels": names}})

    named("cells")
    ngff(tmp_path / "a.zarr" / "labels" / "cells", version, marked, "yx")
    for location in (path, f"{path}/labels/cells"):
        with open_zarr(location, labels=True) as source:
            assert np.array_equal(source.read(1, 2, 30, 40)[..., 0], marked[1:31, 2:42])
    with open_zarr(path, labels=True, level=1) as source:
        assert np.array_equal(source.read(0, 0, 20, 25)[..., 0], marked[::2, ::2])
    with open_zarr(path) as source:
        assert source.info.channels == 3
    named("cells", "nuclei")
    with pytest.raises(DataError, match=r"several labels. Name one of them: labels/cells, labels/nuclei"):
        open_zarr(path, labels=True)
    named("../../secret")
    with pytest.raises(DataError, match="no place inside the image"):
        open_zarr(path, labels=True)


def test_series_of_bioformats2raw_and_plates(tmp_path):
    for name in ("0", "1"):
        ngff(tmp_path / "a.zarr" / name, "0.4", np.full((8, 9), int(name), dtype=np.uint8), "yx", levels=1)
    (tmp_path / "a.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    (tmp_path / "a.zarr" / ".zattrs").write_text('{"bioformats2raw.layout": 3}')
    with open_source(tmp_path / "a.zarr", series=1) as source:
        assert source.read(0, 0, 8, 9).min() == 1
    with pytest.raises(UsageError, match="series 2"):
        open_source(tmp_path / "a.zarr", series=2)
    (tmp_path / "a.zarr" / ".zattrs").write_text('{"plate": {}}')
    with pytest.raises(DataError, match=r"a\.zarr: this is a plate"):
        open_source(tmp_path / "a.zarr")


def test_zip_archives(tmp_path):
    with zarr.storage.ZipStore(tmp_path / "a.zarr.zip", mode="w") as store:
        save(store, IMAGE)
    save(tmp_path / "folder" / "b.zarr", IMAGE, shards=(32, 32, 3))
    shutil.make_archive(str(tmp_path / "b.zarr"), "zip", tmp_path / "folder")  # with a folder inside
    for name in ("a.zarr.zip", "b.zarr.zip"):
        with open_source(tmp_path / name) as source:
            assert np.array_equal(source.read(5, 6, 40, 30), IMAGE[5:45, 6:36])
            assert len(source.fingerprint()) == 64
            source.check_unchanged()
    (tmp_path / "c.zarr.zip").write_bytes((tmp_path / "a.zarr.zip").read_bytes()[:-40])
    with pytest.raises(DataError, match=r"c\.zarr\.zip"):
        open_source(tmp_path / "c.zarr.zip")


def test_fingerprint_and_changes(tmp_path):
    path = save(tmp_path / "a.zarr", IMAGE)
    shutil.copytree(path, tmp_path / "b.zarr")
    with open_zarr(path) as source, open_zarr(str(tmp_path / "b.zarr")) as other:
        before = source.fingerprint()
        assert before == other.fingerprint()  # small folders by content, not by time
        zarr.open_array(path, mode="r+")[0, 0, 0] = IMAGE[0, 0, 0] + 1
        assert source.fingerprint() != before
        with pytest.raises(DataError, match=r"a\.zarr: the array changed while it was read"):
            source.check_unchanged()
        (tmp_path / "b.zarr" / "c" / "0" / "0" / "0").unlink()
        with pytest.raises(DataError, match=r"b\.zarr: the array changed"):
            other.check_unchanged()


def test_windows_of_large_chunks_are_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("pixelwise.formats.zarr.source.WORKING_BYTES", 2000)
    path = save(tmp_path / "a.zarr", IMAGE)
    planar = save(tmp_path / "b.zarr", np.moveaxis(IMAGE, 2, 0), (1, 16, 16))
    for name in (path, planar):
        with open_zarr(name) as source:
            assert np.array_equal(source.read(0, 0, 70, 90), IMAGE)
            assert np.array_equal(source.read(17, 3, 31, 80), IMAGE[17:48, 3:83])


@pytest.fixture(scope="module")
def array_path(tmp_path_factory):
    return save(tmp_path_factory.mktemp("zarr") / "a.zarr", IMAGE, (16, 16, 3), shards=(32, 48, 3))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_window(array_path, data):
    top, left = data.draw(st.integers(0, 69)), data.draw(st.integers(0, 89))
    height, width = data.draw(st.integers(1, 70 - top)), data.draw(st.integers(1, 90 - left))
    with open_zarr(array_path) as source:
        assert np.array_equal(source.read(top, left, height, width), IMAGE[top : top + height, left : left + width])


def test_threads_read_at_once(array_path):
    with open_zarr(array_path) as source, ThreadPoolExecutor(4) as pool:
        tops = list(range(0, 60, 3))
        for top, window in zip(tops, pool.map(lambda top: source.read(top, 0, 10, 90), tops), strict=True):
            assert np.array_equal(window, IMAGE[top : top + 10])


HOSTILE = {
    "object dtype": {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 2}]},
    "pickle filter": {"filters": [{"id": "pickle", "protocol": 2}]},
    "pickle compressor": {"compressor": {"id": "pickle"}},
    "unknown compressor": {"compressor": {"id": "evil"}},
    "objects by delta": {"filters": [{"id": "delta", "dtype": "|O"}]},
    "structured": {"dtype": [["a", "<i4"]]},
    "text": {"dtype": "<U8"},
    "huge chunks": {"chunks": [10**6, 10**6]},
    "huge shape": {"shape": [10**12, 70]},
    "negative": {"shape": [-1, 70]},
    "no chunks": {"chunks": [0, 16]},
    "true": {"chunks": [True, 16]},
    "other axes": {"chunks": [16, 16, 16]},
    "floats": {"shape": [1.5, 2.5]},
    "version": {"zarr_format": 9},
    "order": {"order": "Z"},
    "separator": {"dimension_separator": "../"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata(tmp_path, name):
    path = save(tmp_path / "a.zarr", IMAGE[..., 0], (16, 16), zarr_format=2)
    document = json.loads((tmp_path / "a.zarr" / ".zarray").read_text())
    (tmp_path / "a.zarr" / ".zarray").write_text(json.dumps(document | HOSTILE[name]))
    with pytest.raises(DataError, match=r"a\.zarr: "), open_zarr(path) as source:
        source.read(0, 0, 5, 5)


@pytest.mark.parametrize(
    "place", ["../secret", "/etc", "a/../../b", "", ".", "file:///etc", "s0\\x", "s0//x", 7, None, "x" * 999]
)
def test_levels_stay_in_their_image(tmp_path, place):
    save(tmp_path / "secret", IMAGE)
    path = ngff(tmp_path / "a.zarr", "0.5", IMAGE[..., 0], "yx", levels=1)
    document = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    document["attributes"]["ome"]["multiscales"][0]["datasets"][0]["path"] = place
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"a\.zarr: "):
        open_zarr(path)


@pytest.mark.parametrize("scale", [[0, 1], [1], [float("nan"), 1], ["1", 1], None])
def test_damaged_scales(tmp_path, scale):
    path = ngff(tmp_path / "a.zarr", "0.4", IMAGE[..., 0], "yx", levels=1)
    document = json.loads((tmp_path / "a.zarr" / ".zattrs").read_text())
    document["multiscales"][0]["datasets"][0]["coordinateTransformations"] = [{"type": "scale", "scale": scale}]
    (tmp_path / "a.zarr" / ".zattrs").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"a\.zarr: a transformation"):
        open_zarr(path)


BOMBS = {
    "gzip": (numcodecs.GZip(1), 9_000_000),
    "zlib": (numcodecs.Zlib(1), 9_000_000),
    "bz2": (numcodecs.BZ2(), 9_000_000),
    "lzma": (numcodecs.LZMA(preset=0), 9_000_000),
    "zstd": (numcodecs.Zstd(), 60_000_000),
    "blosc": (numcodecs.Blosc("zstd"), 60_000_000),
    "lz4": (numcodecs.LZ4(), 60_000_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs(tmp_path, name):
    codec, size = BOMBS[name]
    path = save(tmp_path / "a.zarr", IMAGE[..., 0], (16, 16), zarr_format=2, compressors=codec)
    (tmp_path / "a.zarr" / "0.0").write_bytes(codec.encode(bytes(size)))
    with open_zarr(path) as source, pytest.raises(DataError, match=r"a\.zarr: the file is damaged"):
        source.read(0, 0, 5, 5)


@pytest.mark.parametrize(("version", "shards"), [(2, False), (3, False), (3, True)])
def test_truncated_blosc_is_not_filled_with_foreign_memory(tmp_path, version, shards):
    codec = numcodecs.Blosc() if version == 2 else BloscCodec()
    options = {"shards": (64, 64, 3)} if shards else {}
    path = save(tmp_path / "a.zarr", IMAGE[:64, :64], (64, 64, 3), zarr_format=version, compressors=codec, **options)
    chunk = tmp_path / "a.zarr" / ("0.0.0" if version == 2 else "c/0/0/0")
    content = bytearray(chunk.read_bytes())
    if shards:
        content[12:16] = (2**24).to_bytes(4, "little")
    chunk.write_bytes(content if shards else content[:-1])
    with open_zarr(path) as source, pytest.raises(DataError, match=r"a\.zarr: a chunk is truncated"):
        source.read(0, 0, 5, 5)


def test_pipes_are_not_opened_for_ever(tmp_path):
    path = save(tmp_path / "a.zarr", IMAGE)
    chunk = tmp_path / "a.zarr" / "c" / "0" / "0" / "0"
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(DataError, match=r"a\.zarr: .*0: this is not a regular file"):
        open_zarr(path)


def test_what_is_no_zarr(tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "group.zarr").mkdir()
    (tmp_path / "group.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    (tmp_path / "file.zarr").write_text("no")
    for name, message in (
        ("none", "no such file"),
        ("empty", "no Zarr array or group"),
        ("group", "group of arrays"),
        ("file", "neither a Zarr folder nor a ZIP"),
    ):
        with pytest.raises(DataError, match=rf"{name}\.zarr: .*{message}"):
            open_zarr(str(tmp_path / f"{name}.zarr"))


@pytest.mark.parametrize("seed", range(60))
def test_damage_ends_in_one_error(tmp_path, seed):
    draws = np.random.default_rng(seed)
    options = list(STORED.values())[seed % len(STORED)]
    path = save(
        tmp_path / "a.zarr",
        IMAGE,
        (64, 64, 3),
        **(options | ({"shards": (128, 128, 3)} if "shards" in options else {})),
    )
    files = sorted(item for item in (tmp_path / "a.zarr").rglob("*") if item.is_file())
    victim = files[draws.integers(len(files))]
    content = bytearray(victim.read_bytes())
    if seed % 3 == 0:
        content = content[: draws.integers(len(content))]
    else:
        for _ in range(draws.integers(1, 9)):
            content[draws.integers(len(content))] = draws.integers(256)
    victim.write_bytes(content)
    try:
        with open_zarr(path) as source:
            source.fingerprint()
            height, width = min(source.info.height, 70), min(source.info.width, 90)
            assert source.read(0, 0, height, width).shape == (height, width, source.info.channels)
    except PixelwiseError as error:
        assert str(error).startswith(path)
        assert "\n" not in str(error)
