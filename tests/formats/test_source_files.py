"""Local files, PNG and the like, and .npy: windows are slices, changes are noticed, damage is one DataError."""

import hashlib
import io
import os
import random
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import image as images
from pixelwise.formats import local
from pixelwise.formats.image import ImageSource
from pixelwise.formats.local import Identity, Stamp, fingerprint, readable
from pixelwise.formats.npy import open_npy
from pixelwise.formats.opening import read_image
from pixelwise.formats.registry import format_of, picture_format

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 255, (40, 60, 3), dtype=np.uint8)


def test_fingerprints_of_small_files_are_their_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_fingerprints_of_large_files_take_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "WHOLE_BYTES", 1000)
    path = tmp_path / "a"
    content = bytearray(RNG.bytes(300_000))
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    before = fingerprint(path)
    assert fingerprint(path) == before
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert fingerprint(path) != before


def test_stamps_notice_size_time_and_another_file(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"abc")
    stamp = Stamp.of(path)
    os.utime(path, ns=(5, 5))
    with pytest.raises(DataError, match="its time of change differs"):
        stamp.check(path)
    stamp = Stamp.of(path)
    other.write_bytes(b"abd")
    os.utime(other, ns=(5, 5))
    other.replace(path)
    with pytest.raises(DataError, match="another file took its place"):
        stamp.check(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="3 bytes before, 0 now"):
        stamp.check(path)
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        stamp.check(path)


def test_what_must_not_be_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, part in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / ("x" * 300), "cannot be opened"),
        ("a\0b", "cannot be opened"),
    ):
        for ask in (Stamp.of, fingerprint, ImageSource, open_npy):
            with pytest.raises(DataError, match=part):
                ask(str(path))


def test_readable_names_the_file_once():
    for error in (ValueError("x"), MemoryError(), DataError("its size is 0."), DataError("a.tif: its size is 0.")):
        with pytest.raises(DataError) as caught, readable("a.tif"):
            raise error
        assert str(caught.value).count("a.tif: ") == 1
    with pytest.raises(KeyboardInterrupt), readable("a.tif"):
        raise KeyboardInterrupt


def _save(path, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(path, form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP") else {}))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM"]), orientation=st.integers(1, 8), data=st.data()
)
def test_windows_of_images_are_slices(tmp_path, form, orientation, data):
    path = tmp_path / "a.png"
    _save(path, form, orientation)
    whole = read_image(path)
    assert picture_format(path.read_bytes()[:4096])
    with ImageSource(str(path)) as source:
        info = source.info
        assert (info.height, info.width, info.channels, info.dtype) == (*whole.shape, whole.dtype.name)
        assert info.format == form.lower()
        top, left = data.draw(st.integers(0, info.height - 1)), data.draw(st.integers(0, info.width - 1))
        np.testing.assert_array_equal(source.read(top, left, 1, info.width - left), whole[top : top + 1, left:])


def test_images_are_decoded_once_and_late(tmp_path, monkeypatch):
    decoded = []
    pixels = images._pixels
    monkeypatch.setattr(images, "_pixels", lambda *given: decoded.append(given) or pixels(*given))
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with ImageSource(str(tmp_path / "a.png")) as source:
        assert not decoded
        with ThreadPoolExecutor(4) as pool:
            windows = list(pool.map(lambda top: source.read(top, 3, 5, 6), range(30)))
        assert len(decoded) == 1
        np.testing.assert_array_equal(windows[7], RGB[7:12, 3:9])
        with pytest.raises(ValueError, match="read-only"):
            windows[0][:] = 0
        Image.fromarray(RGB[:9]).save(tmp_path / "a.png")
        with pytest.raises(DataError, match="changed"):
            source.check_unchanged()


def test_masks_are_read_as_stored(tmp_path):
    grey, bits = RGB[..., 0], RGB[..., 0] > 100
    deep, floats = grey.astype(np.uint16) * 200, Image.fromarray(grey.astype(np.float32))
    indexed = Image.fromarray(grey % 7)
    indexed.putpalette([value for color in range(9) for value in (color, 255 - color, 7)])
    opaque = Image.fromarray(RGB)
    opaque.putalpha(255)
    for name, picture, wanted in (
        ("p.png", indexed, grey % 7),
        ("p.gif", indexed, grey % 7),
        ("grey.png", Image.fromarray(grey), grey),
        ("deep.png", Image.fromarray(deep), deep),
        ("bits.png", Image.fromarray(bits), bits * 255),
        ("rgba.png", opaque, RGB),
        ("floats.pfm", floats, grey),
    ):
        picture.save(tmp_path / name, **({"format": "PPM"} if name.endswith("pfm") else {}))
        with ImageSource(str(tmp_path / name), labels=True) as source:
            info, found = source.info, source.read(0, 0, 40, 60)
            np.testing.assert_array_equal(found, wanted if wanted.ndim == 3 else wanted[..., None])
            assert found.dtype.kind in "ui" and (found.dtype.name, found.shape[2]) == (info.dtype, info.channels), name
            assert ("palette" in source.metadata) == name.startswith("p."), name
            assert not name.startswith("p.") or source.metadata["palette"][3] == (3, 252, 7)
    Image.fromarray(grey.astype(np.float32) / 7).save(tmp_path / "a.pfm", format="PPM")
    with ImageSource(str(tmp_path / "a.pfm"), labels=True) as source, pytest.raises(DataError, match="not whole"):
        source.read(0, 0, 40, 60)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(RGB.astype(np.uint16)))
    with pytest.raises(DataError, match=r"a\.png: it has 3 channels of uint16; a mask has"):
        ImageSource(str(tmp_path / "a.png"), labels=True)


@pytest.mark.parametrize("shape", [(40, 60, 3), (400, 600, 3)])
def test_an_image_that_is_replaced_between_opening_and_reading(tmp_path, shape):
    Image.fromarray(RNG.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / "a.png")
    with ImageSource(str(tmp_path / "a.png")) as source:
        Image.fromarray(RGB[:9]).save(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"a\.png: the file (changed|is damaged)"):
            source.read(0, 0, 9, 9)


def test_an_image_that_is_not_closed_leaves_nothing_open(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for _ in range(3):  # a file left open would be a ResourceWarning
        ImageSource(str(tmp_path / "a.png"))
    with ImageSource(str(tmp_path / "a.png")) as source:
        first = source.read(0, 0, 40, 60)
    np.testing.assert_array_equal(source.read(0, 0, 40, 60), first)  # opened again


def test_orientation_that_stands_behind_the_pixels(tmp_path):
    _save(tmp_path / "a.png", "PNG", 6)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    moved = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    (tmp_path / "b.png").write_bytes(moved)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), read_image(tmp_path / "a.png"))
    assert read_image(tmp_path / "b.png").shape == (60, 40, 3)


def _npy(path, array, **options):
    np.save(path, array, **options)
    return str(path)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    form=st.sampled_from(["u1", "?", ">u2", "<i4", ">f4", "<f8", "<f2"]),
    fortran=st.booleans(),
    data=st.data(),
)
def test_windows_of_npy_are_slices(tmp_path, shape, form, fortran, data):
    array = RNG.integers(0, 2 if form == "?" else 250, shape).astype(form)
    path = _npy(tmp_path / "a.npy", np.asfortranarray(array) if fortran else array)
    whole = array.astype(np.uint8) * 255 if form == "?" else array
    whole = whole if len(shape) > 2 else whole[..., None]
    whole = whole if len(shape) == 4 else whole[None]
    with open_npy(path) as source:
        info = source.info
        assert (info.planes, info.height, info.width, info.channels) == whole.shape
        assert info.dtype == whole.dtype.newbyteorder("=").name
        plane = data.draw(st.integers(0, info.planes - 1))
        top, left = data.draw(st.integers(0, info.height - 1)), data.draw(st.integers(0, info.width - 1))
        height, width = data.draw(st.integers(1, info.height - top)), data.draw(st.integers(1, info.width - left))
        window = source.read(top, left, height, width, plane)
        assert window.dtype.name == info.dtype and window.flags.c_contiguous
        np.testing.assert_array_equal(window, whole[plane, top : top + height, left : left + width])


def test_npy_from_anywhere(tmp_path):
    path = _npy(tmp_path / "a.npy", RGB)
    content = (tmp_path / "a.npy").read_bytes()
    identity = Identity(fingerprint=lambda: "abc", check=lambda: None)
    with open_npy("s3://a/b.npy", lambda: io.BytesIO(content), identity=identity) as source:
        np.testing.assert_array_equal(source.read(1, 2, 30, 40), RGB[1:31, 2:42])
        assert source.fingerprint() == "abc"
    with pytest.raises(UsageError, match="identity"):
        open_npy("s3://a/b.npy", lambda: io.BytesIO(content))
    with open_npy(path) as source:
        assert source.fingerprint() == fingerprint(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[{}]], dtype=object), "Python objects"),
        (np.zeros((2, 2), dtype=complex), "complex128"),
        (np.zeros((2, 2), dtype=[("a", "u1")]), "type"),
        (np.zeros(4), r"shape is \(4,\)"),
        (np.zeros((2, 0)), "no pixels"),
        (np.array([["a"]]), "type <U1"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, array, message):
    with pytest.raises(DataError, match=rf"a\.npy: .*{message}"):
        open_npy(_npy(tmp_path / "a.npy", array))


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize(
    ("array", "planes", "dtype"),
    [
        (np.arange(12, dtype=np.int16).reshape(3, 4), 1, "int16"),
        (np.arange(24).reshape(2, 3, 4), 2, "int64"),
        (np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1), 2, "int64"),
        (np.arange(12).reshape(3, 4, 1), 1, "int64"),
        (np.arange(36, dtype=np.uint8).reshape(3, 4, 3), 1, "uint8"),
        (np.eye(3, 4, dtype=bool), 1, "uint8"),
    ],
)
def test_npy_as_a_mask(tmp_path, array, planes, dtype, fortran):
    channels = 3 if array.shape == (3, 4, 3) else 1
    path = _npy(tmp_path / "a.npy", np.asfortranarray(array) if fortran else array)
    with open_npy(path, labels=True) as source:
        assert (source.info.planes, source.info.channels, source.info.dtype) == (planes, channels, dtype)
        got = np.stack([source.read(0, 0, 3, 4, plane) for plane in range(planes)])
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, array.reshape(planes, 3, 4, channels) * (255 if array.dtype == bool else 1))


def test_npy_that_is_no_mask(tmp_path):
    halves = _npy(tmp_path / "a.npy", np.full((3, 4), 0.5))
    with (
        open_npy(halves, labels=True) as source,
        pytest.raises(DataError, match=r"a\.npy: .*float64 that are not whole"),
    ):
        source.read(0, 0, 3, 4)
    with pytest.raises(DataError, match=r"a\.npy: it has 2 channels of uint8; a mask has one channel of whole"):
        open_npy(_npy(tmp_path / "a.npy", np.zeros((2, 3, 4, 2), np.uint8)), labels=True)


def test_nan_in_an_array_names_the_window(tmp_path):
    array = np.zeros((9, 9), np.float32)
    array[4, 5] = np.inf
    with open_npy(_npy(tmp_path / "a.npy", array)) as source:
        assert source.read(0, 0, 4, 9).max() == 0
        with pytest.raises(DataError, match=r"a\.npy: 1 of its numbers in rows 2\.\.5, columns 1\.\.8 are NaN"):
            source.read(2, 1, 3, 7)


def test_an_npy_that_claims_more_than_it_has(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.npy"):
        open_npy(str(path))
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**9)})
    with pytest.raises(DataError, match=r"a\.npy: it says it has .* truncated"):
        open_npy(str(path))


@pytest.mark.timeout(60)
def test_damaged_files_give_pixels_or_a_data_error(tmp_path):
    rng, refused = random.Random(3), 0
    corpus = []
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM"):
        _save(tmp_path / "a", form, 6)
        corpus.append((ImageSource, (tmp_path / "a").read_bytes()))
    for array in (RGB, np.asfortranarray(RGB.astype(np.float32))):
        corpus.append((open_npy, (tmp_path / "a.npy").read_bytes() if _npy(tmp_path / "a.npy", array) else b""))
    for number in range(50 * len(corpus)):
        open_it, content = corpus[number % len(corpus)]
        content = bytearray(content)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(rng.choice((1, 5))):
                content[rng.randrange(min(len(content), 300))] = rng.randrange(256)
        path = tmp_path / "damaged"
        path.write_bytes(content)
        try:
            with open_it(str(path)) as source:
                info = source.info
                source.read(0, 0, min(info.height, 100), min(info.width, 100))
        except DataError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 100


def test_what_is_what():
    assert format_of(b"\x93NUMPY\x01\0", "a") == "npy"
    assert picture_format(b"RIFF1234WEBP") and not picture_format(b"RIFF1234WAVE") and not picture_format(b"")
