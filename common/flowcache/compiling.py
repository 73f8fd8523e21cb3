"""torch.compile of the part of a model that is repeated, where it can be had.

What is compiled are functions that take a block as an argument: all blocks, and chunks of any
length, share the code of the first. Attention stays outside, so that no length of a KV cache is
ever compiled for.
"""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from flowcache.errors import UserError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that is compiled at its first call, for any sequence length."""
    return torch.compile(function, dynamic=True)


def should_compile(wanted: bool | None, device: torch.device) -> bool:
    """Tell whether a run compiles its blocks.

    Args:
        wanted: `compile` of the settings; None: on CUDA, if what it takes is installed.

    Raises:
        UserError: it is wanted, but what it takes is missing.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    missing = _missing(device)
    if missing is None:
        return True
    if wanted:
        raise UserError(f"compile=true needs {missing}: install it, or give --no-compile")
    logger.warning("the blocks are not compiled: %s is missing; install it for more speed", missing)
    return False


def _missing(device: torch.device) -> str | None:
    """Return what must be installed before code can be compiled for a device, or None."""
    if not any(shutil.which(os.environ.get(*pair)) for pair in (("CXX", "g++"), ("CC", "gcc"))):
        return "a C++ compiler"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    return None
