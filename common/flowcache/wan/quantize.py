"""8-bit linear layers of the transformer, through torchao.

Quantised are attention and MLP of every block: nearly all weights and matrix products. All else
works in float32 or writes the result (embeddings, modulation, head), is small, and stays as it is.
Every row of a weight (an output channel) has a float32 scale of its own; where activations are
8-bit too, so has every token.
"""

import importlib
import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from flowcache.errors import UserError
from flowcache.runtime.config import QuantizeName
from flowcache.wan.dit import DiT, DiTConfig

PINNED = "torchao==0.18.0"
"""The version in constraints.txt."""
FP8_CAPABILITY = (8, 9)
"""First CUDA compute capability with 8-bit matrix products (Ada; Hopper is 9.0)."""
FP8_MULTIPLE = 16
"""Both widths of an 8-bit floating point product must divide by this."""
SCALE_BYTES = 4


def check(
    mode: QuantizeName | None, sizes: DiTConfig, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Check that a run can quantise; loads no weights."""
    if mode is None:
        return
    if mode == "fp8_dynamic":
        _check_fp8_products(sizes, device=device, dtype=dtype)
    _torchao(mode)


def quantize(
    dit: DiT, mode: QuantizeName, *, device: torch.device, rest: torch.device | None = None
) -> None:
    """Replace the blocks' linear weights by 8-bit ones, in place, and move all to a device.

    One weight at a time is on the device in full width.

    Args:
        device: that quantises.
        rest: where all lies afterwards; None: there, too.
    """
    own = {id(layer) for layer in linears(dit)}

    def is_own(module: nn.Module, _name: str) -> bool:
        return id(module) in own

    torchao = _torchao(mode)
    for block in dit.blocks:  # what is done leaves the device before the next block comes
        torchao.quantize_(block, _rule(torchao, mode), filter_fn=is_own, device=device)
        block.to(rest or device)
    for layer in linears(dit):
        assert type(layer.weight.data) is not torch.Tensor, "torchao left out a layer"
    dit.to(rest or device)


def linears(dit: DiT) -> Iterator[nn.Linear]:
    """Iterate over the layers that are quantised: those of all blocks."""
    return (layer for layer in dit.blocks.modules() if isinstance(layer, nn.Linear))


def weight_bytes(dit: DiT, mode: QuantizeName | None, *, dtype: torch.dtype) -> int:
    """Return what the weights take once they are loaded as `dtype` and quantised, in bytes.

    Args:
        dit: may be empty, on the meta device; only its shapes count.
    """
    total = sum(parameter.numel() for parameter in dit.parameters()) * dtype.itemsize
    if mode is None:
        return total
    return total - _saved_bytes(linears(dit), dtype)


def block_bytes(dit: DiT, mode: QuantizeName | None, *, dtype: torch.dtype) -> list[int]:
    """Return what the weights of each block take, see `weight_bytes`."""
    made: list[int] = []
    for block in dit.blocks:
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
        saved = 0 if mode is None else _saved_bytes(layers, dtype)
        numbers = sum(parameter.numel() for parameter in block.parameters())
        made.append(numbers * dtype.itemsize - saved)
    return made


def _saved_bytes(layers: Iterable[nn.Linear], dtype: torch.dtype) -> int:
    return sum(
        layer.weight.numel() * (dtype.itemsize - 1) - layer.out_features * SCALE_BYTES
        for layer in layers
    )


def _check_fp8_products(sizes: DiTConfig, *, device: torch.device, dtype: torch.dtype) -> None:
    name = "quantize=fp8_dynamic"
    if not (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    ):
        raise UserError(
            f"{name} needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper), which "
            f"{device} is not: use quantize=fp8_weight or int8_dynamic"
        )
    if dtype != torch.bfloat16:
        raise UserError(f"{name} needs dtype=bfloat16, not {str(dtype).removeprefix('torch.')}")
    if sizes.dim % FP8_MULTIPLE or sizes.ffn_dim % FP8_MULTIPLE:
        raise UserError(
            f"{name} needs widths that divide by {FP8_MULTIPLE}, not {sizes.dim} and "
            f"{sizes.ffn_dim} as of this model: use quantize=fp8_weight"
        )


def _torchao(mode: QuantizeName) -> ModuleType:
    """Import the part of torchao that quantises."""
    try:
        with _silenced("torchao", "torch.utils._pytree"):
            return importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise UserError(
            f"quantize={mode} needs the package torchao: pip install {PINNED}, or set quantize=null"
        ) from error


def _rule(quantization: ModuleType, mode: QuantizeName) -> Any:
    """Return torchao's description of a mode; its settings of torch.compile are not taken over."""
    if mode == "int8_weight":
        return quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    if mode == "int8_dynamic":
        return quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if mode == "fp8_weight":
        return quantization.Float8WeightOnlyConfig(set_inductor_config=False)
    return quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), set_inductor_config=False
    )


@contextmanager
def _silenced(*names: str) -> Generator[None, None, None]:
    """Hold back warnings: torchao warns of each of its own kernels that is for another machine."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
