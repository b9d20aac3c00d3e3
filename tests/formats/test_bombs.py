"""Files made to harm: each ends in one error that names it or in its true pixels, and this process stays small and alive."""

import gzip
import os
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import zarr
from pydicom.data import get_testdata_file

from pixelwise.errors import DataError
from pixelwise.formats import decoding, open_source

CHILD_BYTES = 300 << 20
GROWTH_BYTES = 32 << 20


@pytest.fixture(autouse=True, scope="module")
def small_child():
    """A child that may take so little that files of half a gigabyte are bombs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIXELWISE_DECODER_MEMORY", str(CHILD_BYTES))
        patch.setenv("PIXELWISE_DECODER_SECONDS", "60")
        decoding.stop()
        yield
    decoding.stop()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def png_header(folder):
    """50,000 x 50,000 px in 60 bytes."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "wide.png").write_bytes(content + struct.pack(">I", 4) + b"IDAT" + bytes(8))
    return "wide.png"


def tiff(path, entries, next_ifd=0, data=b""):
    """A little-endian TIFF of one directory; entries are (tag, type, count, value)."""
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", next_ifd) + data)


def plain_entries(width, height, **changes):
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    tags |= {int(key[1:]): value for key, value in changes.items()}
    return [(tag, *tags[tag]) for tag in sorted(tags)]


def tiff_circle(folder):
    """A directory that says it is the next one."""
    tiff(folder / "circle.tif", plain_entries(4, 4, t273=(4, 1, 8), t278=(4, 1, 4), t279=(4, 1, 16)), next_ifd=8)
    return "circle.tif"


def tiff_tile(folder):
    """One tile of a million by a million pixels."""
    side = 1 << 20
    tiles = {"t322": (4, 1, side), "t323": (4, 1, side), "t324": (4, 1, 8), "t325": (4, 1, 16)}
    tiff(folder / "tile.tif", plain_entries(side, side, **tiles))
    return "tile.tif"


def tiff_zlib(folder):
    """A tile of 64 x 64 px whose content becomes 500 MB."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(500)) + packer.flush()
    tiles = {"t259": (3, 1, 8), "t322": (4, 1, 64), "t323": (4, 1, 64), "t324": (4, 1, 200), "t325": (4, 1, len(data))}
    entries = plain_entries(64, 64, **tiles)
    tiff(folder / "zlib.tif", entries, data=bytes(200 - 14 - 12 * len(entries)) + data)
    return "zlib.tif"


def ome_xml(folder):
    """Ten letters that become a billion."""
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    text = f'<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY e0 "lol">{entities}]><OME>&e9;</OME>'
    tifffile.imwrite(folder / "laughs.ome.tif", np.zeros((8, 8), np.uint8), description=text, metadata=None)
    return "laughs.ome.tif"


def nifti_header(folder):
    """30,000 x 30,000 x 30,000 numbers in 352 bytes."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float64)
    header["dim"][:4] = (3, 30_000, 30_000, 30_000)
    header["magic"], header["vox_offset"] = b"n+1\0", 352
    (folder / "cube.nii").write_bytes(header.binaryblock + bytes(4))
    return "cube.nii"


def nifti_gzip(folder):
    """700 MB of zeros in 700 KB."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header["dim"][:4] = (3, 1000, 1000, 700)
    header["magic"], header["vox_offset"], header["sform_code"] = b"n+1\0", 352, 1
    header["srow_x"][0] = header["srow_y"][1] = header["srow_z"][2] = 1
    with gzip.open(folder / "zeros.nii.gz", "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(70):
            file.write(bytes(10_000_000))
    return "zeros.nii.gz"


def dicom_rle(folder):
    """60,000 x 60,000 px of run lengths in a few bytes."""
    found = pydicom.dcmread(get_testdata_file("MR_small_RLE.dcm", download=False))
    found.Rows = found.Columns = 60_000
    found.save_as(folder / "runs.dcm")
    return "runs.dcm"


def zarr_blosc(folder):
    """A chunk that says it becomes 3 GB."""
    array = zarr.create_array(
        folder / "chunk.zarr", shape=(64, 64), chunks=(64, 64), dtype="u1", zarr_format=2,
    )  # fmt: skip
    array[:] = 1
    chunk = folder / "chunk.zarr" / "0.0"
    chunk.write_bytes(b"\x02\x01\x01\x01" + struct.pack("<III", 3 << 30, 3 << 20, 16) + bytes(64))
    return "chunk.zarr"


def zarr_shape(folder):
    """A chunk of a terabyte, by the metadata."""
    zarr.create_array(folder / "huge.zarr", shape=(1 << 20, 1 << 20), chunks=(1 << 20, 1 << 20), dtype="u1")
    (folder / "huge.zarr" / "c" / "0").mkdir(parents=True)
    (folder / "huge.zarr" / "c" / "0" / "0").write_bytes(bytes(40))
    return "huge.zarr"


def npy_shape(folder):
    """A petabyte in a hundred bytes."""
    with (folder / "huge.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 24, 1 << 24)}
        )
    return "huge.npy"


def npy_pickle(folder):
    """Objects, whose loading would run code."""
    np.save(folder / "objects.npy", np.array([[print]], dtype=object), allow_pickle=True)
    return "objects.npy"


def pipe(folder):
    """Nobody ever writes into it."""
    os.mkfifo(folder / "pipe.tif")
    return "pipe.tif"


BOMBS = (
    png_header, tiff_circle, tiff_tile, tiff_zlib, ome_xml, nifti_header, nifti_gzip, dicom_rle, zarr_blosc, zarr_shape,
    npy_shape, npy_pickle, pipe,
)  # fmt: skip


@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_a_bomb_harms_nobody(make, tmp_path):
    name = make(tmp_path)
    before = resident_bytes()
    try:
        with open_source(tmp_path / name) as source:
            window = source.read(0, 0, min(4, source.info.height), min(4, source.info.width))
            assert window.shape[:2] == (4, 4)
    except DataError as error:
        assert name in str(error) and "Traceback" not in str(error)
    assert resident_bytes() - before < GROWTH_BYTES


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_a_file_that_is_cut_under_a_memory_map(tmp_path, suffix):
    pixels = np.full((3000, 3000), 7, np.uint8)
    path = tmp_path / f"cut.{suffix}"
    np.save(path, pixels) if suffix == "npy" else tifffile.imwrite(path, pixels, rowsperstrip=3000)
    with open_source(path) as source:
        assert source.read(2990, 0, 4, 4).max() == 7
        os.truncate(path, 5000)
        with pytest.raises(DataError, match=rf"cut\.{suffix}: "):
            source.read(2990, 0, 4, 4)
            source.check_unchanged()
