"""The only place that chooses an attention kernel.

Shapes: B batch, Q queries, K keys, H query heads, G key/value heads (H a multiple of G), D width.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Kernel:
    """An attention function and the name that reports show for it."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
        """Attend every query to every key, scaled by 1/sqrt(D), without a mask.

        Returns: `[B, Q, H, D]` in the dtype of `q_BQHD`.
        """
        return self.run(q_BQHD, k_BKGD, v_BKGD)


def _sdpa(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
    out_BHQD = functional.scaled_dot_product_attention(
        q_BQHD.transpose(1, 2),
        k_BKGD.transpose(1, 2),
        v_BKGD.transpose(1, 2),
        enable_gqa=q_BQHD.shape[2] != k_BKGD.shape[2],
    )
    return out_BHQD.transpose(1, 2)


SDPA = Kernel("torch scaled_dot_product_attention", _sdpa)


def choose_kernel(device: torch.device, *, dtype: torch.dtype) -> Kernel:
    """Pick flash-attn 3 or 2 where it is installed and usable, else PyTorch's own SDPA.

    flash-attn needs CUDA and 16-bit inputs; its inputs are laid out as ours, so nothing is copied.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return SDPA
    if importlib.util.find_spec("flash_attn_interface") is not None:
        from flash_attn_interface import (  # pyright: ignore[reportMissingImports]
            flash_attn_func as flash3,
        )

        return Kernel("flash-attn 3", lambda q, k, v: _first(flash3(q, k, v)))
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import (  # pyright: ignore[reportMissingImports]
            flash_attn_func as flash2,
        )

        return Kernel("flash-attn 2", flash2)
    return SDPA


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output alone: some flash-attn 3 releases also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result
