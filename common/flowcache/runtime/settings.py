"""Names and checks of settings that every model's run has beside those of the method."""

from typing import Literal, TypeAlias

from flowcache.errors import UserError

MAX_CHUNK_STEPS = 1_000_000
"""Steps of all chunks, which are planned one by one: four hours of video in MAGI-1's 64 steps."""
MAX_PASS_TOKENS = 2**20
"""Tokens that attend to each other in one pass; 97 frames of 4K are 810,000 in SkyReels-V2."""

KernelName: TypeAlias = Literal[
    "auto", "flash_attn_3", "flash_attn_2", "cudnn", "flash", "efficient", "math", "torch"
]
"""What `attention_kernel` may be: auto probes; torch leaves the choice to PyTorch."""


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
