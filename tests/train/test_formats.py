"""Training on what prediction reads: volumes slice by slice, rasters by windows, formats in any mixture."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import rasterio
import torch
import zarr
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from pixelwise.data import scan
from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.errors import DataError, UsageError
from pixelwise.formats import LABELS, Result, Source, open_source
from pixelwise.formats.dicom_seg import write_dicom_seg
from pixelwise.infer.bundle import load_card
from pixelwise.train import make_config, train
from pixelwise.train.plan import epoch_pairs, make_plan
from pixelwise.train.start import start_network
from pixelwise.train.stream import make_dataset

TINY = {
    "model": "unet",
    "options": {"widths": [4, 6]},
    "crop_px": 16,
    "batch_size": 2,
    "steps": 2,
    "workers": 0,
    "precision": "float32",
}
AFFINE = np.diag([0.7, 0.8, 2.5, 1.0])
UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}


def volume(seed: int, shape: tuple[int, ...] = (24, 20, 5)) -> tuple[np.ndarray, np.ndarray]:
    """A ball of class 1 in noise: int16 and uint8, by columns, rows and slices."""
    draws = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) - np.array(shape) / 2
    mask = (np.linalg.norm(places, axis=-1) < draws.integers(5, 9)).astype(np.uint8)
    return (draws.integers(-200, 0, shape) + 300 * mask.astype(np.int64)).astype(np.int16), mask


def pair_paths(root: Path, split: str, name: str, image: str, mask: str) -> tuple[Path, Path]:
    paths = root / split / "images" / f"{name}{image}", root / split / "masks" / f"{name}{mask}"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nibabel.Nifti1Image(voxels, affine).to_filename(path)


def write_series(folder: Path, voxels: np.ndarray) -> None:
    """A CT series with the voxels (columns, rows, slices) where AFFINE puts them; DICOM's x and y point the other way."""
    folder.mkdir(parents=True)
    uid = generate_uid()
    for index in range(voxels.shape[2]):
        made = Dataset()
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = CTImageStorage
        made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = "1.2.1", uid, "1.2.9"
        made.PatientName, made.PatientID, made.PatientBirthDate, made.PatientSex = "", "1", "", ""
        made.StudyDate, made.StudyTime, made.StudyID, made.AccessionNumber = "", "", "", ""
        made.ReferringPhysicianName, made.PositionReferenceIndicator, made.Manufacturer = "", "", "X"
        made.Modality, made.SeriesNumber, made.InstanceNumber = "CT", 1, index + 1
        made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 2.5 * index], [1, 0, 0, 0, 1, 0]
        made.PixelSpacing, made.SliceThickness = [0.8, 0.7], 2.5
        made.Rows, made.Columns = voxels.shape[1], voxels.shape[0]
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        made.BitsAllocated = made.BitsStored = 16
        made.HighBit, made.PixelRepresentation = 15, 1
        made.RescaleSlope, made.RescaleIntercept, made.RescaleType = 1, 0, "HU"
        made.PixelData = voxels[:, :, index].T.tobytes()
        made["PixelData"].VR = "OW"
        made.save_as(folder / f"{index}.dcm", enforce_file_format=True)


def write_zarr(path: Path, array: np.ndarray) -> None:
    store = zarr.create_array(
        path, shape=array.shape, chunks=array.shape, dtype=array.dtype, dimension_names=list("zyx")
    )
    store[:] = array


def scene(seed: int, side: int = 150) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    mask = np.zeros((side, side), np.uint8)
    mask[20:60, 30:90], mask[100:103, 5:9] = 1, 2
    return draws.integers(0, 99, (3, side, side), dtype=np.uint8) + 60 * mask, mask


def write_tif(path: Path, bands: np.ndarray, **profile: object) -> None:
    bands = bands if bands.ndim == 3 else bands[None]
    kind = {"driver": "GTiff", "count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    kind |= {"dtype": bands.dtype, "tiled": True, "blockxsize": 64, "blockysize": 64} | UTM | profile
    with rasterio.open(path, "w", **kind) as file:
        file.write(bands)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """NIfTI volumes with NIfTI labels."""
    for split, count in (("train", 3), ("val", 1)):
        for index in range(count):
            image, mask = pair_paths(tmp_path, split, f"{split}{index}", ".nii.gz", "_seg.nii.gz")
            voxels, labels = volume(index if split == "train" else 9)
            write_nifti(image, voxels)
            write_nifti(mask, labels)
    return tmp_path


@pytest.fixture
def rasters(tmp_path: Path) -> Path:
    for seed, split in enumerate(("train", "val")):
        image, mask = pair_paths(tmp_path, split, "scene", ".tif", ".tif")
        bands, labels = scene(seed)
        write_tif(image, bands)
        write_tif(mask, labels)
    return tmp_path


# -- volumes --


def test_a_volume_is_a_stack_of_slices_of_one_group(scans: Path, tmp_path: Path) -> None:
    inspection = inspect_data(open_data(scans))
    assert not inspection.problems
    assert (inspection.sizes, inspection.describe_images()["planes"]) == ({"24x20": 4}, {"5": 4})
    assert inspection.describe_images()["spacings"] == {"0.7 x 0.8 x 2.5 mm": 4}
    samples = inspection.samples("train")
    assert [(pair.image.name, pair.plane) for pair in samples[:6]] == [
        *(("train0.nii.gz", plane) for plane in range(5)), ("train1.nii.gz", 0),
    ]  # fmt: skip
    assert not {pair.group for pair in samples} & {pair.group for pair in inspection.samples("val")}
    run = train(scans, make_config(TINY | {"steps": 10}), out=tmp_path / "run")
    assert run.plan.steps_per_epoch == 8 and run.best_miou is not None
    assert load_card(tmp_path / "run").reading == {}


def test_the_axis_and_the_neighbouring_slices_are_options_that_the_run_remembers(scans: Path, tmp_path: Path) -> None:
    options = {"axis": 1, "slices": 3, "intensity": [-200, 300]}
    run = train(scans, make_config(TINY | options), out=tmp_path / "run")
    card = load_card(run.folder)
    assert card.reading == {"axis": 1, "slices": 3, "intensity": (-200, 300)}
    assert card.in_channels == 3 and run.plan.steps_per_epoch == 30
    assert json.loads((run.folder / "data.json").read_text())["sizes"] == {"24x5": 4}
    resumed = train(scans, out=run.folder, resume=True)
    assert resumed.steps == 2


@pytest.mark.parametrize("values", [{"slices": 2}, {"axis": 3}, {"intensity": "300,-200"}])
def test_options_of_reading_are_checked(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        make_config(values)


def test_a_picture_has_no_axis(toy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png: its format \(png\) has no option axis"):
        train(toy_data, make_config(TINY | {"axis": 0}), out=tmp_path / "run")


def write_segmentation(path: Path, folder: Path, labels: np.ndarray) -> None:
    """A DICOM segmentation of a series, (columns, rows, slices)."""
    spec = SimpleNamespace(names=("background", "ball"), colors=((0, 0, 0), (9, 99, 200)), num_classes=2)
    with open_source(folder) as source:
        write_dicom_seg(
            path,
            Result(
                kind=LABELS,
                spec=spec,  # type: ignore[arg-type]
                source=source.info,
                metadata=source.metadata,
                dtype=np.dtype(np.uint8),
                rows=lambda plane, top, bottom: labels[:, top:bottom, plane].T,
            ),
        )


@pytest.mark.parametrize("kind", ["npy", "zarr", "dicom", "segmentation"])
def test_formats_in_any_mixture(tmp_path: Path, kind: str) -> None:
    for index, split in enumerate(("train", "train", "val")):
        voxels, labels = volume(index)
        planes, plane_labels = (array.transpose(2, 1, 0).copy() for array in (voxels, labels))
        if kind == "npy":
            image, mask = pair_paths(tmp_path, split, str(index), ".npy", ".npy")
            np.save(image, ((planes + 200) / 500).astype(np.float32)[..., None])  # planes, rows, columns, channels
            np.save(mask, plane_labels)
        elif kind == "zarr":
            image, mask = pair_paths(tmp_path, split, str(index), ".zarr", ".zarr")
            write_zarr(image, (planes + 200).astype(np.uint16))
            write_zarr(mask, plane_labels)
        else:
            ending = ".nii.gz" if kind == "dicom" else ".dcm"
            image, mask = pair_paths(tmp_path, split, str(index), "", ending)
            write_series(image, voxels)
            if kind == "segmentation":
                write_segmentation(mask, image, labels)
                continue
            write_nifti(mask, labels, np.diag([-0.7, -0.8, 2.5, 1.0]))
    run = train(tmp_path, make_config(TINY | {"steps": 4}), out=tmp_path / "run")
    assert run.best_miou is not None
    assert run.plan.data["sizes"] == {"24x20": 3} and run.plan.steps_per_epoch == 5


# -- the same grid --


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: (labels[:-1], AFFINE), r"is 23 x 20 px, but its image \S+train0.nii.gz is 24 x 20 px"),
        (lambda labels: (labels[:, :, :4], AFFINE), r"has 4 planes, but its image \S+train0.nii.gz has 5 planes"),
        (lambda labels: (labels, np.diag([0.7, 0.8, 5, 1])), r"affine \(0.7, 0, .*, 5, .*\), but its image .* has \(.*2.5,"),
    ],
)  # fmt: skip
def test_a_mask_on_another_grid_is_an_error_that_shows_both(scans: Path, change: object, message: str) -> None:
    labels, affine = change(volume(0)[1])
    write_nifti(scans / "train/masks/train0_seg.nii.gz", labels, affine)
    with pytest.raises(DataError, match=message):
        inspect_data(open_data(scans)).raise_if_fatal()
    write_nifti(scans / "train/masks/train0_seg.nii.gz", volume(0)[1], AFFINE * 1.0001)
    inspect_data(open_data(scans)).raise_if_fatal()


def test_a_raster_elsewhere_is_an_error_that_shows_both(rasters: Path) -> None:
    mask = rasters / "train/masks/scene.tif"
    write_tif(mask, scene(0)[1], crs="EPSG:32634")
    with pytest.raises(DataError, match=r"coordinate system EPSG:32634, but its image .* is in EPSG:32633"):
        inspect_data(open_data(rasters)).raise_if_fatal()
    write_tif(mask, scene(0)[1], transform=rasterio.Affine(10, 0, 5e5 + 10, 0, -10, 5e6))
    with pytest.raises(DataError, match=r"transform \(10, 0, 500010, .*\), but its image .* has \(10, 0, 500000,"):
        inspect_data(open_data(rasters)).raise_if_fatal()


# -- large rasters --


def crops(root: Path, count: int, **options: object) -> list[tuple[torch.Tensor, ...]]:
    config = make_config(TINY | options)
    inspection = inspect_data(open_data(root))
    plan = make_plan(config, inspection, start_network(config, inspection, is_resumed=False))
    made = make_dataset(config, plan, inspection, start_network(config, inspection, is_resumed=False).model)
    return [made[0, position] for position in range(count)]


@pytest.mark.parametrize(
    "options",
    [{"focus": 1.0, "elastic": 3.0, "flips": "dihedral"}, {"focus": 0.0, "crop_px": 250}, {"model": "patches"}],
)
def test_windows_of_files_give_the_crops_of_whole_images(
    rasters: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    if "model" in options:
        options = {"model": "patch_classifier", "options": {}, "crop_px": None}
    whole = crops(rasters, 12, **options)
    reads = []
    monkeypatch.setattr(scan, "WHOLE_PX", 9_000)
    monkeypatch.setattr(scan, "_STRIP_PX", 9_000)
    scan._scan_mask.cache_clear()
    inside = Source.__subclasses__()
    for kind in inside:
        if "read" in vars(kind):
            real = kind.read
            monkeypatch.setattr(kind, "read", lambda *a, real=real, **k: reads.append(a[3:5]) or real(*a, **k))
    cut = crops(rasters, 12, **options)
    scan._scan_mask.cache_clear()
    for one, other in zip(whole, cut, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert reads and (options.get("crop_px") == 250 or max(h * w for h, w in reads) <= 9_600)


def test_an_epoch_draws_as_many_crops_as_a_raster_has_room_for(
    rasters: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scan, "WHOLE_PX", 9_000)
    scan._scan_mask.cache_clear()
    inspection = inspect_data(open_data(rasters))
    assert len(epoch_pairs(inspection, 16)) == round(150 * 150 / 16**2)
    assert inspection.describe_images()["crs"] == {"EPSG:32633": 2}
    run = train(rasters, make_config(TINY | {"workers": 1}), out=tmp_path / "run")
    assert run.plan.steps_per_epoch == 44
    with pytest.raises(UsageError, match=r"separation: .*scene\.tif is too large"):
        train(rasters, make_config(TINY | {"separation": 5}), out=tmp_path / "other")
    scan._scan_mask.cache_clear()


def test_where_an_image_has_no_data_nothing_is_learnt(rasters: Path) -> None:
    bands, labels = scene(0)
    bands[:, :, 75:] = 0
    write_tif(rasters / "train/images/scene.tif", bands, nodata=0)
    inspection = inspect_data(open_data(rasters))
    assert max(inspection.mean) == pytest.approx(bands[:, :, :75].mean(axis=(1, 2)).max() / 255)
    (_, mask), *_ = crops(rasters, 1, crop_px=150, scale=[1, 1], flips="none")
    assert (mask[:, 75:] == 255).all() and torch.equal(mask[:, :75], torch.from_numpy(labels[:, :75]))


TRAIN_IN_LITTLE_MEMORY = """
import sys
from pathlib import Path
from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.train import make_config
from pixelwise.train.plan import make_plan
from pixelwise.train.start import start_network
from pixelwise.train.stream import make_dataset
def peak():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1]) << 10
config = make_config({"model": "unet", "options": {"widths": [4, 6]}, "crop_px": 64, "batch_size": 2, "steps": 2})
start = peak()
inspection = inspect_data(open_data(sys.argv[1]))
inspected = peak() - start
network = start_network(config, inspection, is_resumed=False)
plan = make_plan(config, inspection, network)
start = peak()
made = make_dataset(config, plan, inspection, network.model)
for position in range(20):
    made[0, position]
print(inspected + peak() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_raster_that_is_larger_than_the_memory_taken_for_it(tmp_path: Path) -> None:
    side = 4_200
    for split in ("train", "val"):
        image, mask = pair_paths(tmp_path, split, "scene", ".tif", ".tif")
        labels = np.zeros((side, side) if split == "train" else (64, 64), np.uint8)
        labels[10:40, 20:50] = 1
        bands = np.broadcast_to(labels.astype(np.uint16), (3, *labels.shape))
        for path, array in ((image, bands), (mask, labels)):
            write_tif(path, array, compress="deflate", blockxsize=256, blockysize=256)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_IN_LITTLE_MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 140 << 20  # the image takes 101 MiB, as floats 202 more, its mask 17
