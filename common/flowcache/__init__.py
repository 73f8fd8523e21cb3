"""Chunk-wise caching and KV-cache compression for autoregressive video diffusion.

pipe = flowcache.load("demo", preset="flowcache_fast")
pipe("a red circle moving right on a black background", seed=7).save("circle.mp4")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowcache.api import (
        Comparison,
        Part,
        Pipeline,
        Plan,
        Tick,
        Tuned,
        Video,
        compare,
        load,
        tune,
    )

__all__ = [
    "Comparison",
    "Part",
    "Pipeline",
    "Plan",
    "Tick",
    "Tuned",
    "Video",
    "compare",
    "load",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: commands that need no PyTorch stay quick."""
    if name not in __all__:
        raise AttributeError(f"module 'flowcache' has no attribute {name!r}")
    return getattr(import_module("flowcache.api"), name)
