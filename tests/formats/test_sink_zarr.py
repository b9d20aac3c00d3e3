"""Labels and maps as Zarr and OME-Zarr: read back by zarr-python and by the source, atomic at every moment."""

import json
import os

import numpy as np
import pytest
import zarr

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.formats import LABELS, WRITERS, Result, SourceInfo, choose_writer, open_source
from pixelwise.formats.zarr.write import write_ome_zarr, write_zarr

SPEC = LabelSpec(names=("sky", "road"), colors=((10, 20, 250), (90, 80, 70)), values=((0,), (1,)))
DRAWS = np.random.default_rng(0)


def result(array, *, kind=LABELS, source="png", nodata=None, metadata=None, block=(256, 256), log=None):
    """A result whose rows come from an array (planes, H, W)."""
    planes, height, width = array.shape
    info = SourceInfo(
        location="a",
        format=source,
        height=height,
        width=width,
        channels=3,
        dtype="uint8",
        planes=planes,
        block_px=block,
    )

    def rows(plane, top, bottom):
        assert 0 <= top < bottom <= height
        if log is not None:
            log.append((plane, top, bottom))
        return array[plane, top:bottom]

    return Result(
        kind=kind, spec=SPEC, source=info, dtype=array.dtype, rows=rows, nodata=nodata, metadata=metadata or {},
        mark={"model": "abc"},
    )  # fmt: skip


def labels(*shape):
    return DRAWS.integers(0, 2, shape, dtype=np.uint8)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("shape", [(1, 700, 40), (3, 50, 60)])
def test_plain_zarr(tmp_path, version, shape):
    array, log = labels(*shape), []
    write_zarr(tmp_path / "a.zarr", result(array, metadata={"zarr_format": version}, log=log))
    made = zarr.open_array(tmp_path / "a.zarr", mode="r")
    assert (made.metadata.zarr_format, made.dtype, made.ndim) == (version, np.uint8, 2 if shape[0] == 1 else 3)
    assert np.array_equal(made[:].reshape(shape), array)
    about = made.attrs["pixelwise"]
    assert about["mark"] == {"model": "abc"}
    assert about["classes"] == [
        {"id": 0, "name": "sky", "color": "#0a14fa"},
        {"id": 1, "name": "road", "color": "#5a5046"},
    ]
    assert log == sorted(log)
    assert max(bottom - top for _, top, bottom in log) <= 256
    with open_source(tmp_path / "a.zarr") as source:
        assert source.info.planes == shape[0]
        assert np.array_equal(source.read(0, 0, *shape[1:], plane=shape[0] - 1)[..., 0], array[-1])
    assert [item.name for item in tmp_path.iterdir()] == ["a.zarr"]


def test_planes_keep_their_axes(tmp_path):
    array = labels(6, 20, 30)
    write_zarr(tmp_path / "a.zarr", result(array, metadata={"sizes": {"t": 2, "z": 3}}))
    made = zarr.open_array(tmp_path / "a.zarr", mode="r")
    assert made.metadata.dimension_names == ("t", "z", "y", "x")
    assert np.array_equal(made[1, 2], array[5])


def test_maps_are_float32(tmp_path):
    array = DRAWS.random((1, 30, 40), dtype=np.float32)
    for write, name in ((write_zarr, "a.zarr"), (write_ome_zarr, "b.zarr")):
        write(tmp_path / name, result(array, kind="entropy"))
        with open_source(tmp_path / name) as source:
            assert source.info.dtype == "float32"
            assert np.array_equal(source.read(0, 0, 30, 40)[..., 0], array[0])
    assert not (tmp_path / "b.zarr" / "labels").exists()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_keeps_scales_and_has_labels(tmp_path, version):
    array = labels(2, 1300, 1100)
    metadata = {
        "zarr_format": 2 if version == "0.4" else 3, "sizes": {"z": 2}, "units": {"y": "micrometer", "x": "micrometer"},
        "types": {"z": "space", "y": "space", "x": "space"}, "name": "cells",
        "scale": {"z": 2.0, "y": 0.5, "x": 0.25}, "translation": {"z": 0.0, "y": 7.0, "x": 8.0},
    }  # fmt: skip
    path = tmp_path / "a.ome.zarr"
    write_ome_zarr(path, result(array, source="ome-zarr", metadata=metadata, nodata=255))
    root, inner = zarr.open_group(path, mode="r"), zarr.open_group(path / "labels" / "pixelwise", mode="r")
    assert root.metadata.zarr_format == metadata["zarr_format"]
    attributes = {
        name: dict(group.attrs) for name, group in (("root", root), ("labels", root["labels"]), ("inner", inner))
    }
    if version == "0.5":
        assert attributes["root"]["ome"]["version"] == "0.5"
        attributes = {name: value["ome"] for name, value in attributes.items()}
    assert attributes["labels"]["labels"] == ["pixelwise"]
    described = attributes["inner"]["image-label"]
    assert described["colors"][1] == {"label-value": 1, "rgba": [90, 80, 70, 255]}
    assert described["properties"] == [
        {"label-value": 0, "name": "sky"}, {"label-value": 1, "name": "road"}, {"label-value": 255, "name": "no data"},
    ]  # fmt: skip
    assert root.attrs["pixelwise"]["mark"] == {"model": "abc"}
    for name, place in (("root", "labels/pixelwise/"), ("inner", "")):
        image = attributes[name]["multiscales"][0]
        assert image["axes"][1] == {"name": "y", "type": "space", "unit": "micrometer"}
        assert [item["path"] for item in image["datasets"]] == [f"{place}0", f"{place}1"]
        assert image["datasets"][1]["coordinateTransformations"] == [
            {"type": "scale", "scale": [2.0, 1.0, 0.5]}, {"type": "translation", "translation": [0.0, 7.0, 8.0]},
        ]  # fmt: skip
    for location in (path, path / "labels" / "pixelwise"):
        with open_source(location) as source:
            assert source.metadata["scale"] == metadata["scale"]
            assert np.array_equal(source.read(100, 90, 1200, 1000, 1)[..., 0], array[1, 100:1300, 90:1090])
        with open_source(location, level=1) as source:
            assert np.array_equal(source.read(0, 0, 650, 550, 1)[..., 0], array[1, ::2, ::2])


def test_odd_sizes_and_nodata_in_the_pyramid(tmp_path):
    array = np.full((1, 1025, 3), 255, dtype=np.uint8)
    write_ome_zarr(tmp_path / "a.zarr", result(array, nodata=255))
    with open_source(tmp_path / "a.zarr", level=1) as source:
        assert (source.info.height, source.info.width) == (513, 2)
        assert source.read(0, 0, 513, 2).min() == 255
    assert zarr.open_array(tmp_path / "a.zarr" / "labels/pixelwise/0", mode="r").fill_value == 255


def test_an_old_one_is_replaced_only_at_the_end(tmp_path):
    path = tmp_path / "a.zarr"
    old, new = labels(1, 40, 40), labels(1, 700, 40)
    write_zarr(path, result(old))

    def read():
        return zarr.open_array(path, mode="r")[:]

    def rows(plane, top, bottom):
        assert np.array_equal(read(), old[0])
        if top > 0:
            raise PixelwiseError("the power went off")
        return new[plane, top:bottom]

    broken = result(new)
    object.__setattr__(broken, "rows", rows)
    for write in (write_zarr, write_ome_zarr):
        with pytest.raises(PixelwiseError, match="power"):
            write(path, broken)
        assert np.array_equal(read(), old[0])
        assert [item.name for item in tmp_path.iterdir()] == ["a.zarr"]
    write_zarr(path, result(new))
    assert np.array_equal(read(), new[0])
    assert [item.name for item in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # a fork beside threads
def test_killed_while_writing(tmp_path):
    path = tmp_path / "a.zarr"
    child = os.fork()
    if child == 0:  # no zarr thread was started in this process by then, or it is started anew
        broken = result(labels(1, 700, 40))
        object.__setattr__(broken, "rows", lambda plane, top, bottom: os.kill(os.getpid(), 9))
        try:
            write_zarr(path, broken)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 9
    assert not path.exists()
    assert all(item.name.startswith(".") for item in tmp_path.iterdir())
    write_zarr(path, result(labels(1, 40, 40)))
    assert path.exists()


def test_what_is_no_zarr_is_kept(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "thesis.txt").write_text("years")
    (tmp_path / "b.zarr").write_text("years")
    for name in ("a.zarr", "b.zarr"):
        with pytest.raises(PixelwiseError, match=rf"{name}: exists and is no Zarr"):
            write_zarr(tmp_path / name, result(labels(1, 4, 4)))
    with pytest.raises(PixelwiseError, match=r"b\.zarr.c\.zarr: cannot be written"):
        write_zarr(tmp_path / "b.zarr" / "c.zarr", result(labels(1, 4, 4)))


def test_a_full_disk_is_one_error(tmp_path, monkeypatch):
    async def full(self, key, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.storage.LocalStore, "set", full)
    with pytest.raises(PixelwiseError, match=r"a\.zarr: cannot be written \(No space left on device\)"):
        write_zarr(tmp_path / "a.zarr", result(labels(1, 4, 4)))
    assert not list(tmp_path.iterdir())


def info(format, planes=1):
    return SourceInfo(location="a", format=format, height=4, width=4, channels=1, dtype="uint8", planes=planes)


@pytest.mark.parametrize(
    ("format", "planes", "kind", "metadata", "suffix", "function"),
    [
        ("png", 1, "labels", {}, ".png", "write_png_labels"),
        ("jpeg", 1, "labels", {}, ".png", "write_png_labels"),
        ("jpeg", 1, "entropy", {}, ".tif", "write_tiff"),
        ("gif", 2, "labels", {}, ".tif", "write_tiff"),
        ("tiff", 1, "labels", {}, ".tif", "write_tiff"),
        ("ome-tiff", 3, "labels", {}, ".ome.tif", "write_ome_tiff"),
        ("slide", 1, "labels", {}, ".ome.tif", "write_ome_tiff"),
        ("geotiff", 1, "entropy", {}, ".tif", "write_geotiff"),
        ("nifti", 9, "labels", {}, ".nii.gz", "write_nifti"),
        ("dicom", 9, "labels", {"affine": 1}, ".nii.gz", "write_nifti"),
        ("dicom", 9, "labels", {"affine": 1, "even": False}, ".dcm", "write_dicom_seg"),
        ("dicom", 9, "entropy", {"affine": 1, "even": False}, ".tif", "write_tiff"),
        ("dicom", 1, "labels", {"rows": 1}, ".png", "write_png_labels"),
        ("zarr", 2, "labels", {}, ".zarr", "write_zarr"),
        ("ome-zarr", 2, "labels", {}, ".ome.zarr", "write_ome_zarr"),
        ("npy", 1, "labels", {}, ".npy", "write_npy"),
    ],
)
def test_the_same_format_out_as_in(format, planes, kind, metadata, suffix, function):
    found, writer = choose_writer(info(format, planes), kind, metadata=metadata)
    assert (found, writer.__name__) == (suffix, function)


def test_every_writer_exists():
    for name, writer in WRITERS.items():
        format = {"nifti": "nifti", "dicom-seg": "dicom"}.get(name, "png")
        suffix, function = choose_writer(info(format), "labels", name)
        assert suffix == writer.suffixes[0]
        assert callable(function)


@pytest.mark.parametrize(
    ("format", "planes", "kind", "wanted", "message"),
    [
        (
            "png",
            1,
            "labels",
            "jpeg",
            "cannot be written as jpeg: there is no such format. Possible are png, geotiff, cog, ome-tiff, tiff, npy",
        ),
        ("png", 1, "labels", "nifti", "a place in space"),
        (
            "nifti",
            5,
            "labels",
            "png",
            "one plane, the image has 5. Possible are geotiff, cog, ome-tiff, tiff, npy, nifti",
        ),
        ("nifti", 5, "labels", "dicom-seg", "refers to DICOM images"),
        ("nifti", 5, "entropy", "png", "labels, not numbers"),
    ],
)
def test_refusals_list_what_is_possible(format, planes, kind, wanted, message):
    with pytest.raises(UsageError, match=message):
        choose_writer(info(format, planes), kind, wanted)


@pytest.mark.parametrize(
    ("format", "wanted", "suffix"), [("dicom", "dicom-seg", ".nii.gz"), ("png", "png", ".tif"), ("tiff", "cog", ".tif")]
)
def test_maps_take_another_format_where_the_one_of_the_labels_cannot_hold_them(format, wanted, suffix):
    assert choose_writer(info(format), "entropy", wanted)[0] == suffix
    assert choose_writer(info(format), "labels", wanted)[0] == WRITERS[wanted].suffixes[0]


def test_attributes_are_json(tmp_path):
    write_ome_zarr(tmp_path / "a.zarr", result(labels(1, 8, 8)))
    for path in tmp_path.rglob("zarr.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
