"""The table of quantised KV caches: bits, ways to quantise, and compression.

Each row is compared with the same run with keys in the dtype of the model. The noise row is that
run from noise that differs by a thousandth: what a PSNR says of a model in which small differences
grow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flowcache.bench.methods import Comparison, Method, shown
from flowcache.runtime.text_files import escaped, table_row

NOISE = 1e-3
"""Standard deviation of what the noise row adds to the noise, whose own is 1."""
CENTRED, KMEANS = ("kv.centred=true",), ("kv.quantizer=kmeans",)
BIAS = ("kv.bias_correction=true",)
WAYS: Mapping[str, tuple[str, ...]] = {
    "rounding": ("kv.centred=false",),
    "centred": CENTRED,
    "centred, bias corrected": (*CENTRED, *BIAS),
    "KIVI": ("kv.quantizer=kivi",),
    "Hadamard": ("kv.quantizer=hadamard",),
    "k-means": KMEANS,
    "k-means, bias corrected": (*KMEANS, *BIAS),
    "k-means, 4 stages": (*KMEANS, "kv.stages=4"),
}
"""Ways to quantise to 4 and 2 bits."""
OF_COMPRESSED = ("centred", "k-means")


def quantized_methods(comparison: Comparison) -> tuple[Method, ...]:
    """Return the rows of a model: vanilla, then KV caches whole and compressed, without reuse."""
    vanilla, computed = comparison.computed[0], comparison.computed[-1]
    whole = replace(computed, name="16 bits", base=None)
    small = replace(
        whole,
        name="compressed, 16 bits",
        overrides=(*computed.overrides, *comparison.compression),
    )
    noisy = replace(whole, name=f"noise + {NOISE:g}", noise=NOISE, base=whole.name)
    return (
        *(vanilla, whole, noisy, *_rows(whole, "", ways=tuple(WAYS))),
        *(small, *_rows(small, "compressed, ", ways=OF_COMPRESSED)),
    )


def _rows(base: Method, prefix: str, *, ways: Sequence[str]) -> list[Method]:
    settings = {dtype: (f"kv.dtype={dtype}",) for dtype in ("fp8", "int8")}
    for dtype in ("int4", "int2"):
        settings |= {f"{dtype}, {way}": (f"kv.dtype={dtype}", *WAYS[way]) for way in ways}
    return [
        replace(base, name=prefix + name, overrides=(*base.overrides, *own), base=base.name)
        for name, own in settings.items()
    ]


def quantized_markdown(table: Sequence[Mapping[str, Any]], kv_bytes: Mapping[str, int]) -> str:
    """Return the averages as a Markdown table; PSNR and SSIM are those to the row of 16 bits.

    Args:
        kv_bytes: of the caches of each row, by its name.
    """
    head = ["method", "KV bytes", "fewer", "DiT s", "judge", "PSNR", "SSIM"]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for row in table:
        own, base = (kv_bytes[name] for name in (row["method"], row["base"] or row["method"]))
        is_equal = row["num_equal_base"] == row["num_clips"]
        cells = [
            escaped(row["method"]),
            f"{own:,}",
            f"{base / own:.2f}x" if own else "-",
            f"{row['dit_seconds']:.2f}",
            f"{100 * row['judge_accuracy']:.0f} %",
            "equal" if is_equal else shown(row["psnr_base"], ".2f"),
            shown(row["ssim_base"], ".3f"),
        ]
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"
