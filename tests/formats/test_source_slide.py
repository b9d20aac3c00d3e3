"""Whole-slide images: levels, micrometres per pixel and areas as the vendors' dialects have them."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import tiffslide

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import open_source
from pixelwise.formats.tiff.slide import is_slide, open_slide

RNG = np.random.default_rng(0)
IMAGE = np.kron(RNG.integers(0, 255, (20, 30, 3)), np.ones((8, 8, 1), int)).astype(np.uint8)  # 160 x 240
LEVELS = [IMAGE, IMAGE[::2, ::2], IMAGE[::4, ::4]]
APERIO = "Aperio Image Library v11.2.1 \n240x160 [0,0 240x160] (32x32) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"


def _pyramid(path, levels=LEVELS, **options):
    with tifffile.TiffWriter(path, ome=options.pop("ome", False)) as writer:
        for number, level in enumerate(levels):
            kind = {"subifds": len(levels) - 1} if number == 0 else {"subfiletype": 1}
            writer.write(level, photometric="rgb", tile=(32, 32), compression="zlib", **kind, **options)
    return str(path)


def _svs(path):
    with tifffile.TiffWriter(path) as writer:
        options = {"photometric": "rgb", "compression": "zlib", "metadata": None, "software": False}
        writer.write(LEVELS[0], tile=(32, 32), description=APERIO, **options)
        writer.write(IMAGE[::8, ::8], rowsperstrip=4, description=APERIO, **options)  # thumbnail
        for level in LEVELS[1:]:
            writer.write(level, tile=(32, 32), subfiletype=0, description=APERIO, **options)
    return str(path)


def _scn(path):
    """A slide of 400 x 300 pixels with two scanned areas, as Leica's scanners describe them."""
    areas = [(20, 30, LEVELS[0][:100, :120]), (150, 200, LEVELS[0][:120, :160])]

    def dimension(number, level, area):
        return f'<dimension r="{level}" ifd="{number}" sizeX="{area.shape[1]}" sizeY="{area.shape[0]}"/>'

    scan = (
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>"
        "<numericalAperture>0.7</numericalAperture><illuminationSource>brightfield</illuminationSource>"
        "</illuminationSettings></scanSettings>"
    )
    images, pages = "", []
    for top, left, area in areas:
        height, width = area.shape[:2]
        small = area[::2, ::2]
        images += (
            f'<image><creationDate>2020</creationDate><device model="m" version="1"/>{scan}'
            f'<pixels sizeX="{width}" sizeY="{height}">{dimension(len(pages), 0, area)}'
            f"{dimension(len(pages) + 1, 1, small)}</pixels>"
            f'<view sizeX="{width * 500}" sizeY="{height * 500}" offsetX="{left * 500}" offsetY="{top * 500}"/></image>'
        )
        pages += [area, small]
    text = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection sizeX="{400 * 500}" sizeY="{300 * 500}">{images}</collection></scn>'
    )
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, page in enumerate(pages):
            description = text if number == 0 else None
            options = {"metadata": None, "software": False}
            writer.write(page, photometric="rgb", tile=(32, 32), compression="zlib", description=description, **options)
    return str(path), areas


@pytest.mark.parametrize("make", [_pyramid, _svs, lambda path: _pyramid(path, ome=True)])
def test_levels_are_those_of_tiffslide(tmp_path, make):
    path = make(tmp_path / "a.svs")
    with tiffslide.TiffSlide(path) as slide:
        for level in range(3):
            with open_slide(path, level) as source:
                width, height = slide.level_dimensions[level]
                assert (source.info.height, source.info.width, source.info.channels) == (height, width, 3)
                assert source.metadata["downsample"] == 2**level
                region = slide.read_region((8 * 2**level, 4 * 2**level), level, (25, 30), as_array=True)
                np.testing.assert_array_equal(source.read(4, 8, 30, 25), region)
                np.testing.assert_array_equal(source.read(0, 0, height, width), LEVELS[level])
                assert source.valid(0, 0, 9, 9) is None


def test_aperio_tells_magnification_and_micrometres(tmp_path):
    path = _svs(tmp_path / "a.svs")
    with open_slide(path, 1) as source:
        assert source.metadata["vendor"] == "aperio" and source.metadata["objective_power"] == 20
        assert source.metadata["mpp"] == pytest.approx((0.998, 0.998))
        assert source.metadata["level_shapes"] == ((160, 240), (80, 120), (40, 60))
        assert source.info.block_px == (32, 32)
    with pytest.raises(UsageError, match=r"a\.svs: it has no level 3\. Its levels are 0 \(240 x 160\)"):
        open_slide(path, 3)
    with pytest.raises(UsageError, match="no level -1"):
        open_slide(path, -1)


def test_pixel_size_of_ome_and_of_tags(tmp_path):
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}
    path = _pyramid(tmp_path / "a.ome.tif", ome=True, metadata=metadata)
    with open_slide(path, 1) as source:
        assert source.metadata["mpp"] == (0.5, 1.0)
    path = _pyramid(tmp_path / "b.tif", resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    with open_slide(path) as source:
        assert source.metadata["pixel_size_um"] == {"x": 0.5, "y": 0.5}


def test_areas_of_a_slide_and_nothing_between_them(tmp_path):
    path, areas = _scn(tmp_path / "a.scn")
    whole, there = np.zeros((300, 400, 3), np.uint8), np.zeros((300, 400), bool)
    for top, left, area in areas:
        whole[top : top + area.shape[0], left : left + area.shape[1]] = area
        there[top : top + area.shape[0], left : left + area.shape[1]] = True
    with open_slide(path) as source:
        assert (source.info.height, source.info.width) == (300, 400)
        assert source.metadata["mpp"] == (0.5, 0.5) and source.metadata["vendor"] == "leica"
        for top, left, height, width in ((0, 0, 300, 400), (10, 20, 50, 60), (100, 100, 100, 200), (0, 0, 9, 9)):
            box = slice(top, top + height), slice(left, left + width)
            np.testing.assert_array_equal(source.read(top, left, height, width), whole[box])
            np.testing.assert_array_equal(source.valid(top, left, height, width), there[box])
    with open_slide(path, 1) as source:
        np.testing.assert_array_equal(source.read(10, 15, 50, 60), areas[0][2][::2, ::2])


def test_opacity_says_where_data_is(tmp_path):
    rgba = np.dstack([IMAGE, np.where(IMAGE[..., :1] > 99, 255, 0).astype(np.uint8)])
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(32, 32))
    with open_slide(str(tmp_path / "a.tif")) as source:
        assert source.info.channels == 3
        np.testing.assert_array_equal(source.read(5, 6, 70, 80), IMAGE[5:75, 6:86])
        np.testing.assert_array_equal(source.valid(5, 6, 70, 80), IMAGE[5:75, 6:86, 0] > 99)


def test_threads(tmp_path):
    with open_slide(_svs(tmp_path / "a.svs")) as source, ThreadPoolExecutor(6) as pool:
        for top, window in enumerate(pool.map(lambda top: source.read(top, 20, 30, 150), range(100))):
            np.testing.assert_array_equal(window, IMAGE[top : top + 30, 20:170])


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    path = _svs(tmp_path / "a.svs")
    with pytest.raises(UsageError, match="identity"):
        open_slide(path, opener=lambda: open(path, "rb"))  # noqa: SIM115, PTH123
    with pytest.raises(DataError, match="no such file"):
        open_slide(str(tmp_path / "none.svs"))
    monkeypatch.setitem(sys.modules, "tiffslide", None)
    with pytest.raises(UsageError, match=r'pip install "tiffslide>=2\.4"'):
        open_slide(path)


def test_masks_are_the_numbers_as_stored(tmp_path):
    colors = RNG.integers(0, 65535, (3, 256), dtype=np.uint16)
    options = {"photometric": "palette", "colormap": colors, "tile": (32, 32), "compression": "zlib"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(IMAGE[..., 0], subifds=1, **options)
        writer.write(IMAGE[::2, ::2, 0], subfiletype=1, **options)
    with open_slide(str(tmp_path / "a.tif"), 1, labels=True) as source:
        np.testing.assert_array_equal(source.read(0, 0, 80, 120), IMAGE[::2, ::2, :1])
        assert source.metadata["palette"][5] == tuple(colors[:, 5] >> 8)
    with open_slide(str(tmp_path / "a.tif"), 1) as source:
        np.testing.assert_array_equal(source.read(0, 0, 80, 120), (colors >> 8).T[IMAGE[::2, ::2, 0]])


def test_xml_with_entities(tmp_path):
    text = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><scn>&b;</scn>'
    tifffile.imwrite(tmp_path / "a.scn", IMAGE, description=text, metadata=None)
    with pytest.raises(DataError, match=r"a\.scn: "):
        open_source(tmp_path / "a.scn")


def test_damaged_slides_give_pixels_or_a_data_error(tmp_path):
    rng, path, refused = random.Random(4), tmp_path / "d.svs", 0
    _svs(tmp_path / "a.svs"), _scn(tmp_path / "b.scn"), _pyramid(tmp_path / "c.tif")
    corpus = [(tmp_path / name).read_bytes() for name in ("a.svs", "b.scn", "c.tif")]
    for number in range(150):
        content = bytearray(corpus[number % 3])
        if number % 5 == 0:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.choice((1, 4, 20))):
            if content:
                content[rng.choice((rng.randrange(len(content)), rng.randrange(min(1200, len(content)))))] = (
                    rng.randrange(256)
                )
        path.write_bytes(content)
        try:
            with open_source(path, format="slide") as source:
                source.read(0, 0, min(source.info.height, 300), min(source.info.width, 300))
        except (DataError, UsageError) as error:
            refused += 1
            assert str(error).startswith(f"{path}: ")
    assert refused > 40


def test_names_of_slides():
    assert is_slide(b"II*\0", "a.NDPI") and not is_slide(b"II*\0", "a.tif") and not is_slide(b"PK\3\4", "a.svs")
