"""8-bit linear layers of transformers and text encoders, through torchao.

Quantised are the linear layers of the parts that a model names, attention and MLP of every block:
nearly all weights and matrix products. All else works in float32 or writes the result (embeddings,
modulation, gates, head), is small, and stays as it is. Every row of a weight (an output channel)
has a float32 scale of its own; where activations are 8-bit too, so has every token.
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

PINNED = "torchao==0.18.0"
"""The version in constraints.txt."""
FP8_CAPABILITY = (8, 9)
"""First CUDA compute capability with 8-bit matrix products (Ada; Hopper is 9.0)."""
PRODUCT_MULTIPLES = {"int8_dynamic": 8, "fp8_dynamic": 16}
"""Mode -> what both widths of a product must divide by: torchao would take others to the CPU, or
refuse them."""
ROW_BYTES = {"int8_weight": 5, "int8_dynamic": 5, "fp8_weight": 4, "fp8_dynamic": 4}
"""Mode -> what a row has in addition to its weights: a float32 scale, and an int8 zero point."""


def check_package(key: str, mode: QuantizeName | None) -> None:
    """Check that what quantises is installed.

    Args:
        key: the setting that asks for it.
    """
    if mode is None:
        return
    try:
        _torchao()
    except ImportError as error:
        raise UserError(
            f"{key}={mode} needs the package torchao: pip install {PINNED}, or set {key}=null"
        ) from error


def check(
    mode: QuantizeName, parts: Iterable[nn.Module], *, device: torch.device, dtype: torch.dtype
) -> None:
    """Check that a device can multiply in 8 bits.

    Args:
        parts: as in `quantize`; they may be empty, on the meta device.
        dtype: of the weights before.
    """
    name = f"quantize={mode}"
    if mode == "fp8_dynamic":
        _check_fp8_products(name, device=device, dtype=dtype)
    multiple = PRODUCT_MULTIPLES.get(mode, 1)
    widths = {width for layer in linears(parts) for width in layer.weight.shape}
    wrong = sorted(width for width in widths if width % multiple)
    if wrong:
        raise UserError(
            f"{name} needs widths that divide by {multiple}, not "
            f"{' and '.join(map(str, wrong))} as of this model: use quantize=fp8_weight"
        )


def quantize(
    network: nn.Module,
    parts: Iterable[nn.Module],
    mode: QuantizeName,
    *,
    device: torch.device,
    rest: torch.device | None = None,
) -> None:
    """Replace linear weights of a network by 8-bit ones, in place, and move all to a device.

    One weight at a time is on the device in full width.

    Args:
        parts: of the network, whose linear layers are quantised.
        device: that quantises.
        rest: where all lies afterwards; None: there, too.
    """
    torchao = _torchao()
    for part in parts:  # what is done leaves the device before the next part comes
        torchao.quantize_(part, _rule(torchao, mode), device=device)
        for layer in linears([part]):
            assert type(layer.weight.data) is not torch.Tensor, "torchao left out a layer"
        part.to(rest or device)
    network.to(rest or device)


def quantize_empty(network: nn.Module, parts: Iterable[nn.Module], mode: QuantizeName) -> None:
    """Quantise a network on the meta device, to trace what a pass holds.

    torchao makes 8-bit floating point activations on a GPU alone; integer ones hold as much: both
    are made from float32 copies, and the product is 32 bits wide.
    """
    traced = "int8_dynamic" if mode == "fp8_dynamic" else mode
    quantize(network, parts, traced, device=torch.device("meta"))


def linears(parts: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """Iterate over the layers that are quantised."""
    return (layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear))


def saved_bytes(
    parts: Iterable[nn.Module], mode: QuantizeName | None, *, dtype: torch.dtype
) -> int:
    """Return what quantised weights take less than before.

    Args:
        parts: as in `quantize`; only their shapes count.
        mode: None: nothing is quantised.
        dtype: of the weights before.
    """
    if mode is None:
        return 0
    return sum(
        layer.weight.numel() * (dtype.itemsize - 1) - layer.out_features * ROW_BYTES[mode]
        for layer in linears(parts)
    )


def _check_fp8_products(name: str, *, device: torch.device, dtype: torch.dtype) -> None:
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


def _torchao() -> ModuleType:
    """Import the part of torchao that quantises."""
    with _silenced("torchao", "torch.utils._pytree"):
        return importlib.import_module("torchao.quantization")


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
