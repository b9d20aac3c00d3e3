"""Numbers of medical images as 0..1, and what users may write for it."""

import numpy as np
import pytest

from pixelwise.errors import UsageError
from pixelwise.formats.intensity import Scaling, by_type, check_intensity, display_window, percentile_scaling


def test_a_range_is_linear_and_clipped():
    values = np.array([-500, 0, 300])
    assert Scaling(low=-100, high=300).apply(values).tolist() == [0.0, 0.25, 1.0]
    assert Scaling(low=-100, high=300, inverted=True).apply(values).tolist() == [1.0, 0.75, 0.0]
    assert Scaling(low=0, high=0).apply(values).tolist() == [0.0, 0.0, 1.0]
    assert Scaling(low=-1.7e308, high=1.7e308).apply(np.zeros(1)).tolist() == [0.5]


def test_what_was_done_is_told():
    assert Scaling(low=1, high=3).to_dict() == {"function": "linear", "low": 1, "high": 3}
    told = Scaling(low=1, high=3, sigmoid=True, inverted=True).to_dict()
    assert told == {"function": "sigmoid", "center": 1, "width": 2, "inverted": True}


def test_what_users_write():
    assert check_intensity("auto") == "auto" and check_intensity("type") == "type"
    assert check_intensity("-160,240") == check_intensity((-160, 240)) == (-160.0, 240.0)
    for wrong in ("bright", "3,3", "1,2,3", (5, 1), ("a", "b"), None, 7, (0, float("inf"))):
        with pytest.raises(UsageError, match=r"intensity .* cannot be used"):
            check_intensity(wrong)


def test_display_windows():
    assert display_window(40, 400) == Scaling(low=-160.0, high=239.0)
    assert display_window(40, 400, "LINEAR_EXACT") == Scaling(low=-160.0, high=240.0)
    assert display_window(40, 400, "OTHER") is None


def test_percentiles_ignore_what_is_not_finite():
    assert percentile_scaling(np.array([0] * 999 + [5])) == Scaling(low=0.0, high=5.0)
    assert percentile_scaling(np.array([np.nan, np.inf])) == Scaling(low=0.0, high=1.0)
    assert percentile_scaling(np.array([1.0, np.nan, 3.0])) == Scaling(low=1.01, high=2.99)


def test_integers_by_their_type():
    assert by_type(np.array([0, 65535], dtype=np.uint16)).tolist() == [0.0, 1.0]
    assert by_type(np.array([0, 4095], dtype=np.uint16), 4095).tolist() == [0.0, 1.0]
    assert by_type(np.array([0.25, 7])).tolist() == [0.25, 7.0]
