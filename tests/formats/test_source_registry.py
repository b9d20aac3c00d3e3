"""Every format is found by its content, whatever its name, and opened with the options it has."""

import shutil
import subprocess
import sys
import warnings

import fsspec
import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
import tifffile
import zarr
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import FORMATS, SOURCE_SUFFIXES, open_source
from pixelwise.formats.registry import likely_suffix, stem_of

IMAGE = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)


def dicom(path, number=1, series="1.2.3"):
    """A slice of a CT series, as small as it can be."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    item = pydicom.Dataset()
    item.file_meta = meta
    item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    item.Modality, item.SeriesInstanceUID, item.StudyInstanceUID = "CT", series, "1.2"
    item.FrameOfReferenceUID, item.InstanceNumber = "1.2.4", number
    item.ImagePositionPatient, item.ImageOrientationPatient = [0, 0, 2 * number], [1, 0, 0, 0, 1, 0]
    item.PixelSpacing, item.Rows, item.Columns = [1, 1], 40, 50
    item.SamplesPerPixel, item.PhotometricInterpretation, item.PixelRepresentation = 1, "MONOCHROME2", 0
    item.BitsAllocated = item.BitsStored = 16
    item.HighBit = 15
    item.PixelData = (IMAGE[..., 0].astype("<u2") + number).tobytes()
    item.save_as(path, enforce_file_format=True)


def write(folder, kind):
    """A file of a format, written by the format's own library; its path."""
    path = folder / f"a.{kind}"
    if kind in ("png", "jpeg", "webp", "bmp", "gif", "ppm"):
        Image.fromarray(IMAGE).save(path)
    elif kind == "tiff":
        tifffile.imwrite(path, IMAGE, photometric="rgb", tile=(16, 16))
    elif kind == "ome-tiff":
        path = folder / "a.ome.tif"
        tifffile.imwrite(path, IMAGE, photometric="rgb", ome=True, tile=(16, 16))
    elif kind == "geotiff":
        path = folder / "a.tif"
        profile = {"driver": "GTiff", "count": 3, "height": 40, "width": 50, "dtype": "uint8", "crs": "EPSG:32633"}
        with rasterio.open(path, "w", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), **profile) as dataset:
            dataset.write(np.moveaxis(IMAGE, 2, 0))
    elif kind in ("nii", "nii.gz"):
        nibabel.Nifti1Image(IMAGE.astype(np.int16), np.diag([1, 1, 2, 1])).to_filename(path)
    elif kind == "dicom":
        dicom(path)
    elif kind == "dicom series":
        path = folder / "series"
        path.mkdir()
        for number in (1, 2, 3):
            dicom(path / f"IM{number}", number)
    elif kind == "npy":
        np.save(path, IMAGE)
    else:
        zarr.save_array(path, IMAGE)
    return path


FOUND = {
    "png": "png", "jpeg": "jpeg", "webp": "webp", "bmp": "bmp", "gif": "gif", "ppm": "ppm", "tiff": "tiff",
    "ome-tiff": "ome-tiff", "geotiff": "geotiff", "nii": "nifti", "nii.gz": "nifti", "dicom": "dicom",
    "dicom series": "dicom", "npy": "npy", "zarr": "zarr",
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_content_decides(tmp_path, kind):
    path = write(tmp_path, kind)
    with open_source(path) as source:
        assert (source.info.format, source.info.location) == (FOUND[kind], str(path))
        known = source.fingerprint()
        assert {source.info.height, source.info.width} == {40, 50}
        assert source.read(0, 0, 8, 9).shape == (8, 9, source.info.channels)
        source.check_unchanged()
    other = tmp_path / "other.name"
    path.rename(other)
    if kind in ("nii", "nii.gz"):  # the package itself needs the name
        other = other.rename(tmp_path / f"other.{kind}")
    with open_source(str(other)) as source:
        assert source.info.format == FOUND[kind]
        assert source.fingerprint() == known


def test_a_dicom_series_behind_a_url_is_copied(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    for path in write(tmp_path, "dicom series").iterdir():
        memory.pipe(f"/series/{path.name}", path.read_bytes())
    memory.pipe("/series/notes.txt", b"not an image")
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    with open_source("memory://series", intensity="auto") as source:
        assert (source.info.location, source.info.planes) == ("memory://series", 3)
        assert source.read(0, 0, 40, 50, 2).shape == (40, 50, 1)
        known = source.fingerprint()
        source.check_unchanged()
        memory.pipe("/series/IM2", b"other")
        with pytest.raises(DataError, match="memory://series: the series changed"):
            source.check_unchanged()
    assert not list((tmp_path / "copies").iterdir())
    with pytest.raises(DataError, match=r"^memory://series"), open_source("memory://series") as source:
        assert source.fingerprint() != known
        raise DataError("memory://series: was left out")
    memory.store.clear()
    memory.pipe("/texts/notes.txt", b"not an image")
    with pytest.raises(DataError, match=r"memory://texts: this is a folder"):
        open_source("memory://texts")
    memory.store.clear()


def test_slides_are_found_by_name_or_by_level(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(IMAGE, tile=(16, 16), photometric="rgb", subifds=1)
        writer.write(IMAGE[::2, ::2], tile=(16, 16), photometric="rgb", subfiletype=1)
    with open_source(path) as source:
        assert source.info.format == "tiff"
    with open_source(path, level=1) as source:
        assert (source.info.format, source.info.height) == ("slide", 20)
    shutil.copy(path, tmp_path / "a.svs")
    with open_source(tmp_path / "a.svs") as source:
        assert source.info.format == "slide"


def test_options_go_to_the_format_that_has_them(tmp_path):
    volume = write(tmp_path, "nii")
    with open_source(volume, axis=0, level=None, channels=1) as source:
        assert source.info.planes == 40
    picture = write(tmp_path, "png")
    with open_source(picture, channels=3, axis=None) as source:
        assert source.info.channels == 3
    with pytest.raises(UsageError, match=r"a\.png: its format \(png\) has no option axis; it has no options\."):
        open_source(picture, axis=1)
    with pytest.raises(UsageError, match=r"a\.nii: its format \(nifti\) has no option level; it has axis, intensity"):
        open_source(volume, level=1)


def test_a_format_can_be_forced(tmp_path):
    path = write(tmp_path, "geotiff")
    for name in ("tiff", "ome-tiff"):
        with open_source(path, format=name) as source:
            assert source.info.format == "tiff"
    with pytest.raises(DataError, match=r"a\.tif: "):
        open_source(path, format="npy")
    with open_source(path, format="tif") as source:
        assert source.info.format == "tiff"
    with pytest.raises(UsageError, match=r"format 'heic' is not known; possible are png, jpeg, .*dicom, .*tiff"):
        open_source(path, format="heic")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "the file is empty"),
        ("a.png", b"what", "no image that can be read.*Known are PNG, .* DICOM and Zarr"),
        ("a.txt", b"a text of some length" * 400, "no image that can be read"),
        ("a.gz", b"\x1f\x8b\x08\0rest", "no image|damaged"),
        ("a.nii", b"\0" * 400, "."),
        ("a.dcm", b"\0" * 400, "."),
        ("a.zip", b"PK\x03\x04rest", "neither a Zarr folder nor a ZIP"),
        ("a.svs", b"II*\0", "."),
    ],
)
def test_what_is_no_image(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: .*{message}"):
        open_source(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.png: there is no such file"):
        open_source(tmp_path / "none.png")
    with pytest.raises(DataError, match=rf"{tmp_path}: is a folder, but neither a Zarr"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", FOUND)
def test_damage_of_all_formats_ends_in_one_error(tmp_path, kind):
    good = write(tmp_path, kind)
    for seed in range(6):
        draws = np.random.default_rng(seed)
        path = tmp_path / f"{seed}-{good.name}"
        shutil.copytree(good, path) if good.is_dir() else shutil.copy(good, path)
        files = sorted(item for item in path.rglob("*") if item.is_file()) if good.is_dir() else [path]
        victim = files[draws.integers(len(files))]
        content = bytearray(victim.read_bytes())
        if seed % 2:
            content = content[: draws.integers(len(content))]
        else:
            for _ in range(9):
                content[draws.integers(min(len(content), 600))] = draws.integers(256)
        victim.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                with open_source(path) as source:
                    source.read(0, 0, min(source.info.height, 40), min(source.info.width, 40))
            except DataError as error:
                assert path.name in str(error)


def test_suffixes_and_formats():
    assert {".png", ".tif", ".svs", ".npy", ".dcm", ".nii.gz", ".zarr"} <= set(SOURCE_SUFFIXES)
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in SOURCE_SUFFIXES)
    assert all(known.opens or known.creates for known in FORMATS.values())
    assert [stem_of(name) for name in ("a.png", "brain.v2.nii.gz", "cells.ome.tif", "IM0001")] == [
        "a",
        "brain.v2",
        "cells",
        "IM0001",
    ]
    assert [likely_suffix(name) for name in ("a.jpg", "a.tif", "a.svs", "a.dcm", "a.ome.zarr", "a")] == [
        ".png",
        ".tif",
        ".ome.tif",
        ".nii.gz",
        ".ome.zarr",
        ".png",
    ]


def test_nothing_heavy_is_imported_before_a_file_needs_it():
    code = "import sys, pixelwise.formats; print([name for name in sys.modules if name in ('torch', 'zarr', 'fsspec')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
