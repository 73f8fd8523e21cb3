"""Floating-point operations of the matrix products; a multiply-add counts 2.

Norms, activations and rotations are left out, as in the published figures: at the real sizes they
are below 0.1 %.
"""


def linear(rows: int, *, d_in: int, d_out: int) -> int:
    """FLOPs of `rows` vectors times a `[d_in, d_out]` matrix."""
    return 2 * rows * d_in * d_out


def attention(queries: int, *, keys: int, width: int) -> int:
    """FLOPs of q k^T and of the weighted sum of v; `width` is heads times head width."""
    return 4 * queries * keys * width
