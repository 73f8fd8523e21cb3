"""torch.compile of the part of a model that is repeated, where it can be had.

A compiler that fails costs speed, never a run: everything goes on uncompiled, and says so once.

What is compiled are functions that take a block as an argument: all blocks, and chunks of any
length, share the code of the first. Attention stays outside, so that no length of a KV cache is
ever compiled for.
"""

import importlib.util
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowcache.errors import UserError, first_line
from flowcache.scores import (
    Received,
    attention_received,
    attention_received_by_sums,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Compilation:
    """Whether the functions of a model that are compiled together are still run compiled."""

    failure: str | None = None
    """Why they are not any more: the first line of what the compiler said."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"is_compiled": self.failure is None, "failure": self.failure}


def compiled(
    function: Callable[..., T],
    *,
    lengths: Sequence[int | None],
    together: Compilation | None = None,
    name: str = "the blocks",
) -> Callable[..., T]:
    """Return a function that is compiled at its first call, once for all lengths; no gradients.

    Args:
        function: takes a module and tensors; calling it twice does no harm.
        lengths: of each tensor the axis that differs from call to call, None: all stay the same.
        together: shared with other functions; where one can't be compiled, none is run compiled.
        name: of what is compiled, for a warning.
    """
    # this takes seconds to import, and nothing else needs it
    from torch._dynamo import maybe_mark_dynamic
    from torch._dynamo.exc import TorchDynamoException

    compiled_function = torch.compile(function, fullgraph=True)
    state = Compilation() if together is None else together

    def call(module: nn.Module, *tensors: Tensor) -> T:
        if state.failure is not None:
            return function(module, *tensors)
        given = [_in_one_form(tensor) for tensor in tensors]
        for tensor, axis in zip(given, lengths, strict=True):
            if axis is not None:
                maybe_mark_dynamic(tensor, axis)
        try:
            return compiled_function(module, *given)
        except torch.OutOfMemoryError:
            raise
        # what compilers raise; an error of the function itself comes again below
        except (
            TorchDynamoException,
            subprocess.SubprocessError,
            RuntimeError,
            ImportError,
            OSError,
        ) as error:
            state.failure = first_line(error)
            logger.warning(
                "%s can't be compiled and run as they are, which is slower: %s",
                name,
                state.failure,
            )
            return function(module, *tensors)

    return call


def compiled_scoring() -> Received:
    """Return how a KV cache's importance is summed, compiled; elsewhere it goes block by block."""
    call = compiled(_received, lengths=(0, 0), name="the scores of the KV cache")
    return partial(call, nn.Identity())


def _received(_module: nn.Module, q_QHD: Tensor, k_LGD: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return attention_received_by_sums(q_QHD, k_LGD)
    return attention_received(q_QHD, k_LGD)


def _in_one_form(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory looks like every other's of that many axes.

    Code is compiled apart for each kind of strides (those of axes of length 1 too, which only a
    flat tensor forgets), for a start inside a larger tensor, and for views, whose larger tensor's
    size it depends on (`data` is none).
    """
    whole = tensor.contiguous().view(-1).view(tensor.shape).data
    return whole.clone() if whole.storage_offset() else whole


def should_compile(wanted: bool | None, device: torch.device) -> bool:
    """Tell whether a run compiles its blocks.

    Args:
        wanted: `compile` of the settings; None: on CUDA, if what it takes is installed.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    missing = _missing(device)
    if missing is None:
        return True
    if wanted:
        raise UserError(f"compile=true needs {missing}: install it, or give compile=false")
    logger.warning("the blocks are not compiled: %s is missing; install it for more speed", missing)
    return False


def _missing(device: torch.device) -> str | None:
    """Return what must be installed before code can be compiled for a device, or None."""
    if not any(shutil.which(os.environ.get(*pair)) for pair in (("CXX", "g++"), ("CC", "gcc"))):
        return "a C++ compiler"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    return None
