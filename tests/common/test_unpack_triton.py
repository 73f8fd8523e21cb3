"""The kernel that reads quantised keys, in Triton's interpreter, against the torch form."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flowcache.kv_quantized import KVLayout, KVSizes, QuantizedKVCache, Rotary, unpack_kernel
from flowcache.quantization import KVFormat

CPU = torch.device("cpu")
CHUNK, HEADS, WIDTH = 8, 2, 32
CASES = [
    ("fp8", "token", "none", False),
    ("int8", "kmeans", "halves", True),
    ("int4", "token", "halves", False),
    ("int2", "kmeans", "neighbours", True),
]
"""Bits, quantizer, which channels are rotated together, and whether the bias is corrected."""


def rotate_halves(x_BSHC: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate channel j with channel j + n, as MAGI-1; two channels stay."""
    pairs = rope.shape[1]
    first, second, rest = x_BSHC.split([pairs, pairs, x_BSHC.shape[-1] - 2 * pairs], dim=-1)
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def rotate_neighbours(x_BSHC: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    even, odd = x_BSHC.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rotary_of(kind: str) -> Rotary | None:
    pairs = {"neighbours": WIDTH // 2, "halves": WIDTH // 2 - 1}.get(kind)
    if pairs is None:
        return None
    angles = torch.arange(3 * CHUNK)[:, None] * torch.linspace(1, 0.01, pairs)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    rotate = rotate_neighbours if kind == "neighbours" else rotate_halves
    return Rotary(table, rotate, has_neighbours=kind == "neighbours")


def read(made: KVFormat, kind: str) -> torch.Tensor:
    """Return what a cache reads of chunks of which heads kept different tokens."""
    sizes = KVSizes(made, CHUNK, CHUNK, 3)
    layout = KVLayout(sizes, {i: i * CHUNK for i in range(3)}, rotary_of(kind))
    place: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
    cache = QuantizedKVCache(3 * CHUNK, layout=layout, num_heads=HEADS, head_width=WIDTH, **place)
    draw = torch.Generator().manual_seed(0)
    for chunk in range(3):
        cache.put(0, *torch.randn(2, CHUNK, HEADS, WIDTH, generator=draw))
        cache.settle(CHUNK, chunk=chunk)
        cache.pack()
    rows = [torch.randperm(3 * CHUNK, generator=draw)[:12] for _ in range(HEADS)]
    cache.keep(torch.stack(rows, dim=1))
    return torch.stack(cache.prefix(0)).clone()


def main() -> None:
    """Print the largest difference of each case, and how many reads the kernel made."""
    from flowcache import unpack_triton

    differences: dict[str, float] = {}
    for dtype, quantizer, kind, corrected in CASES:
        made = KVFormat(dtype, quantizer, 16, centroids=4, stages=2, bias_correction=corrected)
        fused = read(made, kind)
        can_decode, unpack_triton.can_decode = unpack_triton.can_decode, lambda _made: False
        plain = read(made, kind)
        unpack_triton.can_decode = can_decode
        name = f"{dtype} {quantizer} {kind} {corrected}"
        differences[name] = ((fused - plain).abs().max() / plain.abs().max()).item()
    print(json.dumps({"interpreted": unpack_triton.INTERPRETED, "differences": differences}))  # noqa: T201


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_reads_what_the_torch_form_reads():
    # the interpreter is chosen when Triton is imported
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["interpreted"]
    assert len(result["differences"]) == len(CASES)
    # of float32: sums are made in the same order, products may be fused
    assert max(result["differences"].values()) < 1e-6


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_moves_little_more_than_codes_and_numbers():
    from flowcache.unpack_triton import moved_bytes

    for dtype, most in (("int4", 1.16), ("int2", 1.17)):
        moved, least = moved_bytes(KVFormat(dtype, "kmeans"), 12, 128, itemsize=2)
        # angles are 4 bytes per channel of one head, of twelve
        assert least < moved < most * least


def test_without_cuda_and_interpreter_the_torch_form_reads():
    assert unpack_kernel(CPU) is None


if __name__ == "__main__":
    main()
