"""What the numeric tests compare with: it counts in the last bits, and it can fail."""

import math

import numpy as np
import pytest
import torch
from closeness import assert_close, num_ulps

EPS = 2.0**-23


def test_a_difference_counts_in_eps_times_the_largest_entry():
    expected = torch.tensor([0.001, -4.0, 2.0])
    found = expected + torch.tensor([3 * 4 * EPS, 0, 0])  # three units on the smallest entry
    assert num_ulps(found, expected) == pytest.approx(3, rel=1e-3)
    assert num_ulps(found, expected, size=12) == pytest.approx(1, rel=1e-3)
    assert_close(found, expected, ulps=4)
    with pytest.raises(AssertionError, match="differ by 3 ulps, allowed are 2"):
        assert_close(found, expected, ulps=2)


def test_the_coarser_dtype_of_the_two_counts_if_none_is_given():
    exact = torch.tensor([1.0], dtype=torch.float64)
    assert num_ulps((exact + 2**-9).bfloat16(), exact) == 0.0  # rounded to even
    assert num_ulps((exact + 2**-6).bfloat16(), exact) == 2.0
    assert num_ulps((exact + EPS).float(), exact) == 1.0
    assert num_ulps([1.0 + EPS], [1.0], dtype=torch.float32) == 1.0
    assert num_ulps(1.0 + EPS, 1.0) == 2.0**29
    assert num_ulps(np.float32([1.0 + EPS]), [1.0]) == 1.0


def test_what_is_no_number_or_of_another_shape_is_never_close():
    nan, one = torch.tensor([math.nan, 1.0]), torch.ones(2)
    assert num_ulps(nan, one) == num_ulps(one, nan) == math.inf
    assert num_ulps(nan, nan) == 0.0
    infinite = torch.tensor([math.inf, 1.0])
    assert num_ulps(infinite, infinite) == 0.0
    assert num_ulps(infinite, -infinite) == math.inf
    assert num_ulps(torch.full((2,), 1e-30), torch.zeros(2)) == math.inf
    with pytest.raises(AssertionError, match="shapes"):
        num_ulps(one, one[:1])
