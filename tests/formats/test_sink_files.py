"""PNG, TIFF, OME-TIFF and .npy: what is written is what other readers read, in bounded memory, whole or not at all."""

import json
import tracemalloc
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import SourceInfo, choose_writer
from pixelwise.formats.base import Result
from pixelwise.formats.image import write_png_labels
from pixelwise.formats.npy import open_npy, write_npy, write_probabilities
from pixelwise.formats.opening import read_mask
from pixelwise.formats.tiff import write as tiff_sink
from pixelwise.formats.tiff.read import open_tiff
from pixelwise.formats.tiff.write import write_ome_tiff, write_tiff

RNG = np.random.default_rng(0)
SPEC = LabelSpec(
    names=("sky", "straße"), colors=((10, 20, 200), (90, 80, 70)), values=((0,), (1,))
)  # a name that is not ASCII
MARK = {"model": "abc", "input": "ÿ", "options": {"tile": 512}}
WRITERS = {".tif": write_tiff, ".ome.tif": write_ome_tiff, ".npy": write_npy, ".png": write_png_labels}


def _result(array, kind="labels", **options):
    """The result of an array (planes, H, W)."""
    planes, height, width = array.shape
    form = options.pop("form", "tiff")
    source = SourceInfo(
        location="in/a.tif", format=form, height=height, width=width, channels=3, dtype="uint8", planes=planes
    )

    def rows(plane, top, bottom):
        assert 0 <= top < bottom <= height
        return array[plane, top:bottom]

    return Result(kind=kind, spec=SPEC, source=source, dtype=array.dtype, rows=rows, mark=MARK, **options)


def _note(text):
    """What a comment of OME-XML says."""
    (note,) = ElementTree.fromstring(text).iterfind(".//{*}CommentAnnotation[@Namespace='pixelwise']")
    return json.loads("".join(note.itertext()))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    planes=st.integers(1, 3),
    height=st.integers(1, 540),
    width=st.integers(1, 540),
    form=st.sampled_from(["u1", "u2", "f4"]),
)
@pytest.mark.parametrize("suffix", WRITERS)
def test_everything_comes_back(tmp_path, suffix, planes, height, width, form):
    path = tmp_path / f"a{suffix}"
    array = RNG.integers(0, 200, (planes, height, width)).astype(form)
    result = _result(array, "labels" if form != "f4" else "entropy")
    if suffix == ".png" and (planes > 1 or form == "f4"):
        if planes > 1:
            with pytest.raises(UsageError, match=r"cannot be written as png: it holds .*Possible are .*tiff"):
                choose_writer(result.source, result.kind, "png")
        else:
            assert choose_writer(result.source, result.kind, "png")[0] == ".tif"
        return
    WRITERS[suffix](path, result)
    expected = array[0] if planes == 1 else array
    if suffix == ".png":
        np.testing.assert_array_equal(read_mask(path), expected)
        with Image.open(path) as image:
            assert json.loads(image.text["pixelwise"]) == MARK
    elif suffix == ".npy":
        np.testing.assert_array_equal(np.load(path, allow_pickle=False), expected)
    else:
        np.testing.assert_array_equal(tifffile.imread(path), expected)
        with tifffile.TiffFile(path) as tiff:
            note = tiff.shaped_metadata[0] if suffix == ".tif" and tiff.shaped_metadata else _note(tiff.ome_metadata)
        assert note["pixelwise"] == MARK
        if form == "u1":
            with Image.open(path) as image:
                found = np.asarray(image.convert("RGB"))
            np.testing.assert_array_equal(found, SPEC.colorize(array[0]))
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()


def test_colours_classes_nodata_and_resolution_of_a_tiff(tmp_path):
    labels = RNG.integers(0, 2, (1, 40, 50)).astype(np.uint8)
    labels[0, 3, 4] = 255
    metadata = {"resolution": (300.0, 150.0), "resolution_unit": "inch"}
    write_tiff(tmp_path / "a.tif", _result(labels, nodata=255, metadata=metadata))
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages.first
        assert (page.tilewidth, page.compression, page.software) == (512, 8, "pixelwise")
        assert page.colormap[:, 1].tolist() == [90 * 257, 80 * 257, 70 * 257]
        about = tiff.shaped_metadata[0]
        assert about["classes"][1] == {"label": 1, "name": "straße", "color": [90, 80, 70]}
        assert about["axes"] == "YX"
    with open_tiff(str(tmp_path / "a.tif")) as source:
        assert np.argwhere(~source.valid(0, 0, 40, 50)).tolist() == [[3, 4]]
        assert source.metadata["resolution"] == (300, 150) and source.metadata["resolution_unit"] == "inch"
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), labels[0])


@pytest.mark.parametrize("axes", ["TZ", "Z", "Q", "ZR", ""])
def test_stacks_keep_their_axes(tmp_path, axes):
    stack = RNG.integers(0, 2, (6, 20, 30)).astype(np.uint8)
    shape = (2, 3) if len(axes) == 2 else (6,)
    metadata = {"plane_axes": axes, "plane_shape": shape} if axes else {}
    for write in (write_tiff, write_ome_tiff):
        write(tmp_path / "a.tif", _result(stack, metadata=metadata))
        with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
            series = tiff.series[0]
            np.testing.assert_array_equal(series.asarray().reshape(6, 20, 30), stack)
            if axes in ("TZ", "Z"):
                assert series.axes == axes + "YX" and series.shape[:-2] == shape


def test_ome_keeps_what_the_input_says(tmp_path):
    metadata = {
        "axes": "TZCYX", "Name": "cells & more", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0,
        "TimeIncrement": 3.0,
    }  # fmt: skip
    image = RNG.integers(0, 255, (2, 3, 3, 20, 30)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "in.ome.tif", image, ome=True, photometric="minisblack", metadata=metadata)
    with open_tiff(str(tmp_path / "in.ome.tif")) as source:
        labels = RNG.integers(0, 2, (6, 20, 30)).astype(np.uint8)
        write_ome_tiff(
            tmp_path / "out.ome.tif",
            Result(
                kind="labels", spec=SPEC, source=source.info, dtype=labels.dtype, metadata=source.metadata, mark=MARK,
                rows=lambda plane, top, bottom: labels[plane, top:bottom],
            ),
        )  # fmt: skip
    found = []
    for name in ("in.ome.tif", "out.ome.tif"):
        with tifffile.TiffFile(tmp_path / name) as tiff:
            root = ElementTree.fromstring(tiff.ome_metadata)
            image = next(element for element in root if element.tag.endswith("Image"))
            pixels = next(element for element in image if element.tag.endswith("Pixels"))
            assert [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "XYZ"] == ["µm"] * 3
            keys = (
                "PhysicalSizeX",
                "PhysicalSizeY",
                "PhysicalSizeZ",
                "TimeIncrement",
                "SizeZ",
                "SizeT",
                "SizeX",
                "SizeY",
            )
            found.append((image.get("Name"), *(float(pixels.get(key)) for key in keys)))
    assert found[0] == found[1]
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.ome.tif"), labels.reshape(2, 3, 20, 30))
    with tifffile.TiffFile(tmp_path / "out.ome.tif") as tiff:
        assert _note(tiff.ome_metadata)["pixelwise"] == MARK
    with open_tiff(str(tmp_path / "out.ome.tif")) as source:
        assert source.metadata["pixel_size_um"] == {"x": 0.25, "y": 0.5, "z": 2.0}
        assert source.metadata["plane_axes"] == "TZ"


@pytest.mark.parametrize("write", [write_tiff, write_ome_tiff])
def test_slides_get_smaller_copies(tmp_path, write):
    labels = np.kron(RNG.integers(0, 2, (1, 30, 41)), np.ones((1, 99, 97), int)).astype(np.uint8)
    metadata = {"pixel_size_um": {"x": 0.5, "y": 0.25}}
    write(tmp_path / "a.tif", _result(labels, form="slide", metadata=metadata))
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        levels = tiff.series[0].levels
        assert [level.shape for level in levels] == [(2970, 3977), (1485, 1989), (743, 995)]
        for number, level in enumerate(levels):
            np.testing.assert_array_equal(level.asarray(), labels[0, :: 2**number, :: 2**number])
        assert tiff.pages.first.resolution == (20_000, 40_000)


def _lazy(height, width, dtype=np.uint8):
    source = SourceInfo(location="a.tif", format="tiff", height=height, width=width, channels=3, dtype="uint8")

    def rows(plane, top, bottom):
        band = np.zeros((bottom - top, width), dtype=dtype)
        band[:, ::7] = 1
        return band

    return Result(kind="labels", spec=SPEC, source=source, dtype=np.dtype(dtype), rows=rows)


@pytest.mark.parametrize("suffix", WRITERS)
def test_memory_is_a_band_of_rows(tmp_path, suffix):
    tracemalloc.start()
    WRITERS[suffix](tmp_path / f"a{suffix}", _lazy(9_000, 4_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 33 * 2**20, f"{peak / 2**20:.0f} MiB for 34 MiB of labels"


def test_large_files_are_bigtiff(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_sink, "BIG_BYTES", 1000)
    write_tiff(tmp_path / "a.tif", _lazy(100, 100))
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.is_bigtiff


@pytest.mark.parametrize("suffix", WRITERS)
def test_nothing_half_written_stays(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    whole = _lazy(1200, 600)

    def rows(plane, top, bottom):
        if bottom > 1000:
            raise DataError("in.tif: the file changed while it was read.")
        return whole.rows(plane, top, bottom)

    broken = Result(kind="labels", spec=SPEC, source=whole.source, dtype=whole.dtype, rows=rows)
    with pytest.raises(DataError, match=r"in\.tif"):
        WRITERS[suffix](path, broken)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_full_disk_is_told(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"a{suffix}"

    def full(part, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(PixelwiseError, match=r"a\..*cannot be written \(No space left on device\)"):
        WRITERS[suffix](path, _lazy(700, 300))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(PixelwiseError, match="cannot be written"):
        WRITERS[suffix](tmp_path / "file" / f"a{suffix}", _lazy(7, 3))


def test_an_npy_can_be_read_as_a_source(tmp_path):
    array = RNG.random((1, 30, 40)).astype(np.float32)
    write_npy(tmp_path / "a.npy", _result(array, "entropy"))
    with open_npy(str(tmp_path / "a.npy")) as source:
        np.testing.assert_array_equal(source.read(3, 4, 10, 20)[..., 0], array[0, 3:13, 4:24])


@pytest.mark.parametrize(("planes", "shape"), [(2, (2, 5, 6)), (4, (2, 2, 5, 6))])
def test_probabilities_have_an_axis_of_classes(tmp_path, planes, shape):
    array = RNG.random((planes, 5, 6))
    write_probabilities(tmp_path / "a.npy", _result(array, "probabilities"))
    written = np.load(tmp_path / "a.npy")
    assert (written.shape, written.dtype) == (shape, np.float32)
    np.testing.assert_allclose(written.reshape(array.shape), array, rtol=1e-6)
