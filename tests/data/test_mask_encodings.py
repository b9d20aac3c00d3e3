"""One mask in every way in which users store it means the same labels."""

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image

from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.data.samples import load_sample


def truth(number):
    """A rectangle of ones, (24, 32)."""
    mask = np.zeros((24, 32), np.uint8)
    mask[3 + number : 12 + number, 5:20] = 1
    return mask


def npy(change):
    return lambda path, mask: np.save(path.with_suffix(".npy"), change(mask))


def tif(change, **options):
    return lambda path, mask: tifffile.imwrite(path.with_suffix(".tif"), change(mask), **options)


def picture(suffix, change, **options):
    return lambda path, mask: Image.fromarray(change(mask)).save(path.with_suffix(suffix), **options)


def palette(path, mask):
    image = Image.fromarray(mask)
    image.putpalette([0, 0, 0, 200, 30, 60])
    image.save(path.with_suffix(".png"))


def geotiff(bands, **options):
    def write(path, mask):
        layers = bands(mask)
        shape = {"height": 24, "width": 32, "count": len(layers), "dtype": layers[0].dtype}
        place = rasterio.Affine(1, 0, 5e5, 0, -1, 5e6)
        with rasterio.open(
            path.with_suffix(".tif"), "w", crs="EPSG:32633", transform=place, **shape, **options
        ) as file:
            file.write(np.stack(layers))

    return write


def opaque(mask):
    return np.full_like(mask, 255)


ENCODINGS = {
    "npy bool": npy(lambda mask: mask.astype(bool)),
    "npy int64": npy(lambda mask: mask.astype(np.int64)),
    "npy int8": npy(lambda mask: mask.astype(np.int8)),
    "npy uint16": npy(lambda mask: mask.astype(np.uint16) * 255),
    "npy float32": npy(lambda mask: mask.astype(np.float32)),
    "npy float64 of 255": npy(lambda mask: mask * 255.0),
    "npy with a channel": npy(lambda mask: mask[:, :, None]),
    "npy in Fortran's order": npy(np.asfortranarray),
    "tif bool": tif(lambda mask: mask.astype(bool), photometric="minisblack"),
    "tif float32": tif(lambda mask: mask.astype(np.float32)),
    "tif int32": tif(lambda mask: mask.astype(np.int32)),
    "tif of 65535": tif(lambda mask: mask.astype(np.uint16) * 65535),
    "tif tiled": tif(lambda mask: mask, tile=(16, 16), compression="zlib"),
    "tif in three channels": tif(lambda mask: np.dstack([mask * 255] * 3), photometric="rgb"),
    "geotiff": geotiff(lambda mask: [mask]),
    "geotiff with opacity": geotiff(lambda mask: [mask, opaque(mask)], ALPHA="YES"),
    "geotiff RGB with opacity": geotiff(lambda mask: [mask * 255] * 3 + [opaque(mask)], photometric="RGB", ALPHA="YES"),
    "geotiff float64": geotiff(lambda mask: [mask.astype(np.float64)]),
    "png": picture(".png", lambda mask: mask * 255),
    "png of one bit": picture(".png", lambda mask: mask.astype(bool)),
    "png of 16 bits": picture(".png", lambda mask: mask.astype(np.uint16) * 65535),
    "png with palette": palette,
    "png LA": picture(".png", lambda mask: np.dstack([mask, opaque(mask)])),
    "png RGBA": picture(".png", lambda mask: np.dstack([mask * 255] * 3 + [opaque(mask)])),
    "gif": picture(".gif", lambda mask: mask * 255),
    "bmp": picture(".bmp", lambda mask: mask * 255),
    "webp": picture(".webp", lambda mask: np.dstack([mask * 255] * 3), lossless=True),
    "pgm": picture(".pgm", lambda mask: mask),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_mask_means_the_same_in_every_encoding(tmp_path, name):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(5):
        photo = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(photo).save(tmp_path / f"images/{number}.png")
        ENCODINGS[name](tmp_path / f"masks/{number}", truth(number))
    folder = open_data(tmp_path)
    assert folder.labels.names == ("background", "foreground")
    assert [problem.message for problem in inspect_data(folder).problems if problem.severity == "fatal"] == []
    for pair in folder.pairs:
        assert np.array_equal(load_sample(pair, folder.labels).mask.numpy(), truth(int(pair.name)))
