"""Images that are whole but cannot be used, disks that are full, files that change: one line each, the others go on."""

import json
import shutil
import struct
import sys
import zipfile
import zlib

import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
import tifffile
import zarr
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.pixels.utils import set_pixel_data

from pixelwise.infer.predictor import Predictor

resource = pytest.importorskip("resource")  # not on Windows

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
LARGE = RNG.integers(0, 256, (150, 160, 3), dtype=np.uint8)
PLACE = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}


def geotiff(path, bands, **profile):
    count, height, width = bands.shape
    kind = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": bands.dtype}
    with rasterio.open(path, "w", **kind, **profile) as file:
        file.write(bands)


def nifti(path, volume):
    nibabel.Nifti1Image(volume, np.diag([1, 1, 2, 1])).to_filename(path)


def zarr_array(path, pixels):
    zarr.create_array(path, shape=pixels.shape, chunks=(64, 64, pixels.shape[2]), dtype=pixels.dtype)[:] = pixels


def dicom(path, pixels=None, **fields):
    found = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    if pixels is not None:
        set_pixel_data(found, pixels, "MONOCHROME2", 16)
    for name, value in fields.items():
        setattr(found, name, value)
    if "SOPInstanceUID" in fields:
        found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
    found.save_as(path)


@pytest.fixture
def complaints(bundles, program, tmp_path):
    """Label the folder "in"; gives what was said of each file, by its name. Good ones must have been labelled."""

    def call(*options, channels=3):
        folder, out = tmp_path / "in", tmp_path / "out"
        Image.fromarray(RGB if channels == 3 else RGB[..., 0]).save(folder / "good.png")
        done = program("predict", bundles[channels], folder, "--out", out, *options)
        found = {}
        for line in done.err.splitlines():
            if line.startswith("failed: "):
                name, _, reason = line.removeprefix(f"failed: {folder}/").partition(": ")
                assert name not in found
                found[name] = reason
        names = {path.name for path in folder.iterdir()}
        assert done.code == (1 if found else 0)
        assert done.out.startswith(f"{len(names) - len(found)} labelled")
        assert "good.png" not in found
        assert (out / "good.png").is_file()
        written = {path.name.partition(".")[0] for path in out.iterdir() if path.name != ".pixelwise"}
        assert written == {name.partition(".")[0] for name in names - set(found)}
        return found

    (tmp_path / "in").mkdir()
    return call


def test_numbers_that_are_none(complaints, tmp_path):
    folder, holes = tmp_path / "in", RGB.astype(np.float32) / 255
    holes[3, 4, 1], holes[30, 40] = np.nan, np.inf
    tifffile.imwrite(folder / "a.tif", holes, photometric="rgb")
    geotiff(folder / "b.tif", holes.transpose(2, 0, 1), **PLACE)
    np.save(folder / "c.npy", holes)
    zarr_array(folder / "d.zarr", holes)
    nifti(folder / "e.nii.gz", holes[..., 0])
    declared = np.where(np.isfinite(holes), holes, np.nan).transpose(2, 0, 1)
    geotiff(folder / "fine.tif", declared, nodata=float("nan"), **PLACE)
    found = complaints()
    assert sorted(found) == ["a.tif", "b.tif", "c.npy", "d.zarr", "e.nii.gz"]
    for name, reason in found.items():
        assert "NaN" in reason, (name, reason)
        assert "Replace" in reason, (name, reason)
    with rasterio.open(tmp_path / "out" / "fine.tif") as labels:
        assert np.array_equal(np.argwhere(labels.read(1) == 255), [[3, 4], [30, 40]])


def test_wrong_channels(complaints, tmp_path):
    folder = tmp_path / "in"
    two = RGB[..., :2]
    tifffile.imwrite(folder / "a.tif", two, planarconfig="contig", photometric="minisblack")
    geotiff(folder / "b.tif", np.concatenate([RGB, two], axis=2).transpose(2, 0, 1), **PLACE)
    np.save(folder / "c.npy", two)
    zarr.create_array(
        folder / "d.zarr", shape=two.shape, chunks=two.shape, dtype="u1", dimension_names=("y", "x", "c")
    )[:] = two
    Image.fromarray(RGB[..., 0]).save(folder / "grey.png")  # one channel is repeated
    found = complaints()
    assert found == {
        name: f"it has {count} channels, but 3 are wanted. Only one can be repeated."
        for name, count in (("a.tif", 2), ("b.tif", 5), ("c.npy", 2), ("d.zarr", 2))
    }


def test_places_that_are_half_told(complaints, tmp_path):
    folder = tmp_path / "in"
    geotiff(folder / "a.tif", RGB.transpose(2, 0, 1), **PLACE)
    with tifffile.TiffFile(folder / "a.tif", mode="r+") as file:  # the coordinate system stays, the place goes
        for name in ("ModelPixelScaleTag", "ModelTiepointTag"):
            tag = file.pages.first.tags[name]
            file.filehandle.seek(tag.offset)
            file.filehandle.write(struct.pack("<H", 65_000))
    image = nibabel.Nifti1Image(np.zeros((5, 6, 7), np.uint8), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    image.to_filename(folder / "b.nii.gz")
    image.header["sform_code"] = 1  # its rows are zeros
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
    image.to_filename(folder / "c.nii")
    found = complaints()
    assert sorted(found) == ["a.tif", "b.nii.gz", "c.nii"]
    assert "coordinate system" in found["a.tif"]
    assert "transform" in found["a.tif"]
    assert "it has no affine" in found["b.nii.gz"]
    assert "its affine (the sform) is singular" in found["c.nii"]


def huge_tiff(path):
    tifffile.imwrite(path, np.zeros((16, 16), np.uint8), metadata=None, tile=(16, 16))
    with tifffile.TiffFile(path, mode="r+") as file:
        page = file.pages.first
        for name in ("ImageWidth", "ImageLength", "TileWidth", "TileLength"):
            page.tags[name].overwrite(2**20, dtype="I")


def bombs(folder):
    """Files of a few kilobytes that become, or say they become, gigabytes."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**7))), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (folder / "a.png").write_bytes(content)
    huge_tiff(folder / "b.tif")
    volume = nibabel.Nifti1Header()
    volume.set_data_shape((30_000, 30_000, 30_000))
    volume.set_sform(np.eye(4), code=1)
    volume["vox_offset"], volume["magic"] = 352, b"n+1"
    (folder / "c.nii").write_bytes(volume.binaryblock + bytes(4 + 1000))
    packed = zlib.compressobj(wbits=31)
    (folder / "d.nii.gz").write_bytes(packed.compress(volume.binaryblock + bytes(10**7)) + packed.flush())
    np.lib.format.open_memmap(folder / "e.npy", mode="w+", dtype=np.uint8, shape=(4, 4, 3)).flush()
    array = (folder / "e.npy").read_bytes()
    (folder / "e.npy").write_bytes(array.replace(b"(4, 4, 3)", b"(4000000, 4000000, 3)".replace(b"000, ", b"000,"), 1))
    zarr_array(folder / "f.zarr", RGB)
    document = folder / "f.zarr" / "zarr.json"
    told = json.loads(document.read_text())
    told["shape"] = [10**6, 10**6, 3]
    told["chunk_grid"]["configuration"]["chunk_shape"] = [10**6, 10**6, 3]
    document.write_text(json.dumps(told))
    zarr_array(folder / "made.zarr", np.zeros((64, 64, 3), np.uint8))  # empty chunks are not written
    with zipfile.ZipFile(folder / "g.zarr.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "made.zarr" / "zarr.json", "zarr.json")
        archive.writestr("c/0/0/0", bytes(2 * 10**8))
    shutil.rmtree(folder / "made.zarr")
    dicom(folder / "h.dcm", Rows=65_000, Columns=65_000, NumberOfFrames="9000")
    return {path.name for path in folder.iterdir()}


def test_bombs_take_no_memory(complaints, tmp_path):
    wanted = bombs(tmp_path / "in")
    complaints()  # once, so that all that is needed is imported
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shutil.rmtree(tmp_path / "out")
    found = complaints()
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 400 * 2**20
    assert set(found) == wanted
    for name, reason in found.items():
        words = (
            "too large",
            "cannot hold",
            "truncated",
            "at most",
            "more than",
            "are there",
            "but holds",
            "on the disk",
        )
        assert any(word in reason for word in words), (name, reason)


def one_of_each(folder):
    Image.fromarray(LARGE).save(folder / "a.png")
    tifffile.imwrite(folder / "b.tif", LARGE)
    geotiff(folder / "c.tif", LARGE.transpose(2, 0, 1), **PLACE)
    np.save(folder / "d.npy", LARGE)
    nifti(folder / "e.nii", LARGE[..., :2])
    zarr_array(folder / "f.zarr", LARGE)
    (folder / "g").mkdir()
    for index in range(2):
        place = {"ImagePositionPatient": [0, 0, index * 5.0], "SOPInstanceUID": f"1.2.3.{index}"}
        dicom(folder / "g" / f"{index}.dcm", LARGE[..., index].astype(np.uint16), **place)


@pytest.mark.parametrize("name", ["a.png", "b.tif", "c.tif", "d.npy", "e.nii", "f.zarr", "g"])
def test_a_file_that_changes_while_it_is_read(bundles, program, tmp_path, monkeypatch, name):
    folder = tmp_path / "in"
    folder.mkdir()
    one_of_each(folder)
    victim = {"f.zarr": "f.zarr/zarr.json", "g": "g/1.dcm"}.get(name, name)
    window = Predictor.window

    def changed(self, *window_and_holes):
        with (folder / victim).open("ab") as file:
            file.write(b" ")
        return window(self, *window_and_holes)

    monkeypatch.setattr(Predictor, "window", changed)
    done = program("predict", bundles[3], folder / name, "--out", tmp_path / "out")
    assert (done.code, done.out) == (1, f"0 labelled, 1 failed: {tmp_path / 'out'}\n"), done.err
    assert f"failed: {folder / victim}: the file changed while it was read" in done.err or (
        f"failed: {folder / name}: " in done.err and "changed while it was read" in done.err
    ), done.err
    assert [path for path in tmp_path.glob("out/*") if path.name != ".pixelwise"] == []


@pytest.fixture
def full_disk():
    """From now on no file can be longer than 3 KiB, whoever writes it; the kernel says so as it does of a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3072, limits[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, ()) for name in ("a.png", "b.tif", "c.tif", "d.npy", "e.nii", "f.zarr", "g")]
    + [("a.png", ("--geojson",)), ("c.tif", ("--coco", "--maps", "entropy")), ("g", ("--format", "dicom-seg"))],
)
def test_a_disk_that_is_full(bundles, program, tmp_path, full_disk, name, options):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    one_of_each(folder)
    arguments = ("predict", bundles[3], folder / name, "--out", out, *options)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full_disk()
    done = program(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code in (1, 2)
    (line,) = [text for text in done.err.splitlines() if "multiply-adds" not in text]
    assert "cannot be written (File too large)" in line
    assert str(out) in line
    assert [path for path in out.glob("[!.]*") if path.suffix not in (".geojson", ".json")] == []
    assert not list(out.rglob("*.part"))
    assert program(*arguments).out == f"1 labelled: {out}\n"


def test_a_disk_without_room_is_noticed_before_the_start(bundles, program, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    nifti(folder / "e.nii", LARGE[..., :2])
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pixelwise.infer.estimates.shutil.disk_usage", lambda _: usage._replace(free=1000))
        patch.setattr(Predictor, "window", lambda *_: pytest.fail("it has started"))
        done = program("predict", bundles[3], folder, "--out", tmp_path / "out")
    assert (done.code, done.out) == (1, f"0 labelled, 1 failed: {tmp_path / 'out'}\n")
    assert f"failed: {folder / 'e.nii'}: needs up to 94 KiB on the disk" in done.err
