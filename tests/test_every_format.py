"""Training, evaluation and prediction on files of every format, written by the format's own library."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
import tifffile
import zarr
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import pixelwise
from pixelwise.cli import main
from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.errors import DataError
from pixelwise.infer.bundle import load_card
from pixelwise.metrics import ConfusionMatrix
from pixelwise.train import make_config

TINY = {
    "model": "unet", "options": {"widths": [4, 6]}, "crop_px": 16, "batch_size": 2, "steps": 2, "workers": 0,
    "precision": "float32", "device": "cpu",
}  # fmt: skip
AFFINE = np.diag([0.7, 0.8, 2.5, 1.0])
UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}


def volume(seed: int, shape: tuple[int, ...] = (24, 20, 5)) -> tuple[np.ndarray, np.ndarray]:
    """A ball of class 1 in noise: int16 and uint8, (columns, rows, slices)."""
    draws = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) - np.array(shape) / 2
    mask = (np.linalg.norm(places, axis=-1) < draws.integers(5, 9)).astype(np.uint8)
    return (draws.integers(-200, 0, shape) + 300 * mask.astype(np.int64)).astype(np.int16), mask


def as_planes(voxels: np.ndarray) -> np.ndarray:
    """(slices, rows, columns)."""
    return voxels.transpose(2, 1, 0).copy()


def as_uint8(voxels: np.ndarray) -> np.ndarray:
    return ((as_planes(voxels).astype(np.int64) + 200) // 2).astype(np.uint8)


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nibabel.Nifti1Image(voxels, affine).to_filename(path)


def write_series(folder: Path, voxels: np.ndarray) -> None:
    """A CT series; DICOM's x and y point the other way than NIfTI's."""
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


def write_segmentation(path: Path, series: Path, labels: np.ndarray) -> None:
    """A DICOM segmentation of a series, by highdicom."""
    code = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    segments = [highdicom.seg.SegmentDescription(1, "ball", code, code, "MANUAL")]
    images = [pydicom.dcmread(series / f"{index}.dcm") for index in range(labels.shape[2])]
    uids = generate_uid(), 1, generate_uid(), 1
    made = highdicom.seg.Segmentation(images, as_planes(labels), "BINARY", segments, *uids, "x", "x", "1", "1")
    made.save_as(path)


def write_ome_zarr(path: Path, planes: np.ndarray) -> None:
    """An image of two levels as OME-Zarr 0.5."""
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    levels = [
        {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": [2.0, 0.5 * step, 0.5 * step]}]}
        for level, step in enumerate((1, 2))
    ]
    image = {"axes": axes, "datasets": levels, "name": "ball"}
    group = zarr.open_group(path, mode="w", attributes={"ome": {"version": "0.5", "multiscales": [image]}})
    for level, step in enumerate((1, 2)):
        group.create_array(str(level), data=planes[:, ::step, ::step], chunks=(1, 8, 8))


def write_zarr(path: Path, planes: np.ndarray) -> None:
    zarr.create_array(path, data=planes, chunks=(1, 8, 8), dimension_names=list("zyx"))


def write_raster(path: Path, bands: np.ndarray, **profile: object) -> None:
    bands = bands if bands.ndim == 3 else bands[None]
    kind = {"driver": "GTiff", "count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    kind |= {"dtype": bands.dtype, "tiled": True, "blockxsize": 64, "blockysize": 64} | UTM | profile
    with rasterio.open(path, "w", **kind) as file:
        file.write(bands)


def write_nifti_pair(image: Path, mask: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write_nifti(image, voxels)
    write_nifti(mask, labels)


def write_dicom_pair(image: Path, mask: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write_series(image, voxels)
    write_segmentation(mask, image, labels)


def write_dicom_and_nifti(image: Path, mask: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write_series(image, voxels)
    write_nifti(mask, labels, np.diag([-0.7, -0.8, 2.5, 1.0]))


def write_zarr_pair(image: Path, mask: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write_ome_zarr(image, as_uint8(voxels))
    write_zarr(mask, as_planes(labels))


def write_npy_pair(image: Path, mask: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    np.save(image, (as_uint8(voxels) / 255).astype(np.float32)[..., None])  # planes, rows, columns, channels
    np.save(mask, as_planes(labels))


def write_tiff_and_npy(image: Path, mask: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    tifffile.imwrite(image, as_uint8(voxels)[2], tile=(16, 16), compression="zlib")
    np.save(mask, as_planes(labels)[2])


def write_raster_pair(image: Path, mask: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write_raster(image, as_uint8(voxels)[1:4], compress="deflate")
    write_raster(mask, as_planes(labels)[2], compress="deflate")


KINDS: dict[str, tuple[Callable[..., None], str, str]] = {
    "nifti": (write_nifti_pair, ".nii.gz", "_seg.nii.gz"),
    "dicom, dicom-seg": (write_dicom_pair, "", ".dcm"),
    "dicom, nifti": (write_dicom_and_nifti, "", ".nii.gz"),
    "ome-zarr, zarr": (write_zarr_pair, ".ome.zarr", ".zarr"),
    "npy": (write_npy_pair, ".npy", ".npy"),
    "tiff, npy": (write_tiff_and_npy, ".tif", ".npy"),
    "geotiff": (write_raster_pair, ".tif", ".tif"),
}


def write_cases(root: Path, kind: str, splits: tuple[str, ...] = ("train", "train", "val", "test")) -> Path:
    """One case for each of `splits`; returns the last image."""
    write, *endings = KINDS[kind]
    for seed, split in enumerate(splits):
        paths = [root / split / what / f"{seed}{end}" for what, end in zip(("images", "masks"), endings, strict=True)]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        write(*paths, *volume(seed))
    return paths[0]


def predict(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`pixelwise predict`."""
    monkeypatch.setattr(sys, "argv", ["pixelwise", "predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


# -- trained, evaluated and predicted --


@pytest.mark.parametrize("kind", KINDS)
def test_trained_evaluated_and_predicted(tmp_path: Path, kind: str) -> None:
    image = write_cases(tmp_path / "data", kind)
    run = pixelwise.train(tmp_path / "data", make_config(TINY), out=tmp_path / "run")
    planes = 1 if kind in ("tiff, npy", "geotiff") else 5
    assert run.best_miou is not None and run.plan.steps_per_epoch == planes
    assert run.plan.data["sizes"] == {"24x20": 4}
    evaluation = pixelwise.evaluate(run.folder, tmp_path / "data")
    predictor = pixelwise.load(run.folder)
    labels, matrix = as_planes(volume(3)[1])[slice(2, 3) if planes == 1 else slice(None)], ConfusionMatrix(2)
    for plane in range(planes):
        matrix.update(predictor.predict(image, plane=plane).labels, labels[plane])
    assert evaluation.matrix == matrix.matrix.tolist()
    assert evaluation.scores.pixels == planes * 24 * 20


@pytest.mark.parametrize("options", [{}, {"axis": 1, "slices": 3}])
def test_volumes_are_scored_as_nibabel_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    image = write_cases(tmp_path / "data", "nifti")
    options |= {"intensity": [-200, 300]}
    run = pixelwise.train(tmp_path / "data", make_config(TINY | options), out=tmp_path / "run")
    axis, around = options.get("axis", 2), options.get("slices", 1) // 2
    voxels = np.moveaxis(nibabel.load(image).get_fdata(), axis, 0).transpose(0, 2, 1)  # (slices, rows, columns)
    unit = np.clip((voxels + 200) / 500, 0, 1).astype(np.float32)
    truth = np.moveaxis(volume(3)[1], axis, 0).transpose(0, 2, 1)
    predictor, matrix, last = pixelwise.load(run.folder), ConfusionMatrix(2), len(unit) - 1
    found = np.zeros(truth.shape, np.uint8)
    for plane in range(len(unit)):
        neighbours = [unit[min(max(plane + step, 0), last)] for step in range(-around, around + 1)]
        found[plane] = predictor.predict(np.stack(neighbours, axis=-1), probabilities=False).labels
        matrix.update(found[plane], truth[plane])
    assert pixelwise.evaluate(run.folder, tmp_path / "data").matrix == matrix.matrix.tolist()
    predict(monkeypatch, run.folder, image, "--out", tmp_path / "labels")
    (written,) = (tmp_path / "labels").glob("*.nii.gz")
    labels = nibabel.load(written)
    assert np.allclose(labels.affine, AFFINE)
    assert np.array_equal(labels.get_fdata(), np.moveaxis(found.transpose(0, 2, 1), 0, axis))


def test_the_run_remembers_axis_and_slices(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", "nifti", ("train", "train", "train", "val"))
    options = {"axis": 1, "slices": 3, "intensity": [-200, 300]}
    run = pixelwise.train(tmp_path / "data", make_config(TINY | options), out=tmp_path / "run")
    card = load_card(run.folder)
    assert card.reading == {"axis": 1, "slices": 3, "intensity": (-200, 300)}
    assert len(card.mean) == 3 and run.plan.steps_per_epoch == 30
    assert json.loads((run.folder / "data.json").read_text())["sizes"] == {"24x5": 4}
    assert pixelwise.train(tmp_path / "data", out=run.folder, resume=True).steps == 2


def test_the_run_remembers_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of two of five bands labels all images of five bands as one of two bands labels those two."""
    for root, kept in (("five", [0, 1, 2, 3, 4]), ("two", [3, 0])):
        for seed, split in enumerate(("train", "val", "test")):
            bands = np.random.default_rng(seed).integers(0, 255, (5, 40, 50), dtype=np.uint8)
            for kind, array in (("images", bands[kept]), ("masks", bands[3] // 128)):
                path = tmp_path / root / split / kind / f"{seed}.tif"
                path.parent.mkdir(parents=True)
                write_raster(path, array)
    runs = {}
    for root, more in (("five", {"bands": (4, 1)}), ("two", {})):
        run = pixelwise.train(tmp_path / root, make_config(TINY | more), out=tmp_path / f"run-{root}")
        image = tmp_path / root / "test" / "images" / "2.tif"
        predict(monkeypatch, run.folder, image, "--out", tmp_path / f"out-{root}")
        with rasterio.open(tmp_path / f"out-{root}" / "2.tif") as file:
            runs[root] = file.read(), pixelwise.evaluate(run.folder, tmp_path / root).matrix, load_card(run.folder)
    assert runs["five"][0].any() and np.array_equal(runs["five"][0], runs["two"][0])
    assert runs["five"][1] == runs["two"][1] and runs["five"][2].mean == runs["two"][2].mean
    assert runs["five"][2].reading == {"bands": (4, 1)}
    with pytest.raises(DataError, match="has 2 bands, counted from 1 and without opacity, but band 4 is wanted"):
        pixelwise.load(tmp_path / "run-five").predict(tmp_path / "two" / "test" / "images" / "2.tif")


def test_labels_inside_an_ome_zarr_image(tmp_path: Path) -> None:
    lines = ["image,mask,split"]
    for seed, split in enumerate(("train", "val", "test")):
        voxels, labels = volume(seed)
        path = tmp_path / f"{seed}.zarr"
        write_ome_zarr(path, as_uint8(voxels))
        group = zarr.open_group(path).create_group("labels")
        group.attrs.put({"ome": {"version": "0.5", "labels": ["balls"]}})
        write_ome_zarr(path / "labels" / "balls", as_planes(labels))
        lines.append(f"{path.name},{path.name}/labels/balls,{split}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    run = pixelwise.train(tmp_path / "pairs.csv", make_config(TINY), out=tmp_path / "run")
    assert pixelwise.evaluate(run.folder, tmp_path / "pairs.csv").scores.pixels == 24 * 20 * 5


# -- volumes are groups --


def test_planes_of_a_volume_are_never_on_both_sides_of_a_split(tmp_path: Path) -> None:
    for seed in range(8):
        for kind, array in zip(("images", "masks"), volume(seed), strict=True):
            (tmp_path / kind).mkdir(exist_ok=True)
            write_nifti(tmp_path / kind / f"{seed}.nii.gz", array)
    inspection = inspect_data(open_data(tmp_path))
    assert not inspection.problems and inspection.describe_images()["planes"] == {"5": 8}
    assert inspection.describe_images()["spacings"] == {"0.7 x 0.8 x 2.5 mm": 8}
    splits = [inspection.samples(split) for split in inspection.folder.splits]
    assert len(splits) == 3 and sum(map(len, splits)) == 40
    for samples in splits:
        volumes = list(dict.fromkeys(pair.image for pair in samples))
        assert [(pair.image, pair.plane) for pair in samples] == [(v, plane) for v in volumes for plane in range(5)]
    groups = [{pair.group for pair in samples} for samples in splits]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 8


# -- the same grid --


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: (labels[:-1], AFFINE), r"is 23 x 20 px, but its image \S+0.nii.gz is 24 x 20 px"),
        (lambda labels: (labels[:, :, :4], AFFINE), r"has 4 planes, but its image \S+0.nii.gz has 5 planes"),
        (lambda labels: (labels, np.diag([0.7, 0.8, 5, 1])), r"affine \(0.7, 0, .*, 5, .*\), but its image .* has \(.*2.5,"),
    ],
)  # fmt: skip
def test_a_volume_of_labels_on_another_grid(
    tmp_path: Path, change: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], message: str
) -> None:
    write_cases(tmp_path, "nifti", ("train", "val"))
    mask = tmp_path / "train/masks/0_seg.nii.gz"
    write_nifti(mask, *change(volume(0)[1]))
    with pytest.raises(DataError, match=message):
        pixelwise.train(tmp_path, make_config(TINY), out=tmp_path / "run")
    write_nifti(mask, volume(0)[1], AFFINE * 1.0001)  # float32 in a header is not exact
    inspect_data(open_data(tmp_path)).raise_if_fatal()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"crs": "EPSG:32634"}, r"coordinate system EPSG:32634, but its image .* is in EPSG:32633"),
        (
            {"transform": rasterio.Affine(10, 0, 5e5 + 10, 0, -10, 5e6)},
            r"transform \(10, 0, 500010, .*\), but its image .* has \(10, 0, 500000,",
        ),
    ],
)
def test_a_raster_of_labels_elsewhere(tmp_path: Path, profile: dict[str, object], message: str) -> None:
    write_cases(tmp_path, "geotiff", ("train", "val", "test"))
    run = pixelwise.train(tmp_path, make_config(TINY), out=tmp_path / "run")
    write_raster(tmp_path / "test/masks/2.tif", as_planes(volume(2)[1])[2], **profile)
    with pytest.raises(DataError, match=message):
        inspect_data(open_data(tmp_path)).raise_if_fatal()
    with pytest.raises(DataError, match=message):
        pixelwise.evaluate(run.folder, tmp_path)


# -- large rasters --


IN_LITTLE_MEMORY = """
import json, sys
from pathlib import Path
from pixelwise.formats.decoding import WorkerSource
from pixelwise.train import make_config, train
from pixelwise.infer.evaluate import evaluate
from pixelwise.infer import tiling

tiling.BUDGET_BYTES = 30 << 20  # as for an image of many times the size

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

reads, real = [], WorkerSource.read
def read(self, top, left, height, width, plane=0):
    reads.append(height * width)
    return real(self, top, left, height, width, plane)
WorkerSource.read = read
start = peak()
run = train(sys.argv[1], make_config(json.loads(sys.argv[2])), out=sys.argv[3])
trained = peak() - start
score = evaluate(run.folder, sys.argv[1], split="test")
print(json.dumps({"trained": trained, "evaluated": peak() - start, "read_px": max(reads), "pixels": score.scores.pixels}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_large_rasters_are_read_by_windows(tmp_path: Path) -> None:
    for split, (height, width) in {"train": (4_200, 4_200), "val": (64, 64), "test": (1_300, 1_200)}.items():
        ramp = (np.add.outer(np.arange(height), np.arange(width)) >> 6).astype(np.uint8)
        labels = (ramp > 100).astype(np.uint8)
        labels[10:40, 20:50] = 1
        for kind, array in (("images", np.stack([ramp, ramp, ramp + labels])), ("masks", labels)):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            path = tmp_path / "data" / split / kind / "scene.tif"
            write_raster(path, array, compress="deflate", blockxsize=256, blockysize=256)
    config = TINY | {"options": {"widths": [2, 3]}, "crop_px": 64, "steps": 3}
    command = [
        sys.executable,
        "-c",
        IN_LITTLE_MEMORY,
        str(tmp_path / "data"),
        json.dumps(config),
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["read_px"] <= 4_000_000 and found["pixels"] == 1_300 * 1_200
    assert max(found["trained"], found["evaluated"]) < 400 << 20
