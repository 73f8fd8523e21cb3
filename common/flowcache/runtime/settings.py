"""Settings of a run besides those of the method, and their checks; all without PyTorch."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from flowcache.bounds import Bounds
from flowcache.errors import UserError

MAX_PROCESSES = 4096
MAX_CHUNK_STEPS = 1_000_000
"""Steps of all chunks, which are planned one by one: four hours of video in MAGI-1's 64 steps."""
MAX_PASS_TOKENS = 2**20
"""Tokens that attend to each other in one pass; 97 frames of 4K are 810,000 in SkyReels-V2."""

KernelName: TypeAlias = Literal[
    "auto", "flash_attn_3", "flash_attn_2", "cudnn", "flash", "efficient", "math", "torch"
]
"""What `attention_kernel` may be: auto probes; torch leaves the choice to PyTorch."""
QuantizeName: TypeAlias = Literal["int8_weight", "int8_dynamic", "fp8_weight", "fp8_dynamic"]
"""weight: 8-bit weights, widened for each product; dynamic: 8-bit activations and products, too."""

MEMORY_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
_LIMIT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.IGNORECASE)


@dataclass(frozen=True)
class ParallelRule:
    """How several processes divide a run."""

    branch: Annotated[int | None, Bounds(1, MAX_PROCESSES)] = None
    sequence: Annotated[int | None, Bounds(1, MAX_PROCESSES)] = None


def check_prompt(name: str, prompt: str) -> None:
    """Check that a prompt says something."""
    if not prompt.strip():
        raise UserError(f"{name} is empty: say what the video shows")


def check_work(*, num_chunks: int, num_steps: int) -> None:
    """Refuse a video so long that planning it, step by step, would fill time and memory.

    Args:
        num_chunks: of all windows of the video, given ones included.
        num_steps: ticks that each chunk adds at most, or its own steps: the larger number.
    """
    if num_chunks * num_steps > MAX_CHUNK_STEPS:
        raise UserError(
            f"{num_chunks} chunks of {num_steps} steps are {num_chunks * num_steps} steps, at "
            f"most {MAX_CHUNK_STEPS} are planned: make a shorter video (num_frames), or use larger "
            "chunks or fewer steps"
        )


def check_pass(num_tokens: int, *, sizes: str) -> None:
    """Refuse a pass over more tokens than any model and device can do.

    Args:
        num_tokens: that go through the blocks at once, at least.
        sizes: the settings that make it smaller.
    """
    if num_tokens > MAX_PASS_TOKENS:
        raise UserError(
            f"one pass would have {num_tokens} tokens, at most {MAX_PASS_TOKENS} are possible: "
            f"lower {sizes}"
        )


def parse_limit(text: str) -> int | None:
    """Return the bytes that a `memory_limit` names, None for `auto` and `none`.

    Example: `24GB` is 24,000,000,000 and `24GiB` is 25,769,803,776.
    """
    if text.lower() in ("auto", "none"):
        return None
    found = _LIMIT.fullmatch(text.strip())
    factor = None if found is None else MEMORY_UNITS.get(found[2].upper())
    if found is None or factor is None or not float(found[1]):
        raise UserError(
            f"memory_limit must be auto, none or an amount such as 24GB or 24GiB, not {text}"
        )
    return int(float(found[1]) * factor)
