import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import pixelwise.infer.cleanup as cleanup
from pixelwise.errors import PixelwiseError
from pixelwise.infer.cleanup import remove_small

SIDES = [
    (slice(1, None), slice(None)),
    (slice(None, -1), slice(None)),
    (slice(None), slice(1, None)),
    (slice(None), slice(None, -1)),
]
OPPOSITE = [SIDES[1], SIDES[0], SIDES[3], SIDES[2]]


def areas_of(labels, nodata):
    """Number of the area of each pixel, from 1 on; 0 where there is no data."""
    areas, count = np.zeros(labels.shape, int), 0
    for value in np.unique(labels):
        if value != nodata:
            part, found = ndimage.label(labels == value, structure=np.ones((3, 3)))
            areas[part > 0] = part[part > 0] + count
            count += found
    return areas


def reference(labels, min_area_px, nodata=None):
    """The rule, on the whole image, area by area."""
    areas = areas_of(labels, nodata)
    sizes = np.bincount(areas.ravel())
    waiting = {area for area in range(1, len(sizes)) if sizes[area] < min_area_px}
    result = labels.copy()
    while True:
        settled = (areas > 0) & ~np.isin(areas, list(waiting))
        choices = {}
        for area in waiting:
            inside, counts = areas == area, np.zeros(1 << 16, int)
            for here, there in zip(SIDES, OPPOSITE, strict=True):
                touching = inside[here] & settled[there]
                counts += np.bincount(result[there][touching], minlength=1 << 16)
            if counts.any():
                choices[area] = counts.argmax()
        for area, choice in choices.items():
            result[areas == area] = choice
        waiting -= set(choices)
        if not choices:
            return result


def cleaned(labels, min_area_px, **options):
    height, width = labels.shape
    return remove_small(lambda top, bottom: labels[top:bottom], height, width, min_area_px, **options)(0, height)


def blobs(seed, height, width, classes=3, blur=1.5):
    draws = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(draws.normal(size=(height, width)), blur) for _ in range(classes)]
    return np.argmax(fields, axis=0).astype(np.uint8)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_it_is_the_rule_on_the_whole_image_whatever_the_bands_are(data):
    height, width = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    seed, blur = data.draw(st.integers(0, 9999)), data.draw(st.sampled_from([0, 0.6, 1.0, 2.0]))
    labels = blobs(seed, height, width, data.draw(st.integers(1, 4)), blur)
    nodata = data.draw(st.sampled_from([None, None, 0, 3, 255]))
    if nodata == 255:
        labels[np.random.default_rng(seed).random(labels.shape) < 0.2] = 255
    min_area_px = data.draw(st.sampled_from([0, 1, 2, 3, 5, 9, 20, 60, 1000]))
    wanted = reference(labels, min_area_px, nodata)
    for band_px in {1, 2, 7, height, data.draw(st.integers(1, 30)), None}:
        found = cleaned(labels, min_area_px, nodata=nodata, band_px=band_px)
        assert found.dtype == labels.dtype and np.array_equal(found, wanted), band_px


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_long_winding_areas(data):
    """Spirals, combs and nests: areas that meet again many rows later."""
    size = data.draw(st.integers(3, 15))  # no more areas lie between two than the rule follows
    row, column = np.mgrid[:size, :size]
    shape = data.draw(st.sampled_from(["rings", "comb", "cup", "diagonal", "stripes", "checks"]))
    labels = {
        "rings": np.minimum.reduce([row, column, size - 1 - row, size - 1 - column]) % 3,
        "comb": ((column % 2 == 0) & (row < size - 1)).astype(int),
        "cup": ((column % 2 == 0) & (row > 0)).astype(int),
        "diagonal": (row + column) % 3,
        "stripes": column % 3,
        "checks": (row + column) % 2,
    }[shape].astype(np.uint8)
    if data.draw(st.booleans()):
        labels = np.flipud(labels)
    min_area_px = data.draw(st.integers(2, size * size + 1))
    wanted = reference(labels, min_area_px)
    for band_px in (1, 3, size):
        assert np.array_equal(cleaned(labels, min_area_px, band_px=band_px), wanted)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_no_small_area_is_left_and_large_ones_stay(data):
    labels = blobs(data.draw(st.integers(0, 999)), 40, 40, 3, data.draw(st.sampled_from([0, 1.0])))
    labels[20:, 20:] = 1
    min_area_px = data.draw(st.integers(2, 60))
    found = cleaned(labels, min_area_px, band_px=data.draw(st.integers(1, 40)))
    before, after = areas_of(labels, None), areas_of(found, None)
    assert np.bincount(after.ravel())[1:].min() >= min_area_px
    was_large = np.bincount(before.ravel())[before] >= min_area_px
    assert np.array_equal(found[was_large], labels[was_large])


def test_the_longest_border_decides_and_of_equal_ones_the_lowest_class():
    labels = np.full((7, 9), 2, np.uint8)
    labels[:, :4] = 1
    labels[3, 4] = 0  # three sides with 2, one with 1
    assert cleaned(labels, 2)[3, 4] == 2
    labels[2:5, 4] = 0  # three with 1, five with 2
    assert cleaned(labels, 4)[2:5, 4].tolist() == [2] * 3
    labels[:, 4] = 0
    assert cleaned(labels, 8)[:, 4].tolist() == [1] * 7


def test_corners_connect():
    labels = np.zeros((20, 20), np.uint8)
    np.fill_diagonal(labels, 1)
    assert np.array_equal(cleaned(labels, 20), labels)
    assert not cleaned(labels, 21).any()


def test_areas_within_small_areas_take_the_class_from_outside():
    labels = np.zeros((15, 15), np.uint8)
    labels[5:10, 5:10] = 1
    labels[6:9, 6:9] = 2
    labels[7, 7] = 3
    assert not cleaned(labels, 20).any()
    assert cleaned(labels, 2)[7, 7] == 2


def test_pixels_without_data_are_neither_changed_nor_neighbours():
    labels = np.full((9, 9), 255, np.uint8)
    labels[4, 2:7] = 1
    labels[4, 4] = 0
    found = cleaned(labels, 4, nodata=255)
    assert np.array_equal(found, labels)  # two areas of 2 px, and no large one
    labels[3, 2:7] = 1
    found = cleaned(labels, 4, nodata=255)
    assert found[4, 4] == 1 and (found == 255).sum() == (labels == 255).sum()
    assert np.array_equal(cleaned(np.full((3, 3), 255, np.uint8), 100, nodata=255), np.full((3, 3), 255))


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1)])
def test_thin_images(shape):
    labels = np.random.default_rng(0).integers(0, 3, shape, dtype=np.uint8)
    for min_area_px, band_px in itertools.product((2, 3, 1000), (1, 7, None)):
        assert np.array_equal(cleaned(labels, min_area_px, band_px=band_px), reference(labels, min_area_px))


def test_uint16_labels_and_read_only_rows():
    labels = blobs(1, 30, 30).astype(np.uint16) * 20_000 + 5000
    labels.flags.writeable = False
    found = cleaned(labels, 30, band_px=4)
    assert found.dtype == np.uint16 and np.array_equal(found, reference(labels, 30))


def test_without_small_areas_rows_are_passed_on():
    labels = np.zeros((4, 4), np.uint8)

    def rows(top, bottom):
        return labels[top:bottom]

    assert remove_small(rows, 4, 4, 0) is rows and remove_small(rows, 4, 4, 10) is not None
    assert remove_small(rows, 4, 4, 16) is rows


def test_any_rows_are_given_in_any_order_and_from_threads():
    labels = blobs(3, 90, 70, 3, 1.0)
    wanted = reference(labels, 12)
    rows = remove_small(lambda top, bottom: labels[top:bottom], 90, 70, 12, band_px=16)
    wrong = []

    def check(seed):
        draws = np.random.default_rng(seed)
        for _ in range(20):
            top, bottom = np.sort(draws.choice(91, 2, replace=False))
            if not np.array_equal(rows(int(top), int(bottom)), wanted[top:bottom]):
                wrong.append((top, bottom))

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_only_bands_are_read():
    labels, most = blobs(4, 200, 30), []

    def rows(top, bottom):
        assert 0 <= top < bottom <= 200
        most.append(bottom - top)
        return labels[top:bottom]

    found = remove_small(rows, 200, 30, 15, band_px=10)(0, 200)
    assert np.array_equal(found, reference(labels, 15)) and max(most) == 11


def test_a_large_table_goes_to_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(cleanup, "_IN_MEMORY_BYTES", 64)
    monkeypatch.setattr(cleanup, "_BLOCK", 8)
    labels = blobs(5, 60, 60, 4, 0.7)
    assert np.array_equal(cleaned(labels, 10, band_px=5, folder=tmp_path), reference(labels, 10))
    with pytest.raises(PixelwiseError, match=r"temporary file in .*none cannot be used \(No such file"):
        cleaned(labels, 10, band_px=5, folder=tmp_path / "none")
