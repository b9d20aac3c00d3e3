"""Every format through `pixelwise predict`: files written by their own libraries, results read back by them.

What a file says of its place, its units and its patient must be what the result says. A second call finds it finished.
"""

import functools
import json
import re
import sys
import threading
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
import tifffile
import zarr
from PIL import Image
from pycocotools import mask as coco_mask
from pydicom.data import get_testdata_file
from rasterio.control import GroundControlPoint
from rasterio.transform import from_gcps

from pixelwise.extras import requirements
from pixelwise.formats import decoding, open_source
from pixelwise.infer.engines.local import Labeller
from pixelwise.infer.predictor import load

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (50, 60, 3), dtype=np.uint8)
VOLUME = RNG.integers(-900, 900, (5, 24, 20)).astype(np.int16)  # slices, rows, columns
UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}


@pytest.fixture
def label(bundles, program, tmp_path):
    """Label an image, look that a second call finds it finished; gives the folder of the results."""

    def call(image, *options, channels=3, name="out", says=""):
        out = tmp_path / name
        arguments = ("predict", bundles[channels], image, "--out", out, "--precision", "float32", *options)
        first = program(*arguments)
        assert (first.code, first.out) == (0, f"1 labelled: {out}\n"), first.err
        assert says in first.err
        again = program(*arguments)
        assert (again.code, again.out, again.err) == (0, f"0 labelled, 1 finished before: {out}\n", "")
        return out

    return call


@functools.cache
def predictor(folder):
    return load(folder, device="cpu", precision="float32")


def same_labels(found, bundle, pixels, valid=None):
    """Whether labels (H, W) are those of one pass over pixels (H, W, C), wherever that is no near tie.

    Where they are not `valid` the network sees the mean.
    """
    network = predictor(bundle)
    if valid is not None:
        pixels = np.where(valid[:, :, None], pixels / np.float32(255), np.float32(network.card.mean))
    whole = network.predict(pixels)
    best, second = np.sort(whole.logits.numpy(), axis=0)[[-1, -2]]
    clear = (best - second > 1e-4) & (True if valid is None else valid)
    return clear.mean() > 0.3 and np.array_equal(found[clear], whole.labels[clear])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "ppm"])
def test_pictures_become_indexed_png(label, bundles, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path)
    out = label(path, "--overlay", "--probabilities", "--geojson", "--coco", "--maps", "entropy")
    with Image.open(path) as source, Image.open(out / "a.png") as found, Image.open(out / "a_overlay.png") as overlay:
        assert (found.mode, found.getpalette()[:9]) == ("P", [0, 0, 0, 90, 80, 70, 250, 0, 0])
        assert same_labels(np.asarray(found), bundles[3], np.asarray(source.convert("RGB")))
        assert (overlay.mode, overlay.size) == ("RGB", (60, 50))
        labels = np.asarray(found)
    probabilities = np.load(out / "a_probabilities.npy", allow_pickle=False)
    assert np.allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    entropy = tifffile.imread(out / "a_entropy.tif")
    assert (entropy.shape, entropy.dtype) == ((50, 60), np.float32)
    assert np.allclose(entropy, -(probabilities * np.log(probabilities)).sum(axis=0), atol=1e-4)
    coco = json.loads((out / "a_coco.json").read_text())
    for item in coco["annotations"]:
        with warnings.catch_warnings(action="ignore"):  # pycocotools is older than numpy 2
            mask = coco_mask.decode(item["segmentation"])
        assert np.array_equal(mask, labels == item["category_id"])
    features = json.loads((out / "a.geojson").read_text())["features"]
    for index, name in enumerate(("background", "road", "car")):
        area = sum(item["properties"]["area_px"] for item in features if item["properties"]["class"] == name)
        assert area == (labels == index).sum() * (name != "background")


@pytest.mark.parametrize(
    "options",
    [{}, {"bigtiff": True, "tile": (16, 16), "compression": "lzw"}, {"byteorder": ">", "compression": "zlib"}],
)
def test_tiff_stays_tiff_with_its_resolution(label, bundles, tmp_path, options):
    tifffile.imwrite(tmp_path / "a.tif", RGB, resolution=(300.5, 150.25), resolutionunit="CENTIMETER", **options)
    out = label(tmp_path / "a.tif", "--maps", "max_probability")
    with tifffile.TiffFile(out / "a.tif") as found:
        page = found.pages.first
        assert page.is_tiled
        assert page.tags["ResolutionUnit"].value == 3
        assert page.resolution == (300.5, 150.25)
        assert page.colormap[:, 2].tolist() == [250 * 257, 0, 0]
        assert same_labels(found.asarray(), bundles[3], RGB)
    assert tifffile.imread(out / "a_max_probability.tif").dtype == np.float32


def test_ome_tiff_keeps_axes_and_micrometres(label, bundles, tmp_path):
    stack = RNG.integers(0, 256, (2, 3, 3, 30, 40), dtype=np.uint8)  # T, Z, C, Y, X
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.3, "PhysicalSizeZ": 1.5, "TimeIncrement": 2.5}
    units = {f"{name}Unit": "s" if name == "TimeIncrement" else "µm" for name in sizes}
    tifffile.imwrite(
        tmp_path / "cells.ome.tif",
        stack,
        metadata={"axes": "TZCYX", "Name": "cells", **sizes, **units},
        photometric="minisblack",
    )
    out = label(tmp_path / "cells.ome.tif", "--maps", "entropy", "--coco")
    with tifffile.TiffFile(out / "cells.ome.tif") as found:
        assert (found.series[0].axes, found.series[0].shape) == ("TZYX", (2, 3, 30, 40))
        image = tifffile.xml2dict(found.ome_metadata)["OME"]["Image"]
        labels = found.asarray()
    assert image["Name"] == "cells"
    assert {name: image["Pixels"][name] for name in (*sizes, *units)} == sizes | units
    for time, depth in np.ndindex(2, 3):
        assert same_labels(labels[time, depth], bundles[3], stack[time, depth].transpose(1, 2, 0))
    assert tifffile.imread(out / "cells_entropy.ome.tif").shape == (2, 3, 30, 40)
    assert len(json.loads((out / "cells_coco.json").read_text())["images"]) == 6


def geotiff(path, bands=None, **profile):
    bands = RGB.transpose(2, 0, 1) if bands is None else bands
    profile = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate", **profile}
    count, height, width = bands.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype, **profile
    ) as file:
        file.write(bands)
        file.update_tags(SENSOR="MSI", ACQUIRED="2024-05-01")
    return path


@pytest.mark.parametrize("format", ["geotiff", "cog"])
def test_geotiff_keeps_its_place_tags_and_nodata(label, bundles, tmp_path, format):
    bands = RGB.transpose(2, 0, 1).copy()
    bands[bands == 7] = 8
    bands[:, 10:30, 5:20] = 7
    geotiff(tmp_path / "scene.tif", bands, nodata=7, **UTM)
    options = () if format == "geotiff" else ("--format", "cog")
    out = label(tmp_path / "scene.tif", "--geojson", "--background", "--maps", "entropy", "--overlay", *options)
    for name, dtype in (("scene", "uint8"), ("scene_entropy", "float32")):
        with rasterio.open(tmp_path / "scene.tif") as source, rasterio.open(out / f"{name}.tif") as found:
            assert (found.crs, found.transform, found.bounds) == (source.crs, source.transform, source.bounds)
            assert (found.count, found.dtypes[0], found.shape) == (1, dtype, source.shape)
            assert (found.profile["tiled"], found.profile["compress"]) == (True, "deflate")
            assert {"SENSOR": "MSI", "ACQUIRED": "2024-05-01"}.items() <= found.tags().items()
            layout = found.tags(ns="IMAGE_STRUCTURE").get("LAYOUT")
            assert layout == ("COG" if format == "cog" else None)
            values, empty = found.read(1), found.read_masks(1) == 0
        assert empty[10:30, 5:20].all()
        assert empty.sum() == 300
    with rasterio.open(out / "scene.tif") as found:
        assert found.nodata == 255
        assert found.colormap(1)[2] == (250, 0, 0, 255)
        values = found.read(1)
    with open_source(tmp_path / "scene.tif") as source:
        valid = source.valid(0, 0, 50, 60)
        assert same_labels(values, bundles[3], source.read(0, 0, 50, 60), valid)
    assert (values[~valid] == 255).all()
    features = json.loads((out / "scene.geojson").read_text())["features"]
    areas = {item["properties"]["area_m2"] / item["properties"]["area_px"] for item in features}
    assert 99 < min(areas) <= max(areas) < 101
    assert sum(item["properties"]["area_px"] for item in features) == 2700
    longitudes = [place[0] for item in features for ring in rings(item["geometry"]) for place in ring]
    assert 14.999 < min(longitudes) < max(longitudes) < 15.01  # the middle of the zone, in WGS 84


def rings(geometry):
    polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    return [ring for polygon in polygons for ring in polygon]


def test_ground_control_points_and_many_bands(label, bundles, tmp_path):
    places = ((0, 0, 10.0, 50.0), (0, 60, 11.0, 50.0), (50, 0, 10.0, 49.0), (50, 60, 11.0, 49.0))
    points = [GroundControlPoint(row=row, col=col, x=x, y=y) for row, col, x, y in places]
    path = tmp_path / "swath.tif"
    kind = {"driver": "GTiff", "count": 1, "height": 50, "width": 60, "dtype": "uint16"}
    with rasterio.open(path, "w", gcps=points, crs="EPSG:4326", **kind) as file:
        file.write((RGB[..., 0].astype(np.uint16) * 200)[None])
    out = label(path, channels=1)
    with rasterio.open(out / "swath.tif") as found:
        gcps, crs = found.gcps
        assert crs.to_epsg() == 4326
        assert from_gcps(gcps).almost_equals(from_gcps(points), 1e-9)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_nifti_keeps_its_space(label, bundles, tmp_path, suffix, axis):
    volume = VOLUME.transpose(2, 1, 0)
    turned = nibabel.eulerangles.euler2mat(0.1, 0.2, -0.3) @ np.diag([0.8, 0.9, 2.5])
    affine = nibabel.affines.from_matvec(turned, [-30, 40, 12.5])
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_sform(affine, code="mni")
    image.header.set_qform(affine, code="scanner")
    image.header["descrip"] = b"Doe, John"
    image.to_filename(tmp_path / f"brain{suffix}")
    options = () if axis is None else ("--axis", axis)
    out = label(tmp_path / f"brain{suffix}", "--maps", "entropy", *options, channels=1)
    source = nibabel.load(tmp_path / f"brain{suffix}")
    for name, dtype in (("brain", np.uint8), ("brain_entropy", np.float32)):
        found = nibabel.load(out / f"{name}.nii.gz")
        assert found.shape == source.shape
        assert found.get_data_dtype() == dtype
        assert np.array_equal(found.affine, source.affine)
        assert found.header.get_zooms() == source.header.get_zooms()
        assert found.header.get_xyzt_units() == ("mm", "sec")
        for field in ("sform_code", "qform_code", "pixdim"):
            assert np.array_equal(found.header[field], source.header[field])
        assert b"Doe" not in (out / f"{name}.nii.gz").read_bytes()
    labels = np.asarray(nibabel.load(out / "brain.nii.gz").dataobj)
    with open_source(tmp_path / f"brain{suffix}", axis=axis) as opened:
        for plane in range(opened.info.planes):
            pixels = opened.read(0, 0, opened.info.height, opened.info.width, plane)
            assert same_labels(labels.take(plane, axis=2 if axis is None else axis).T, bundles[1], pixels)


def test_a_volume_without_a_place_is_refused_unless_allowed(label, bundles, program, tmp_path):
    image = nibabel.Nifti1Image(VOLUME.transpose(2, 1, 0), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    image.to_filename(tmp_path / "brain.nii.gz")
    done = program("predict", bundles[1], tmp_path / "brain.nii.gz", "--out", tmp_path / "no")
    assert done.code == 1
    assert f"failed: {tmp_path / 'brain.nii.gz'}: it has no affine" in done.err
    assert "--allow-no-affine" in done.err
    out = label(tmp_path / "brain.nii.gz", "--allow-no-affine", channels=1)
    found = nibabel.load(out / "brain.nii.gz")
    assert (int(found.header["sform_code"]), int(found.header["qform_code"])) == (0, 0)
    Image.fromarray(RGB[..., 0]).save(tmp_path / "a.png")  # has no place either, and no need of one
    label(tmp_path / "a.png", "--allow-no-affine", channels=1, name="other")


def slices(folder, volume=VOLUME, *, gaps=None, suffix=".dcm", series="1.2.826.0.1.3"):
    """A CT series in a folder, of which names and instance numbers say nothing on the order."""
    folder.mkdir(parents=True)
    order = np.random.default_rng(1).permutation(len(volume))
    places = np.cumsum([0] + [2.5] * (len(volume) - 1) if gaps is None else gaps)
    for index, pixels in enumerate(volume):
        found = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
        found.Rows, found.Columns = pixels.shape
        found.PixelData = pixels.tobytes()
        found.FrameOfReferenceUID, found.SeriesInstanceUID = "1.2.826.0.1.9", series
        found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = f"{series}.{index + 1}"
        found.ImagePositionPatient, found.InstanceNumber = [-80, -70, float(places[index])], int(order[index])
        found.PixelSpacing, found.SliceThickness, found.PatientName = [0.7, 0.8], 2.5, "Doe^John"
        del found.DataSetTrailingPadding
        found.save_as(folder / f"IM{order[index]:04}{suffix}")
    return folder


@pytest.mark.parametrize("suffix", [".dcm", "", ".ima"])
def test_a_dicom_series_becomes_a_volume_in_its_place(label, bundles, tmp_path, suffix):
    slices(tmp_path / "study" / "chest", suffix=suffix)
    (tmp_path / "study" / "chest" / "notes.txt").write_text("not an image")
    out = label(tmp_path / "study", "--maps", "entropy", channels=1)  # found below the folder that was given
    found = nibabel.load(out / "chest.nii.gz")
    assert found.shape == (20, 24, 5)
    assert nibabel.load(out / "chest_entropy.nii.gz").shape == (20, 24, 5)
    # DICOM's axes point left and back, NIfTI's right and front
    assert np.allclose(found.affine, [[-0.8, 0, 0, 80], [0, -0.7, 0, 70], [0, 0, 2.5, 0], [0, 0, 0, 1]], atol=1e-5)
    assert found.header.get_xyzt_units()[0] == "mm"
    assert b"Doe" not in (out / "chest.nii.gz").read_bytes()
    with open_source(tmp_path / "study" / "chest") as source:
        for plane in range(5):
            assert same_labels(np.asarray(found.dataobj)[:, :, plane].T, bundles[1], source.read(0, 0, 24, 20, plane))


def test_dicom_seg_belongs_to_the_patient_and_the_images(label, bundles, tmp_path):
    folder = slices(tmp_path / "chest")
    out = label(folder, "--format", "dicom-seg", "--maps", "entropy", channels=1)
    found = highdicom.seg.segread(out / "chest.dcm")
    source = pydicom.dcmread(folder / "IM0000.dcm")
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "StudyDate"):
        assert found[name].value == source[name].value
    assert found.SeriesInstanceUID != source.SeriesInstanceUID
    assert [item.SegmentLabel for item in found.SegmentSequence] == ["road", "car"]
    uids = {pydicom.dcmread(path).SOPInstanceUID for path in folder.iterdir()}
    assert {uid for _, _, uid in found.get_source_image_uids()} == uids
    with open_source(folder) as opened:
        uids = [f"1.2.826.0.1.3.{plane + 1}" for plane in range(5)]
        labels = found.get_pixels_by_source_instance(uids, combine_segments=True)
        for plane in range(5):
            assert same_labels(labels[plane], bundles[1], opened.read(0, 0, 24, 20, plane))
    assert nibabel.load(out / "chest_entropy.nii.gz").shape == (20, 24, 5)  # a SEG has no place for it


def test_missing_slices_are_told_and_a_single_file_is_an_image(label, bundles, tmp_path):
    gaps = slices(tmp_path / "gaps", gaps=[0, 2.5, 2.5, 5, 2.5])
    out = label(gaps, channels=1, says=f"{gaps}: the distances between its 5 slices are uneven (2.500 to 5.000 mm)")
    assert highdicom.seg.segread(out / "gaps.dcm").FrameOfReferenceUID == "1.2.826.0.1.9"
    out = label(gaps / "IM0003.dcm", channels=1, name="one")
    assert nibabel.load(out / "IM0003.nii.gz").shape == (20, 24, 1)


def test_several_series_in_a_folder_need_a_choice(label, bundles, program, tmp_path):
    slices(tmp_path / "all")
    for path in slices(tmp_path / "more", series="1.2.826.0.1.4").iterdir():
        path.rename(tmp_path / "all" / f"more_{path.name}")
    done = program("predict", bundles[1], tmp_path / "all", "--out", tmp_path / "no")
    assert done.code == 1
    assert re.search(r"holds 2 series: 1\.2\.826\.0\.1\.3 \(.{1,40}, 5 images\); 1\.2\.826\.0\.1\.4 \(", done.err)
    assert "--series UID" in done.err
    out = label(tmp_path / "all", "--series", "1.2.826.0.1.4", channels=1)
    assert nibabel.load(out / "all.nii.gz").shape == (20, 24, 5)
    done = program("predict", bundles[1], f"{tmp_path}/all/*.dcm", "--out", tmp_path / "each")
    assert done.out == f"10 labelled: {tmp_path / 'each'}\n"


APERIO = "Aperio Image Library v11.2.1 \n240x160 [0,0 240x160] (32x32) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"


def test_a_slide_at_a_level_becomes_a_pyramid_of_ome_tiff(label, bundles, program, tmp_path):
    scan = np.kron(RNG.integers(0, 256, (20, 30, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "biopsy.svs") as writer:
        kind = {"photometric": "rgb", "compression": "zlib", "metadata": None, "software": False}
        writer.write(scan, tile=(32, 32), description=APERIO, **kind)
        writer.write(scan[::8, ::8], rowsperstrip=4, description=APERIO, **kind)
        for step in (2, 4):
            writer.write(scan[::step, ::step], tile=(32, 32), subfiletype=0, description=APERIO, **kind)
    out = label(tmp_path / "biopsy.svs", "--level", 1, "--overlay")
    with tifffile.TiffFile(out / "biopsy.ome.tif") as found:
        pixels = tifffile.xml2dict(found.ome_metadata)["OME"]["Image"]["Pixels"]
        assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeXUnit"]) == (pytest.approx(0.998), "µm")
        assert same_labels(found.asarray(), bundles[3], scan[::2, ::2])
    done = program("predict", bundles[3], tmp_path / "biopsy.svs", "--out", tmp_path / "no", "--level", 7)
    assert done.code == 1
    assert "it has no level 7. Its levels are 0 (240 x 160), 1 (120 x 80), 2 (60 x 40) pixels" in done.err


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_stays_zarr(label, bundles, tmp_path, version):
    stack = RNG.integers(0, 256, (2, 50, 60, 3), dtype=np.uint8)
    names = {"dimension_names": ("time", "y", "x", "c")} if version == 3 else {}
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=stack.shape, chunks=(1, 16, 16, 3), dtype="u1", zarr_format=version, **names
    )
    array[:] = stack
    out = label(tmp_path / "a.zarr", "--maps", "entropy")
    found = zarr.open_array(out / "a.zarr", mode="r")
    assert (found.metadata.zarr_format, found.shape, found.dtype) == (version, (2, 50, 60), np.uint8)
    assert found.attrs["pixelwise"]["classes"][2]["name"] == "car"
    for plane in range(2):
        assert same_labels(found[plane], bundles[3], stack[plane])
    assert zarr.open_array(out / "a_entropy.zarr", mode="r").dtype == np.float32


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr_keeps_scale_units_and_axes(label, bundles, tmp_path, version):
    stack = RNG.integers(0, 256, (3, 2, 40, 50), dtype=np.uint8)  # C, Z, Y, X
    root = zarr.open_group(tmp_path / "cells.ome.zarr", mode="w", zarr_format=version)
    space = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    datasets = []
    for level in range(2):
        pixels = stack[..., :: 2**level, :: 2**level]
        made = root.create_array(
            str(level),
            shape=pixels.shape,
            chunks=(1, 1, 16, 16),
            dtype="u1",
            chunk_key_encoding={"name": "v2" if version == 2 else "default", "separator": "/"},
        )
        made[:] = pixels
        scale = [1.0, 2.0, 0.5 * 2**level, 0.25 * 2**level]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    image = {"axes": [{"name": "c", "type": "channel"}, *space], "datasets": datasets, "name": "cells"}
    root.attrs.put(
        {"multiscales": [image | {"version": "0.4"}]}
        if version == 2
        else {"ome": {"version": "0.5", "multiscales": [image]}}
    )
    for level, (height, width) in enumerate([(40, 50), (20, 25)]):
        out = label(tmp_path / "cells.ome.zarr", "--level", level, name=f"out{level}")
        made = zarr.open_group(out / "cells.ome.zarr", mode="r")
        assert made.metadata.zarr_format == version
        about = made.attrs if version == 2 else made.attrs["ome"]
        found = about["multiscales"][0]
        assert [axis["name"] for axis in found["axes"]] == ["z", "y", "x"]
        assert {axis["unit"] for axis in found["axes"]} == {"micrometer"}
        (transform,) = found["datasets"][0]["coordinateTransformations"]
        assert transform == {"type": "scale", "scale": [2.0, 0.5 * 2**level, 0.25 * 2**level]}
        labels = made["labels/pixelwise/0"]
        assert labels.shape == (2, height, width)
        for plane in range(2):
            pixels = stack[:, plane, :: 2**level, :: 2**level].transpose(1, 2, 0)
            assert same_labels(labels[plane], bundles[3], pixels)


def test_numpy_arrays(label, bundles, tmp_path):
    np.save(tmp_path / "a.npy", RGB)
    out = label(tmp_path / "a.npy", "--maps", "entropy")
    assert same_labels(np.load(out / "a.npy"), bundles[3], RGB)
    assert np.load(out / "a_entropy.npy").dtype == np.float32


@pytest.mark.parametrize("format", ["png", "tiff", "ome-tiff", "geotiff", "cog", "zarr", "ome-zarr", "npy"])
def test_any_format_can_be_wanted_and_foreign_files_are_kept(label, bundles, program, tmp_path, format):
    Image.fromarray(RGB).save(tmp_path / "a.jpg")
    out = label(tmp_path / "a.jpg", "--format", format)
    (made,) = [path for path in out.iterdir() if not path.name.startswith(".")]
    foreign = tmp_path / "foreign" / made.name
    foreign.parent.mkdir()
    for fill in (lambda: foreign.write_text("mine"), foreign.mkdir):
        fill()
        done = program("predict", bundles[3], tmp_path / "a.jpg", "--out", foreign.parent, "--format", format)
        assert (done.code, done.out) == (1, f"0 labelled, 1 failed: {foreign.parent}\n")
        assert f"failed: {foreign}: exists and was not written by pixelwise" in done.err
        assert foreign.is_dir() or foreign.read_text() == "mine"
        if foreign.is_file():
            foreign.unlink()


def test_a_folder_of_all_formats(bundles, program, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    Image.fromarray(RGB).save(folder / "a.jpg")
    tifffile.imwrite(folder / "b.tif", RGB)
    geotiff(folder / "c.tif", **UTM)
    np.save(folder / "d.npy", RGB)
    nibabel.Nifti1Image(VOLUME.transpose(2, 1, 0), np.eye(4)).to_filename(folder / "e.nii.gz")
    slices(folder / "f")
    zarr.create_array(folder / "g.zarr", shape=RGB.shape, chunks=(16, 16, 3), dtype="u1")[:] = RGB
    (folder / "h.zarr").mkdir()  # what makes it an array is lost
    done = program("predict", bundles[3], folder, "--out", tmp_path / "out")
    assert (done.code, done.out) == (1, f"7 labelled, 1 failed: {tmp_path / 'out'}\n"), done.err
    assert f"failed: {folder / 'h.zarr'}: is a folder, but neither a Zarr" in done.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".pixelwise", "a.png", "b.tif", "c.tif", "d.npy", "e.nii.gz", "f.nii.gz", "g.zarr"]


@pytest.fixture
def web(tmp_path):
    """A web server of the folder "site"; gives its address."""
    (tmp_path / "site").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_images_of_a_web_server(label, bundles, program, web, tmp_path):
    geotiff(tmp_path / "site" / "scene.tif", **UTM)
    Image.fromarray(RGB).save(tmp_path / "site" / "a.png")
    out = label(f"{web}/scene.tif")
    with rasterio.open(out / "scene.tif") as found:
        assert found.crs.to_epsg() == 32633
        assert same_labels(found.read(1), bundles[3], RGB)
    label(f"{web}/a.png?token=secret", name="other")
    done = program("predict", bundles[3], f"{web}/none.png?token=secret", "--out", tmp_path / "no")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert f"{web}/none.png: there is no such object" in done.err
    assert "secret" not in done.err + done.out


def test_ctrl_c_says_that_the_same_command_goes_on(bundles, program, tmp_path, monkeypatch):
    for name in "abc":
        Image.fromarray(RGB).save(tmp_path / f"{name}.png")
    label, started = Labeller.label, []

    def interrupted(labeller, task):
        if started:
            raise KeyboardInterrupt
        started.append(task)
        return label(labeller, task)

    arguments = ("predict", bundles[3], tmp_path, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Labeller, "label", interrupted)
        done = program(*arguments)
    assert (done.code, done.out) == (130, "")
    assert done.err == "stopped: what was done is kept, and the same command goes on with the rest.\n"
    assert program(*arguments).out == f"2 labelled, 1 finished before: {tmp_path / 'out'}\n"


def test_file_urls(bundles, program, tmp_path):
    tifffile.imwrite(tmp_path / "a b.tif", RGB)
    arguments = ("predict", bundles[3], f"file://{tmp_path}/a%20b.tif", "--out", f"file://{tmp_path}/out", "--overlay")
    assert program(*arguments).out == f"1 labelled: file://{tmp_path}/out\n"
    assert program(*arguments).out == f"0 labelled, 1 finished before: file://{tmp_path}/out\n"
    assert tifffile.imread(tmp_path / "out" / "a b.tif").shape == (50, 60)
    done = program("predict", bundles[3], f"file://{tmp_path}", "--out", f"file://{tmp_path}")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is also an input" in done.err


def test_object_stores_in_and_out(s3, bundles, program, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.meta.endpoint_url)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    geotiff(tmp_path / "b.tif", **UTM)
    zarr.create_array(tmp_path / "c.zarr", shape=RGB.shape, chunks=(16, 16, 3), dtype="u1")[:] = RGB
    slices(tmp_path / "d")
    files = [tmp_path / "a.png", tmp_path / "b.tif", *(tmp_path / "c.zarr").rglob("*"), *(tmp_path / "d").iterdir()]
    for path in files:
        if path.is_file():
            s3.upload_file(str(path), "scans", f"in/{path.relative_to(tmp_path)}")
    s3.put_object(Bucket="scans", Key="in/bad.tif", Body=(tmp_path / "b.tif").read_bytes()[:300])
    arguments = ("predict", bundles[3], "s3://scans/in/", "--out", "s3://scans/out", "--overlay")
    arguments += ("--precision", "float32")
    done = program(*arguments)
    assert (done.code, done.out) == (1, "4 labelled, 1 failed: s3://scans/out\n"), done.err
    assert "failed: s3://scans/in/bad.tif: " in done.err
    listed = s3.list_objects_v2(Bucket="scans", Prefix="out/")["Contents"]
    names = {item["Key"].removeprefix("out/").partition("/c/")[0] for item in listed}
    assert {name for name in names if not name.startswith(".pixelwise/")} == {
        "a.png", "a_overlay.png", "b.tif", "b_overlay.png", "c.zarr", "c.zarr/zarr.json", "c_overlay.png",
        "d.nii.gz", "d_overlay.png",
    }  # fmt: skip
    s3.download_file("scans", "out/b.tif", str(tmp_path / "found.tif"))
    with rasterio.open(tmp_path / "found.tif") as found:
        assert (found.crs.to_epsg(), found.transform) == (32633, UTM["transform"])
        assert same_labels(found.read(1), bundles[3], RGB)
    assert program(*arguments).out == "0 labelled, 4 finished before, 1 failed: s3://scans/out\n"
    done = program("predict", bundles[3], "s3://scans/in/d/", "--out", tmp_path / "series")
    assert done.out == f"1 labelled: {tmp_path / 'series'}\n"
    assert nibabel.load(tmp_path / "series" / "d.nii.gz").shape == (20, 24, 5)
    s3.put_object(Bucket="scans", Key="foreign/a.png", Body=b"mine")
    done = program("predict", bundles[3], "s3://scans/in/a.png", "--out", "s3://scans/foreign")
    assert done.code == 1
    assert "s3://scans/foreign/a.png: exists and was not written by pixelwise" in done.err
    assert s3.get_object(Bucket="scans", Key="foreign/a.png")["Body"].read() == b"mine"


@pytest.mark.parametrize(
    ("package", "extra", "options", "code", "message"),
    [
        ("rasterio", "geo", (), 1, "failed: {folder}/c.tif: GeoTIFF"),
        ("nibabel", "medical", (), 1, "failed: {folder}/e.nii: NIfTI"),
        ("zarr", "zarr", (), 1, "failed: {folder}/g.zarr: Zarr"),
        ("shapely", "geo", ("--geojson",), 2, "pixelwise: GeoJSON"),
        ("rasterio", "geo", ("--format", "cog"), 2, "pixelwise: writing cog"),
    ],
)
def test_a_package_that_is_missing(bundles, program, tmp_path, monkeypatch, package, extra, options, code, message):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(RGB).save(folder / "a.png")
    geotiff(folder / "c.tif", **UTM)
    nibabel.Nifti1Image(VOLUME.transpose(2, 1, 0), np.eye(4)).to_filename(folder / "e.nii")
    zarr.create_array(folder / "g.zarr", shape=RGB.shape, chunks=(16, 16, 3), dtype="u1")[:] = RGB
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "stubs").mkdir()  # and one that cannot be imported for the process that decodes
    (tmp_path / "stubs" / f"{package}.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stubs"))
    decoding.stop()
    try:
        done = program("predict", bundles[3], folder, "--out", tmp_path / "out", *options)
    finally:
        decoding.stop()
    assert done.code == code
    wanted = " ".join(f'"{each}"' for each in requirements(extra))
    install = f"needs the package {package}. Install it: pip install {wanted}"
    assert f"{message.format(folder=folder)} {install}" in done.err
    if code == 1:  # the others go on
        assert done.out == f"3 labelled, 1 failed: {tmp_path / 'out'}\n"
    else:
        assert not (tmp_path / "out").exists()
