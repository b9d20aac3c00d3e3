import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pixelwise.data.separation import separate_touching, separation_weights
from pixelwise.errors import UsageError


def brute_force(cells, w0=10.0, sigma=5.0):
    """Equation 2 with a distance from every pixel to every pixel of every cell."""
    weights = np.ones(cells.shape)
    for row, column in zip(*np.nonzero(cells == 0), strict=True):
        distances = []
        for number in np.unique(cells[cells > 0]):
            rows, columns = np.nonzero(cells == number)
            distances.append(np.sqrt((rows - row) ** 2 + (columns - column) ** 2).min() - 1)
        if len(distances) > 1:
            first, second = sorted(distances)[:2]
            weights[row, column] += w0 * math.exp(-((first + second) ** 2) / (2 * sigma**2))
    return weights


def blobs(seed, size=(40, 50), number=6):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    cells = np.zeros(size, dtype=np.uint16)
    for label in rng.permutation(np.arange(1, number + 1)) * 37:
        row, column, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(2, 7)
        cells[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = label
    return cells


def test_between_touching_cells_the_extra_weight_is_w0():
    touching = np.array([[3, 3, 3, 3, 8, 8, 8]] * 5)
    separated = separate_touching(touching)
    weights = separation_weights(separated, is_instances=True)
    assert (separated == 0).sum() == 5
    assert (weights[separated == 0] == 11).all() and (weights[separated > 0] == 1).all()
    assert (separation_weights(separated, is_instances=True, w0=4)[separated == 0] == 5).all()


def test_at_sigma_times_root_two_it_is_w0_over_e():
    # sigma = k / sqrt(2), so that the distances of k px in all are whole numbers
    row = np.array([[1, *([0] * 7), 2, 2]])
    weights = separation_weights(row, is_instances=True, sigma_px=6 / math.sqrt(2))
    assert weights[0, 1:8] == pytest.approx(1 + 10 / math.e, abs=1e-4)  # one side k px nearer is the other k px farther
    assert 10 / math.e == pytest.approx(3.679, abs=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_weights_equal_the_definition(seed):
    cells = separate_touching(blobs(seed))
    assert separation_weights(cells, is_instances=True) == pytest.approx(brute_force(cells), abs=1e-3)
    options = {"w0": 3.0, "sigma_px": 1.5}
    assert separation_weights(cells, is_instances=True, **options) == pytest.approx(
        brute_force(cells, 3.0, 1.5), abs=1e-3
    )


def test_far_from_each_other_nothing_is_left():
    cells = np.zeros((20, 90), dtype=int)
    cells[5:9, 3:8], cells[5:9, 80:86] = 1, 2
    weights = separation_weights(cells, is_instances=True)
    assert (weights == 1).all() and weights.dtype == np.float32 and weights.shape == cells.shape


@pytest.mark.parametrize("cells", [np.zeros((4, 6), int), np.ones((4, 6), int), np.eye(1, 1, dtype=int)])
def test_without_a_second_cell_there_is_no_extra_weight(cells):
    assert (separation_weights(cells, is_instances=True) == 1).all()
    assert (separation_weights(cells.astype(np.uint8)) == 1).all()
    assert (separation_weights(cells.astype(bool)) == 1).all()


@pytest.mark.parametrize("seed", range(4))
def test_components_of_a_mask_are_its_cells(seed):
    cells = separate_touching(blobs(seed, number=4))
    weights = separation_weights((cells > 0).astype(np.uint8))
    assert np.array_equal(weights, separation_weights(cells, is_instances=True))


def test_cells_of_two_classes_are_two_cells_and_a_corner_joins():
    two_classes = np.array([[1, 0, 2]], dtype=np.uint8)
    assert separation_weights(two_classes).tolist() == [[1, 11, 1]]
    joined = np.array([[1, 0], [0, 1]], dtype=np.uint8)
    assert (separation_weights(joined) == 1).all()
    assert (separation_weights(joined * np.array([[1], [2]], dtype=np.uint8)) > 1).sum() == 2


def test_void_is_neither_cell_nor_background():
    mask = np.array([[1, 0, 255, 2, 0, 255, 255]], dtype=np.uint8)
    weights = separation_weights(mask)
    assert (weights[mask == 255] == 0).all()
    assert weights[0, 1] == pytest.approx(1 + 10 * math.exp(-1 / 50))
    instances = np.array([[1, 0, 255]])  # the 255th cell is a cell
    assert separation_weights(instances, is_instances=True).tolist() == [[1, 11, 1]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12))
def test_separated_cells_touch_nowhere(seed, height, columns):
    instances = np.random.default_rng(seed).integers(0, 5, (height, columns)).astype(np.uint16)
    instances = np.kron(instances, np.ones((3, 3), dtype=np.uint16))
    separated = separate_touching(instances)
    assert separated.dtype == instances.dtype and set(np.unique(separated)) <= set(np.unique(instances)) | {0}
    assert np.array_equal(separated[separated > 0], instances[separated > 0])
    parts, number = ndimage.label(separated > 0, structure=np.ones((3, 3)))
    assert all(len(np.unique(separated[parts == part])) == 1 for part in range(1, number + 1))
    assert np.array_equal(separate_touching(separated), separated)


def test_the_larger_cell_gives_up_its_pixels():
    cells = np.array([[5, 5, 5, 7, 7, 0, 0, 0]])
    assert separate_touching(cells).tolist() == [[5, 5, 0, 7, 7, 0, 0, 0]]
    cells[0, 5:] = 7
    assert separate_touching(cells).tolist() == [[5, 5, 5, 0, 7, 7, 7, 7]]


def test_cells_that_do_not_touch_stay_as_they_are():
    cells = np.array([[1, 0, 2, 0, 3]] * 2)
    assert np.array_equal(separate_touching(cells), cells)
    assert separate_touching(np.zeros((0, 4), dtype=int)).shape == (0, 4)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.zeros((2, 2)), {}, "whole numbers from 0 on"),
        (np.zeros((2, 2, 3), int), {}, r"\(2, 2, 3\)"),
        (np.array([[-1, 0]]), {}, "from -1 on"),
        (np.zeros((2, 2), int), {"w0": -1}, "w0 must be at least 0"),
        (np.zeros((2, 2), int), {"sigma_px": 0}, "sigma_px more than 0"),
        (np.zeros((2, 2), int), {"sigma_px": math.nan}, "sigma_px more than 0"),
    ],
)
def test_what_cannot_be_weighed_is_told(labels, options, message):
    with pytest.raises(UsageError, match=message):
        separation_weights(labels, **options)
