"""What every reader promises, for every kind of file: pixels as the header says, in windows too and for every caller."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import nibabel
import numpy as np
import pytest
import rasterio
import tifffile
import torch
import zarr
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from rasterio.enums import ColorInterp

from pixelwise.cli import main
from pixelwise.data.labels import LabelSpec
from pixelwise.data.pairs import Pair
from pixelwise.data.photometric import Photometric, network_input, packed, with_validity
from pixelwise.data.samples import OpenPair, open_image, open_mask
from pixelwise.errors import DataError
from pixelwise.formats.base import Source
from pixelwise.formats.in_process import open_in_process
from pixelwise.formats.local import HEAD_BYTES
from pixelwise.formats.opening import open_source, read_image
from pixelwise.formats.registry import FORMATS, format_of
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.predictor import load
from pixelwise.models import create_model

H, W = 40, 56
DRAWS = np.random.default_rng(21)
SPEC = LabelSpec(names=("a", "b"), colors=((0, 0, 0), (255, 0, 0)), values=((0,), (1,)))
UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 4e5, 0, -1, 5e6)}
KINDS: dict[str, Callable[[Path], Path]] = {}
READ: dict[str, dict[str, object]] = {}  # kinds that are read with options, which a network remembers


def u8(*shape: int) -> np.ndarray:
    return DRAWS.integers(1, 255, shape, dtype=np.uint8)


def u16(*shape: int) -> np.ndarray:
    return DRAWS.integers(1, 65535, shape, dtype=np.uint16)


def f32(*shape: int) -> np.ndarray:
    return DRAWS.random(shape, dtype=np.float32)


def tif(name: str, array: np.ndarray, **options: object) -> None:
    def write(folder: Path) -> Path:
        tifffile.imwrite(folder / "a.tif", array, **options)
        return folder / "a.tif"

    KINDS[f"tiff {name}"] = write


def geo(name: str, array: np.ndarray, after: Callable[[object], None] | None = None, **profile: object) -> None:
    def write(folder: Path) -> Path:
        made = {"driver": "GTiff", "width": W, "height": H, "count": len(array), "dtype": array.dtype, **UTM} | profile
        with rasterio.open(folder / "a.tif", "w", **made) as file:
            if after:
                after(file)
            file.write(array)
        return folder / "a.tif"

    KINDS[f"geotiff {name}"] = write


def picture(name: str, image: Image.Image, **options: object) -> None:
    def write(folder: Path) -> Path:
        image.save(folder / name, **options)
        return folder / name

    KINDS[name] = write


def npy(name: str, array: np.ndarray) -> None:
    def write(folder: Path) -> Path:
        np.save(folder / "a.npy", array)
        return folder / "a.npy"

    KINDS[f"npy {name}"] = write


def nifti(name: str, voxels: np.ndarray, slope: tuple[float, float] | None = None) -> None:
    def write(folder: Path) -> Path:
        made = nibabel.Nifti1Image(voxels, np.diag([0.7, 0.8, 2.5, 1.0]))
        if slope:
            made.header.set_slope_inter(*slope)
        made.to_filename(folder / "a.nii.gz")
        return folder / "a.nii.gz"

    KINDS[f"nifti {name}"] = write


def dicom(name: str, pixels: np.ndarray, **fields: object) -> None:
    def write(folder: Path) -> Path:
        made = Dataset()
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = CTImageStorage
        made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        made.StudyInstanceUID, made.SeriesInstanceUID = "1.2.1", "1.2.3"
        made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
        made.PixelSpacing, made.Rows, made.Columns = [0.8, 0.7], H, W
        made.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
        made.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
        if pixels.ndim == 3:
            made.PlanarConfiguration = 0
        made.BitsAllocated = made.BitsStored = pixels.dtype.itemsize * 8
        made.PixelRepresentation = int(pixels.dtype.kind == "i")
        made.PixelData = pixels.tobytes()
        made["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
        for key, value in fields.items():
            setattr(made, key, value)
        made.HighBit = made.BitsStored - 1
        made.save_as(folder / "a.dcm", enforce_file_format=True)
        return folder / "a.dcm"

    KINDS[f"dicom {name}"] = write


def zarray(name: str, array: np.ndarray, axes: str, **options: object) -> None:
    def write(folder: Path) -> Path:
        zarr.create_array(folder / "a.zarr", data=array, chunks="auto", dimension_names=list(axes), **options)
        return folder / "a.zarr"

    KINDS[f"zarr {name}"] = write


def dicom_series(name: str, pixels: np.ndarray, **fields: object) -> None:
    """A folder of one file for each slice."""

    def write(folder: Path) -> Path:
        (folder / "series").mkdir()
        for number, slice_ in enumerate(pixels):
            dicom("slice", slice_, ImagePositionPatient=[0, 0, 2.5 * number], InstanceNumber=number + 1, **fields)
            KINDS.pop("dicom slice")(folder).rename(folder / "series" / f"{number}.dcm")
        return folder / "series"

    KINDS[f"dicom {name}"] = write


def slide(name: str, image: np.ndarray) -> None:
    """A pyramid of two levels, with a thumbnail between them, as the scanners of Aperio write it."""

    def write(folder: Path) -> Path:
        described = (
            f"Aperio Image Library v11.2.1 \n{W}x{H} [0,0 {W}x{H}] (16x16) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"
        )
        options = {"photometric": "rgb", "compression": "zlib", "metadata": None, "software": False}
        thumbnail, level = {"rowsperstrip": 4}, {"tile": (32, 32), "subfiletype": 0}
        with tifffile.TiffWriter(folder / "a.svs") as writer:
            for step, more in ((1, level), (8, thumbnail), (2, level)):
                writer.write(np.ascontiguousarray(image[::step, ::step]), description=described, **options, **more)
        return folder / "a.svs"

    KINDS[f"slide {name}"] = write


def ome_zarr(name: str, array: np.ndarray) -> None:
    def write(folder: Path) -> Path:
        group = zarr.open_group(folder / "a.ome.zarr", mode="w")
        axes = [{"name": axis, "type": "channel" if axis == "c" else "space"} for axis in "cyx"]
        levels = []
        for number, level in enumerate((array, array[:, ::2, ::2])):
            group.create_array(str(number), data=np.ascontiguousarray(level), chunks=(1, 16, 16))
            scale = [{"type": "scale", "scale": [1.0, 2.0**number, 2.0**number]}]
            levels.append({"path": str(number), "coordinateTransformations": scale})
        group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
        return folder / "a.ome.zarr"

    KINDS[f"ome-zarr {name}"] = write


def read_with(kind: str, name: str, **options: object) -> None:
    """The files of a kind once more, read with options."""
    KINDS[f"{kind} {name}"], READ[f"{kind} {name}"] = KINDS[kind], options


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def overviews(file: object) -> None:
    file.write(u8(3, H, W))  # before they are made
    file.build_overviews([2])


def scale_and_offset(file: object) -> None:
    file.scales, file.offsets = (1e-4, 1e-4), (-0.1, -0.1)


def holes(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[:, :, 40:] = value
    return array


OPACITY = np.where(np.arange(W) > 40, 0, 255).astype(np.uint8) + np.zeros((H, 1), np.uint8)
tif("grey8", u8(H, W))
tif("rgb8", u8(H, W, 3))
tif("grey16", u16(H, W))
tif("float", f32(H, W))
tif("planar5", u8(5, H, W), planarconfig="separate", photometric="minisblack")
tif("opacity", np.dstack([u8(H, W, 3), OPACITY]), photometric="rgb", extrasamples=["unassalpha"])
tif("infrared", u8(H, W, 4), photometric="rgb", extrasamples=["unassalpha"])
tif("infrared16", u16(H, W, 4), photometric="rgb", extrasamples=["unassalpha"])
tif("rgbx", u8(H, W, 4), photometric="rgb", extrasamples=["unspecified"])
tif("grey and opacity", np.dstack([u8(H, W), OPACITY]), photometric="minisblack", extrasamples=["unassalpha"])
tif("white is zero", u8(H, W), photometric="miniswhite")
tif("bits", u8(H, W) < 99)
tif("bits, white is zero", u8(H, W) < 99, photometric="miniswhite")
tif("stack", u8(5, H, W))
tif("imagej", u8(3, H, W), imagej=True, metadata={"axes": "CYX"})
tif("ome", u16(3, H, W), ome=True, metadata={"axes": "CYX"})
tif("lzw", u8(H, W, 3), compression="lzw")
tif("jpeg", u8(H, W, 3), compression="jpeg")
tif("int8", u8(H, W).view(np.int8))
tif("int16", u16(H, W).view(np.int16))
tif("uint32", DRAWS.integers(0, 2**32 - 1, (H, W), dtype=np.uint32))
tif("float64", DRAWS.random((H, W)))
tif("half", f32(H, W).astype(np.float16))
tif("turned", u8(H, W, 3), extratags=[(274, 3, 1, 6, True)])
tif("big-endian", u16(H, W), byteorder=">")
tif("palette", u8(H, W) % 9, photometric="palette", colormap=u16(3, 256))
geo("rgb", u8(3, H, W))
geo("infrared", u8(4, H, W))
geo("infrared16", u16(4, H, W))
geo("tiles", u8(2, H, W), tiled=True, blockxsize=16, blockysize=32, compress="deflate")
geo("nodata -9999", holes(f32(4, H, W), -9999), nodata=-9999)
geo("nodata -3.4e38", holes(f32(3, H, W), -3.4028234663852886e38), nodata=-3.4028234663852886e38)
geo("nodata nan", holes(f32(1, H, W), np.nan), nodata=np.nan)
geo("nodata 255", holes(u8(3, H, W), 255), nodata=255)
geo("nodata 0 of 16 bits", holes(u16(1, H, W), 0), nodata=0)
geo("mask band", u8(3, H, W), lambda file: file.write_mask(OPACITY))
geo("opacity", np.concatenate([u8(3, H, W), OPACITY[None]]))
geo("opacity of five", np.concatenate([u8(4, H, W), OPACITY[None]]),
    lambda file: setattr(file, "colorinterp", [ColorInterp.gray, *[ColorInterp.undefined] * 3, ColorInterp.alpha])
)  # fmt: skip
geo("five bands", u8(5, H, W))
geo("int16", u16(3, H, W).view(np.int16))
geo("overviews", u8(3, H, W), overviews, tiled=True, blockxsize=16, blockysize=16)
geo(
    "scale and offset",
    u16(2, H, W),
    scale_and_offset,
)
read_with("geotiff infrared16", "bands", bands=(4, 1))
read_with("geotiff overviews", "level", level=1)
picture("rgba.png", Image.fromarray(u8(H, W, 4)))
picture("la.png", Image.fromarray(u8(H, W)).convert("LA"))
picture("grey16.png", Image.fromarray(u16(H, W)))
picture("palette.png", Image.fromarray(u8(H, W, 3)).quantize(11))
picture("bit.png", Image.fromarray(u8(H, W) > 99))
picture("cmyk.jpg", Image.fromarray(u8(H, W, 3)).convert("CMYK"))
picture("turned.jpg", Image.fromarray(u8(H, W, 3)), exif=exif(8))
picture("turned.webp", Image.fromarray(u8(H, W, 3)), exif=exif(6), lossless=True)
picture("grey.gif", Image.fromarray(u8(H, W)))
picture("turned.png", Image.fromarray(u8(H, W, 3)), exif=exif(8))
picture("holes.png", Image.fromarray(u8(H, W) % 9, "P"), transparency=0)
frames = [Image.fromarray(u8(H, W, 3)) for _ in range(3)]
picture("frames.gif", frames[0], save_all=True, append_images=frames[1:])
picture("frames.png", frames[0], save_all=True, append_images=frames[1:])
picture("pages.tif", frames[0], save_all=True, append_images=frames[1:])
picture("a.ppm", frames[0])
picture("a.jpg", frames[0])
picture("a.webp", frames[0])
picture("a.bmp", Image.fromarray(u8(H, W, 3)))
picture("a.pgm", Image.fromarray(u8(H, W)))
npy("grey", u8(H, W))
npy("float16", f32(H, W, 2).astype(np.float16))
npy("big-endian", u16(H, W).astype(">u2"))
npy("columns first", np.asfortranarray(u16(H, W)))
npy("bool", u8(H, W) > 99)
npy("planes", f32(3, H, W, 1))
read_with("npy columns first", "turned", axes="xy")
nifti("int16", u16(W, H, 3).view(np.int16))
nifti("uint8", u8(W, H, 3))
nifti("float64", DRAWS.random((W, H, 2)))
nifti("slope", u16(W, H, 2), (0.5, -3.0))
nifti("points in time", u16(W, H, 2, 3).view(np.int16))
nifti("gaps", np.where(DRAWS.random((W, H, 2)) < 0.1, np.nan, DRAWS.random((W, H, 2))))
for axis in (0, 1):
    read_with("nifti uint8", f"axis {axis}", axis=axis)
read_with("nifti int16", "range", intensity=(-100.0, 300.0))
read_with("nifti float64", "slices", slices=3)
READ["nifti gaps"] = {"nan_is_nodata": True}
dicom("8 bit", u8(H, W))
dicom("8 of 16 bits", u8(H, W).astype(np.uint16), BitsStored=8)
dicom("8 of 16 bits, inverted", u8(H, W).astype(np.uint16), BitsStored=8, PhotometricInterpretation="MONOCHROME1")
dicom("12 of 16 bits", u16(H, W) >> 4, BitsStored=12)
dicom(
    "signed, window", u16(H, W).view(np.int16), WindowCenter=40, WindowWidth=400, RescaleSlope=1, RescaleIntercept=-1024
)
dicom("rgb", u8(H, W, 3))
dicom_series("series", u16(3, H, W) >> 4, BitsStored=12)
read_with("dicom series", "type", intensity="type")
slide("aperio", u8(96, 128, 3))
read_with("slide aperio", "level", level=1)
ome_zarr("colour", u8(3, H, W))
read_with("ome-zarr colour", "level", level=1)
zarray("uint8", u8(3, H, W), "cyx")
zarray("big-endian", u16(H, W).astype(">u2"), "yx")
zarray("gaps", holes(f32(2, H, W), np.nan), "zyx", fill_value=np.nan)
zarray("bool", u8(H, W) > 99, "yx")
zarray("packed", u16(H, W), "yx", attributes={"scale_factor": 0.01, "add_offset": -5.0, "_FillValue": 7})


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(kind: str, tmp_path: Path) -> Path:
    return KINDS[kind](tmp_path)


@pytest.fixture
def reading(kind: str) -> dict[str, object]:
    return READ.get(kind, {})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, dict[str, object]], Path]:
    """A run folder of a network for so many channels of images that are read so, with random weights."""
    base = tmp_path_factory.mktemp("networks")

    def make(channels: int, reading: dict[str, object]) -> Path:
        folder = base / f"run{channels}{sorted(reading.items())}"
        if not folder.exists():
            torch.manual_seed(channels)
            config = {"num_classes": 2, "in_channels": channels, "widths": [4, 6]}
            scale = {"mean": (0.45,) * channels, "std": (0.25,) * channels}
            folder.mkdir()
            card = ModelCard(model="unet", config=config, labels=SPEC, reading=reading, **scale)
            save_bundle(folder, create_model("unet", **config), card)
        return folder

    return make


def test_every_format_is_among_the_kinds(tmp_path: Path) -> None:
    """One that is added to the registry, to be read or only to be written, needs files here."""
    found = set()
    for number, write in enumerate(KINDS.values()):
        (tmp_path / str(number)).mkdir()
        path = write(tmp_path / str(number))
        head = b"" if path.is_dir() else path.read_bytes()[:HEAD_BYTES]
        with open_in_process(path) as source:
            found |= {source.info.format} if path.is_dir() else {source.info.format, format_of(head, str(path))}
    written_only = {"cog", "dicom-seg"}  # read as GeoTIFF and DICOM, whose kinds have overviews and many frames
    assert found >= FORMATS.keys() - written_only


def assert_windows_equal_the_whole(source: Source) -> None:
    info = source.info
    boxes = (0, 0, info.height, info.width), (3, 5, 20, 17), (0, 2 * info.width // 3, 40, 7), (info.height - 1, 0, 1, 1)
    for plane in range(info.planes):
        size = (0, 0, info.height, info.width, plane)
        whole, valid = source.read(*size), source.valid(*size)
        assert whole.shape == (info.height, info.width, info.channels) and whole.dtype == np.dtype(info.dtype)
        assert valid is None or (valid.shape == whole.shape[:2] and valid.dtype == bool)
        for top, left, height, width in boxes:
            top = min(top, info.height - 1)
            height, width = min(height, info.height - top), min(width, info.width - left)
            box = slice(top, top + height), slice(left, left + width)
            window = source.read(top, left, height, width, plane)
            assert window.dtype == whole.dtype and np.array_equal(window, whole[box])
            there = source.valid(top, left, height, width, plane)
            assert there is None if valid is None else np.array_equal(there, valid[box])


def test_pixels_are_as_the_header_says_in_windows_too(path: Path, reading: dict[str, object]) -> None:
    """In this process and in the decoding one; of masks too, where such a file can be one."""
    of_file = {key: value for key, value in reading.items() if key not in ("bands", "slices")}
    with open_in_process(path, **of_file) as source, open_source(path, **of_file) as other:
        assert other.info == source.info
        for one in (source, other):
            assert_windows_equal_the_whole(one)
        info, size = source.info, (0, 0, source.info.height, source.info.width)
        for plane in range(info.planes):
            assert np.array_equal(source.read(*size, plane), other.read(*size, plane))
    with open_image(path, reading) as seen:
        assert_windows_equal_the_whole(seen)
    if info.planes == 1 and not reading:
        assert np.array_equal(read_image(path), source_pixels(path))
    elif not reading:
        with pytest.raises(DataError, match="planes; a single image is needed"):
            read_image(path)
    with suppress(DataError), open_mask(path, reading) as mask:  # fractions and many channels are no mask
        mask.read(0, 0, 1, 1)
        assert mask.info.height * mask.info.width > 0 and np.dtype(mask.info.dtype).kind in "ui"
        assert_windows_equal_the_whole(mask)


def source_pixels(path: Path) -> np.ndarray:
    with open_in_process(path) as source:
        return source.read(0, 0, source.info.height, source.info.width)


@pytest.mark.filterwarnings("ignore:.*(far from those|left out|of which only the first)")
def test_every_way_sees_the_same_pixels(
    path: Path,
    reading: dict[str, object],
    runs: Callable[[int, dict[str, object]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training, Python and the command with and without tiles."""
    with open_image(path, reading) as source:
        info = source.info
    run, planes = runs(info.channels, reading), range(info.planes)
    predictor = load(run, device="cpu", precision="float32")
    whole = [predictor.predict(path, plane=plane) for plane in planes]
    for plane in planes:
        tiled = predictor.predict(path, plane=plane, tile_px=16)
        assert np.allclose(whole[plane].logits, tiled.logits, atol=1e-4)
    with OpenPair(Pair(image=path, mask=None, split="train", name="a"), SPEC, info.channels, reading) as opened:
        mean = predictor.card.mean
        for plane in planes:
            sample = opened.read(plane)
            seen_mean = torch.tensor(mean)[:, None, None]
            how = {"seen_mean": mean, "seen_std": (1.0,) * len(mean), "is_uint8": sample.image.dtype == torch.uint8}
            changes = Photometric(0.0, mean, (1.0,) * len(mean), **how).draw()
            stored = packed(with_validity(sample.image, sample.valid), len(mean))
            image = network_input(stored[None], changes[None])[0] + seen_mean  # in unit scale, the mean where none are
            logits = predictor.logits(image[None])[0]
            assert torch.allclose(logits, whole[plane].logits, atol=1e-5)
    found = []
    for name, more in (("plain", []), ("tiles", ["--tile", "16"])):
        arguments = [
            "predict",
            run,
            path,
            "--out",
            tmp_path / name,
            "--precision",
            "float32",
            "--device",
            "cpu",
            "--format",
            "npy",
        ]
        monkeypatch.setattr("sys.argv", ["pixelwise", *map(str, arguments), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        found.append(np.load(next((tmp_path / name).glob("*.npy"))))
    labels = np.stack([prediction.labels for prediction in whole])
    assert np.array_equal(found[0].reshape(labels.shape), labels)
    assert np.mean(found[1] != found[0]) < 0.002  # where two classes are as likely, rounding may decide
