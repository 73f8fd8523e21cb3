"""How far two computations of the same thing may lie apart: in units of their rounding.

Two computations that are equal on paper differ in the last bits: other processors, vector widths,
numbers of threads and matrix libraries add in other orders, and some fuse a product with a sum. So
a tolerance is a number of ulps: `eps` of the dtype that was computed in, times the size of the
result. The size is the largest absolute value of the whole tensor and not each entry's own: a small
entry is mostly a difference of large terms, and carries their rounding.

    eps(float32) = 1.2e-7, and a result with entries up to 3: 16 ulps are 16 * 1.2e-7 * 3 = 5.7e-6

How many ulps are right for what, at the sizes of these tests, and how many were measured with
torch's vector widths (default, avx2, avx512) and 1 to 4 threads. The room between the two is for
other processors' kernels; a mistake differs by 100,000 and more.

    allowed   measured   what
       8-16          1   a few elementwise operations
         64          5   an interpolation, a product, an attention, a step of a solver
        256         30   a transformer; the picture measures; a resized picture
        512         61   a convolutional VAE; a denoising loop through a network

`pytest.approx` as it is stays for Python's own float64 numbers: its millionth is billions of ulps.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def num_ulps(
    found: Any, expected: Any, *, size: float | None = None, dtype: torch.dtype | None = None
) -> float:
    """Return the largest difference of two results, in ulps of the expected result's size.

    Args:
        found: a tensor, an array or numbers.
        expected: the same in the same shape.
        size: of the numbers whose rounding is meant, if `expected` alone does not show it (a
            difference of large numbers, a part of a result).
        dtype: that was computed in, if it is none of the two (default: the coarser of the two;
            Python's numbers count as float64).

    Returns:
        0 for equal results; infinite where only one is not a number, or they differ at size 0.
    """
    a, b = _as_tensor(found), _as_tensor(expected)
    assert a.shape == b.shape, f"the shapes {tuple(a.shape)} and {tuple(b.shape)} differ"
    eps = torch.finfo(dtype).eps if dtype else max(torch.finfo(x.dtype).eps for x in (a, b))
    a, b = a.double(), b.double()
    is_same = (a == b) | (a.isnan() & b.isnan())  # also infinite values of one sign
    difference = (a - b).abs().nan_to_num(nan=math.inf).masked_fill(is_same, 0)
    largest = difference.max().item() if difference.numel() else 0.0
    if largest in (0.0, math.inf):
        return largest
    unit = eps * (b[b.isfinite()].abs().max().item() if size is None else size)
    return largest / unit if unit else math.inf


def assert_close(
    found: Any,
    expected: Any,
    *,
    ulps: float,
    size: float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Check that two results differ by no more than `ulps`; see `num_ulps`."""
    difference = num_ulps(found, expected, size=size, dtype=dtype)
    assert difference <= ulps, f"they differ by {difference:.3g} ulps, allowed are {ulps:g}"


def _as_tensor(x: Any) -> Tensor:
    x = x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x))
    return x if x.is_floating_point() else x.double()
