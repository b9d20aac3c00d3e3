"""Readers: every format as it is meant to be seen, and one DataError for whatever is wrong with a file."""

import io
import logging
import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from pixelwise.data.samples import to_tensor
from pixelwise.errors import DataError
from pixelwise.formats.base import NAN_VALUE
from pixelwise.formats.opening import open_source, read_image, read_mask

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 255, (20, 30, 5), dtype=np.uint8)
RGB, GREY = np.ascontiguousarray(BANDS[..., :3]), np.ascontiguousarray(BANDS[..., 0])
DEEP = RNG.integers(0, 65535, (20, 30), dtype=np.uint16)
COLORMAP = RNG.integers(0, 65535, (3, 256), dtype=np.uint16)


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def image_info(path):
    with open_source(path) as source:
        return source.info


def palette(path):
    with open_source(path, labels=True) as source:
        return source.metadata.get("palette")


def _agrees(path):
    """What the header says is what read_image gives."""
    array, info = read_image(path), image_info(path)
    assert (info.height, info.width, info.channels, info.dtype) == (*array.shape, array.dtype.name)
    return array


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "webp", "tif"])
def test_lossless_formats_give_back_the_pixels(tmp_path, suffix):
    for pixels in (RGB, GREY):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == "webp" else {}))
        array = _agrees(path)
        expected = pixels if pixels.ndim == 3 else pixels[..., None]
        if suffix == "webp" and pixels.ndim == 2:
            expected = np.repeat(expected, 3, axis=2)  # WebP knows no grey
        np.testing.assert_array_equal(array, expected)


def test_jpeg_in_its_colour_spaces(tmp_path):
    smooth = Image.new("RGB", (32, 16), (200, 100, 50))
    for mode, channels in (("RGB", 3), ("L", 1), ("CMYK", 3)):
        smooth.convert(mode).save(tmp_path / "a.jpg")
        array = _agrees(tmp_path / "a.jpg")
        assert array.shape == (16, 32, channels)
    assert np.abs(array.astype(int) - (200, 100, 50)).max() < 6


def test_opacity_is_dropped_and_palettes_become_rgb(tmp_path):
    image = Image.fromarray(RGB)
    rgba = image.copy()
    rgba.putalpha(Image.fromarray(GREY))
    rgba.save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(_agrees(tmp_path / "rgba.png"), RGB)
    Image.fromarray(GREY).convert("LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(_agrees(tmp_path / "la.png")[..., 0], GREY)
    quantized = image.quantize(11)
    for file, options in (("p.png", {}), ("t.png", {"transparency": b"\x00\x80"}), ("p.gif", {}), ("p.bmp", {})):
        quantized.save(tmp_path / file, **options)
        np.testing.assert_array_equal(_agrees(tmp_path / file), np.asarray(quantized.convert("RGB")))


def test_16_bit_and_1_bit_png(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(_agrees(tmp_path / "deep.png")[..., 0], DEEP)
    color = RNG.integers(0, 65535, (4, 5, 3), dtype=np.uint16)
    (tmp_path / "color.png").write_bytes(imagecodecs.png_encode(color))
    np.testing.assert_array_equal(_agrees(tmp_path / "color.png"), color)
    Image.fromarray(GREY > 100).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(_agrees(tmp_path / "bit.png")[..., 0], (GREY > 100) * np.uint8(255))


@pytest.mark.parametrize(
    ("stored", "expected", "options"),
    [
        (BANDS, BANDS, {}),
        (BANDS, BANDS, {"photometric": "minisblack", "planarconfig": "contig"}),
        (BANDS, BANDS, {"photometric": "minisblack", "tile": (16, 16), "compression": "zlib", "predictor": True}),
        (BANDS.transpose(2, 0, 1), BANDS, {}),
        (BANDS.transpose(2, 0, 1), BANDS, {"photometric": "minisblack", "planarconfig": "separate"}),
        (BANDS.transpose(2, 0, 1), BANDS, {"imagej": True}),
        (BANDS.transpose(2, 0, 1), BANDS, {"ome": True, "metadata": {"axes": "CYX"}}),
        (RGB, RGB, {"photometric": "rgb", "compression": "lzw"}),
        (RGB, RGB, {"photometric": "rgb", "compression": "zstd", "bigtiff": True}),
        (BANDS[..., :4], BANDS[..., :4], {"photometric": "rgb"}),  # tifffile calls the fourth opacity, but it is none
        (np.dstack([RGB, (GREY > 60) * np.uint8(255)]), RGB, {"photometric": "rgb"}),
        (BANDS[..., :4], BANDS[..., :4], {"photometric": "rgb", "extrasamples": ["unspecified"]}),
        (GREY, GREY[..., None], {"byteorder": ">"}),
        (GREY, 255 - GREY[..., None], {"photometric": "miniswhite"}),
        (GREY, (COLORMAP >> 8).T.astype(np.uint8)[GREY], {"photometric": "palette", "colormap": COLORMAP}),
        (GREY, np.rot90(GREY[..., None], -1), {"extratags": [(274, 3, 1, 6, True)]}),
        (GREY[None], GREY[..., None], {}),
        (DEEP, DEEP[..., None], {"byteorder": ">"}),
        (DEEP.astype(np.float32), DEEP[..., None].astype(np.float32), {}),
        (BANDS.astype(np.float64) - 300, BANDS.astype(np.float64) - 300, {}),
        (DEEP.astype(np.int16), DEEP[..., None].astype(np.int16), {}),
    ],
)
def test_tiff_of_all_kinds(tmp_path, stored, expected, options):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ascontiguousarray(stored), **options)
    array = _agrees(path)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_image_and_mask_alike(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path, exif=_exif(orientation))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(_agrees(path), expected)
    np.testing.assert_array_equal(read_mask(path), expected)


def test_masks_are_read_as_stored(tmp_path):
    labels = GREY // 25
    indexed = Image.fromarray(labels)
    indexed.putpalette([value for color in range(256) for value in (color, 255 - color, 7)])
    indexed.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "p.png"), labels)
    assert palette(tmp_path / "p.png")[3] == (3, 252, 7)
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "deep.png"), DEEP)
    assert palette(tmp_path / "deep.png") is None
    tifffile.imwrite(tmp_path / "p.tif", labels, photometric="palette", colormap=COLORMAP)
    np.testing.assert_array_equal(read_mask(tmp_path / "p.tif"), labels)
    assert palette(tmp_path / "p.tif")[2] == tuple(COLORMAP[:, 2] >> 8)
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "rgb.png"), RGB)


def test_binary_and_whole_float_masks(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "bit.png")
    tifffile.imwrite(tmp_path / "bit.tif", GREY <= 100, photometric="miniswhite")  # where 0 is white, as it is seen
    for file in ("bit.png", "bit.tif"):
        np.testing.assert_array_equal(read_mask(tmp_path / file), (GREY > 100) * 255)
    tifffile.imwrite(tmp_path / "float.tif", GREY.astype(np.float32))
    np.testing.assert_array_equal(read_mask(tmp_path / "float.tif"), GREY)
    tifffile.imwrite(tmp_path / "gaps.tif", np.array([[0, np.inf, np.nan, -3.4e38]], np.float32))
    assert read_mask(tmp_path / "gaps.tif").tolist() == [[0, NAN_VALUE, NAN_VALUE, NAN_VALUE]]
    for bad in (GREY + 0.5, BANDS, DEEP[..., None].repeat(3, 2)):
        tifffile.imwrite(tmp_path / "bad.tif", bad)
        with pytest.raises(DataError, match=r"bad\.tif: .*mask has"):
            read_mask(tmp_path / "bad.tif")


def _bomb_png(width, height):
    content = bytearray(_encoded("PNG"))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = imagecodecs.zlib_crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def _bomb_tiff():
    """17 kB that say they are 3 GB."""
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((1024, 1024), np.uint8), compression="zlib", rowsperstrip=1024, metadata=None)
    content = bytearray(file.getvalue())
    for page_tag in (256, 257, 278):
        at = content.index(page_tag.to_bytes(2, "little"), 8)
        content[at + 8 : at + 12] = (60_000).to_bytes(4, "little")
    return bytes(content)


def _encoded(form, pixels=RGB, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty (0 bytes)"),
        (b"\n", "no image"),
        (b"name,age\nx,3\n", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (_encoded("PNG")[:200], "damaged or truncated"),
        (_encoded("JPEG")[:-200], "damaged or truncated"),
        (_encoded("WEBP")[:200], "damaged"),
        (_encoded("TIFF")[:300], "truncated"),
        (b"II*\0" + b"\xff" * 90, "damaged or truncated"),
        (b"II*\0" + b"\0" * 90, "damaged or truncated"),
        (_bomb_png(60_000, 60_000), "too large"),
        (_bomb_png(0, 9), "no image"),
        (_bomb_tiff(), "only be decoded as a whole"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_mask, image_info, palette])
def test_bad_files_are_data_errors_that_name_them(tmp_path, read, content, part):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    try:
        read(path)
    except DataError as error:
        assert str(error).startswith(f"{path}: ")
        if read is read_image:
            assert part in str(error)
    else:
        assert read in (image_info, palette), "only readers of headers may overlook damaged pixels"


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, part in (
        (tmp_path / "absent.png", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.png", "not a regular file"),
        (tmp_path / ("x" * 300), "cannot be opened"),
        ("a\0b.png", "cannot be opened"),
    ):
        with pytest.raises(DataError, match=part):
            read_image(path)


def test_numbers_that_are_none_are_refused_and_counted(tmp_path):
    values = np.zeros((4, 5), dtype=np.float32)
    values[0, :2] = np.nan, np.inf
    tifffile.imwrite(tmp_path / "a.tif", values)
    with pytest.raises(DataError, match=r"a\.tif: 2 .*numbers .*are NaN or infinite"):
        read_image(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "a.tif", values.astype(np.complex64))
    with pytest.raises(DataError, match="complex64"):
        read_image(tmp_path / "a.tif")


def test_stacks_and_foreign_colours_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 4, 20, 30), np.uint8), photometric="minisblack")
    with pytest.raises(DataError, match="12 planes"):
        read_image(tmp_path / "a.tif")
    Image.new("CMYK", (4, 4)).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match="stored as CMYK"):
        read_image(tmp_path / "b.tif")


def test_pages_in_a_circle_do_not_hang(tmp_path):
    content = bytearray(_encoded("TIFF"))
    start = int.from_bytes(content[4:8], "little")
    entries = int.from_bytes(content[start : start + 2], "little")
    end = start + 2 + 12 * entries
    content[end : end + 4] = start.to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(DataError, match="circle"):
        read_image(tmp_path / "a.tif")


def _corpus():
    exif = _exif(6)
    yield from (_encoded(form) for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF"))
    yield from (_encoded(form, exif=exif) for form in ("PNG", "JPEG", "WEBP"))
    yield _encoded("PNG", DEEP)
    yield imagecodecs.png_encode(RNG.integers(0, 65535, (4, 5, 3), dtype=np.uint16))
    for options in ({}, {"compression": "zlib", "tile": (16, 16)}, {"compression": "lzw"}, {"imagej": True}):
        file = io.BytesIO()
        tifffile.imwrite(file, BANDS.transpose(2, 0, 1).copy(), **options)
        yield file.getvalue()


def _damage(content, rng):
    content = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 1:
        for _ in range(rng.choice((1, 4, 30))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        for _ in range(3):
            content[rng.randrange(min(200, len(content)))] = rng.choice((0, 1, 127, 255))
    else:
        start = rng.randrange(len(content))
        del content[start : start + rng.randrange(1, 100)]
    return bytes(content)


@pytest.mark.timeout(60)
def test_damaged_files_give_pixels_or_a_data_error_and_nothing_else(tmp_path, caplog):
    rng = random.Random(1)
    corpus, path, refused = list(_corpus()), tmp_path / "damaged", 0
    for round_number in range(800):
        path.write_bytes(_damage(corpus[round_number % len(corpus)], rng))
        for read in (read_image, read_mask, image_info, palette):
            try:
                read(path)
            except DataError as error:
                refused += 1
                assert str(path) in str(error)
    assert refused > 800
    assert not caplog.records


def test_threads_see_no_warnings_and_leave_the_filters_alone(tmp_path):
    """Damaged EXIF makes Pillow warn; silencing it must neither leak nor change the state of the process."""
    path = tmp_path / "a.jpg"
    content = _encoded("JPEG", exif=_exif(6))
    path.write_bytes(content.replace(b"II*\0\x08\0\0\0\x01\0", b"II*\0\x08\0\0\0\x09\0"))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(read_image, [path] * 200))
    assert {array.shape for array in arrays} <= {(20, 30, 3), (30, 20, 3)}
    assert warnings.filters == before


def test_messages_of_tifffile_about_other_peoples_files_stay(tmp_path, caplog):
    (tmp_path / "a.tif").write_bytes(_encoded("TIFF")[:150])
    with pytest.raises(DataError):
        read_image(tmp_path / "a.tif")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        logging.getLogger("tifffile").warning("somebody else's file")
    assert len(caplog.records) == 1


def test_tensors_are_uint8_or_float_in_unit_scale():
    tensor = to_tensor(RGB)
    assert tensor.dtype == torch.uint8
    assert torch.equal(tensor, torch.from_numpy(RGB).permute(2, 0, 1))
    assert tensor.is_contiguous()
    deep = to_tensor(np.array([[[0], [65535], [13107]]], dtype=np.uint16))
    assert deep.dtype == torch.float32
    torch.testing.assert_close(deep, torch.tensor([[[0.0, 1.0, 0.2]]]))
    assert to_tensor(np.full((1, 1, 1), 2**32 - 1, dtype=np.uint32)).item() == 1.0
    assert to_tensor(np.full((1, 1, 2), 7.5)).dtype == torch.float32
    assert to_tensor(np.full((1, 1, 2), -7.5, dtype=np.float16)).flatten().tolist() == [-7.5, -7.5]


def test_tensors_own_their_memory_and_read_only_arrays_pass():
    array = RGB.copy()
    array.flags.writeable = False
    assert torch.equal(to_tensor(array), to_tensor(RGB))


def test_only_grey_is_repeated():
    assert torch.equal(to_tensor(GREY[..., None], 3)[2], torch.from_numpy(GREY))
    assert to_tensor(BANDS, 5).shape == (5, 20, 30)
    for array, channels in ((BANDS, 3), (RGB, 1), (GREY[..., None], 4)):
        with pytest.raises(DataError, match="are wanted"):
            to_tensor(array, channels)
