"""500 damaged files of all formats among good ones, through `pixelwise predict`: no traceback, no hang, nothing of a
library on the terminal, one line for each failure that names the file, no half of an output, and the good are labelled.

Every file is made by the library of its format and then damaged, by chance with a fixed seed. Some damage must make a
file unreadable (`LETHAL`); of the rest only its decoder can say, so there each file must be either labelled or named.
"""

import gzip
import io
import re
import shutil
import struct
import time
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

from pixelwise.formats import open_source

SECONDS = 300  # far more than needed, far less than a hang
HEIGHT, WIDTH = 18, 23

TIFF = {
    "plain": {},
    "zlib": {"compression": "zlib", "predictor": True},
    "lzw": {"compression": "lzw", "tile": (16, 16)},
    "jpeg": {"compression": "jpeg", "tile": (16, 16)},
    "big": {"bigtiff": True, "tile": (16, 16), "compression": "zstd"},
    "ome": {"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}},
    "svs": {"tile": (16, 16), "description": "Aperio Image Library v11\n23x18 (16x16)|AppMag = 20|MPP = 0.5"},
}


def picture(rng, kind):
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def as_picture(path, rng, kind):
    options = {"jpg": {"progressive": bool(rng.integers(0, 2))}, "gif": {}, "webp": {"lossless": True}}
    Image.fromarray(picture(rng, kind)).save(path, **options.get(kind, {}))


def as_tiff(path, rng, kind):
    options = {"metadata": None, "photometric": "rgb", **TIFF[kind]}
    tifffile.imwrite(path, picture(rng, kind), **options)


def as_geotiff(path, rng, kind):
    profile = {"driver": "GTiff", "count": 3, "height": HEIGHT, "width": WIDTH, "dtype": "uint8", "nodata": 0}
    profile |= {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    profile |= {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": kind}
    with rasterio.open(path, "w", **profile) as file:
        file.write(picture(rng, kind).transpose(2, 0, 1))


def as_nifti(path, rng, kind):
    volume = rng.integers(0, 900, (WIDTH, HEIGHT, 3)).astype(np.int16)
    image = (nibabel.Nifti2Image if kind == "2" else nibabel.Nifti1Image)(volume, np.diag([1, 1, 2, 1]))
    image.to_filename(path)


def as_npy(path, rng, kind):
    np.save(path, picture(rng, kind).astype(np.uint16 if kind == "wide" else np.uint8))


def as_dicom(path, rng, kind):
    found = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    pixels = rng.integers(0, 900, (HEIGHT, WIDTH)).astype(np.uint16)
    set_pixel_data(found, pixels, "MONOCHROME2", 12)
    if kind == "rle":
        found.compress(pydicom.uid.RLELossless)
    found.save_as(path)


def as_zarr(path, rng, kind):
    version = 2 if kind == "2" else 3
    options = {"shards": (16, 16, 3)} if kind == "shards" else {}
    options |= {"shape": (HEIGHT, WIDTH, 3), "chunks": (8, 8, 3), "dtype": "u1", "zarr_format": version}
    if kind == "zip":
        with zarr.storage.ZipStore(path, mode="w") as store:
            zarr.create_array(store, **options)[:] = picture(rng, kind)
    else:
        zarr.create_array(path, **options)[:] = picture(rng, kind)


MAKERS = [
    *((as_picture, kind, kind) for kind in ("png", "jpg", "webp", "bmp", "gif", "ppm")),
    *((as_tiff, kind, {"ome": "ome.tif", "svs": "svs"}.get(kind, "tif")) for kind in TIFF),
    *((as_geotiff, kind, "tif") for kind in ("deflate", "lzw")),
    *((as_nifti, kind, suffix) for kind in "12" for suffix in ("nii", "nii.gz")),
    *((as_npy, kind, "npy") for kind in ("plain", "wide")),
    *((as_dicom, kind, "dcm") for kind in ("plain", "rle")),
    (as_zarr, "zip", "zarr.zip"),
    *((as_zarr, kind, "zarr") for kind in ("2", "3", "shards")),
]
"""(what makes it, of which kind, suffix)."""

MAGICS = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBPVP8L", b"BM", b"GIF89a", b"II*\0", b"MM\0+\0\x08\0\0",
    b"\x93NUMPY\x01\0", b"\x1f\x8b\x08\0", b"PK\x03\x04", bytes(128) + b"DICM", b"\\\x01\0\0", b"%PDF-1.7", b"CD\x89HDF",
)  # fmt: skip


def empty(content, rng):
    return b""


def cut_early(content, rng):
    return content[: int(rng.integers(1, 24))]


def text(content, rng):
    return b"<html><body>404: no such image, but the download went on</body></html>"


def noise(content, rng):
    return b"\xfe" + rng.bytes(int(rng.integers(1, 3000)))


def bomb(content, rng):
    """Files of a few bytes that say they hold terabytes, of one format or another."""
    side = int(rng.choice([60_000, 2**31 - 1]))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    png = MAGICS[0] + chunk + struct.pack(">I", 9) + b"IDAT" + zlib.compress(b"")[:8] + bytes(9)
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (side, side, 3)})
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, np.zeros((16, 16), np.uint8), metadata=None)
    tiff = tiff.getvalue()
    for tag in (256, 257, 278):  # width, length, rows per strip: all as LONG
        tiff = re.sub(
            struct.pack("<H", tag) + b"..\1\0\0\0....", struct.pack("<HHII", tag, 4, 1, side), tiff, flags=re.S
        )
    nifti = nibabel.Nifti1Header()
    nifti.set_data_shape((32_000, 32_000, 32_000))
    nifti.set_sform(np.eye(4), code=1)
    nifti["vox_offset"], nifti["magic"] = 352, b"n+1"
    found = (
        png,
        array.getvalue(),
        tiff,
        nifti.binaryblock + bytes(4),
        gzip.compress(nifti.binaryblock + bytes(90_000)),
    )
    return found[int(rng.integers(0, len(found)))]


def cut_anywhere(content, rng):
    return content[: int(rng.integers(1, len(content)))]


def swapped_magic(content, rng):
    magic = MAGICS[int(rng.integers(0, len(MAGICS)))]
    return magic + content[len(magic) :]


def flip_header(content, rng):
    return flip(content, rng, min(len(content), 600))


def flip_anywhere(content, rng):
    return flip(content, rng, len(content))


def flip(content, rng, end):
    damaged = bytearray(content)
    for place in rng.integers(0, end, int(rng.integers(1, 12))):
        damaged[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(damaged)


def large_number(content, rng):
    """Somewhere near the start a number becomes zero, one, negative or huge."""
    at = int(rng.integers(0, min(len(content), 700)))
    number = rng.choice(
        [b"\0\0\0\0", b"\1\0\0\0", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\0\0\1\0"]
    )
    return content[:at] + bytes(number).ljust(4, b"\0") + content[at + 4 :]


def overwritten(content, rng):
    start = int(rng.integers(0, len(content)))
    return content[:start] + rng.bytes(int(rng.integers(1, 60))) + content[start + int(rng.integers(0, 60)) :]


def shuffled(content, rng):
    blocks = [content[at : at + 64] for at in range(0, len(content), 64)]
    return b"".join(blocks[index] for index in rng.permutation(len(blocks)))


def doubled(content, rng):
    return content + content[: int(rng.integers(1, len(content)))]


LETHAL = (empty, cut_early, text, noise, bomb)
DAMAGES = (*LETHAL, cut_anywhere, cut_anywhere, swapped_magic, flip_header, flip_header, flip_anywhere, large_number)
DAMAGES += (large_number, overwritten, shuffled, doubled)


def damage_folder(folder, rng):
    """One of the files of a Zarr is damaged, or gone; numbers of its description are changed as text."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    documents = [path for path in files if path.name.startswith((".z", "zarr"))]
    path = files[int(rng.integers(0, len(files)))] if rng.integers(0, 2) else documents[0]
    content = path.read_bytes()
    if path in documents and rng.integers(0, 2):
        numbers = list(re.finditer(rb"\d+", content)) or [re.search(b"$", content)]
        match = numbers[int(rng.integers(0, len(numbers)))]
        values = (b"0", b"-1", b"1e9", b"99999999999", b'"a"', b"[]", b"null", b"2147483647")
        value = values[int(rng.integers(0, len(values)))]
        path.write_bytes(content[: match.start()] + value + content[match.end() :])
    elif rng.integers(0, 6) == 0:
        path.unlink()
    else:
        damage = DAMAGES[int(rng.integers(0, len(DAMAGES)))]
        path.write_bytes(damage(content, rng) if content else b"")


def fill(folder, count, seed):
    """So many damaged files and folders, all makers and kinds of damage in turn; gives the names that must fail."""
    rng, fatal = np.random.default_rng(seed), set()
    for index in range(count):
        make, kind, suffix = MAKERS[index % len(MAKERS)]
        damage = DAMAGES[(index * 7 + index // len(MAKERS)) % len(DAMAGES)]
        name = f"{index:04}_{damage.__name__}_{kind}.{suffix}"
        path = folder / f"made.{suffix}"
        make(path, rng, kind)
        if path.is_dir():
            damage_folder(path, rng)
        else:
            path.write_bytes(damage(path.read_bytes(), rng))
            if damage in LETHAL:
                fatal.add(name)
            elif rng.integers(0, 8) == 0:  # the content stays as it is, the name tells another format
                name = f"{name.partition('.')[0]}.{MAKERS[int(rng.integers(0, len(MAKERS) - 3))][2]}"
        path.replace(folder / name)
    return fatal


def good_files(folder, seed):
    """One intact file of each kind."""
    rng = np.random.default_rng(seed)
    for index, (make, kind, suffix) in enumerate(MAKERS):
        make(folder / f"good{index:02}.{suffix}", rng, kind)
    return {path.name for path in folder.iterdir()}


def check(program, run, folder, out, fatal, good, *options):
    """Label the folder, look at all that is said; gives the names that failed."""
    names = {path.name for path in folder.iterdir()}
    started = time.monotonic()
    done = program("predict", run, folder, "--out", out, "--precision", "float32", *options)
    assert time.monotonic() - started < SECONDS
    failed, (first, *lines) = set(), done.err.splitlines()
    assert first == "unet: float32 on cpu, the network as it is"
    for line in lines:
        if not line.startswith("failed: "):
            told = r".*x the multiply-adds of one pass, at most .*|its numbers \(.*\) are far from .*"
            assert re.fullmatch(rf"{folder}/[^/]+: ({told})", line), line
            continue
        match = re.match(rf"failed: {re.escape(str(folder))}/([^/:]+?)(?=[/:]| )", line)
        assert match, line
        assert match[1] in names, line
        assert match[1] not in failed, line  # one line each
        assert not re.search(r' at 0x|object at|Error\(|<class|\.py[":]', line), line
        failed.add(match[1])
    assert done.code == 1
    labelled = names - failed
    assert done.out == f"{len(labelled)} labelled, {len(failed)} failed: {out}\n"
    assert fatal <= failed
    assert good <= labelled
    return failed


def check_written(out, labelled):
    """Every image that did not fail has its output, whole and of a name of its own; nothing else is there."""
    written = {path.name for path in out.iterdir()}
    assert {name for name in written if name.startswith(".")} == {".pixelwise"}
    assert {name.partition(".")[0] for name in written - {".pixelwise"}} == {
        name.partition(".")[0] for name in labelled
    }
    for name in written - {".pixelwise"}:  # whole, every one
        with open_source(out / name) as found:
            info = found.info
            found.read(0, 0, info.height, info.width, info.planes - 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_of_all_formats(bundles, program, tmp_path, seed):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    good = good_files(folder, seed + 100)
    fatal = fill(folder, 250, seed)
    failed = check(program, bundles[3], folder, out, fatal, good)
    check_written(out, {path.name for path in folder.iterdir()} - failed)
    assert len(failed) > 140


def test_damaged_files_of_a_series(bundles, program, tmp_path):
    rng = np.random.default_rng(5)
    folder, out = tmp_path / "studies", tmp_path / "out"
    for number in range(20):
        inside = folder / f"{number:02}"
        inside.mkdir(parents=True)
        for index in range(3):
            as_dicom(inside / f"{index}.dcm", rng, "plain")
            found = pydicom.dcmread(inside / f"{index}.dcm")
            found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{index}"
            found.ImagePositionPatient = [0, 0, index * 2.5]
            found.save_as(inside / f"{index}.dcm")
        if number:
            path = inside / f"{int(rng.integers(0, 3))}.dcm"
            damage = DAMAGES[number % len(DAMAGES)]
            path.write_bytes(damage(path.read_bytes(), rng))
    done = program("predict", bundles[3], folder, "--out", out)
    reports = [line for line in done.err.splitlines() if line.startswith("failed: ")]
    others = [line for line in done.err.splitlines()[1:] if not line.startswith("failed: ")]
    assert all(re.match(rf"failed: {folder}/\d\d[/:]", line) for line in reports), reports
    assert all(re.match(rf"{folder}/\d\d: ", line) for line in others), others
    assert (out / "00.nii.gz").is_file()
    assert len(list(out.glob("[0-9]*"))) + len(reports) == 20
    assert 5 < len(reports) < 20


def test_the_damage_is_what_it_is_called(tmp_path):
    """The makers make what can be read, and the bombs say what they are meant to say."""
    for name in good_files(tmp_path, 7):
        with open_source(tmp_path / name) as source:
            assert source.read(0, 0, HEIGHT, WIDTH).shape[:2] == (HEIGHT, WIDTH)
    shutil.rmtree(tmp_path)
    rng = np.random.default_rng(0)
    found = {bomb(b"", rng)[:4] for _ in range(60)}
    assert found == {b"\x89PNG", b"\x93NUM", b"II*\0", b"\\\x01\0\0", b"\x1f\x8b\x08\0"}
